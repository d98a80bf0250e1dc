"""What can be checked on this machine before anything is dialled: each check says ok, warn or fail, and what to do.

Nothing is changed, nothing is sent. The order is that of likely causes: the machine, the keys, the clock, the disk.
"""

from __future__ import annotations

import os
import shutil
import ssl
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from securesplit.errors import ConnectionFailed, SecureSplitError
from securesplit.pki.identity import Role, identity_of, read_certificate
from securesplit.pki.passphrase import Passphrase
from securesplit.pki.store import KeyFolder
from securesplit.transport.quantum import offers_hybrid

__all__ = ["Check", "check_keys", "check_machine", "check_place", "failed", "role_of"]

Status = Literal["ok", "warn", "fail"]
_PACKAGES = ("cryptography", "websockets", "msgpack", "pydantic", "safetensors", "torch", "transformers")
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One answer.

    Attributes:
        name: of the check, stable.
        status: ``fail`` means that something will not work.
        what: what was found.
        hint: what to do, when something is to be done.
        code: of the error that this would become, or empty.
    """

    name: str
    status: Status
    what: str
    hint: str = ""
    code: str = ""


def failed(name: str, error: SecureSplitError) -> Check:
    """A check that an error of ours ended."""
    return Check(name, "fail", error.what, error.hint, error.code)


def check_machine() -> Iterator[Check]:
    """Python, packages, TLS, and whether a recording of today's traffic could be opened by tomorrow's quantum computer."""
    here = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Check("python", "ok" if good else "fail", f"Python {here}", "" if good else "Python 3.11 or later is needed.")
    found, missing = [], []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        yield Check(
            "packages", "fail", f"missing: {', '.join(missing)}", "Install SecureSplit with its pinned packages."
        )
    else:
        yield Check("packages", "ok", ", ".join(found))
    if ssl.HAS_TLSv1_3:
        yield Check("tls", "ok", f"TLS 1.3 by {ssl.OPENSSL_VERSION}")
    else:
        yield Check("tls", "fail", f"{ssl.OPENSSL_VERSION} has no TLS 1.3", "Use a Python with OpenSSL 1.1.1 or later.")
    if offers_hybrid():
        yield Check(
            "post-quantum", "ok", "this side offers X25519MLKEM768; it is used where the other side has it, too"
        )
    else:
        yield Check(
            "post-quantum",
            "warn",
            f"{ssl.OPENSSL_VERSION} has no X25519MLKEM768: who records the traffic now may read it with a quantum computer later",
            "Use a Python that is linked with OpenSSL 3.5 or later, on both ends.",
        )


def check_keys(path: Path, role: Role, now: datetime, passphrase: Passphrase | None = None) -> Iterator[Check]:
    """A party's folder: modes and key, certificate, days left, revocation list, clock.

    Args:
        path: the party's folder, or the one above.
        role: what it is to be good for.
        now: the time of the check.
        passphrase: asked when the key is encrypted.
    """
    try:
        folder = KeyFolder.open(path, role, now=now, passphrase=passphrase)
    except ConnectionFailed as error:
        yield failed("keys", error)
        yield from _clock(path, now)
        return
    yield Check("keys", "ok", f"{folder.path}: modes, key, chain and role are in order ({folder.identity.uri})")
    leaf = read_certificate(folder.cert_der)
    left, life = leaf.not_valid_after_utc - now, leaf.not_valid_after_utc - leaf.not_valid_before_utc
    what = f"the certificate is good for {left.total_seconds() / 86400:.1f} more days"
    soon = left < life / 3
    yield Check("certificate", "warn" if soon else "ok", what, "Renew it: a third of its life is left." if soon else "")
    yield from _lists(folder, now)
    yield from _clock(folder.path, now)


def check_place(path: Path) -> Iterator[Check]:
    """Room and rights on the disk of a folder."""
    place = path if path.exists() else path.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        yield Check(
            "disk", "fail", f"{place} cannot be looked at ({type(error).__name__})", "Check the path.", "SS-1002"
        )
        return
    said = f"{free / _GIB:.1f} GiB free under {place}"
    if free < _GIB // 4:
        yield Check(
            "disk",
            "fail",
            said,
            "The ledger and the audit log stop the service when they cannot be written.",
            "SS-1002",
        )
    elif free < 5 * _GIB:
        yield Check("disk", "warn", said, "A model and its parts need more; make room.")
    elif not os.access(place, os.W_OK):
        yield Check("disk", "fail", f"{place} may not be written", "Give it to the user who runs this.", "SS-1002")
    else:
        yield Check("disk", "ok", said)


def _lists(folder: KeyFolder, now: datetime) -> Iterator[Check]:
    """How old the revocation lists are; :meth:`KeyFolder.open` has refused unusable ones."""
    texts = [b"-----BEGIN X509 CRL" + part for part in folder.crl_pem.split(b"-----BEGIN X509 CRL")[1:]]
    lists = [x509.load_pem_x509_crl(text) for text in texts]
    ends = [found.next_update_utc for found in lists if found.next_update_utc is not None]
    if not ends:
        yield Check(
            "crl", "fail", "the revocation list has no end", "Publish it anew: securesplit certs crl.", "SS-3206"
        )
        return
    left = min(ends) - now
    age = now - min(found.last_update_utc for found in lists)
    said = f"the revocation list is {age.total_seconds() / 3600:.0f} h old and good for {left.total_seconds() / 3600:.0f} more"
    if left < timedelta(days=2):
        hint = "Run 'securesplit certs crl' at the authority daily and copy crl.pem here; an outdated list refuses everybody."
        yield Check("crl", "warn", said, hint)
    else:
        yield Check("crl", "ok", said)


def _clock(folder: Path, now: datetime) -> Iterator[Check]:
    """A clock that is behind shows in files that come from its future."""
    newest: datetime | None = None
    for name in ("cert.pem", "ca.pem"):
        try:
            leaf = x509.load_pem_x509_certificate((folder / name).read_bytes())
        except (OSError, ValueError):
            continue
        newest = max(newest or leaf.not_valid_before_utc, leaf.not_valid_before_utc)
    try:
        crl = x509.load_pem_x509_crl((folder / "crl.pem").read_bytes())
        newest = max(newest or crl.last_update_utc, crl.last_update_utc)
    except (OSError, ValueError):
        pass
    if newest is not None and newest > now:
        behind = (newest - now).total_seconds() / 60
        what = f"this machine's clock is at least {behind:.0f} min behind its authority's"
        yield Check("clock", "fail", what, "Set the clock; let a time service keep it.", "SS-3204")
    else:
        yield Check("clock", "ok", f"{now:%Y-%m-%dT%H:%M:%SZ}, not before anything that was signed for this party")


def role_of(path: Path) -> Role:
    """The role that a party's certificate states; ``client`` where there is none to read."""
    try:
        leaf = x509.load_pem_x509_certificate((path / "cert.pem").read_bytes())
        return identity_of(leaf.public_bytes(serialization.Encoding.DER)).role
    except (OSError, ValueError, ConnectionFailed):
        return "client"
