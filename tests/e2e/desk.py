"""An endpoint for tests: a real server behind TLS on loopback, one client, and HTTP before it; and bytes by hand."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from securesplit.client.chat.toll import Toll
from securesplit.client.client import Client
from securesplit.client.dial import dial
from securesplit.client.endpoint.asked import Defaults
from securesplit.client.endpoint.run import Ready, run_endpoint
from securesplit.client.sampling import Sampling
from securesplit.policy.schema import Policy
from securesplit.privacy.ledger import Ledger
from securesplit.transport.loopback import Bounds
from tests.e2e.house import House, Loopback

# The tiny tokenizer knows words w3 to w63; this template marks sides by two of them, and asks for an answer by a third.
TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w60', 'user': 'w61', 'assistant': 'w62'}[m.role] }} {{ m.content }} "
    "{% endfor %}{% if add_generation_prompt %}w62{% endif %}"
)


@dataclass
class Served:
    """A running endpoint.

    Attributes:
        opened: sessions with the server so far, newest last.
    """

    ready: Ready
    opened: list[Client]
    toll: Toll

    @property
    def port(self) -> int:
        return int(self.ready.url.rsplit(":", 1)[1].split("/")[0])

    def headers(self, **more: str) -> dict[str, str]:
        return {"Host": f"127.0.0.1:{self.port}", "Authorization": f"Bearer {self.ready.token}", **more}

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """One request by hand; status, fields and body of the answer."""
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {**self.headers(), "Content-Length": str(len(data)), **headers}
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items()) + "\r\n"
        return self.raw(head.encode() + data)

    def raw(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        with self.connect() as sock:
            sock.sendall(data)
            return answer_of(read_all(sock))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


def read_all(sock: socket.socket) -> bytes:
    out = b""
    while data := sock.recv(1 << 16):
        out += data
    return out


def answer_of(data: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    fields = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
    if fields.get("transfer-encoding") == "chunked":
        body = unchunked(body)
    return int(first.split()[1]), fields, body


def unchunked(body: bytes) -> bytes:
    out = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        out, body = out + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return out


@contextmanager
def endpoint(
    house: House,
    url: str,
    policy: Policy,
    *,
    ledger: Ledger | None = None,
    toll: Toll | None = None,
    template: str | None = TEMPLATE,
    bounds: Bounds | None = None,
) -> Iterator[Served]:
    opened: list[Client] = []
    counting = toll or Toll()

    @contextmanager
    def session() -> Iterator[Client]:
        with dial(url, keys=house.keys / "alice", policy=policy, patience=30) as link:
            client = house.client(link, policy, ledger)
            client.tokenizer.chat_template = template
            opened.append(client)
            yield client

    told: list[Ready] = []
    listening, stop = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def ready(value: Ready) -> None:
        told.append(value)
        listening.set()

    def serve() -> None:
        try:
            run_endpoint(
                session, "127.0.0.1", 0, defaults=Defaults(6, Sampling()), toll=counting, ready=ready, stop=stop.is_set,
                bounds=bounds,
            )  # fmt: skip
        except BaseException as error:  # noqa: BLE001 (handed to the test's thread)
            failed.append(error)
            listening.set()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert listening.wait(30)
    if failed:
        raise failed[0]
    try:
        yield Served(told[0], opened, counting)
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()
    if failed:
        raise failed[0]


@contextmanager
def served(house: House, policy: Policy, **options: object) -> Iterator[Served]:
    """An endpoint and a server of its own."""
    with Loopback(house.core(house.job(blind=policy.aggregation.blind), policy), house.keys) as loop, endpoint(
        house, loop.url, policy, **options
    ) as one:  # fmt: skip
        yield one
