"""A whole real run over TLS on loopback, looked through for what must not be said: counts, losses, texts, names.

Three clients train and sum; the server's side keeps every message as it comes out of TLS, both ways, and every logger of the
process, ours and foreign ones, is set to level 1. Then everything is searched: raw bytes for what is too long to stand there
by chance, and every number and every string of every decoded message, inner bodies included, for what is short.

What is allowed, by design and stated in docs/protocol.md: certificate names of clients (and of the server) are identities;
they stand in certificates, adverts and sets, and in the server's log. They are the only names. The server's own job, which
it sends in Welcome, names the kinds of layers that have adapters; no client says any. How many messages there are, and of
what size, is metadata that this test does not hide (architecture.md, O7).
"""

from __future__ import annotations

import logging
import re
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgpack
import pytest
from pydantic import BaseModel

from securesplit.aggregate import wire
from securesplit.client.client import Client
from securesplit.client.run import Run, RunRecord, run_training
from securesplit.data.corpus import read_corpus
from securesplit.protocol.codec import decode
from securesplit.protocol.messages import Blob, Message, Secagg, Welcome
from securesplit.transport.actions import Send
from tests.e2e.house import ANY, CLIENTS, FROZEN, Loopback, build_house, policy_of

HELD_OUT = 2
COUNTS = {"alice": 199, "bob": 211, "carol": 223}
"""Records that a client trains on, and so its weight: odd, and larger than any step's number, so that nothing else is equal."""

UP = {0: wire.Advertise, 1: wire.Shares, 2: wire.Masked, 3: wire.Consistent, 4: wire.Unmask, 15: wire.Abort}
DOWN = {0: wire.Roster, 1: wire.Routed, 2: wire.Survivors, 3: wire.Bundle, 4: wire.Result, 15: wire.Abort}
LAYERS = (
    "q_proj",
    "v_proj",
    "down_proj",
    "lora_",
    "layers.",
    "embed_tokens",
    "lm_head",
    "self_attn",
    "mlp.",
    "norm.",
    "model.",
)
FILES = (".jsonl", ".npz", ".safetensors", "run.json", "answered", "ledger", "adapter-", ".truth", ".toml", ".pem")


class Ear:
    """A server core that keeps every message: (upwards?, bytes)."""

    def __init__(self, core: object) -> None:
        self._core = core
        self.heard: list[tuple[bool, bytes]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._core, name)

    def _kept(self, actions: list[object]) -> list[object]:
        self.heard += [(False, action.data) for action in actions if isinstance(action, Send)]
        return actions

    def receive(self, connection: int, data: bytes) -> list[object]:
        self.heard.append((True, data))
        return self._kept(self._core.receive(connection, data))

    def complete(self, connection: int, result: object) -> list[object]:
        return self._kept(self._core.complete(connection, result))

    def disconnect(self, connection: int) -> list[object]:
        return self._kept(self._core.disconnect(connection))

    def tick(self, now: float) -> list[object]:
        return self._kept(self._core.tick(now))


class Everything(logging.Handler):
    """Every record of every logger, formatted, with its arguments."""

    def __init__(self) -> None:
        super().__init__(level=1)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name} {record.levelname} {record.getMessage()} {record.exc_text or ''}")


@dataclass
class Evening:
    """What was heard, and what must not have been."""

    up: list[bytes]
    down: list[bytes]
    lines: list[str]
    losses: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    records: dict[str, RunRecord] = field(default_factory=dict)


@pytest.fixture(scope="module", params=["frozen, blind", pytest.param("open", marks=pytest.mark.slow)])
def evening(request, tmp_path_factory) -> Evening:
    """One round of a whole run; in the second one nothing is noised and the server may open the sum."""
    frozen = request.param != "open"
    policy = policy_of(FROZEN) if frozen else policy_of()
    house = build_house(tmp_path_factory.mktemp("silence") / "house")
    ear, log, patch = (
        Ear(house.core(house.job(rounds=1, epochs=1, blind=frozen), policy)),
        Everything(),
        pytest.MonkeyPatch(),
    )
    losses: list[float] = []

    def listened(method: str) -> None:
        whole = getattr(Client, method)

        def told(self: Client, *arguments: object, **options: object) -> float:
            losses.append(whole(self, *arguments, **options))
            return losses[-1]

        patch.setattr(Client, method, told)

    for method in ("step", "loss", "evaluate"):
        listened(method)
    levels = {name: logging.getLogger(name).level for name in (None, "websockets", "asyncio", "securesplit")}
    for name in levels:
        logging.getLogger(name).setLevel(1)
    logging.getLogger().addHandler(log)
    found, errors = Evening([], [], log.lines, losses), dict[str, BaseException]()
    try:
        with Loopback(ear, house.keys) as loop:

            def one(name: str, seed: int) -> None:
                data = house.data(f"{name}-secrets.jsonl", COUNTS[name] + HELD_OUT, seed=seed)
                found.texts += [record.text for record in read_corpus(data)]
                run = Run(
                    policy=policy, keys=house.keys / name, server=loop.url, data=data, out=house.root / name,
                    held_out=HELD_OUT, limit=None, max_tokens=16, truth=house.root / f"{name}.truth", alone=False,
                    model=str(house.model), cache=house.root / "cache",
                )  # fmt: skip
                try:
                    found.records[name] = run_training(run, lambda *_: None)
                except BaseException as error:  # noqa: BLE001 (handed to the test's thread)
                    errors[name] = error

            threads = [threading.Thread(target=one, args=(name, 60 + i)) for i, name in enumerate(CLIENTS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
    finally:
        logging.getLogger().removeHandler(log)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        patch.undo()
    assert errors == {}
    found.paths = [str(house.root), *(f"{name}-secrets" for name in CLIENTS)]
    found.up = [data for upwards, data in ear.heard if upwards]
    found.down = [data for upwards, data in ear.heard if not upwards]
    return found


def leaves(thing: object) -> Iterator[object]:
    """Every number, string and piece of bytes of a message; words of tensors and vectors are looked at apart."""
    match thing:
        case Secagg() | BaseModel():
            for name in type(thing).model_fields:
                yield from leaves(getattr(thing, name))
        case list() | tuple():
            for item in thing:
                yield from leaves(item)
        case _:
            yield thing


def opened(data: bytes, *, upwards: bool) -> Iterator[object]:
    """The leaves of a message, with those of a stage's body and of the adverts and proofs in it."""
    message = decode(data, ANY)
    for leaf in leaves(message):
        yield leaf
    if isinstance(message, Secagg):
        body = wire.decode((UP if upwards else DOWN)[message.stage], message.body)
        inner = {wire.Roster: ("adverts", wire.Advertise), wire.Survivors: ("masked", wire.Masked)}.get(type(body))
        for leaf in leaves(body):
            yield leaf
        for item in getattr(body, inner[0]) if inner else ():
            yield from leaves(wire.decode(inner[1], item if isinstance(item, bytes) else item[1]))


def test_the_run_was_whole(evening):
    """Without this, silence would be easily had."""
    kinds = {type(decode(data, ANY)).__name__ for data in evening.up}
    assert {"Hello", "Confirm", "Forward", "RoundReady", "Secagg"} <= kinds
    stages = {m.stage for m in (decode(data, ANY) for data in evening.up) if isinstance(m, Secagg)}
    assert stages == {0, 1, 2, 3, 4}
    assert set(evening.records) == set(CLIENTS)
    assert all(record.survivors == (CLIENTS,) for record in evening.records.values())
    assert len(evening.losses) > 150
    assert {line.split()[0] for line in evening.lines} >= {"websockets.server", "securesplit.transport.record"}
    assert any("BINARY" in line for line in evening.lines), "websockets logs every frame"


def test_no_weight_is_a_number_or_a_string_of_any_message(evening):
    counts = {*COUNTS.values(), *(n + HELD_OUT for n in COUNTS.values()), sum(COUNTS.values())}
    said = {str(n) for n in counts}
    numbers = set()
    for upwards, frames in ((True, evening.up), (False, evening.down)):
        for data in frames:
            for leaf in opened(data, upwards=upwards):
                if isinstance(leaf, Blob):
                    numbers.update(leaf.shape)
                elif isinstance(leaf, (int, float)):
                    numbers.add(leaf)
                elif isinstance(leaf, str):
                    numbers.update(re.findall(r"(?<![0-9a-f])[0-9]{3}(?![0-9a-f])", leaf))
    assert not numbers & (counts | said | {float(n) for n in counts})
    assert {0, 1} < numbers


def test_no_weight_is_a_word_of_what_a_client_masks(evening):
    vectors = [m.vector for m in (decode(data, ANY) for data in evening.up) if isinstance(m, Secagg) and m.stage == 2]
    assert len(vectors) == 3
    for vector in vectors:
        words = struct.unpack(f"<{vector.shape[0]}I", vector.data)
        assert words[-1] not in COUNTS.values()
        assert not set(COUNTS.values()) & set(words)


def encodings(value: float) -> set[bytes]:
    """A loss in doubles, floats and msgpack, and as text to six digits."""
    exact = {struct.pack(order + "d", value) for order in "<>"} | {msgpack.packb(value)}
    return exact | {f"{value:.6g}"[:6].encode(), f"{value:.17g}"[:8].encode(), f"{value:.4e}".encode()}


def test_no_loss_stands_in_any_frame(evening):
    everything = b"\x00".join(evening.up + evening.down)
    # Four bytes may stand in megabytes of noise by chance: floats are looked for where no tensor, key or mask is.
    plain = b"".join(bare(data) for data in (*evening.up, *evening.down))
    for loss in evening.losses:
        assert not [form for form in encodings(loss) if form in everything]
        assert not [order for order in "<>" if struct.pack(order + "f", loss) in plain]
    assert len(set(evening.losses)) > 100


def bare(data: bytes) -> bytes:
    """A message's numbers and strings, packed again, without the bytes of tensors, keys, boxes and signatures."""
    found = [leaf for leaf in leaves(decode(data, ANY)) if not isinstance(leaf, (bytes, Blob))]
    return msgpack.packb(found)


def test_no_text_file_or_layer_stands_in_any_frame(evening):
    up = b"\x00".join(evening.up)
    down = b"\x00".join(data for data in evening.down if not isinstance(decode(data, ANY), Welcome))
    jobs = [m for m in (decode(data, ANY) for data in evening.down) if isinstance(m, Welcome)]
    assert len(jobs) >= 3
    for frames in (up, down):
        assert not [text for text in evening.texts if text.encode() in frames]
        assert not re.search(rb"\bw[0-9]{1,2} w[0-9]{1,2}\b", frames)
        assert not [name for name in (*LAYERS, *FILES, *evening.paths) if name.encode() in frames]
    assert not [
        text for text in (*evening.texts, *(f"{name}-secrets" for name in CLIENTS)) for job in jobs if text in job.job
    ]


def test_every_string_that_a_client_says_is_a_digest_a_code_a_type_or_a_certificate_name(evening):
    for data in evening.up:
        for leaf in opened(data, upwards=True):
            if isinstance(leaf, str):
                assert leaf in {*CLIENTS, "f32", "bf16", "u32", "u64"} or re.fullmatch(
                    r"[0-9a-f]{64}|SS-[0-9]{4}", leaf
                ), leaf


def test_no_count_loss_text_file_or_layer_stands_in_any_log(evening):
    """websockets logs frames at DEBUG, cut short, as hexadecimal digits and with their sizes: those digits are looked
    through for losses; sizes and digits say nothing of counts.
    """
    lines = [re.sub(r"\[[0-9]+ bytes[^\]]*\]", "", line) for line in evening.lines]
    words = [re.sub(r"\b[0-9a-f]{2}( [0-9a-f]{2})+\b", "", line) for line in lines]
    whole, spoken = "\n".join(lines), "\n".join(words)
    counts = {*COUNTS.values(), *(n + HELD_OUT for n in COUNTS.values()), sum(COUNTS.values())}
    assert not re.search(rf"\b({'|'.join(str(n) for n in counts)})\b", spoken)
    assert not re.search(r"\bw[0-9]{1,2}\b", spoken)
    assert not [name for name in (*LAYERS, *FILES, *evening.paths) if name in spoken]
    for loss in evening.losses:
        assert f"{loss:.4f}" not in whole
        assert f"{loss:.6g}"[:6] not in spoken
        assert not [order for order in "<>" if struct.pack(order + "d", loss).hex(" ") in whole]
    assert not [text for text in evening.texts if text in whole]


# The searches find what they look for.


def test_the_searches_would_find_it(evening):
    loss = evening.losses[0]
    leaky = Evening(
        [*evening.up, struct.pack("<d", loss) + b"x"],
        evening.down,
        [*evening.lines, "securesplit DEBUG loss 211"],
        [loss],
    )
    with pytest.raises(AssertionError):
        assert not [form for form in encodings(loss) if form in b"".join(leaky.up)]
    with pytest.raises(AssertionError):
        test_no_count_loss_text_file_or_layer_stands_in_any_log(leaky)
    with pytest.raises(AssertionError):
        test_no_text_file_or_layer_stands_in_any_frame(
            Evening([*evening.up, b"model.layers.0.self_attn.q_proj"], evening.down, [], [], evening.texts)
        )
    names = wire.encode(wire.Abort(session=bytes(16), round=211, cfg=bytes(32), code="SS-6013"))
    told = Secagg(round=211, stage=15, body=names, vector=Blob(dtype="u32", shape=(0,), data=b""))
    assert 211 in set(leaves(told))


def test_a_message_has_no_room_for_more():
    """No field of what a client sends takes free text, so nothing can be put there by mistake."""
    for kind in (*UP.values(), Message):
        assert kind.model_config["extra"] == "forbid"
