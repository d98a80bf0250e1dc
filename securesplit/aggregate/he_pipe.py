"""The wire to the process that works on ciphertexts: its messages, and that process's life, seen from outside.

A message, both ways: its length (8 bytes, little-endian), a byte, and parts, each behind its length (8 bytes). Of a
request the byte is the operation, of an answer the status. Nothing else comes back, no object and no text: an error is a
number.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from securesplit.errors import AggregationAborted, InputError, RemoteProtocolError

__all__ = [
    "ADD", "ADD_PLAIN", "BEGIN", "DECRYPT", "DROP", "ENCRYPT", "FINISH", "HELLO", "MALFORMED", "MEMORY", "MISSING", "OK",
    "SCHEME", "WRONG", "HeProcess", "receive", "send",
]  # fmt: skip

HELLO, ENCRYPT, BEGIN, ADD, ADD_PLAIN, FINISH, DECRYPT, DROP = range(8)
OK, MALFORMED, WRONG, MISSING, MEMORY = range(5)
SCHEME = struct.Struct("<BHI")  # Number of the scheme, clients, dim.

_SIZE = struct.Struct("<Q")
_MAX_PARTS = 5
_PROGRAM = "securesplit.aggregate.he_native"
# What the process needs from the environment; nothing else reaches it, as tokens and passwords stand there.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LANG", "TZ")
_FAILED = "the process that works on ciphertexts did not start, died, ran out of memory or took too long"
_HINT = "Start a new round; a new process is started with it."
_ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}


def send(link: socket.socket, code: int, parts: Sequence[bytes | memoryview] = ()) -> None:
    """Write one message; a part may be large and is not copied."""
    link.sendall(_SIZE.pack(1 + sum(_SIZE.size + len(part) for part in parts)) + bytes([code]))
    for part in parts:
        link.sendall(_SIZE.pack(len(part)))
        link.sendall(part)


def receive(link: socket.socket, most: int) -> tuple[int, tuple[bytes, ...]]:
    """Read one message.

    Args:
        link: the connection; its timeout applies to every read.
        most: largest message.

    Raises:
        EOFError: the other end is gone. ValueError: the message is larger or not of its form. OSError: as the socket.
    """
    size: int = _SIZE.unpack(_exactly(link, _SIZE.size))[0]
    if not 1 <= size <= most:
        raise ValueError("a message of an impossible length")
    code, left, parts = _exactly(link, 1)[0], size - 1, list[bytes]()
    while left:
        if left < _SIZE.size or len(parts) == _MAX_PARTS:
            raise ValueError("a message ends inside a part, or has too many")
        part: int = _SIZE.unpack(_exactly(link, _SIZE.size))[0]
        left -= _SIZE.size + part
        if left < 0:
            raise ValueError("a part is longer than its message")
        parts.append(_exactly(link, part))
    return code, tuple(parts)


def _exactly(link: socket.socket, size: int) -> bytes:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        got = link.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return bytes(buffer)


class HeProcess:
    """One process, from its start to its end. Not for several threads at once.

    Args:
        timeout: seconds that a request or its answer may stand still before the process is ended.
        memory_bytes: address space that it may use.

    Raises:
        InputError: SS-1606 when TenSEAL is missing or does not load, or this is not Linux.
        AggregationAborted: SS-6016 when the process does not come up.
    """

    def __init__(self, *, timeout: float, memory_bytes: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise InputError("SS-1606", "homomorphic sums need Linux", hint="Use the backend masks.")
        self._link, theirs = socket.socketpair()
        root = str(Path(__file__).parents[2])
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | _ONE_THREAD
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        command = (sys.executable, "-W", "ignore", "-m", _PROGRAM, str(theirs.fileno()), str(memory_bytes))
        with theirs:
            try:
                # A session of its own: an interrupt typed at the terminal reaches the program, which then ends this one.
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    env=environment, pass_fds=(theirs.fileno(),), start_new_session=True,
                )  # fmt: skip
            except OSError:
                self._link.close()
                raise AggregationAborted("SS-6016", _FAILED, hint=_HINT) from None
        self._link.settimeout(timeout)
        self.ask(HELLO, (), most=0)

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    @property
    def cpu_seconds(self) -> float:
        """Processor time that the process has used, in steps of the kernel's clock; 0 when it has ended."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ask(self, code: int, parts: Sequence[bytes | memoryview], *, most: int) -> bytes:
        """Send a request and wait for its answer.

        Args:
            code: the operation.
            parts: its arguments.
            most: largest answer, bytes.

        Raises:
            RemoteProtocolError: SS-6014 when the process finds a frame malformed.
            AggregationAborted: SS-6011 when a decrypted sum cannot be; SS-6016 when the process failed, which ends it.
            InputError: SS-1606 when it cannot load TenSEAL, which ends it.
        """
        try:
            send(self._link, code, parts)
            status, answer = receive(self._link, most + 1 + _SIZE.size)
        except (OSError, EOFError, ValueError):
            raise self.failed() from None
        if status == OK and len(answer) == 1:
            return answer[0]
        if status == MALFORMED:
            what = "a frame holds what is no ciphertext of this scheme"
            raise RemoteProtocolError("SS-6014", what, hint="Its sender is faulty or hostile.")
        if status == WRONG:
            hint = "It was altered, or a client broke the rules; start a new round."
            raise AggregationAborted("SS-6011", "a decrypted sum is impossible", hint=hint)
        if status == MISSING:
            self.end()
            raise InputError("SS-1606", "TenSEAL cannot be loaded", hint="Install it: pip install tenseal.")
        raise self.failed()

    def failed(self) -> AggregationAborted:
        """End the process, and what to raise for it."""
        self.end()
        return AggregationAborted("SS-6016", _FAILED, hint=_HINT)

    def kill(self) -> None:
        """Kill the process; a thread that waits in :meth:`ask` aborts."""
        self._process.kill()

    def end(self) -> None:
        """Kill the process and clear up after it."""
        self._link.close()
        self._process.kill()
        self._process.wait()
