"""Named attacks on survivors, signatures, shares and results; on the order of messages; and by aborts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from securesplit.aggregate import wire
from securesplit.aggregate.keys import alike_tag, bind, statement
from tests.aggregate.hostile.kit import COMPLETE, EVERY, OTHERS, SPARSE, Play, at, elsewhere
from tests.aggregate.hostile.table import Script, Table, act, but

TABLE = Table()
attack = TABLE.attack
OPEN = ("plain", "64-bit", "sparse")
BLIND = ("blind", "sparse blind")


def told(change: Callable[[Play, str, wire.Body], wire.Body], *, to: int | None = 1) -> Script:
    """Alter what one client, or everybody, is about to be told."""

    def script(play: Play) -> tuple[str, ...]:
        victims = play.forge(lambda name, body: change(play, name, body), None if to is None else [but(play)[to]])
        play.finish()
        return victims

    return script


def everywhere(name: str, stage: int, *codes: str, change: Callable[..., wire.Body], **options: object) -> None:
    """The same lie to one client, and to all of them."""
    attack(f"{name}, to one client", stage, *codes, **options)(told(change))
    attack(f"{name}, to all", stage, *codes, **options)(told(change, to=None))


# Stage 2: survivors.


def survivors(choose: Callable[[Play, str], tuple[tuple[str, ...], tuple[str, ...]]]) -> Callable[..., wire.Body]:
    """Survivors and dropped as chosen, with the proofs that the survivors would need."""

    def change(play: Play, name: str, _body: wire.Body) -> wire.Body:
        alive, dropped = choose(play, name)
        known = tuple(n for n in alive if n in play.config.roster)
        proofs = play.survivors(name, tuple(dict.fromkeys(known))).masked
        return play.body(wire.Survivors, survivors=alive, dropped=dropped, masked=proofs)

    return change


def without(play: Play, *names: str) -> tuple[str, ...]:
    return tuple(n for n in play.config.roster if n not in names)


def other_than(play: Play, name: str) -> str:
    """The next one of the roster."""
    return play.config.roster[(play.config.roster.index(name) + 1) % len(play.config.roster)]


everywhere("a survivor counted as dropped too: both shares asked", 2, "SS-6009", change=survivors(
    lambda play, name: (play.config.roster, (other_than(play, name),))))  # fmt: skip
everywhere("everybody counted as dropped too", 2, "SS-6009", change=survivors(
    lambda play, _: (play.config.roster, play.config.roster)))  # fmt: skip
everywhere("survivor set of one", 2, "SS-6010", change=survivors(lambda play, name: ((name,), without(play, name))))
everywhere("survivor set of the server's friends and one", 2, "SS-6010", change=survivors(
    lambda play, name: (
        tuple(sorted({*play.config.roster[: play.config.colluders], name})),
        without(play, *play.config.roster[: play.config.colluders], name),
    )))  # fmt: skip
everywhere("one survivor fewer than a sum needs", 2, "SS-6010", "SS-6008", change=survivors(
    lambda play, _: (play.config.roster[: play.config.quorum - 1], play.config.roster[play.config.quorum - 1 :])))  # fmt: skip
everywhere("survivors without the receiver", 2, "SS-6008", change=survivors(
    lambda play, name: (without(play, name), (name,))))  # fmt: skip
everywhere("a stranger among the survivors", 2, "SS-6008", change=survivors(
    lambda play, _: ((*play.config.roster, "zoe"), ())))  # fmt: skip
everywhere("survivors out of order", 2, "SS-6008", change=survivors(lambda play, _: (play.config.roster[::-1], ())))
everywhere("a survivor twice", 2, "SS-6008", change=survivors(
    lambda play, _: ((play.config.roster[0], *play.config.roster), ())))  # fmt: skip
everywhere("a client neither survivor nor dropped", 2, "SS-6008", change=survivors(
    lambda play, name: (without(play, other_than(play, name)), ())))  # fmt: skip
everywhere("nobody survives", 2, "SS-6008", change=survivors(lambda play, _: ((), play.config.roster)))
everywhere("no proof of what survivors masked under", 2, "SS-6008", modes=SPARSE, change=(
    lambda _p, _n, body: body.model_copy(update={"masked": ()})))  # fmt: skip
everywhere("proof for one survivor missing", 2, "SS-6008", modes=SPARSE, change=(
    lambda _p, _n, body: body.model_copy(update={"masked": body.masked[1:]})))  # fmt: skip
everywhere("proofs of two survivors exchanged", 2, "SS-6002", modes=SPARSE, change=(
    lambda _p, _n, body: body.model_copy(update={"masked": (
        (body.masked[0][0], body.masked[1][1]), (body.masked[1][0], body.masked[0][1]), *body.masked[2:])})))  # fmt: skip
for _which, _code in zip(OTHERS, ("SS-6006", "SS-6006", "SS-6004"), strict=True):
    everywhere(f"proofs of {_which}", 2, _code, modes=("sparse",), change=(
        lambda play, _n, body, which=_which: body.model_copy(update={"masked": tuple(
            (n, elsewhere(play.mode, which).last(n, wire.MASKED).body) for n, _ in body.masked)})))  # fmt: skip


@attack("different survivors to two halves", 2, "SS-6010")
def halves(play):
    """Some hear that the last one dropped, some that it did not; neither half is many enough to agree."""
    names, last = play.config.roster, play.config.roster[-1]
    half = set(names[: len(names) // 2])
    view = {n: play.survivors(n, without(play, last) if n in half else names) for n in names}
    tell_all(play, view)
    for name in without(play, last):
        agree = [n for n in names if (n in half) == (name in half) and n != last]
        play.tell(name, wire.CONSISTENT, play.bundle(agree))
    play.tell(last, wire.CONSISTENT, play.bundle(n for n in names if n not in half))
    play.queue = []
    return names


def tell_all(play: Play, view: dict[str, wire.Body]) -> None:
    """Tell everybody something, by hand; the honest server hears nothing of it any more."""
    play.queue, play.server.finished = [], True
    for name, body in view.items():
        play.tell(name, {wire.Survivors: 2, wire.Bundle: 3, wire.Roster: 0, wire.Routed: 1}[type(body)], body)


def colluding_halves(sign_twice: int) -> Script:
    """As many colluders as the configuration names sign both sets; the other clients are cut where it helps most."""

    def script(play: Play) -> tuple[str, ...]:
        names, friends = play.config.roster, play.config.roster[:sign_twice]
        honest = [n for n in names if n not in friends]
        target = honest[0]
        # The threshold can be met once: by those who hear that the target survived.
        first = set(honest[: play.config.threshold - len(friends)])
        second = [n for n in honest if n not in first]
        alive, gone = names, without(play, target)
        tell_all(play, {n: play.survivors(n, alive if n in first else gone) for n in honest})
        for group, told_alive in ((sorted(first), alive), (second, gone)):
            signatures = {n: play.spoken(n, wire.CONSISTENT).signature for n in group}
            signatures |= {n: signature_of(play, n, told_alive) for n in friends}
            body = play.body(wire.Bundle, signatures=tuple(sorted(signatures.items())))
            for name in group:
                play.tell(name, wire.CONSISTENT, body)
        answered = {o.holder for o in play.opened}
        assert answered == first, "one of the sets was signed by enough, and one alone"
        return tuple(second)

    return script


def signature_of(play: Play, friend: str, alive: tuple[str, ...]) -> bytes:
    """A colluder signs any set; in blind rounds it knows the key of the tag."""
    client = play.clients[friend]
    body = play.body(wire.Consistent, signature=bytes(8))
    t3 = bind("ssa-1/u3", client._t2, (n.encode() for n in alive))
    tag = alike_tag(client._group, client._t2, b"") if play.config.blind else b""
    return play.identities[friend].sign(statement("consistent", t3, wire.unsigned(body) + tag))


attack(
    "two sets, signed by all colluders: both shares of one client",
    2,
    "SS-6010",
    modes=COMPLETE,
    colluders=2,
    others=("waits",),
)(colluding_halves(2))
attack(
    "two sets, signed by all colluders: both shares of one client",
    2,
    "SS-6010",
    modes=SPARSE,
    colluders=4,
    others=("waits",),
)(colluding_halves(4))


@attack("survivors told twice: both shares asked one after the other", 2, "SS-6005")
def told_twice(play):
    names = play.config.roster
    tell_all(play, {n: play.survivors(n, names) for n in names})
    for name in names:
        play.tell(name, 2, play.survivors(name, without(play, other_than(play, name))))
    return names


@attack("survivors told anew after the signatures were handed on", 3, "SS-6005")
def told_after_answering(play):
    """The answer for the first set is out; the second one must not follow."""
    names = play.config.roster
    play.step()
    play.queue, play.server.finished = [], True
    for name in names:
        play.tell(name, 2, play.survivors(name, without(play, other_than(play, name))))
        play.tell(name, 3, play.bundle(names))
    return names


# Stage 3: signatures.


def bundled(change: Callable[[Play, dict[str, bytes]], list[tuple[str, bytes]]]) -> Callable[..., wire.Body]:
    return lambda play, _n, body: body.model_copy(update={"signatures": tuple(change(play, dict(body.signatures)))})


def altered(signature: bytes) -> bytes:
    return bytes([signature[0] ^ 1]) + signature[1:]


everywhere(
    "truncated bundle", 3, "SS-6010", change=bundled(lambda play, s: list(s.items())[: play.config.threshold - 1])
)
everywhere("empty bundle", 3, "SS-6010", change=bundled(lambda _p, _s: []))
everywhere(
    "one signer many times", 3, "SS-6008", change=bundled(lambda play, s: list(s.items())[:1] * play.config.threshold)
)
everywhere("signatures out of order", 3, "SS-6008", change=bundled(lambda _p, s: list(s.items())[::-1]))
everywhere("forged signatures", 3, "SS-6010", change=bundled(lambda _p, s: [(n, altered(x)) for n, x in s.items()]))
everywhere("one good signature too few among forged ones", 3, "SS-6010", change=bundled(
    lambda play, s: [(n, x if at_ < play.config.threshold - 1 else altered(x)) for at_, (n, x) in enumerate(s.items())]))  # fmt: skip
everywhere("signatures under each other's names", 3, "SS-6010", change=bundled(
    lambda _p, s: list(zip(s, [*list(s.values())[1:], next(iter(s.values()))], strict=True))))  # fmt: skip
everywhere("a stranger's signature", 3, "SS-6008", change=bundled(lambda _p, s: [*s.items(), ("zoe", bytes(64))]))
for _which in OTHERS:
    everywhere(f"signatures of {_which}", 3, "SS-6010", modes=(*COMPLETE, "sparse"), change=bundled(
        lambda play, s, which=_which: [(n, elsewhere(play.mode, which).spoken(n, wire.CONSISTENT).signature) for n in s]))  # fmt: skip
everywhere("signatures of stage 2 for those of stage 3", 3, "SS-6010", change=bundled(
    lambda play, s: [(n, play.spoken(n, wire.MASKED).signature) for n in s]))  # fmt: skip


@attack("a signer who is no survivor", 2, "SS-6008", others=("waits",))
def no_survivor(play):
    last = play.config.roster[-1]
    tell_all(play, {n: play.survivors(n, without(play, last)) for n in without(play, last)})
    signatures = play.bundle(without(play, last)).signatures
    for name in without(play, last):
        body = play.body(wire.Bundle, signatures=(*signatures, (last, signature_of(play, last, without(play, last)))))
        play.tell(name, 3, body)
    return without(play, last)


@attack("the bundle twice: a second answer asked", 3, "SS-6005")
def bundle_twice(play):
    bundle = play.waiting(but(play)[0])
    play.step()
    play.queue, play.server.finished = [], True
    for name in play.config.roster:
        play.tell(name, 3, bundle)
    return play.config.roster


# Stage 4: the result.


def sums(change: Callable[[Play, np.ndarray], np.ndarray | None]) -> Script:
    def script(play: Play) -> tuple[str, ...]:
        play.queue = [d._replace(vector=change(play, d.vector)) for d in play.queue]
        play.finish()
        return play.config.roster

    return script


def plus(at_: int, delta: int) -> Callable[[Play, np.ndarray], np.ndarray]:
    def change(_play: Play, ring: np.ndarray) -> np.ndarray:
        moved = ring.copy()
        moved[[at_]] += np.array([delta], dtype=ring.dtype)
        return moved

    return change


everywhere("result over other survivors", 4, "SS-6008", change=(
    lambda _p, _n, body: body.model_copy(update={"survivors": body.survivors[1:]})))  # fmt: skip
for _which, _code in zip(OTHERS, ("SS-6006", "SS-6006", "SS-6004"), strict=True):
    everywhere(f"result of {_which}", 4, _code, modes=(*COMPLETE, "sparse"), change=(
        lambda play, name, _b, which=_which: next(
            wire.decode(wire.Result, d.body) for d in elsewhere(play.mode, which).shown if (d.to, d.stage) == (name, 4))))  # fmt: skip
attack("result out of range", 4, "SS-6011", modes=("plain", "sparse"))(sums(plus(0, 1 << 31)))
attack("result out of range", 4, "SS-6011", modes=("64-bit",))(sums(plus(0, 1 << 63)))
attack("result with an impossible weight", 4, "SS-6011", modes=OPEN)(sums(plus(-1, 1 << 20)))
attack("result out of range, where the sum is blind: nobody may show that he saw it", 4, "other sum", modes=BLIND)(
    sums(plus(0, 1 << 31))
)
attack("result moved within its range: not noticed, and stated so", 4, "other sum", modes=OPEN)(sums(plus(0, 1)))
attack("result without a vector", 4, "SS-6014")(sums(lambda _p, _v: None))
attack("result of a wrong length", 4, "SS-6014")(sums(lambda _p, ring: ring[:-1]))
attack("result in another word", 4, "SS-6014")(sums(lambda _p, ring: ring.astype(np.int64)))
attack("result in another shape", 4, "SS-6014")(sums(lambda _p, ring: ring.reshape(1, -1)))


# Order, and aborts.


def out_of_order(stage: int) -> Script:
    """Honest bodies of another stage, of this very round where they exist: repeated ones, and those to come."""

    def script(play: Play) -> tuple[str, ...]:
        state = play.queue[0].stage
        future = at(play.mode, 5)
        for name in play.config.roster:
            body = next((d.body for d in (*play.shown, *future.shown) if (d.to, d.stage) == (name, stage)), b"")
            vector = next((d.vector for d in future.shown if (d.to, d.stage) == (name, stage)), None)
            play.tell(name, stage, body, vector)
        assert stage != state
        play.queue, play.server.finished = [], True
        return play.config.roster

    return script


for _state in range(5):
    for _stage in (*range(5), 5, 14, -1):
        if _stage != _state:
            _modes = COMPLETE if _stage in range(5) else ("plain",)
            _what = f"stage {_stage}" if _stage in range(5) else f"no stage ({_stage})"
            _codes = ("SS-6005",) if _stage != 4 else ("SS-6005", "SS-6014")
            attack(
                f"a message out of order, to a client where stage {_state} is due: {_what}",
                _state,
                *_codes,
                modes=_modes,
            )(out_of_order(_stage))


@attack("every message once more after the end", 4, "exact", modes=EVERY)
def after_the_end(play):
    play.finish()
    for delivery in list(play.shown):
        assert play.tell(*delivery) == []
    return play.config.roster


def aborted(code: str | bytes, which: str | None = None) -> Script:
    def script(play: Play) -> tuple[str, ...]:
        config = play.config if which is None else elsewhere(play.mode, which).config
        good = wire.encode(wire.Abort(session=config.session_id, round=config.round, cfg=config.digest, code="SS-6013"))
        text = code if isinstance(code, bytes) else bytes([0xA0 + len(code.encode())]) + code.encode()
        body = good.replace(b"\xa7SS-6013", text)
        for name in play.config.roster:
            play.tell(name, 15, body)
        play.queue, play.server.finished = [], True
        return play.config.roster

    return script


for _stage in range(5):
    attack(f"abort, to all while stage {_stage} is due", _stage, "SS-6013", modes=COMPLETE)(aborted("SS-6013"))
attack("abort with a code that nobody knows", 2, "SS-6099", modes=("plain",))(aborted("SS-6099"))
for _code in ("SS-1234", "SS-60", "SS-60130", "ss-6013", "text of any kind", "", "SS-6013\n", "\x1b[2J"):
    attack(f"abort with a code that is none, to all: {_code!r}", 2, "SS-6014", modes=("plain",))(aborted(_code))
attack("abort with a code that is none, to all: bytes", 2, "SS-6014", modes=("plain",))(aborted(b"\xc4\x07SS-6013"))
for _which, _code in zip(OTHERS, ("SS-6006", "SS-6006", "SS-6004"), strict=True):
    attack(f"abort of {_which}", 2, _code, modes=("plain", "sparse"))(aborted("SS-6013", _which))


@pytest.mark.parametrize(("attack", "mode"), TABLE.cases)
def test_nothing_is_learnt_and_the_end_has_a_name(attack, mode, record_property):
    act(attack, mode, record_property)


def test_an_abort_with_digits_of_another_script_is_malformed(record_property):
    rows = Table()
    rows.attack("abort with digits of another script", 2, "SS-6014", modes=("plain",))(aborted("SS-60\u0661\u0663"))
    act(rows.rows[0], "plain", record_property)
