"""Sixteen people generate at once on one server: every text is the unsplit model's, and memory stays within its budget."""

from __future__ import annotations

import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from securesplit.client.dial import dial
from securesplit.client.replay import Patience
from securesplit.errors import RemoteProtocolError
from securesplit.model.store import load_tokenizer
from securesplit.protocol.job import Job
from securesplit.transport.limits import Caches, Limits
from tests.e2e.house import House, Loopback, build_house, build_model, job_text, policy_of, sentences

COUNT = 16
NAMES = tuple(f"guest-{i}" for i in range(COUNT))
TOKENS = 16
POSITION = 2 * 2 * 16 * 4
"""Bytes of a position of the house's B."""


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    return build_house(tmp_path_factory.mktemp("crowd") / "house", *NAMES)


def tensors_of(engine) -> int:
    """Bytes of all keys and values that the engine holds, by the tensors."""
    return sum(
        t.untyped_storage().nbytes()
        for cached in engine.caches.kept.values()
        for lane in cached.lanes
        for layer in lane.past.past.layers
        for t in (layer.keys, layer.values)
    )


class Meter:
    """Looks at the engine after each decoding step, in the thread that computes."""

    def __init__(self, engine) -> None:
        self.most, self.declined, self.seen = 0, [], set()
        real = engine.decode

        def decode(*args):
            try:
                return real(*args)
            except RemoteProtocolError as error:
                self.declined.append(error.code)
                raise
            finally:
                assert tensors_of(engine) == engine.caches.nbytes
                self.most = max(self.most, tensors_of(engine))
                self.seen.add(len(engine.caches.kept))

        engine.decode = decode


def greedy(model, ids, count) -> list[int]:
    rows = torch.tensor([ids])
    with torch.no_grad():
        made = model.generate(
            rows, attention_mask=torch.ones_like(rows), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
    return made[0, len(ids) :].tolist()


def chat(house, url, policy, name, prompt, start) -> tuple[list[int], str]:
    """One session: text as it comes."""
    with dial(url, keys=house.keys / name, policy=policy) as link:
        client = house.client(link, policy)
        client.tokenizer.eos_token = None
        start.wait(60)
        pieces = list(client.stream(prompt, max_new_tokens=TOKENS))
        return [p.token for p in pieces if p.token is not None], "".join(p.text for p in pieces)


@pytest.mark.parametrize(("fitting", "declines"), [(5, True), pytest.param(16, False, marks=pytest.mark.slow)])
def test_sixteen_sessions_at_once_each_get_what_they_would_get_alone(crowd, fitting, declines):
    prompts = sentences(COUNT, seed=77, longest=10)
    longest = 10 + TOKENS
    limits = Limits(
        guests=frozenset(NAMES),
        caches=Caches(bytes=fitting * longest * POSITION, idle_seconds=1.0, patience_seconds=1.0),
    )
    policy = policy_of()
    core = crowd.core(crowd.job(), policy, limits=limits)
    meter = Meter(core._engine)
    with Loopback(core, crowd.keys, limits=limits, max_connections=64) as server, ThreadPoolExecutor(COUNT) as pool:
        start = threading.Barrier(COUNT)
        jobs = [pool.submit(chat, crowd, server.url, policy, n, p, start) for n, p in zip(NAMES, prompts, strict=True)]
        found = [job.result(100) for job in jobs]
    model, tokenizer = build_model(), load_tokenizer(crowd.model)
    for prompt, (tokens, text) in zip(prompts, found, strict=True):
        assert tokens == greedy(model, tokenizer.encode(prompt), TOKENS)
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert 0 < meter.most <= fitting * longest * POSITION
    assert ("SS-4040" in meter.declined) == declines
    assert max(meter.seen) > 2, "several at the same time"
    assert core._engine.caches.kept == {}


def test_over_the_budget_is_a_polite_refusal_on_a_connection_that_stays(crowd):
    policy = policy_of()
    limits = Limits(guests=frozenset(NAMES), caches=Caches(bytes=32 * POSITION, idle_seconds=60.0))
    core = crowd.core(crowd.job(), policy, limits=limits)
    with Loopback(core, crowd.keys, limits=limits, max_connections=64) as server:
        links = [dial(server.url, keys=crowd.keys / name, policy=policy) for name in NAMES[:3]]
        clients = [crowd.client(link, policy) for link in links]
        for client in clients:
            client.tokenizer.eos_token = None
            client.patience = Patience(room_seconds=0.0)
        running = [
            client.stream("w4 w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15", max_new_tokens=3) for client in clients[:2]
        ]
        for pieces in running:
            next(pieces)
        with pytest.raises(RemoteProtocolError, match="SS-4040") as caught:
            clients[2].generate("w4 w5 w6 w7 w8 w9 w10 w11 w12 w13", max_new_tokens=2)
        assert "later" in caught.value.hint
        with pytest.raises(RemoteProtocolError, match="SS-4041"):
            clients[2].generate_batch(["w4 w5 w6 w7 w8 w9 w10 w11 w12 w13"] * 4, max_new_tokens=2)
        assert [len(list(pieces)) for pieces in running] == [3, 3]
        assert len(clients[2].generate("w4 w5 w6", max_new_tokens=2).tokens) == 2, "the same connection goes on"
        assert len(core.names) == 3
        for link in links:
            link.close()


def test_a_connection_that_breaks_comes_back_under_tls(crowd):
    policy = policy_of()
    core = crowd.core(crowd.job(), policy, limits=(limits := Limits(guests=frozenset(NAMES))))
    with (
        Loopback(core, crowd.keys, limits=limits) as server,
        dial(server.url, keys=crowd.keys / NAMES[0], policy=policy) as link,
    ):
        client = crowd.client(link, policy)
        client.tokenizer.eos_token = None
        got = []
        for piece in client.stream("w4 w5 w6", max_new_tokens=8):
            got.append(piece.token)
            if len(got) in (2, 5):
                for peer in list(server.shell._peers.values()):
                    server._loop.call_soon_threadsafe(peer.wire.transport.abort)
                time.sleep(0.1)
        assert got[:-1] == greedy(build_model(), client.tokenizer.encode("w4 w5 w6"), 8)
        assert link.sessions == 3


@pytest.mark.slow
def test_sixteen_sessions_with_a_pretrained_model(crowd, tmp_path):
    """SmolLM2-135M, where it is in the user's cache: the same, with room for six of the sixteen."""
    model = Path.home() / ".cache" / "securesplit" / "models" / "smollm2-135m" / "cut-2-0"
    if not (model / "manifest.json").is_file():
        pytest.skip("smollm2-135m is not in the user's cache")
    house = House(tmp_path, crowd.keys, model)
    text = job_text(model).replace("front = 1", "front = 2").replace("back = 1", "back = 0")
    job, policy = Job.model_validate(tomllib.loads(text)), policy_of(buckets=[64], max_message_bytes=1 << 24)
    prompts = [
        f"{line} {i}"
        for i in range(4)
        for line in ("The capital of France is", "Once upon a time", "def add(a, b):", "42 +")
    ]
    alone, _, core = house.joined(job, policy)
    want = [list(alone.generate(prompt, max_new_tokens=TOKENS).tokens) for prompt in prompts]
    rate = core._engine._position_bytes()
    room = 6 * (TOKENS + 16) * rate
    limits = Limits(guests=frozenset(NAMES), caches=Caches(bytes=room, idle_seconds=2.0, patience_seconds=5.0))
    core = house.core(job, policy, limits=limits)
    meter = Meter(core._engine)

    def one(name, prompt):
        with dial(server.url, keys=house.keys / name, policy=policy) as link:
            return list(house.client(link, policy).generate(prompt, max_new_tokens=TOKENS).tokens)

    with (
        Loopback(core, crowd.keys, max_message=1 << 24, limits=limits, max_connections=64) as server,
        ThreadPoolExecutor(COUNT) as pool,
    ):
        found = list(pool.map(one, NAMES, prompts))
    assert found == want
    assert 0 < meter.most <= room
    assert core._engine.caches.kept == {}


def test_four_sessions_of_one_client_leave_another_its_place_and_end_their_own_texts(crowd):
    """They hold all memory and keep it in use; nobody else is told to wait, and who makes room builds its cache again."""
    prompt, count = "w4 w5 w6 w7 w8 w9 w10 w11 w12 w13", 9
    limits = Limits(guests=frozenset(NAMES), caches=Caches(bytes=48 * POSITION, idle_seconds=60.0))
    policy = policy_of()
    core = crowd.core(crowd.job(), policy, limits=limits)
    meter = Meter(core._engine)
    with Loopback(core, crowd.keys, limits=limits, max_connections=64) as server, ExitStack() as links:

        def client_of(name):
            client = crowd.client(links.enter_context(dial(server.url, keys=crowd.keys / name, policy=policy)), policy)
            client.tokenizer.eos_token, client.patience = None, Patience(room_seconds=0.0)
            return client

        streams = [client_of(NAMES[0]).stream(prompt, max_new_tokens=count) for _ in range(4)]
        texts = [
            list(text) for text in zip(*([next(pieces).token for pieces in streams] for _ in range(3)), strict=True)
        ]
        assert meter.most == 48 * POSITION, "alone it has everything"
        modest = client_of(NAMES[1])
        found = [list(modest.generate(prompt, max_new_tokens=count).tokens) for _ in range(3)]
        assert meter.declined == [], "never refused, and never put out"
        for text, pieces in zip(texts, streams, strict=True):
            text += [piece.token for piece in pieces if piece.token is not None]
    want = greedy(build_model(), load_tokenizer(crowd.model).encode(prompt), count)
    assert [*found, *texts] == [want] * 7
    assert meter.most == 48 * POSITION
    assert set(meter.declined) == {"SS-4017"}, "by who made room"
    assert core._engine.caches.kept == {}
