"""Which rounds a client has answered stage 4 for, on disk, so that no answers of its together open an update.

Two rules. A round is answered once: a second answer with another set of survivors would give the server both kinds of
shares of one client. And one update enters sums over one set of survivors only: the same sum once more tells nothing new,
but sums over n sets that differ, be it by two clients each, can be solved for every single update. An update is taken for
the same when it starts from the same values in the same round, as it does when a job is run again. Updates with noise of
their own are exempt, but where a round is tried again and where the noise is only a part of the sum's: there an update is
the same by its bytes. The record is durable before the answer leaves. Pass an :class:`AnswerLog` as ``persist``.

What this does not protect: against a user who deletes or restores the file, or runs one identity on two machines; against
updates that start from other values, or were made by another learning rate, and are nearly the same all the same.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path

from securesplit.errors import AggregationAborted, InputError

__all__ = ["Answer", "AnswerLog"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What is about to be answered.

    Attributes:
        session_id, round: which round.
        t3: transcript hash over everything up to the survivors.
        start: names the update: digest of what it starts from; empty when it carries noise.
        survivors: U3.
    """

    session_id: bytes
    round: int
    t3: bytes
    start: bytes
    survivors: tuple[str, ...]

    def line(self) -> bytes:
        """One line of the file."""
        fields = {
            "session": self.session_id.hex(), "round": self.round, "t3": self.t3.hex(), "start": self.start.hex(),
            "survivors": self.survivors,
        }  # fmt: skip
        return json.dumps(fields, separators=(",", ":")).encode("ascii") + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Answer | None:
        """The answer of a line; None for one that a crash cut off, before which no answer had left."""
        try:
            fields = json.loads(line)
            made = cls(
                bytes.fromhex(fields["session"]), fields["round"], bytes.fromhex(fields["t3"]),
                bytes.fromhex(fields["start"]), tuple(fields["survivors"]),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError):
            return None
        return made if made.line() == line + b"\n" else None


class AnswerLog:
    """An append-only file of answers.

    Args:
        path: the file; made, private to the user, when absent, and locked while open. A torn last line (a crash while
            writing) is closed: its fsync had not returned, so no answer had left.

    Raises:
        InputError: SS-1605 when the file cannot be opened or another process holds it.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._file = -1
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            what = f"cannot open {self._path} for this process alone: {type(error).__name__}"
            raise InputError(
                "SS-1605", what, hint="Run one client with one key folder at a time; the folder must be writable."
            ) from None
        self._answers = self._load()
        # A new file's name must be as durable as its records.
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(folder)
        os.close(folder)

    def _load(self) -> list[Answer]:
        data = self._path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.write(self._file, b"\n")
            os.fsync(self._file)
        return [answer for line in data.split(b"\n") if (answer := Answer.read(line)) is not None]

    def __call__(self, answer: Answer) -> None:
        """Make an answer durable.

        Raises:
            AggregationAborted: SS-6015 when this session and round is on file already, or the write fails; SS-6030 when the
                same update entered a sum over other clients than these.
        """
        for known in self._answers:
            if (known.session_id, known.round) == (answer.session_id, answer.round):
                raise AggregationAborted(
                    "SS-6015", "this round was answered before", hint="Never answer a round twice; start a new one."
                )
            same = bool(answer.start) and known.start == answer.start
            if same and set(known.survivors) != set(answer.survivors):
                raise AggregationAborted(
                    "SS-6030",
                    "this update is in an earlier sum over other clients, and such sums together can show single updates",
                    hint="Train with exactly the clients of that sum, from another adapters.seed, or under a policy that noises updates.",
                )
        self._answers.append(answer)
        line = answer.line()
        try:
            written = os.write(self._file, line)
            os.fsync(self._file)
        except OSError:
            written = 0
        if written != len(line):
            raise AggregationAborted(
                "SS-6015",
                "the answer could not be recorded, so it is not given",
                hint="Free disk space; start a new round.",
            )

    def close(self) -> None:
        """Close the file; nothing can be recorded, and so nothing answered, afterwards."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1
