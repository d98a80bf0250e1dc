"""A finished round in one process, records of it, and what a report says; for tests of verify.py and compare.py."""

import hashlib

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from securesplit.aggregate import wire
from securesplit.aggregate.record import RoundRecord, record_round, seal
from securesplit.aggregate.verify import verify_round
from securesplit.errors import ConnectionFailed

MADE = 1_700_000_000
SERVER = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"server").digest())


def length_prefixed(label: bytes, *parts: bytes) -> bytes:
    """The specification's H, written down once more: docs/protocol.md, section 9."""
    data = label + b"|" + b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hashlib.sha256(data).digest()


def t3_of(record: RoundRecord) -> bytes:
    t0 = hashlib.sha256(b"ssa-1/cfg|" + record.config).digest()
    t1 = length_prefixed(b"ssa-1/adv", t0, *record.adverts)
    t2 = length_prefixed(b"ssa-1/u2", t1, *(name.encode() for name in record.members))
    return length_prefixed(b"ssa-1/u3", t2, *(name.encode() for name in record.survivors))


def signatures_by(cohort, record: RoundRecord, signers) -> tuple[tuple[str, bytes], ...]:
    """What these clients would sign for the record's survivors, without the protocol's code for statements."""
    c = cohort.config
    body = wire.Consistent(session=c.session_id, round=c.round, cfg=c.digest, signature=bytes(8))
    said = b"ssa-1|consistent|" + t3_of(record) + wire.unsigned(body) + record.alike
    return tuple((name, cohort.identities[name].sign(said)) for name in sorted(signers))


class World:
    """One finished round (eve masks nothing; t = 4 of 5), and records of it."""

    def __init__(self, cohort, vanish=None):
        self.cohort, self.alike = cohort, {}

        def notice(delivery):
            if delivery.stage == wire.CONSISTENT and cohort.config.blind:
                self.alike[delivery.to] = cohort.clients[delivery.to]._said
            return delivery

        cohort.run({"eve": 2} if vanish is None else vanish, tamper=notice)

    def record(self, maker: str = "amir", **changes: object) -> RoundRecord:
        c, server = self.cohort, self.cohort.server
        bundle = next((wire.decode(wire.Bundle, b).signatures for _, stage, b, _ in c.down if stage == 3), ())
        role = "client" if maker in c.clients else "server"
        result = (
            c.clients[maker].result if role == "client" else None if server.result is None else server.result.aggregate
        )
        draft = record_round(
            c.config, server._peers, role=role, maker=maker, made=MADE, members=server._members, survivors=server._survivors,
            signatures=bundle, alike=self.alike.get(maker, b""), aborted=server.aborted,
            sum_digest=b"" if result is None else hashlib.sha256(result.ring_sum.tobytes()).digest(),
        )  # fmt: skip
        return self.sealed(draft.model_copy(update=changes), maker)

    def sealed(self, record: RoundRecord, by: str) -> RoundRecord:
        key = self.cohort.identities.get(by, SERVER)
        return seal(record, key.public_key().public_bytes_raw(), key.sign)

    def verify_server(self, name: str, certificate: bytes, signature: bytes, data: bytes) -> None:
        if (name, certificate) != ("gpu", SERVER.public_key().public_bytes_raw()):
            raise ConnectionFailed("SS-3999", "another server")
        try:
            SERVER.public_key().verify(signature, data)
        except Exception:  # noqa: BLE001 - whatever it is, the signature is not good
            raise ConnectionFailed("SS-3998", "bad signature") from None

    def report(self, record: RoundRecord, **options):
        options = {
            "now": MADE + 60,
            "verify_server": self.verify_server,
            "pinned_roster": self.cohort.config.roster,
        } | options
        return verify_round(record, self.cohort.verify, **options)


def failed(report) -> set[str]:
    assert report.valid == all(check.ok for check in report.checks)
    assert len({check.name for check in report.checks}) == len(report.checks)
    assert all(check.detail and check.detail.isprintable() for check in report.checks)
    return {check.name for check in report.checks if not check.ok}


def detail(report, name: str) -> str:
    return next(check.detail for check in report.checks if check.name == name)


def warnings(report) -> set[str]:
    return {check.name for check in report.checks if check.warning}
