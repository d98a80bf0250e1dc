"""The server as an attacker with all that it was told, and the verdict over a play.

The attacker puts together every secret of which enough shares came out (with what its colluders hold), takes every mask
off every vector that it can, and then solves for what is left: each vector is a contribution plus key streams, of which
some are unknown, and a sum of vectors is open when its unknown streams cancel. As an unknown stream appears in one vector,
or in the two of a pair with opposite signs, the open sums are exactly the connected components of vectors under
unknown pair streams that have no other unknown stream. Which sums a round may open is the protocol's promise:

* complete graph: at most one, over at least ``quorum - colluders`` honest clients;
* sparse graph: at most one, over at least ``min_clients - colluders`` honest clients and more than half of those that
  the server has vectors of under the same transcript;
* blind rounds: none, unless somebody colludes.

What this attacker lacks: it does not break primitives, does not look at time, and does not use what it knows of the model.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from securesplit.aggregate import wire
from securesplit.aggregate.client import State
from securesplit.aggregate.keys import blind_key, commit, group_key, mask_private, pair_key, raw_public, self_key
from securesplit.aggregate.masks import add_streams
from securesplit.aggregate.shamir import Share, combine
from tests.aggregate.hostile.kit import Masking, Play, Truth

GRACEFUL = frozenset({"SS-6010", "SS-6013"})
"""How a round ends without a lie: too few are left, or the server went on without this client."""

HONEST = frozenset({"exact", *GRACEFUL})


def spoiled(mode: str) -> frozenset[str]:
    """How it may end for those who were told no lie when somebody masks for a set that the others do not know.

    The sum is then noise. A blind one is brought into range in silence (fixedpoint.py says why), others are refused.
    """
    return HONEST | {"SS-6011"} | ({"other sum"} if "blind" in mode else set())


@dataclass(frozen=True, slots=True)
class Sum:
    """A sum that the attacker opened: whose contributions, and the words."""

    owners: frozenset[str]
    words: np.ndarray


class Attacker:
    """All that a server of this play knows, with its colluders.

    Args:
        play: what passed.
        colluders: clients that tell the server all they know.
        keys: private X25519 keys that the server put into adverts itself.
    """

    def __init__(self, play: Play, colluders: Iterable[str] = (), keys: Sequence[X25519PrivateKey] = ()) -> None:
        self.play, self.colluders = play, frozenset(colluders)
        self._own = {raw_public(key): key for key in keys}
        self._shares: dict[tuple[str, bytes, str], dict[int, Share]] = defaultdict(dict)
        self._b: dict[bytes, bytes] = {}
        self._s: dict[bytes, bytes] = {}
        self._groups: dict[bytes, bytes] = {}
        for opened in play.opened:
            self._hold(opened.advert, opened.kind, opened.share)
        for name in self.colluders:
            for truth in play.truths[name]:
                self._betray(name, truth)
        self._combine()
        self.sums = self._solve()

    def _hold(self, advert: wire.Advertise, kind: str, share: Share) -> None:
        image = advert.commit_self if kind == "b" else advert.mask_key
        self._shares[advert.name, image, kind][share.x] = share

    def _betray(self, name: str, truth: Truth) -> None:
        x = self.play.config.position(name)
        self._b[truth.advert.commit_self] = truth.self_mask
        self._s[truth.advert.mask_key] = truth.seed
        self._groups[truth.advert.commit_group] = truth.group
        for advert, held in truth.held.values():
            if held.self_share:
                self._hold(advert, "b", Share(x, held.self_share))
                self._hold(advert, "s", Share(x, held.seed_share))
            self._groups[advert.commit_group] = held.group

    def _combine(self) -> None:
        c = self.play.config
        for (_, image, kind), shares in self._shares.items():
            found = _put_together(
                list(shares.values()), c.shares_needed, image,
                (lambda b: commit("cb", b)) if kind == "b" else (lambda s: raw_public(mask_private(s, c.digest))),
            )  # fmt: skip
            if found is not None:
                (self._b if kind == "b" else self._s)[image] = found

    def knows_both(self) -> set[str]:
        """Clients of whom the attacker has b and s of one round: its vectors are open."""
        adverts = {t.advert for truths in self.play.truths.values() for t in truths}
        return {a.name for a in adverts if a.commit_self in self._b and a.mask_key in self._s}

    def _private(self, public: bytes) -> X25519PrivateKey | None:
        if public in self._own:
            return self._own[public]
        seed = self._s.get(public)
        return None if seed is None else mask_private(seed, self.play.config.digest)

    def _strip(self, masking: Masking) -> tuple[np.ndarray, dict[object, int]]:
        """What is left of a vector, and the unknown streams in it with their signs."""
        vector, unknown = masking.vector.copy(), dict[object, int]()
        plus: list[bytes] = []
        minus: list[bytes] = []
        me, t2 = masking.peers.of(masking.name), masking.t2
        if me.commit_self in self._b:
            minus.append(self_key(self._b[me.commit_self], t2, me.name))
        else:
            unknown["self", me.commit_self, t2] = 1
        for other in masking.partners:
            their = masking.peers.of(other)
            sign = 1 if me.name < other else -1
            mine, others = self._private(me.mask_key), self._private(their.mask_key)
            if mine is None and others is None:
                unknown["pair", frozenset((me.mask_key, their.mask_key)), t2] = sign
                continue
            private, public = (mine, their.mask_key) if mine is not None else (others, me.mask_key)
            assert private is not None
            (minus if sign > 0 else plus).append(pair_key(private, public, t2, me.name, other))
        if self.play.config.blind:
            parts = [self._groups.get(masking.peers.of(n).commit_group) for n in masking.members]
            known = [part for part in parts if part]
            if len(known) == len(parts):
                minus.append(blind_key(group_key(known, t2), t2, me.name))
            else:
                unknown["blind", me.name, t2] = 1
        add_streams(vector, plus, minus, prg=getattr(self.play.config, "prg", "aes256ctr"))
        return vector, unknown

    def _solve(self) -> list[Sum]:
        rows = [m for m in self.play.maskings if m.name not in self.colluders]
        stripped = [self._strip(row) for row in rows]
        where: dict[object, list[int]] = defaultdict(list)
        for at, (_, unknown) in enumerate(stripped):
            for stream in unknown:
                where[stream].append(at)
        joined = list(range(len(rows)))

        def root(at: int) -> int:
            while joined[at] != at:
                at = joined[at]
            return at

        closed = set()
        for stream, places in where.items():
            if len(places) == 2 and stripped[places[0]][1][stream] + stripped[places[1]][1][stream] == 0:
                joined[root(places[0])] = root(places[1])
            else:
                closed.update(places)
        components: dict[int, list[int]] = defaultdict(list)
        for at in range(len(rows)):
            components[root(at)].append(at)
        return [
            Sum(frozenset(rows[at].name for at in part), sum(stripped[at][0] for at in part))
            for part in components.values()
            if not closed & set(part)
        ]


def _put_together(shares: list[Share], t: int, image: bytes, imaged: object) -> bytes | None:
    """Try several choices: a hostile client may have given false shares."""
    coins = random.Random(1)
    for _ in range(20 if len(shares) > t else int(len(shares) == t)):
        secret = combine(coins.sample(shares, t))
        if imaged(secret) == image:
            return secret
    return None


def plain_words(play: Play, names: Iterable[str]) -> np.ndarray:
    """The oracle in the ring: Python integers, then mod 2^bits."""
    bits = play.config.ring_bits
    return np.array([v % (1 << bits) for v in play.plain_sum(names)], dtype=f"u{bits // 8}")


def check_secrecy(play: Play, colluders: Iterable[str] = (), keys: Sequence[X25519PrivateKey] = ()) -> Attacker:
    """The invariant over all that left the clients. See the module for what is allowed.

    Returns:
        The attacker, with what it could open.
    """
    c, colluders = play.config, frozenset(colluders)
    honest = [name for name in c.roster if name not in colluders]
    # (a) Of no owner both kinds of shares, from anybody honest.
    kinds: dict[tuple[str, bytes], set[str]] = defaultdict(set)
    for opened in play.opened:
        if opened.holder not in colluders:
            kinds[opened.owner, opened.advert.commit_self].add(opened.kind)
    both = {owner for (owner, _), given in kinds.items() if len(given) > 1}
    assert not both, f"honest clients gave shares of b and of s of {sorted(both)}"
    # (b) After giving up, nothing.
    for name in honest:
        stages = [item.stage for item in play.said if item.name == name]
        if name in play.ended:
            assert stages[-1] == wire.ABORT, f"{name} went on after it gave up"
    _check_nothing_in_clear(play, honest)
    # (c) No sum but the one that is meant.
    attacker = Attacker(play, colluders, keys)
    assert not attacker.knows_both() - colluders, "b and s of one client came together"
    for opened in attacker.sums:
        # The attack's own control: what it calls open is right, word for word.
        assert np.array_equal(opened.words, plain_words(play, opened.owners)), "the attacker miscounts; mend it"
    assert len(attacker.sums) <= 1, f"several sums are open: {[sorted(s.owners) for s in attacker.sums]}"
    for opened in attacker.sums:
        assert colluders or not c.blind, "a blind sum is open, and nobody colludes"
        least = (c.min_clients if c.degree else c.quorum) - len(colluders)
        size, t2s = len(opened.owners), {m.t2 for m in play.maskings if m.name in opened.owners}
        assert size >= max(2, least), f"a sum over {sorted(opened.owners)} is open"
        rivals = {m.name for m in play.maskings if m.t2 in t2s and m.name not in colluders}
        assert not c.degree or 2 * size > len(rivals)
    return attacker


def _check_nothing_in_clear(play: Play, honest: Sequence[str]) -> None:
    """No secret of a client stands in what it sent; shares stand in stage 4 alone."""
    for name in honest:
        early = b"".join(item.body for item in play.said if item.name == name and item.stage != wire.UNMASK)
        late = b"".join(item.body for item in play.said if item.name == name and item.stage == wire.UNMASK)
        for truth in play.truths[name]:
            secrets = [truth.seed, truth.self_mask, truth.channel._private.private_bytes_raw(), truth.group]
            assert not any(secret and secret in early + late for secret in secrets)
            shares = [y for _, held in truth.held.values() for y in (held.self_share, held.seed_share)]
            assert not any(y and y in early for y in shares)


def outcome(play: Play, name: str) -> str:
    """How the round ended for a client: its code, or that with which the honest server refused it; ``exact``, ``other sum``,
    or ``waits`` when the server fell silent.
    """
    if name in play.ended or name in play.refused:
        return play.ended.get(name) or play.refused[name]
    client = play.clients[name]
    if client.result is None:
        assert client.state is not State.DONE
        return "waits"
    same = np.array_equal(client.result.ring_sum, plain_words(play, client.result.survivors))
    return "exact" if same else "other sum"


def judge(
    play: Play,
    victims: Iterable[str] = (),
    codes: Iterable[str] = (),
    *,
    others: Iterable[str] = HONEST,
    colluders: Iterable[str] = (),
    keys: Sequence[X25519PrivateKey] = (),
) -> list[str]:
    """Secrecy, and how it ended for every honest client.

    Args:
        play: after the attack.
        victims: clients at which it must end with one of ``codes``.
        others: how it may end for the rest.
        colluders, keys: as in :class:`Attacker`.

    Returns:
        The distinct outcomes, sorted, for the table.
    """
    check_secrecy(play, (), keys)
    colluders = frozenset(colluders)
    if colluders:
        check_secrecy(play, colluders, keys)
    victims, codes, others = set(victims), set(codes), set(others)
    ends = {name: outcome(play, name) for name in play.config.roster if name not in colluders}
    for name, end in ends.items():
        assert end in (codes if name in victims else others), f"{name}: {end}; of {ends}"
    _poke_the_dead(play)
    return sorted(set(ends.values()))


def _poke_the_dead(play: Play) -> None:
    """Whoever gave up answers nothing any more, whatever comes."""
    before = len(play.said)
    for name in play.ended:
        for delivery in {(d.stage, d.body): d for d in play.shown if d.to == name}.values():
            assert play.tell(*delivery) == []
    assert len(play.said) == before
