"""Named attacks on adverts, boxes and members: by the server, or by a client by way of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from securesplit.aggregate import wire
from securesplit.aggregate.keys import raw_public, seal_box, share_key, statement
from tests.aggregate.hostile.kit import COMPLETE, OTHERS, SPARSE, Play, elsewhere
from tests.aggregate.hostile.table import SERVERS_KEY, Script, Table, act, but

TABLE = Table()
attack = TABLE.attack


# Stage 0: adverts.


def adverts(
    play: Play, to: Iterable[str] | None, change: Callable[[wire.Advertise], wire.Body | bytes], *places: int
) -> None:
    """Alter the adverts at these places of the roster in what waits for some, or for all."""
    chosen = {play.config.roster[place] for place in places}

    def forge(_: str, body: wire.Body) -> wire.Body:
        made = []
        for data in body.adverts:
            advert = wire.decode(wire.Advertise, data)
            altered = change(advert) if advert.name in chosen else data
            made.append(wire.encode(altered) if isinstance(altered, wire.Body) else altered)
        return body.model_copy(update={"adverts": tuple(made)})

    play.forge(forge, to)


def swapped(field: str, value: bytes) -> Script:
    def script(play: Play) -> tuple[str, ...]:
        adverts(play, None, lambda a: a.model_copy(update={field: value}), 2)
        play.finish()
        return play.config.roster

    return script


for _field in ("mask_key", "share_key", "commit_self"):
    attack(f"{_field} swapped for the server's own", 0, "SS-6002", "SS-6003")(swapped(_field, raw_public(SERVERS_KEY)))
attack("a key of low order put in", 0, "SS-6002", "SS-6003")(swapped("mask_key", bytes(32)))


@attack("a key swapped towards one client alone", 0, "SS-6002")
def swapped_to_one(play):
    adverts(play, but(play)[1:2], lambda a: a.model_copy(update={"mask_key": raw_public(SERVERS_KEY)}), 2)
    play.finish()
    return but(play)[1:2]


@attack("mask keys of two clients exchanged", 0, "SS-6002")
def exchanged(play):
    keys = [play.truths[play.config.roster[place]][0].advert.mask_key for place in (2, 3)]
    adverts(play, but(play, 2, 3), lambda a: a.model_copy(update={"mask_key": keys[a.mask_key == keys[0]]}), 2, 3)
    play.finish()
    return but(play, 2, 3)


@attack("the two uses of a client's keys exchanged", 0, "SS-6002")
def uses_exchanged(play):
    adverts(play, but(play, 2), lambda a: a.model_copy(update={"mask_key": a.share_key, "share_key": a.mask_key}), 2)
    play.finish()
    return but(play, 2)


def forged(play: Play, advert: wire.Advertise, key: Ed25519PrivateKey, **changes: object) -> wire.Advertise:
    """An advert signed with some key."""
    made = advert.model_copy(update=changes)
    said = statement("advertise", play.config.digest, wire.unsigned(made))
    return made.model_copy(update={"signature": key.sign(said)})


MALLORY = Ed25519PrivateKey.from_private_bytes(bytes(32))


@attack("man in the middle with a certificate of his own", 0, "SS-6002")
def man_in_the_middle(play):
    mine = {"certificate": MALLORY.public_key().public_bytes_raw(), "mask_key": raw_public(SERVERS_KEY)}
    adverts(play, but(play, 2), lambda a: forged(play, a, MALLORY, **mine), 2)
    play.finish()
    return but(play, 2)


@attack("a client's advert under another client's certificate", 0, "SS-6002")
def anothers_certificate(play):
    friend = play.identities[play.config.roster[0]]
    changes = {"certificate": friend.public_key().public_bytes_raw(), "mask_key": raw_public(SERVERS_KEY)}
    adverts(play, but(play, 0, 2), lambda a: forged(play, a, friend, **changes), 2)
    play.finish()
    return but(play, 0, 2)


@attack("a colluding client copies a key", 0, "SS-6003")
def key_copied(play):
    friend, victim = play.config.roster[0], play.truths[play.config.roster[2]][0].advert
    adverts(play, None, lambda a: forged(play, a, play.identities[friend], mask_key=victim.mask_key), 0)
    play.finish()
    return play.config.roster


@attack("a colluding client's share key of low order, signed", 0, "SS-6003", colluders=1, others=("SS-6007",))
def low_order(play):
    friend = play.config.roster[0]
    adverts(play, but(play, 0), lambda a: forged(play, a, play.identities[friend], share_key=bytes(32)), 0)
    play.finish()
    # In the sparse graph the key is met by those alone who chose its owner.
    return [n for n in but(play, 0) if play.config.blind or not play.config.degree or play.ended[n] == "SS-6003"]


@attack("a colluding client's mask key of low order, signed", 0, "SS-6003", "SS-6007", colluders=1, modes=COMPLETE)
def low_order_mask_key(play):
    friend = play.identities[play.config.roster[0]]
    adverts(play, but(play, 0), lambda a: forged(play, a, friend, mask_key=bytes(32)), 0)
    play.finish()
    return but(play, 0)


@attack("unknown identity", 0, "SS-6003")
def unknown(play):
    adverts(play, None, lambda a: forged(play, a, MALLORY, name="mallory"), 2)
    play.finish()
    return play.config.roster


@attack("one identity more than the roster has", 0, "SS-6003")
def one_more(play):
    def forge(_, body):
        more = forged(play, wire.decode(wire.Advertise, body.adverts[-1]), MALLORY, name="zoe")
        return body.model_copy(update={"adverts": (*body.adverts, wire.encode(more))})

    play.forge(forge)
    play.finish()
    return play.config.roster


@attack("a client's advert twice", 0, "SS-6003")
def twice(play):
    play.forge(lambda _, body: body.model_copy(update={"adverts": (body.adverts[0], *body.adverts)}))
    play.finish()
    return play.config.roster


@attack("a client is not shown its own advert", 0, "SS-6003")
def left_out(play):
    victim = but(play)[2]
    play.forge(lambda _, body: body.model_copy(update={"adverts": (*body.adverts[:2], *body.adverts[3:])}), [victim])
    play.finish()
    return [victim]


@attack("too few adverts for a sum", 0, "SS-6010", "SS-6003")
def too_few(play):
    play.forge(lambda _, body: body.model_copy(update={"adverts": body.adverts[: play.config.quorum - 1]}))
    play.finish()
    return play.config.roster


def replayed(which: str) -> Script:
    def script(play: Play) -> tuple[str, ...]:
        old = elsewhere(play.mode, which)
        adverts(play, but(play, 2), lambda a: old.last(a.name, wire.ADVERTISE).body, 2)
        play.finish()
        return but(play, 2)

    return script


for _which, _code in zip(OTHERS, ("SS-6006", "SS-6006", "SS-6004"), strict=True):
    attack(f"replayed advert of {_which}", 0, _code)(replayed(_which))


@attack("replayed advert of the same round, before a restart", 0, "SS-6003", others=("SS-6007", "SS-6008", "waits"))
def before_the_restart(play):
    """Its signature is good; only its owner can tell, and the others share no transcript with it."""
    victim = play.config.roster[2]
    old = play.last(victim, wire.ADVERTISE).body
    play.restart(victim)
    play.advertise(victim)
    play.forge(lambda _, body: body)  # All are shown the old one, its owner too.
    play.finish()
    assert old != play.last(victim, wire.ADVERTISE).body
    return [victim]


@attack(
    "one client is shown another roster than the rest",
    0,
    "SS-6007",
    "SS-6008",
    "SS-6010",
    others=("SS-6007", "SS-6008"),
)
def another_roster(play):
    """Without its own transcript nobody opens its boxes, nor it theirs."""
    victim = play.config.roster[1]
    play.forge(lambda _, body: body.model_copy(update={"adverts": body.adverts[:-1]}), [victim])
    play.finish()
    return [victim]


@attack("two halves are shown different rosters", 0, "SS-6007", "SS-6008", "SS-6010")
def two_rosters(play):
    half = len(play.config.roster) // 2
    play.forge(lambda _, body: body.model_copy(update={"adverts": body.adverts[:-1]}), play.config.roster[:half])
    play.forge(lambda _, body: body.model_copy(update={"adverts": body.adverts[1:]}), play.config.roster[half:])
    play.finish()
    return play.config.roster


@attack(
    "another roster for one client, whose boxes are kept back",
    0,
    modes=("sparse",),
    spoils=True,
    others=("SS-6008", "waits"),
)
def another_roster_alone(play):
    """It goes on: in the sparse graph boxes may be missing. Nobody holds its shares, so nothing opens its vector."""
    victim, names = play.config.roster[1], play.config.roster
    play.forge(lambda _, body: body.model_copy(update={"adverts": body.adverts[:-1]}), [victim])
    play.step()
    routed = {n: play.routed(n, names, without=[victim]) for n in names}
    routed[victim] = play.routed(victim, names[:-1], without=names)
    play.queue = [d._replace(body=wire.encode(routed[d.to])) for d in play.queue]
    play.finish()
    assert victim in {masking.name for masking in play.maskings}
    return []


# Stage 1: boxes and members.


def boxed(change: Callable[[Play, str, dict[str, bytes]], dict[str, bytes]], *, to: int | None = 1) -> Script:
    """Alter the boxes of what one client, or everybody, is about to get."""

    def script(play: Play) -> tuple[str, ...]:
        def forge(name: str, body: wire.Body) -> wire.Body:
            return body.model_copy(update={"sealed": tuple(sorted(change(play, name, dict(body.sealed)).items()))})

        victims = play.forge(forge, None if to is None else [play.config.roster[to]])
        play.finish()
        return victims

    return script


def first(boxes: dict[str, bytes]) -> str:
    return min(boxes)


def misrouted(play: Play, name: str, boxes: dict[str, bytes]) -> dict[str, bytes]:
    """From the same sender, meant for somebody else."""
    sender = first(boxes)
    other = next(box for (frm, to), box in play.boxes().items() if frm == sender and to != name)
    return boxes | {sender: other}


def reflected(play: Play, name: str, boxes: dict[str, bytes]) -> dict[str, bytes]:
    """What the receiver itself has sealed for the sender."""
    sender = next(n for n in boxes if (name, n) in play.boxes())
    return boxes | {sender: play.boxes()[name, sender]}


def of_another(which: str) -> Callable[[Play, str, dict[str, bytes]], dict[str, bytes]]:
    def change(play: Play, name: str, boxes: dict[str, bytes]) -> dict[str, bytes]:
        old = elsewhere(play.mode, which).boxes()
        sender = next((n for n in boxes if (n, name) in old), first(boxes))
        return boxes | {sender: old.get((sender, name), bytes(80))}

    return change


def exchanged_boxes(_play: Play, _name: str, boxes: dict[str, bytes]) -> dict[str, bytes]:
    one, two = sorted(boxes)[:2]
    return boxes | {one: boxes[two], two: boxes[one]}


def shortened(_play: Play, _name: str, boxes: dict[str, bytes]) -> dict[str, bytes]:
    sender = min(n for n, box in boxes.items() if len(box) >= wire.SHARED_BOX)
    return boxes | {sender: boxes[sender][:48]}


def flipped(_play: Play, _name: str, boxes: dict[str, bytes]) -> dict[str, bytes]:
    sender = first(boxes)
    return boxes | {sender: boxes[sender][:-1] + bytes([boxes[sender][-1] ^ 1])}


attack("misrouted box", 1, "SS-6007", spoils=True)(boxed(misrouted))
attack("misrouted box for everybody", 1, "SS-6007")(boxed(misrouted, to=None))
attack("a client's own box reflected", 1, "SS-6007", spoils=True)(boxed(reflected))
attack("two senders' boxes exchanged", 1, "SS-6007")(boxed(exchanged_boxes))
attack("altered box", 1, "SS-6007")(boxed(flipped))
attack("a box shortened to one without shares", 1, "SS-6007")(boxed(shortened))
attack("a box without content", 1, "SS-6014")(boxed(lambda _p, _n, b: b | {first(b): b[first(b)][:16]}))
for _which in OTHERS:
    attack(f"replayed box of {_which}", 1, "SS-6007")(boxed(of_another(_which)))
attack("withheld box", 1, "SS-6008", modes=(*COMPLETE, "sparse blind"))(
    boxed(lambda _p, _n, b: dict(sorted(b.items())[1:]))
)
attack("all boxes withheld from one client", 1, "SS-6008", modes=(*COMPLETE, "sparse blind"))(
    boxed(lambda _p, _n, _b: {})
)


@attack("withheld boxes in the sparse graph", 1, modes=("sparse",), spoils=True)
def withheld(play):
    """It is allowed, and costs a mask on one side: the server that does it, and knows what it does, gets noise."""
    kept_back = {pair for pair in play.boxes() if pair[1] in play.config.roster[1:3]}
    keep_back(play, kept_back)
    play.finish()
    return []


def isolated(left: int) -> Script:
    """After it has seen the graph: the victim gets no boxes, so it masks with its holders alone, and all but some drop."""

    def script(play: Play) -> tuple[str, ...]:
        victim = play.config.roster[11]
        holders = sorted(to for (frm, to), box in play.boxes().items() if frm == victim and len(box) >= wire.SHARED_BOX)
        keep_back(play, {pair for pair in play.boxes() if pair[1] == victim})
        gone = set(holders[left:])
        play.finish(up=lambda name, out: () if name in gone else (out,))
        assert {m.name for m in play.maskings} == set(play.config.roster), "the server has seen all vectors"
        return ()

    return script


attack("one client's holders all dropped: too few shares of its own mask", 1, modes=("sparse",))(isolated(0))
attack("one client's holders dropped but as many as open its own mask", 1, modes=("sparse",), spoils=True)(isolated(12))
attack("all but one of a client's holders dropped", 1, modes=("sparse",))(isolated(1))


@attack("all boxes withheld in the sparse graph", 1, modes=("sparse",))
def all_withheld(play):
    keep_back(play, set(play.boxes()))
    play.finish()
    return []


attack("a box from a stranger", 1, "SS-6008")(boxed(lambda _p, _n, b: b | {"zoe": b[first(b)]}))
attack("a box from the receiver itself", 1, "SS-6008")(boxed(lambda _p, n, b: b | {n: b[first(b)]}))


def sealed_by_a_friend(content: Callable[[Play], bytes]) -> Script:
    """The first of the roster colludes and seals something else for one client."""

    def script(play: Play) -> tuple[str, ...]:
        friend = play.config.roster[0]
        victim = min(to for frm, to in play.boxes() if frm == friend and len(play.boxes()[frm, to]) >= 80)
        truth, peers = play.truths[friend][0], play.clients[victim]._peers
        key = share_key(
            truth.channel, peers.of(victim).share_key, peers.t1, sender=friend, receiver=victim, other=victim
        )
        box = seal_box(key, content(play), peers.t1, sender=friend, receiver=victim)

        def forge(_: str, body: wire.Body) -> wire.Body:
            return body.model_copy(update={"sealed": tuple((n, box if n == friend else b) for n, b in body.sealed)})

        play.forge(forge, [victim])
        play.finish()
        return [victim]

    return script


def keep_back(play: Play, pairs: set[tuple[str, str]]) -> None:
    """In the sparse graph: boxes that do not arrive, by a server that knows from then on who holds what."""

    def forge(name: str, body: wire.Body) -> wire.Body:
        return body.model_copy(update={"sealed": tuple((n, b) for n, b in body.sealed if (n, name) not in pairs)})

    play.forge(forge)
    # An empty set stands for the complete graph.
    play.server._holders = (play.server._holders - pairs) or frozenset({("nobody", "nobody")})


def part_of(play: Play) -> bytes:
    return play.truths[play.config.roster[0]][0].group


attack("a colluding client's share is no field element", 1, "SS-6011", colluders=1)(
    sealed_by_a_friend(lambda play: b"\xff" * 32 + bytes(32) + part_of(play))
)
attack("a colluding client's box has one share too few", 1, "SS-6011", colluders=1)(
    sealed_by_a_friend(lambda play: bytes(32) + part_of(play))
)
attack("a colluding client's box has no shares where they are due", 1, "SS-6011", modes=("blind",), colluders=1)(
    sealed_by_a_friend(part_of)
)
attack(
    "a colluding client tells one peer another part of the blind key",
    1,
    "SS-6012",
    modes=("blind", "sparse blind"),
    colluders=1,
)(sealed_by_a_friend(lambda _play: bytes(96)))
attack(
    "a colluding client's box lacks its part of the blind key", 1, "SS-6011", "SS-6012", modes=("blind",), colluders=1
)(sealed_by_a_friend(lambda _play: bytes(64)))
attack(
    "a box with a part of a blind key in an open round", 1, "SS-6011", modes=("plain", "64-bit", "sparse"), colluders=1
)(sealed_by_a_friend(lambda _play: bytes(96)))


def with_members(members: Callable[[Play, str], tuple[str, ...]], *, to: int | None = 1, boxes: bool = True) -> Script:
    def script(play: Play) -> tuple[str, ...]:
        def forge(name: str, body: wire.Body) -> wire.Body:
            told = members(play, name)
            sealed = tuple((n, b) for n, b in body.sealed if n in told) if boxes else body.sealed
            return body.model_copy(update={"members": told, "sealed": sealed})

        victims = play.forge(forge, None if to is None else [play.config.roster[to]])
        play.finish()
        return victims

    return script


attack("members without the receiver", 1, "SS-6008")(
    with_members(lambda play, name: tuple(n for n in play.config.roster if n != name), boxes=False)
)
attack("members too few for a sum", 1, "SS-6010")(
    with_members(lambda play, _: play.config.roster[: play.config.quorum - 1])
)
attack("members out of order", 1, "SS-6008")(with_members(lambda play, _: play.config.roster[::-1]))
attack("a member twice", 1, "SS-6008")(with_members(lambda play, _: (play.config.roster[0], *play.config.roster)))
attack("a stranger among the members", 1, "SS-6008")(with_members(lambda play, _: (*play.config.roster, "zoe")))
attack("fewer members than boxes", 1, "SS-6008", modes=(*COMPLETE, "sparse blind"))(
    with_members(lambda play, _: play.config.roster[:-1], boxes=False)
)
attack("different members to one client", 1, "SS-6008", "SS-6010", "SS-6002", modes=COMPLETE, spoils=True)(
    with_members(lambda play, _: play.config.roster[:-1])
)
attack("different members to everybody", 1, "SS-6002", "SS-6008", "SS-6010", modes=COMPLETE)(
    with_members(
        lambda play, name: tuple(
            n for n in play.config.roster if n != play.config.roster[play.config.roster.index(name) - 1]
        ),
        to=None,
    )
)
attack(
    "different members to one client of the sparse graph",
    1,
    "SS-6008",
    modes=SPARSE,
    spoils=True,
    others=("SS-6002", "SS-6008"),
)(with_members(lambda play, _: play.config.roster[:-1]))


@pytest.mark.parametrize(("attack", "mode"), TABLE.cases)
def test_nothing_is_learnt_and_the_end_has_a_name(attack, mode, record_property):
    act(attack, mode, record_property)
