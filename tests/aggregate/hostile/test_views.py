"""Attacks that need a plan over several stages or rounds, each with its control: without the one rule that stops it, the
attacker of judge.py opens an update, and the kit turns red.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from securesplit.aggregate import client as client_module
from securesplit.aggregate import wire
from securesplit.aggregate.answered import Answer, AnswerLog
from securesplit.aggregate.keys import Channel, open_box, raw_public, seal_box, share_key
from securesplit.aggregate.server import ServerRound
from securesplit.aggregate.shamir import Share
from tests.aggregate.hostile.judge import Attacker, check_secrecy, judge
from tests.aggregate.hostile.kit import COMPLETE, EVERY, SPARSE, Opened, Play, at

# Another U2 for one client of the sparse graph: it masks with nobody who holds its shares.


def other_members_for_one(play: Play) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The server that designed this: colluders among the holders make up the number of signatures that is missing."""
    names, victim = play.config.roster, play.config.roster[7]
    holders = [to for (frm, to), box in play.boxes().items() if frm == victim and len(box) >= wire.SHARED_BOX]
    friends = tuple(sorted(holders)[: play.config.colluders])
    view = tuple(n for n in names if n not in holders)
    assert len(view) >= play.config.quorum
    play.gullible()
    play.queue, play.server.finished = [], True
    for name in names:
        # The fewer boxes it gets, the fewer masks it adds; in blind rounds it wants all of them.
        kept_back = names if name == victim and not play.config.blind else ()
        play.tell(name, 1, play.routed(name, view if name == victim else names, without=kept_back))
    for name in names:
        if name != victim:
            play.tell(name, 2, play.survivors(name, names))
    signers = [n for n in names if n != victim and n not in play.ended]
    signed = {n: play.spoken(n, wire.CONSISTENT).signature for n in signers}
    signed |= {n: forged_consent(play, n, next(s for s in signers if s not in friends)) for n in friends}
    for name in signers:
        play.tell(name, 3, play.body(wire.Bundle, signatures=tuple(sorted(signed.items()))))
    return friends, tuple(h for h in holders if h not in friends)


def forged_consent(play: Play, friend: str, like: str) -> bytes:
    """What a colluder signs when it wants to agree with an honest client."""
    client = play.clients[like]
    draft = play.body(wire.Consistent, signature=bytes(8))
    signed = play.signed(friend, wire.CONSISTENT, draft, client._t3, client._said)
    assert isinstance(signed, wire.Consistent)
    return signed.signature


@pytest.mark.parametrize("mode", SPARSE)
def test_one_client_under_another_u2_is_found_out_by_those_who_hold_its_shares(mode, record_property):
    play = at(mode, 1)
    friends, holders = other_members_for_one(play)
    assert len(holders) == play.config.degree - play.config.colluders
    ends = judge(play, holders, ("SS-6002",), others=("waits", "SS-6010", "SS-6004"), colluders=friends)
    record_property("hostile", ["another U2 for one client, without its holders", mode, 1, ends])


def test_without_the_proofs_of_stage_2_that_client_is_open(monkeypatch):
    """Not in blind rounds: there it cannot be kept from masking with those who chose it."""
    monkeypatch.setattr(client_module, "check_masked", lambda *_, **__: None)
    play = at("sparse", 1)
    friends, _ = other_members_for_one(play)
    with pytest.raises(AssertionError, match="a sum over \\['c07'\\] is open"):
        check_secrecy(play, friends)
    (opened,) = Attacker(play, friends).sums
    assert np.array_equal(opened.words, play.clients["c07"].contribution)


# Two sets of survivors, to two halves.


@pytest.mark.parametrize("mode", ["plain", "sparse"])
def test_without_the_quorum_two_halves_give_both_shares_of_one_client(mode, monkeypatch):
    monkeypatch.setattr(client_module, "check_quorum", lambda *_, **__: None)
    play = at(mode, 2).gullible()
    names, target = play.config.roster, play.config.roster[2]
    half, rest = set(names[: len(names) // 2]), tuple(n for n in names if n != target)
    play.queue, play.server.finished = [], True
    for name in names:
        play.tell(name, 2, play.survivors(name, names if name in half else rest))
    for name in names:
        play.tell(name, 3, play.bundle(()))
    with pytest.raises(AssertionError, match="gave shares of b and of s of"):
        check_secrecy(play)


# A client that dies and begins again.


def logs(play: Play, folder: Path) -> dict[str, AnswerLog]:
    return {name: AnswerLog(folder / f"{name}.answered") for name in play.config.roster}


def again(play: Play, *, without: str, persist: Callable[[str], Callable[[Answer], None]]) -> None:
    """The server plays the round once more with restarted clients, and one of them is too slow this time."""
    play.server, play.queue, play.refused = ServerRound(play.config), [], {}
    for name in play.config.roster:
        play.restart(name, persist(name))
    play.begin(n for n in play.config.roster if n != without)
    play.finish()


@pytest.mark.parametrize("mode", ["plain", "blind", "64-bit", "sparse"])
def test_a_second_unmask_after_a_restart_is_refused(mode, tmp_path, record_property):
    play = at(mode, 3)
    first = logs(play, tmp_path)
    for name, log in first.items():
        play.clients[name]._persist = log
    play.finish()
    for log in first.values():
        log.close()
    second = logs(play, tmp_path)
    gone = play.config.roster[-1]
    again(play, without=gone, persist=second.__getitem__)
    rest = [n for n in play.config.roster if n != gone]
    ends = judge(play, rest, ("SS-6015",))
    for log in second.values():
        log.close()
    record_property("hostile", ["second unmask after a restart, one survivor fewer", mode, 1, ends])


@pytest.mark.parametrize("mode", ["plain", "sparse"])
def test_without_the_log_two_sums_show_the_difference(mode):
    play = at(mode, 5)
    again(play, without=play.config.roster[-1], persist=lambda _name: lambda _answer: None)
    with pytest.raises(AssertionError, match="several sums are open"):
        check_secrecy(play)


@pytest.mark.parametrize("torn", [False, True])
def test_a_client_that_died_between_its_record_and_its_answer_stays_silent(torn, tmp_path, record_property):
    """Between the record and the sending nothing had left; a torn record had not been made, and the next answer is the first."""
    play = at("plain", 3)
    name = play.config.roster[1]
    log = AnswerLog(tmp_path / "log")

    class Died(Exception):
        pass

    def die(answer: Answer) -> None:
        if torn:
            (tmp_path / "log").write_bytes(answer.line()[:20])
        else:
            log(answer)
        raise Died

    play.clients[name]._persist = die
    with pytest.raises(Died):
        play.tell(name, 3, play.waiting(name))
    assert not [item for item in play.said if (item.name, item.stage) == (name, wire.UNMASK)]
    log.close()
    log = AnswerLog(tmp_path / "log")
    play = at("plain", 0)
    play.server, play.queue = ServerRound(play.config), []
    for other in play.config.roster:
        play.restart(other, log if other == name else None)
    play.begin().finish()
    log.close()
    ends = judge(play, [name], ["exact" if torn else "SS-6015"])
    what = "torn record" if torn else "record made"
    record_property("hostile", [f"death between record and answer, {what}", "plain", 1, ends])


@pytest.mark.parametrize("mode", EVERY)
@pytest.mark.parametrize("stage", range(5))
def test_what_was_said_to_a_client_before_its_restart_means_nothing_to_it_afterwards(mode, stage, record_property):
    play = at(mode, 5)
    name = play.config.roster[1]
    before = next(d for d in play.shown if (d.to, d.stage) == (name, stage))
    play.restart(name)
    play.advertise(name)
    play.tell(*before)
    code = "SS-6003" if stage == 0 else "SS-6005"
    assert play.ended[name] == code
    check_secrecy(play)
    record_property("hostile", ["what was said before a restart", mode, 1, [code]])


# The same update in two sums.


def two_rounds(tmp_path: Path, members: Iterable[int]) -> list[str]:
    """A round over all, then the same updates in another session over some of the roster; how it ended for those."""
    one = at("plain", 3)
    kept = logs(one, tmp_path)
    for name, log in kept.items():
        one.clients[name]._persist = log
    one.finish()
    two = at("plain", 0, session_id=bytes(16))
    for name in two.config.roster:
        two.clients[name]._persist = kept[name]
    chosen = [two.config.roster[place] for place in members]
    two.server, two.queue = ServerRound(two.config), []
    for name in chosen:
        two.hear(name, wire.Outgoing(wire.ADVERTISE, two.last(name, wire.ADVERTISE).body, None))
    two.finish()
    check_secrecy(two)
    for log in kept.values():
        log.close()
    return sorted({two.ended.get(name, "exact") for name in chosen})


@pytest.mark.parametrize(
    ("members", "ends"),
    [((0, 1, 2, 3, 4, 5), ["SS-6030"]), ((0, 1, 2, 3, 4, 5, 6), ["exact"]), ((0, 1, 2, 3, 4), ["SS-6030"])],
    ids=["one fewer", "the same", "two fewer"],
)
def test_the_same_update_enters_sums_over_one_set_of_clients(members, ends, tmp_path, record_property):
    assert two_rounds(tmp_path, members) == ends
    record_property("hostile", [f"the same updates in another session, {7 - len(members)} fewer", "plain", 1, ends])


def test_no_update_follows_from_all_sums_over_it_together(tmp_path):
    """Seven sessions, of each of which the server lets two neighbours drop: no two cohorts differ by one client."""
    first = at("plain", 0)
    kept, names = logs(first, tmp_path), first.config.roster
    rows, sums = [], []
    for session in range(len(names)):
        play = at("plain", 0, session_id=bytes([session]) * 16)
        for name in names:
            play.clients[name]._persist = kept[name]
        gone = {names[session], names[(session + 1) % len(names)]}
        play.server, play.queue = ServerRound(play.config), []
        for name in names:
            if name not in gone:
                play.hear(name, wire.Outgoing(wire.ADVERTISE, play.last(name, wire.ADVERTISE).body, None))
        play.finish()
        if play.server.result is not None and play.server.result.aggregate is not None:
            rows.append([float(name not in gone) for name in names])
            sums.append(play.server.result.aggregate.ring_sum.view(np.int32).astype(float))
    for log in kept.values():
        log.close()
    solved, *_ = np.linalg.lstsq(np.array(rows), np.array(sums), rcond=None)
    found = [
        n
        for n, x in zip(names, solved, strict=True)
        if np.allclose(x, first.clients[n].contribution.view(np.int32), atol=1e-6)
    ]
    assert found == []


# Keys swapped where nobody looks at signatures: what the signatures of adverts are for.


def man_in_the_middle(play: Play) -> list[X25519PrivateKey]:
    """Every client sees the server's keys in the place of all others'; the server opens its boxes and seals own ones."""
    names = play.config.roster
    own = {n: wire.decode(wire.Advertise, play.last(n, wire.ADVERTISE).body) for n in names}
    raw = {n: (bytes([2 * place]) * 32, bytes([2 * place + 1]) * 32) for place, n in enumerate(names, 1)}
    masks = {n: X25519PrivateKey.from_private_bytes(mask) for n, (mask, _) in raw.items()}
    channels = {n: Channel(channel) for n, (_, channel) in raw.items()}
    fake = {
        n: own[n].model_copy(update={"mask_key": raw_public(masks[n]), "share_key": channels[n].public}) for n in names
    }
    play.queue, play.server.finished = [], True
    for me in names:
        shown = tuple(wire.encode(own[n] if n == me else fake[n]) for n in names)
        play.clients[me]._verify = lambda *_: None
        (out,) = play.tell(me, 0, play.body(wire.Roster, adverts=shown))
        t1, sealed = play.clients[me]._peers.t1, []
        for to, box in wire.decode(wire.Shares, out.body).sealed:
            key = share_key(channels[to], own[me].share_key, t1, sender=me, receiver=to, other=me)
            got, x = open_box(key, box, t1, sender=me, receiver=to), play.config.position(to)
            play.opened += [
                Opened(to, me, own[me], kind, Share(x, y)) for kind, y in (("b", got[:32]), ("s", got[32:]))
            ]
            key = share_key(channels[to], own[me].share_key, t1, sender=to, receiver=me, other=me)
            sealed.append((to, seal_box(key, bytes(64), t1, sender=to, receiver=me)))
        play.tell(me, 1, play.body(wire.Routed, members=names, sealed=tuple(sealed)))
    return list(masks.values())


def test_without_signatures_of_adverts_a_man_in_the_middle_opens_everybody():
    play = at("plain", 0)
    keys = man_in_the_middle(play)
    sums = Attacker(play, keys=keys).sums
    assert sorted(tuple(s.owners) for s in sums) == [(n,) for n in play.config.roster]
    assert all(np.array_equal(s.words, play.clients[next(iter(s.owners))].contribution) for s in sums)


# The attacker itself: what it can do, and from where on.


@pytest.mark.parametrize("mode", EVERY)
def test_the_attacker_opens_the_sum_that_is_meant_and_nothing_else(mode):
    play = at(mode, 5)
    c = play.config
    assert [s.owners for s in Attacker(play).sums] == ([] if c.blind else [frozenset(c.roster)])
    friends = c.roster[: c.colluders]
    assert [s.owners for s in Attacker(play, friends).sums] == [frozenset(c.roster[c.colluders :])]


@pytest.mark.parametrize("mode", COMPLETE)
def test_as_many_colluders_as_shares_open_everybody(mode):
    play = at(mode, 3)  # No honest client has answered yet.
    few, enough = play.config.roster[: play.config.threshold - 1], play.config.roster[: play.config.threshold]
    assert Attacker(play, few).sums == []
    assert {tuple(s.owners) for s in Attacker(play, enough).sums} == {(n,) for n in play.config.roster[len(enough) :]}
    with pytest.raises(AssertionError, match="b and s of one client"):
        check_secrecy(play, enough)


@pytest.mark.parametrize("mode", COMPLETE)
def test_a_vector_without_its_own_mask_is_open_as_soon_as_its_pairs_are(mode):
    """One b is told, and all others' s: what honest answers never bring together."""
    play = at(mode, 3)
    victim = play.config.roster[-1]
    friends = play.config.roster[:2] if play.config.blind else ()
    for holder in play.config.roster:
        for advert, held in play.truths[holder][0].held.values():
            kind = "b" if advert.name == victim else "s"
            share = Share(play.config.position(holder), held.self_share if kind == "b" else held.seed_share)
            play.opened.append(Opened(holder, advert.name, advert, kind, share))
    assert [s.owners for s in Attacker(play, friends).sums] == [{victim}]
    with pytest.raises(AssertionError, match=f"a sum over \\['{victim}'\\] is open"):
        check_secrecy(play, friends)


@pytest.mark.parametrize("mode", EVERY)
def test_a_copied_round_is_the_round(mode):
    """Attacks begin with copies; one that shared something with the others would show here."""
    for stage in range(5):
        for _ in range(2):
            play = at(mode, stage).finish()
            assert judge(play) == ["exact"]
        assert at(mode, stage).server.stage == (0 if stage == 5 else stage + 1)
