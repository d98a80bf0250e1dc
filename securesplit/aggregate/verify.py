"""Does a recorded round hold? For an auditor who trusts neither the server nor the client that made the record.

Everything is recomputed: T1 from the adverts, T2 and T3 from the names, and what every signature is over. What threshold
clients signed cannot be forged without their keys, so a record that passes proves that they all saw these adverts, U2
and U3, under this configuration. All faults are reported, not the first alone.

What this does not protect: a record cannot show that a client's update is in the sum, or that the sum is right. The time
of the round is what the maker states. Clients whom the authority invented look like others: pin the roster. Threshold
clients that collude with the server can sign whatever they like.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from securesplit.aggregate import wire
from securesplit.aggregate.config import Floors, RoundConfig, check_floors
from securesplit.aggregate.findings import Check, Report, printable, shown
from securesplit.aggregate.keys import bind, statement
from securesplit.aggregate.record import RoundRecord, parse_config, sealed_statement
from securesplit.aggregate.roster import Verify, check_signature, peers_of, read_advert
from securesplit.errors import SecureSplitError

__all__ = ["verify_round"]

_SKEW = 600
"""Seconds by which clocks may differ."""


def verify_round(
    record: RoundRecord,
    verify: Verify,
    *,
    now: int,
    verify_server: Verify | None = None,
    pinned_roster: Sequence[str] | None = None,
    floors: Floors | None = None,
    alikes: Sequence[bytes] = (),
) -> Report:
    """Check one record.

    Args:
        record: of a round that ended, with a sum or without.
        verify: checks clients' certificates, at the time of the round, and their signatures.
        now: time of the check, seconds since 1970; a round of the future is refused.
        verify_server: the same for the seal of a server.
        pinned_roster: who may take part, from the consortium; None takes the recorded roster, with a warning.
        floors: a client's policy to hold the round against.
        alikes: values that other records of this round hold in ``alike``, for a record without one.

    Returns:
        Every check by name. It never raises for what a record holds.
    """
    try:
        config = parse_config(record.config)
    except SecureSplitError as error:
        return Report(record, None, b"", (), (), (_check("configuration", (error.what, *error.details[1:])),))
    t1 = bind("ssa-1/adv", config.digest, record.adverts)
    t2 = bind("ssa-1/u2", t1, (name.encode() for name in record.members))
    t3 = bind("ssa-1/u3", t2, (name.encode() for name in record.survivors))
    known, adverts = _adverts(config, record)
    signers, agreement = _agreement(config, record, known, t3, verify, alikes)
    checks = [
        _check("configuration", (), f"legal, in its one encoding, digest {config.digest.hex()[:16]}"),
        _roster(config, pinned_roster),
        *(() if floors is None else (_floors(config, floors),)),
        *_maker(config, record, known, verify if record.role == "client" else verify_server, now),
        adverts,
        _identities(config, known, verify),
        *_sets(config, record, tuple(sorted(known))),
        *agreement,
        _result(config, record),
    ]
    return Report(record, config, t3, tuple(sorted(known)), signers, tuple(checks))


def _check(name: str, faults: Sequence[str], good: str = "", *, warning: bool = False) -> Check:
    return Check(name, not faults, printable("; ".join(faults) if faults else good), warning and not faults)


def _roster(config: RoundConfig, pinned: Sequence[str] | None) -> Check:
    if pinned is None:
        note = f"{len(config.roster)} clients as recorded; give the consortium's roster to compare with"
        return _check("roster", (), note, warning=True)
    faults = []
    if strangers := sorted(set(config.roster) - set(pinned)):
        faults.append(f"not of the pinned roster: {shown(strangers)}")
    if missing := sorted(set(pinned) - set(config.roster)):
        faults.append(f"missing of the pinned roster: {shown(missing)}")
    return _check("roster", faults, f"the {len(config.roster)} pinned clients")


def _floors(config: RoundConfig, floors: Floors) -> Check:
    try:
        check_floors(config, config.roster[0], floors)
    except SecureSplitError as error:
        return _check("floors", error.details or (error.what,))
    return _check("floors", (), "the policy allows such a round")


def _maker(
    config: RoundConfig, record: RoundRecord, known: dict[str, wire.Advertise], verify: Verify | None, now: int
) -> tuple[Check, Check]:
    faults, client = [], record.role == "client"
    who = f"{record.role} {record.maker}" if record.role != record.maker else record.maker
    good, warning = f"sealed by {who}", False
    if client and not record.aborted and record.maker not in record.survivors:
        faults.append(f"{who} keeps a sum that it is not in")
    if client and record.maker in known and known[record.maker].certificate != record.certificate:
        faults.append(f"the seal's certificate is not the one that {who} advertised")
    if client and record.maker not in config.roster:
        faults.append(f"{who} is not in the roster")
    elif not record.seal and not record.certificate:
        if client:
            faults.append(f"{who} did not seal its record")
        good, warning = (
            f"{who} did not seal it: its time, its sum and how it ended are claims that anybody can make",
            True,
        )
    elif verify is None:
        good, warning = f"the seal of {who} was not checked", True
    else:
        try:
            verify(record.maker, record.certificate, record.seal, sealed_statement(record))
        except SecureSplitError as error:
            faults.append(f"the seal or the certificate of {who} is not good ({error.code})")
    stated = datetime.fromtimestamp(record.made, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    future = [f"{stated} has not come yet"] if record.made > now + _SKEW else []
    return _check("maker", faults, good, warning=warning), _check("time", future, f"{stated} by the maker's clock")


def _adverts(config: RoundConfig, record: RoundRecord) -> tuple[dict[str, wire.Advertise], Check]:
    known: dict[str, wire.Advertise] = {}
    faults = []
    for place, data in enumerate(record.adverts, 1):
        try:
            advert = read_advert(config, data)
        except SecureSplitError as error:
            faults.append(f"advert {place}: {error.what} ({error.code})")
        else:
            known.setdefault(advert.name, advert)
    if not faults:
        try:
            peers_of(config, record.adverts)
        except SecureSplitError as error:
            faults.append(error.what)
    if not record.aborted and len(record.adverts) < config.quorum:
        faults.append(f"{len(record.adverts)} adverts where {config.quorum} are needed")
    return known, _check("adverts", faults, f"{len(known)} of this round, in order, all keys different")


def _identities(config: RoundConfig, known: dict[str, wire.Advertise], verify: Verify) -> Check:
    faults = []
    for advert in known.values():
        try:
            said = statement("advertise", config.digest, wire.unsigned(advert))
            check_signature(verify, advert, said, advert.signature)
        except SecureSplitError as error:
            faults.append(error.what)
    return _check("identities", faults, "every advert is signed under a good certificate of its name")


def _sets(config: RoundConfig, record: RoundRecord, clients: Sequence[str]) -> tuple[Check, Check, Check]:
    short = []
    if not record.aborted and len(record.survivors) < config.quorum:
        short.append(f"{len(record.survivors)} survivors where {config.quorum} are needed")
    u2 = _set_faults(record.members, clients, "advertised")
    note = f"it ended by {record.aborted}, so none is needed" if record.aborted else f"{config.quorum} are enough"
    return (
        _check("members", u2, f"{len(record.members)} within U1"),
        _check("survivors", _set_faults(record.survivors, record.members, "are members"), f"{len(record.survivors)} within U2"),
        _check("quorum", short, note),
    )  # fmt: skip


def _set_faults(names: Sequence[str], within: Sequence[str], verb: str) -> list[str]:
    faults = []
    if list(names) != sorted(set(names)):
        faults.append("not in the order of names, or a name twice")
    if strangers := sorted(set(names) - set(within)):
        faults.append(f"none of those who {verb}: {shown(strangers)}")
    return faults


def _agreement(
    config: RoundConfig,
    record: RoundRecord,
    known: dict[str, wire.Advertise],
    t3: bytes,
    verify: Verify,
    alikes: Sequence[bytes],
) -> tuple[tuple[str, ...], tuple[Check, ...]]:
    """Who signed T3, and whether they are enough; the rules of agreement.check_quorum, with every fault named."""
    draft = wire.Consistent(session=config.session_id, round=config.round, cfg=config.digest, signature=bytes(8))
    names = [name for name, _ in record.signatures]
    able = {name: signature for name, signature in record.signatures if name in known and name in record.survivors}
    signers: tuple[str, ...] = ()
    # A server's record of a blind round lacks what clients signed with; whichever value fits shows itself.
    for alike in dict.fromkeys((record.alike,) if record.alike or not config.blind else (b"", *alikes)):
        said = statement("consistent", t3, wire.unsigned(draft) + alike)
        good = tuple(sorted(name for name, signature in able.items() if _good(verify, known[name], said, signature)))
        signers = max(signers, good, key=len)
    few = []
    if not record.aborted and len(signers) < config.threshold:
        few.append(f"{len(signers)} survivors signed this U3 where {config.threshold} are needed")
        if config.blind and record.role == "server" and not record.alike and not signers:
            few.append("give a client's record of this blind round along with the server's")
    bad = sorted(set(able) - set(signers))
    note = f"{len(bad)} signatures are not over this U3: {shown(bad)}" if bad else f"{len(signers)} good, none bad"
    needed = "none is needed" if record.aborted else f"{config.threshold} are needed"
    return signers, (
        _check("signers", _set_faults(names, record.survivors, "survived"), f"{len(names)} survivors, each once"),
        _check("agreement", few, f"{len(signers)} survivors signed this U3, {needed}"),
        _check("signatures", (), note, warning=bool(bad)),
    )


def _good(verify: Verify, advert: wire.Advertise, said: bytes, signature: bytes) -> bool:
    try:
        check_signature(verify, advert, said, signature)
    except SecureSplitError:
        return False
    return True


def _result(config: RoundConfig, record: RoundRecord) -> Check:
    faults = []
    sealed_from_server = config.blind and record.role == "server"
    if len(record.alike) not in {0, 32} or (record.alike and not config.blind):
        faults.append("a value of blind rounds does not fit this one")
    if record.aborted:
        if record.sum_digest:
            faults.append(f"there is a sum although the round ended by {record.aborted}")
        return _check("result", faults, f"no sum: the round ended by {record.aborted}")
    if sealed_from_server:
        if record.sum_digest:
            faults.append("the server states a sum that must be hidden from it")
        return _check("result", faults, "the sum is hidden from the server")
    if len(record.sum_digest) != 32:
        faults.append("the digest of the sum is missing")
    return _check("result", faults, f"the sum has the digest {record.sum_digest.hex()[:16]}, as the maker states")
