"""Was a certificate good when something was signed? For records that are checked long after their certificates expired.

A handshake asks whether a certificate is good now (certificate.py). A record asks about a moment that has passed, and
answers differ in two points. Dates count at that moment. Revocation counts as it is known *now*: whoever stole a key can
write any date into what it signs, so a revoked certificate proves nothing, unless the person who checks knows from
elsewhere that the record existed before the revocation, and vouches for the moment.

What this does not protect against: a key that was stolen and never reported, and, when the moment is vouched for, a
person who is wrong about it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from securesplit.errors import ConnectionFailed, InputError
from securesplit.pki.certificate import (
    party_key,
    require_path,
    require_purpose,
    require_same_domain,
    serial_text,
    verify_signature,
)
from securesplit.pki.identity import Identity, Role, identity_of, read_certificate
from securesplit.pki.revocation import Lists
from securesplit.pki.trust import Trust

__all__ = ["PastAuthority"]

_HINT = "Name the authority's trust.pem, or where there is none its cert.pem, and its newest crl.pem from `securesplit certs crl`."


@dataclass(frozen=True, slots=True)
class PastAuthority:
    """An authority's certificates and revocation lists, for questions about the past.

    Attributes:
        trust: the pinned certificates: a root, an intermediate if there is one, and all that an exchange left.
        lists: one list for each of them, signature checked; how old they may be depends on the question.
    """

    trust: Trust = field(repr=False)
    lists: tuple[x509.CertificateRevocationList, ...] = field(repr=False)

    @classmethod
    def parse(cls, ca_pem: bytes, crl_pem: bytes) -> PastAuthority:
        """Read both files.

        Raises:
            InputError: SS-1621 when they are not an authority's certificates and the lists that they signed.
        """
        try:
            trust = Trust.parse(ca_pem)
        except ConnectionFailed:
            trust = None
        if trust is None or len(trust.domains) != 1:
            raise InputError("SS-1621", "the file of the authority holds no authority's certificate", hint=_HINT)
        try:
            lists = Lists.parse(crl_pem)
        except ConnectionFailed:
            raise InputError("SS-1621", "the revocation list cannot be read", hint=_HINT) from None
        own = [lists.of(authority) for authority in trust.authorities]
        if None in own:
            raise InputError("SS-1621", "the revocation list comes from another authority", hint=_HINT)
        return cls(trust, tuple(one for one in own if one is not None))

    def require_newest(self, *, at: datetime, vouched: bool, now: datetime) -> None:
        """Refuse a revocation list that is too old to answer.

        Args:
            at: the moment that is asked about.
            vouched: whether the person who checks vouches for it; then a list that was valid at that moment or later does.
            now: the time of the check; a list that is out of date now hides what was revoked since.

        Raises:
            InputError: SS-1621.
        """
        moment = at if vouched else now
        if any(one.next_update_utc is None or one.next_update_utc <= moment for one in self.lists):
            raise InputError("SS-1621", "the revocation list is out of date", hint=_HINT)

    def verify(self, leaf_der: bytes, role: Role, *, at: datetime, vouched: bool) -> Identity:
        """Check a leaf against this authority for a moment of the past.

        Args:
            leaf_der: the certificate, DER.
            role: what it must have been good for.
            at: the moment, with a time zone.
            vouched: whether a revocation after ``at`` leaves the certificate good.

        Returns:
            The identity, proven to be issued by the authority; possession of the key is *not* proven.

        Raises:
            ConnectionFailed: SS-3201 no identity, SS-3202 another authority or profile, SS-3203 expired then, SS-3204 not
                yet valid then, SS-3205 revoked, SS-3208 no certificate, SS-3210 another role, SS-3211 another domain, SS-3215 a
                kind of key that is not accepted.
        """
        try:
            return self._verify(leaf_der, role, at=at, vouched=vouched)
        except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
            # A hostile certificate can fail in the parser at any of its parts, which are read one by one.
            raise ConnectionFailed("SS-3208", "the certificate is malformed", hint="Ask its owner.") from None

    def verify_signed(
        self, name: str, certificate: bytes, signature: bytes, data: bytes, *, role: Role, at: datetime, vouched: bool
    ) -> None:
        """Check that a party of that name and role signed ``data`` with the key of its certificate (DER).

        Raises:
            ConnectionFailed: as :meth:`verify`; SS-3207 another signature, SS-3213 another party's certificate.
        """
        if self.verify(certificate, role, at=at, vouched=vouched).name != name:
            raise ConnectionFailed("SS-3213", "a certificate in the round belongs to another party")
        verify_signature(certificate, signature, data)

    def _verify(self, leaf_der: bytes, role: Role, *, at: datetime, vouched: bool) -> Identity:
        identity, leaf, whose = identity_of(leaf_der), read_certificate(leaf_der), "the certificate"
        require_purpose(leaf, identity, role, whose)
        if at > leaf.not_valid_after_utc:
            raise ConnectionFailed(
                "SS-3203", "the certificate had expired then", hint="Check the time that is asked about."
            )
        if at < leaf.not_valid_before_utc:
            raise ConnectionFailed(
                "SS-3204", "the certificate was not valid yet", hint="Check the time that is asked about."
            )
        require_same_domain(leaf, identity, self.trust, whose)
        path = require_path(leaf, self.trust, role, at, whose)
        party_key(leaf)
        for below, issuer in zip((leaf, *path), path, strict=False):
            crl = Lists(self.lists).of(issuer)
            assert crl is not None
            revoked = crl.get_revoked_certificate_by_serial_number(below.serial_number)
            if revoked is not None and not (vouched and revoked.revocation_date_utc > at):
                raise ConnectionFailed(
                    "SS-3205", f"the certificate is revoked (serial {serial_text(below.serial_number)})",
                    hint="If you know that the round was before the revocation, say so with --at.",
                )  # fmt: skip
        return identity
