"""What a client insists on before it believes who is in a sum.

The rule that carries the security of stage 4: a client opens shares only for a set of survivors that at least t distinct
clients have signed, each of whom signs one set per round. As 2t > n no two sets can both be signed by t honest clients,
so the server never gets shares of b from some and of s from others for the same client.

What this does not protect: c clients that collude with the server may sign two sets. Then 2t > n + c is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.keys import statement
from securesplit.aggregate.roster import Peers, Verify, check_signature
from securesplit.aggregate.wire import Masked, Survivors, read, unsigned
from securesplit.errors import AggregationAborted, RemoteProtocolError

__all__ = ["HOSTILE", "check_masked", "check_quorum", "check_senders", "check_set", "check_survivors"]

HOSTILE = "The server is faulty or hostile; nothing more is sent to it in this round."


def check_set(config: RoundConfig, name: str, names: Sequence[str], *, within: Sequence[str]) -> None:
    """Check a set of clients that the server announces.

    Args:
        config: the round.
        name: this client, which must be in the set.
        names: the set, sorted.
        within: the earlier set that it may only shrink.

    Raises:
        AggregationAborted: SS-6008 when it is no such set, SS-6010 when fewer than max(t, m_min) are left.
    """
    if list(names) != sorted(set(names)) or not set(names) <= set(within):
        raise AggregationAborted(
            "SS-6008", "a set of clients is not in order or not within the earlier one", hint=HOSTILE
        )
    if name not in names:
        raise AggregationAborted(
            "SS-6008", "this client was left out of the round", hint="It was too slow, or the server is hostile."
        )
    if len(names) < config.quorum:
        what = f"{len(names)} clients are left; {config.quorum} are needed"
        raise AggregationAborted("SS-6010", what, hint="Start a new round when more clients are connected.")


def check_senders(config: RoundConfig, name: str, senders: Sequence[str], *, members: Sequence[str]) -> None:
    """Check whose boxes came to this client: of all other members, or in the sparse graph of some of them.

    A box that the server keeps back costs a mask on one side alone. What it may learn by that is bounded in graph.py, under
    the rule of :func:`check_masked`.

    Raises:
        AggregationAborted: SS-6008.
    """
    others = [member for member in members if member != name]
    some_suffice = config.degree and not config.blind
    if list(senders) != (sorted(set(senders) & set(others)) if some_suffice else others):
        raise AggregationAborted("SS-6008", "the boxes do not match the members", hint=HOSTILE)


def check_survivors(config: RoundConfig, name: str, told: Survivors, *, members: Sequence[str]) -> None:
    """Check the announced U3 and U2 without U3 against U2.

    Raises:
        AggregationAborted: SS-6009 when a client is in both: shares of its b and of its s would open its update.
            SS-6008 and SS-6010 as :func:`check_set`; SS-6008 also when the two are not together U2.
    """
    if set(told.survivors) & set(told.dropped):
        raise AggregationAborted("SS-6009", "the server counts a client as survivor and as dropped", hint=HOSTILE)
    check_set(config, name, told.survivors, within=members)
    if list(told.dropped) != [member for member in members if member not in told.survivors]:
        raise AggregationAborted("SS-6008", "survivors and dropped are not together the members", hint=HOSTILE)


def check_masked(
    config: RoundConfig,
    peers: Peers,
    proofs: Sequence[tuple[str, bytes]],
    *,
    owners: Sequence[str],
    t2: bytes,
    verify: Verify,
) -> None:
    """Check, in the sparse graph, that the survivors whose shares this client holds masked under the U2 that it knows.

    The bounds of graph.py rest on it: under another U2 a client may have masked with nobody that holds its shares.

    Args:
        config, peers, t2: the round so far.
        proofs: bodies of stage 2 by name, as the server gave them.
        owners: whose shares this client holds, itself left out; sorted.
        verify: checks certificates and signatures.

    Raises:
        AggregationAborted: SS-6008 when the proofs are not of these clients.
        RemoteProtocolError: SS-6002 for a signature that is not good; codes of :func:`wire.read`.
    """
    if [name for name, _ in proofs] != list(owners):
        raise AggregationAborted("SS-6008", "it is not shown what the survivors masked under", hint=HOSTILE)
    for name, data in proofs:
        body = read(Masked, data, config)
        check_signature(verify, peers.of(name), statement("masked", t2, unsigned(body)), body.signature)


def check_quorum(
    config: RoundConfig,
    peers: Peers,
    signatures: Sequence[tuple[str, bytes]],
    *,
    survivors: Sequence[str],
    said: bytes,
    verify: Verify,
) -> None:
    """Check that at least t survivors signed the same statement as this client did.

    Args:
        config, peers: the round so far.
        signatures: by name, sorted.
        survivors: U3.
        said: the statement over U3 that this client signed.
        verify: checks certificates and signatures.

    Raises:
        AggregationAborted: SS-6008 when the signers are not distinct survivors, SS-6010 when fewer than t are good. A
            bad signature costs only itself: one faulty client must not stop those who agree. SS-6004, naming the signer, in
            blind rounds, where a signature is bad when its owner holds other values than the others: only clients can see
            that, and its update, made from another start, is in the sum already.
    """
    names = [signer for signer, _ in signatures]
    if names != sorted(set(names)) or not set(names) <= set(survivors):
        raise AggregationAborted("SS-6008", "the signatures are not of distinct survivors", hint=HOSTILE)
    good, odd = 0, list[str]()
    for signer, signature in signatures:
        try:
            check_signature(verify, peers.of(signer), said, signature)
        except RemoteProtocolError:
            odd.append(signer)
            continue
        good += 1
        if good == config.threshold and not config.blind:
            return
    if good >= config.threshold and not odd:
        return
    if good >= config.threshold:
        what = f"{', '.join(odd)} holds other values than the others, or did not sign what they signed"
        raise AggregationAborted(
            "SS-6004", what, hint="Let it start from the others' state, or start a round without it."
        )
    what = f"{good} clients agree on who survived; {config.threshold} are needed"
    raise AggregationAborted("SS-6010", what, hint="Too many left, or the server told clients different things.")
