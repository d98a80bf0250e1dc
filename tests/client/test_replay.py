"""What the server forgets is sent again: the very same bytes, no charge, no noise, and the same tokens."""

from __future__ import annotations

import pytest
import torch

from securesplit.client.replay import Patience
from securesplit.errors import ConnectionFailed, RemoteProtocolError
from securesplit.protocol.codec import decode
from securesplit.protocol.messages import Declined, DropCache, Forward, Hidden
from securesplit.transport.limits import Caches, Limits
from securesplit.transport.memory import MemoryServer
from tests.e2e.house import ANY, FROZEN, build_house, build_model, policy_of, sentences

PROMPTS = sentences(4, seed=31)
POSITION = 2 * 2 * 16 * 4
"""Bytes of a position of the house's B: layers, keys and values, width of two heads, float32."""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """One for all tests here: they leave nothing behind in it."""
    return build_house(tmp_path_factory.mktemp("site") / "house")


class Site:
    """A client whose connection can be lost and come back, and all that crossed."""

    def __init__(self, house, policy, *, ledger=None, limits=None) -> None:
        self._house, self.core = house, house.core(house.job(), policy, limits=limits)
        self.server = MemoryServer(self.core)
        self.spies = []

        def dial(_within: float = 0.0):
            link, spy = house.link(self.server, policy)
            self.spies.append(spy)
            return link

        link = dial()
        link.redial = dial
        self.client = house.client(link, policy, ledger)
        self.client.tokenizer.eos_token = None
        self.client.patience = Patience(room_seconds=0.0, reconnect_seconds=1.0, sleep=lambda _seconds: None)

    def forget(self) -> None:
        """As if others had needed the room."""
        store = self.core._engine.caches
        store.dropped.update(store.kept)
        store.kept.clear()

    def lose(self) -> None:
        """The connection breaks."""
        for number, pipe in list(self.server._pipes.items()):
            pipe.closed = True
            self.server.drop(number)

    def restart(self) -> None:
        """The server's program ends, and another one takes its place."""
        self.lose()
        self.core = self._house.core(self.client.job, self.client.policy)
        self.server = MemoryServer(self.core)

    @property
    def forwards(self) -> list[Forward]:
        return [m for spy in self.spies for m in spy.messages(Forward)]

    def answers(self, kind=Hidden):
        return [m for spy in self.spies for m in (decode(d, ANY) for d in spy.received) if isinstance(m, kind)]


def whole(prompts, count):
    """The unsplit model's own greedy tokens; nothing of the split is used."""
    model = build_model()
    out = []
    for ids in prompts:
        rows = torch.tensor([ids])
        with torch.no_grad():
            made = model.generate(
                rows, attention_mask=torch.ones_like(rows), max_new_tokens=count, do_sample=False, eos_token_id=None
            )
        out.append(made[0, len(ids) :].tolist())
    return out  # fmt: skip


@pytest.mark.parametrize("how", ["forget", "lose", "restart"])
def test_tokens_are_the_same_after_the_server_forgot_or_the_connection_broke(house, how):
    site = Site(house, policy_of())
    (want,) = whole([site.client.tokenizer.encode(PROMPTS[0])], 9)
    got = []
    for piece in site.client.stream(PROMPTS[0], max_new_tokens=9):
        got.append(piece.token)
        if len(got) in (1, 4, 8):
            getattr(site, how)()
    assert got[:-1] == want
    assert site.core._engine.caches.kept == {}
    assert site.core._engine.caches.dropped == set()


@pytest.mark.parametrize("how", ["forget", "lose"])
def test_a_batch_of_several_lengths_goes_on_too(house, how):
    site = Site(house, policy_of())
    want = whole([site.client.tokenizer.encode(p) for p in PROMPTS], 6)
    real, count = site.client.link.decode, 0

    def decoding(*args, **options):
        nonlocal count
        count += 1
        if count in (2, 5):
            getattr(site, how)()
        return real(*args, **options)

    site.client.link.decode = decoding
    made = site.client.generate_batch(PROMPTS, max_new_tokens=6)
    assert [list(m.tokens) for m in made] == want
    assert count > 6


@pytest.mark.parametrize("how", ["forget", "lose"])
def test_the_same_bytes_cross_again_and_nothing_is_charged(house, open_ledger, how):
    ledger = open_ledger()
    site = Site(house, policy_of(FROZEN), ledger=ledger)
    for number, piece in enumerate(site.client.stream("w4 w5 w6", max_new_tokens=7)):
        if number == 4:
            getattr(site, how)()
        assert piece.token is not None or piece.finish
    spent = {entry.channel: entry.releases for entry in ledger.summary()}
    assert spent == {"cut": 1, "decode": 6}
    sent = site.forwards
    first, rest = sent[:5], sent[-3:]
    assert [m.lengths for m in rest] == [(4,), (5,), (1,)], "the prompt, four tokens with the new one, and the last"
    prompt, tokens = rest[:2]
    assert prompt.hidden == first[0].hidden
    assert prompt.gain == first[0].gain
    assert tokens.hidden.data[: 4 * len(first[1].hidden.data)] == b"".join(m.hidden.data for m in first[1:5])
    assert tokens.gain == first[1].gain
    answers = site.answers()
    again = next(m for m in answers if m.hidden.shape[0] == 5)
    assert again.hidden.data[: 4 * len(answers[1].hidden.data)] == b"".join(m.hidden.data for m in answers[1:5]), (
        "bit for bit"
    )


def test_the_prompt_is_resent_from_memory_in_stream_generate_and_batch(house, open_ledger):
    """One release of each prompt, whichever way it is asked for, and as text or as tokens."""
    ledger = open_ledger()
    site = Site(house, policy_of(FROZEN), ledger=ledger)
    ids = tuple(site.client.tokenizer.encode("w4 w5 w6"))
    site.client.generate("w4 w5 w6", max_new_tokens=1)
    list(site.client.stream("w4 w5 w6", max_new_tokens=1))
    site.client.generate_batch(["w4 w5 w6", ids, "w4 w5 w6"], max_new_tokens=1)
    assert {e.channel: e.releases for e in ledger.summary()} == {"cut": 1}
    crossed = {m.hidden.data[: len(site.forwards[0].hidden.data)] for m in site.forwards}
    assert len(crossed) == 1
    assert site.forwards[-1].lengths == (4, 4, 4)
    site.client.generate_batch(["w4 w5 w6", "w7"], max_new_tokens=3)
    assert {e.channel: e.releases for e in ledger.summary()} == {"cut": 2, "decode": 4}


def test_no_room_is_said_politely_and_the_session_goes_on(house):
    policy = policy_of()
    site = Site(house, policy, limits=Limits(caches=Caches(bytes=44 * POSITION, idle_seconds=100.0)))
    others = [house.link(site.server, policy, name)[0] for name in ("bob", "carol")]
    engine, one = site.core._engine, torch.zeros(18, 32)
    for number, _ in enumerate(others, start=2):
        engine.decode(number, 1, (18,), one)
    with pytest.raises(RemoteProtocolError) as caught:
        site.client.generate("w4 w5 w6 w7 w8", max_new_tokens=3)
    assert (caught.value.code, caught.value.exit_code) == ("SS-4040", 5)
    assert "later" in caught.value.hint
    assert [m.code for m in site.answers(Declined)] == ["SS-4040"]
    assert len(site.core.names) == 3, "nobody was put out"
    engine.drop_cache(3, 1)
    made = site.client.generate("w4 w5 w6 w7 w8", max_new_tokens=3)
    assert [list(made.tokens)] == whole([site.client.tokenizer.encode("w4 w5 w6 w7 w8")], 3)
    with pytest.raises(RemoteProtocolError, match="SS-4041"):
        site.client.generate_batch([" ".join(PROMPTS)[:30]] * 8, max_new_tokens=2)
    assert len(site.client.generate("w4", max_new_tokens=2).tokens) == 2


def test_waiting_for_room_sends_the_same_step_again(house):
    site = Site(house, policy_of(), limits=Limits(caches=Caches(bytes=44 * POSITION, idle_seconds=100.0)))
    engine, one, waits = site.core._engine, torch.zeros(18, 32), []
    house.link(site.server, policy_of(), "bob")
    house.link(site.server, policy_of(), "carol")
    engine.decode(2, 1, (18,), one)
    engine.decode(3, 1, (18,), one)

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            engine.drop_cache(2, 1)

    site.client.patience = Patience(room_seconds=60.0, clock=lambda: sum(waits), sleep=sleep)
    made = site.client.generate("w4 w5 w6 w7 w8", max_new_tokens=3)
    assert len(made.tokens) == 3
    assert waits == [0.1, 0.2, 0.4]
    assert len({m.hidden.data for m in site.forwards}) == 3
    assert site.spies[0].messages(DropCache) == [DropCache(cache=1)]


def test_a_server_that_does_not_come_back_ends_the_text(house):
    site = Site(house, policy_of())
    site.client.link.redial = None
    pieces = site.client.stream("w4 w5", max_new_tokens=5)
    next(pieces)
    site.lose()
    with pytest.raises(ConnectionFailed, match="SS-3020"):
        list(pieces)


def test_a_server_that_forgets_again_and_again_ends_the_text(house):
    site = Site(house, policy_of())
    real = site.client.link.decode

    def decoding(*args, **options):
        site.forget()
        return real(*args, **options)

    site.client.link.decode = decoding
    with pytest.raises(RemoteProtocolError, match="SS-4017"):
        site.client.generate("w4 w5", max_new_tokens=5)
