"""Whom a client trusts with shares above 32 clients: how many others (k), and how many of them open a secret (t).

The graph. After T1 has fixed U1 (u members), each member i draws k holders out of the other u - 1, uniformly, by its own
coins, and gives shares of b and s, threshold t, to them and to itself. A pair mask lies on (i, j) when either drew the
other. So the server cannot steer an honest client's draw; it sees all draws, as it routes the boxes.

The adversary is the server with up to c clients, fixed before the draw. It picks U1 (of ``quorum`` to n), routes or keeps
back boxes, and says, after seeing the graph, who survived (U3, at least ``quorum``). The rounds' rules do the rest: honest
answers come for one (T2, U3) only, as 2T > n + c; and a holder gives its share of b_i only when i masked under that same T2,
which it knows by i's signature. WITHOUT THAT RULE NOTHING BELOW HOLDS: a second T2 can name to i only members that do not
hold its shares.

What opens what, for an honest i with x colluding holders (a client that is not in U3 never answers):

| secret                 | shares that come out                  | may not come out when |
|------------------------|---------------------------------------|-----------------------|
| s of a survivor        | x                                     | ever: (P1) x < t      |
| b of a dropped client  | x                                     | ever: (P1) x < t      |
| b of a survivor        | x + holders that answer + its own one | (P2) below            |
| s of a dropped client  | x + holders that answer               | meant to              |

(P2) By (P1) nobody learns a pair mask between two honest survivors, so the server learns sums over sets S of honest
survivors that no draw of a member of S leaves: with W the honest survivors outside S, no i in S drew a member of W. (A draw
into S from W is no hindrance: the server keeps that box back and loses only the drawer.) And each i in S has at least
t - 1 holders in S or among the colluders. For one S of s clients the draws of its members are independent, so a bound p
for each, whatever was drawn before, gives p^s. Of the holders of i all but at most u - |U3| lie in S or collude, therefore

    p <= Pr[Hypergeometric(u - 1, s - 1 + c, k) >= max(t - 1, k - (u - |U3|))],

which rises with u while the second term is the larger and falls afterwards (replace the one more member, when it is drawn,
by another): u = |U3| + k - t + 1, or n, is the worst U1. Or, for one S and one W of w clients, p <= C(n-1-w, k) / C(n-1, k),
worst at u = n. A union over C(n, s) sets, or C(n, s) C(n-s, w) pairs, whichever is less, for

* every s < ``smallest``, with |U3| = quorum, w = quorum - c - s: no sum covers fewer honest clients than that; and
* every s <= n/2, with |U3| >= 2s, w >= s: no sum covers half of the honest survivors or less. Two sums would be over two
  disjoint such sets. So at most ONE sum opens, as in the complete graph.

All clients are counted as if honest and c as if corrupt, so that the bound holds for every smaller number of colluders. (P1)
adds n Pr[Hypergeometric(u - 1, c, k) >= t], worst at the smallest u. The unit is one round: over r rounds, retries that
the server provokes included, the probabilities add up. Not covered: clients corrupted after the draw, clients whose
randomness is weak, and whether the remaining honest survivors are in the one sum.

(P3), no matter of secrecy: when d clients that were not chosen by looking at the graph vanish, at whatever stage, each
secret still has t shares: k - X of a vanished client, k + 1 - X of another, X ~ Hypergeometric(u - 1, d - 1 or d, k).

Sparse random graphs for secure sums: Bell, Bonawitz, Gascón, Lepoint, Raykova, ACM CCS 2020 (IACR ePrint 2020/704). The
bounds are derived here, for the rules of SSA-1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import comb, log2

from securesplit.errors import InputError

__all__ = [
    "COMPLETE_UP_TO",
    "LEAK_LOG2",
    "STUCK_LOG2",
    "Graph",
    "graph_for",
    "leak_log2",
    "require_graph",
    "stuck_log2",
]

COMPLETE_UP_TO = 32
"""Up to so many clients everybody holds shares of everybody."""

LEAK_LOG2 = -40.0
"""log2 of the largest probability, per round, that more than the one sum can be opened."""

STUCK_LOG2 = -20.0
"""log2 of the largest probability, per round, that a needed secret lacks shares although no more clients vanished than planned."""


@dataclass(frozen=True, slots=True)
class Graph:
    """Parameters of the graph.

    Attributes:
        degree: k, how many others each client gives shares to; n - 1 is the complete graph.
        threshold: t, how many shares open a secret.
    """

    degree: int
    threshold: int


@lru_cache(maxsize=1 << 14)
def _tail_log2(population: int, marked: int, drawn: int, least: int) -> float:
    """log2 Pr[at least ``least`` of ``drawn`` are marked], drawn without replacement; from exact integers."""
    if least <= max(0, drawn - (population - marked)):
        return 0.0
    ways = sum(comb(marked, x) * comb(population - marked, drawn - x) for x in range(least, min(marked, drawn) + 1))
    return min(0.0, log2(ways) - log2(comb(population, drawn))) if ways else -math.inf


def _sum_log2(terms: Iterable[float]) -> float:
    """log2 of the sum of probabilities given by their log2; at most 0."""
    finite = [term for term in terms if term > -math.inf]
    if not finite:
        return -math.inf
    top = max(finite)
    return min(0.0, top + log2(math.fsum(2.0 ** (term - top) for term in finite)))


def _leak_terms(n: int, k: int, t: int, c: int, smallest: int, quorum: int) -> Iterator[float]:
    """log2 of (P1), then of (P2) for s = 1, 2, ...: the equations of this module's docstring."""
    yield log2(n) + _tail_log2(max(quorum, k + 1) - 1, c, k, t)
    for s in range(1, max(smallest, n // 2 + 1)):
        survivors = quorum if s < smallest else max(quorum, 2 * s)
        outside = max(quorum - c - s, 0 if s < smallest else s)
        u = min(n, survivors + k - t + 1)
        by_shares = s * _tail_log2(u - 1, min(s - 1 + c, u - 1), k, max(t - 1, k - u + survivors))
        by_masks = log2(comb(n - s, outside)) + s * _tail_log2(n - 1, n - 1 - outside, k, k)
        yield log2(comb(n, s)) + min(by_shares, by_masks)


def _faults(n: int, quorum: int, colluders: int, smallest: int) -> str:
    if not 1 <= quorum <= n:
        return f"quorum {quorum}: it must lie between 1 and the roster of {n}"
    if colluders < 0 or not 1 <= smallest <= quorum - colluders:
        return f"a sum over {quorum} clients cannot cover {smallest} honest ones when {colluders} collude"
    return ""


def _refuse(what: str) -> InputError:
    return InputError("SS-1601", what, hint="Plan for fewer colluders or dropouts, or leave the graph complete.")


@lru_cache(maxsize=256)
def leak_log2(clients: int, degree: int, threshold: int, colluders: int, smallest: int, *, quorum: int) -> float:
    """log2 of the bound on (P1) or (P2) failing in one round, over every U1 of ``quorum`` to ``clients`` members.

    Args:
        clients: n, the roster.
        degree, threshold: k and t; where U1 has k members or fewer, everybody holds shares.
        colluders: c, at most so many clients side with the server.
        smallest: fewest honest clients that a sum may cover.
        quorum: fewest survivors for whom an honest client answers.

    Returns:
        At most 0; minus infinity where it cannot happen.

    Raises:
        InputError: SS-1601 when the numbers contradict each other.
    """
    what = _faults(clients, quorum, colluders, smallest)
    if not what and not (1 <= degree < clients and 1 <= threshold <= min(degree + 1, quorum)):
        what = f"{threshold} shares of {degree} holders: there are {clients} clients, of whom {quorum} may be left"
    if what:
        raise _refuse(what)
    return _sum_log2(_leak_terms(clients, degree, threshold, colluders, smallest, quorum))


@lru_cache(maxsize=256)
def stuck_log2(members: int, degree: int, threshold: int, dropouts: int) -> float:
    """log2 of the bound on (P3) failing: some secret is needed and lacks shares after ``dropouts`` clients vanished.

    The worst case is that they all vanish after stage 0; one that never advertised is nobody's holder.

    Args:
        members: u, clients of U1.
        degree, threshold: k and t.
        dropouts: d, at most u; whoever they are, they are not chosen by looking at the graph.

    Raises:
        InputError: SS-1601 when there are not so many to vanish.
    """
    if not 0 <= dropouts <= members:
        raise _refuse(f"{dropouts} dropouts among {members} clients")
    k = min(degree, members - 1)
    terms = []
    if dropouts:
        terms.append(log2(dropouts) + _tail_log2(members - 1, dropouts - 1, k, k - threshold + 1))
    if dropouts < members:
        terms.append(log2(members - dropouts) + _tail_log2(members - 1, dropouts, k, k - threshold + 2))
    return _sum_log2(terms)


@lru_cache(maxsize=64)
def graph_for(clients: int, *, quorum: int, colluders: int, smallest: int, dropouts: int) -> Graph:
    """The sparsest graph that keeps :data:`LEAK_LOG2` and :data:`STUCK_LOG2`, and of its thresholds the one with most slack.

    Args:
        clients: n, the roster.
        quorum: fewest survivors of a sum.
        colluders: c, so many clients may side with the server.
        smallest: fewest honest clients that a sum may cover; at most ``quorum - colluders``.
        dropouts: d, so many clients may vanish.

    Returns:
        The complete graph (degree n - 1) up to :data:`COMPLETE_UP_TO` clients and where no sparser one will do; its
        threshold is the largest that ``quorum`` answers, and n - d, still meet.

    Raises:
        InputError: SS-1601 when the numbers contradict each other, or not even the complete graph will do.
    """
    what = _faults(clients, quorum, colluders, smallest)
    if what or not 0 <= dropouts < clients:
        raise _refuse(what or f"{dropouts} dropouts among {clients} clients")
    most = min(quorum, clients - dropouts)  # Where U1 is so small that all hold shares, these many answer.
    t = 0
    for k in range(1, clients - 1 if clients > COMPLETE_UP_TO else 0):
        # The largest threshold at which rounds still complete never falls as k rises.
        while t < min(most, k + 1) and stuck_log2(clients, k, t + 1, dropouts) <= STUCK_LOG2:
            t += 1
        if t and _safe(clients, k, t, colluders, smallest, quorum):
            return Graph(k, _best_threshold(clients, k, t, colluders, smallest, quorum, dropouts))
    if clients < 2 or not _safe(clients, clients - 1, most, colluders, smallest, quorum):
        raise _refuse(f"{colluders} colluders and {dropouts} dropouts among {clients} clients: no graph bears both")
    return Graph(clients - 1, most)


def _safe(n: int, k: int, t: int, c: int, smallest: int, quorum: int) -> bool:
    """Whether the leak bound is kept; stops at the first term that is too large."""
    total = 0.0
    for term in _leak_terms(n, k, t, c, smallest, quorum):
        total += 2.0 ** min(term, 0.0)
        if total > 2.0**LEAK_LOG2:
            return False
    return True


def _best_threshold(n: int, k: int, top: int, c: int, smallest: int, quorum: int, dropouts: int) -> int:
    """Of the thresholds up to ``top`` that are safe, the one whose nearer bound is farthest; the larger in a tie."""
    best, slack = top, -math.inf
    for t in range(top, 0, -1):
        leak = _sum_log2(_leak_terms(n, k, t, c, smallest, quorum))
        if leak > LEAK_LOG2:
            break
        room = min(LEAK_LOG2 - leak, STUCK_LOG2 - stuck_log2(n, k, t, dropouts))
        if room > slack:
            best, slack = t, room
    return best


def require_graph(degree: int, threshold: int, *, clients: int, quorum: int, colluders: int, smallest: int) -> None:
    """Refuse a graph in which more than the one sum could be opened; what a client checks before it takes part.

    Raises:
        InputError: SS-1601, naming the bound that is reached and the one that is wanted, or what is contradictory.
    """
    leak = leak_log2(clients, degree, threshold, colluders, smallest, quorum=quorum)
    if leak > LEAK_LOG2:
        raise _refuse(
            f"degree {degree}, share threshold {threshold}: with {colluders} colluders the graph fails to hide an update "
            f"with probability up to 2^{leak:.1f} per round; at most 2^{LEAK_LOG2:.0f} is allowed"
        )
