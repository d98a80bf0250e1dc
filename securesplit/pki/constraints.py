"""Name constraints: what an authority may speak for, even when its key is stolen.

Every authority made here may issue for its own trust domain only (a URI constraint on the host of ``spiffe://<domain>/...``), and
on request for given DNS suffixes and address ranges only. OpenSSL checks them in the handshake; :func:`require_permitted` checks
them again wherever a chain is verified without OpenSSL.

Source: RFC 5280, section 4.2.1.10. A kind of name that no permitted subtree speaks of is not constrained.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from cryptography import x509

from securesplit.errors import InputError

__all__ = ["constraints_of", "name_constraints", "permits"]

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_CHECKED = (x509.UniformResourceIdentifier, x509.DNSName, x509.IPAddress)


def name_constraints(domain: str, dns: Sequence[str], ips: Sequence[str]) -> x509.NameConstraints:
    """Permit one trust domain, and when given only these DNS suffixes and address ranges.

    Raises:
        InputError: SS-1808 for a malformed suffix or range.
    """
    permitted: list[x509.GeneralName] = [x509.UniformResourceIdentifier(domain)]
    for suffix in dns:
        if not suffix or suffix != suffix.lower().strip(".") or any(c.isspace() or c in "*/:@" for c in suffix):
            raise InputError(
                "SS-1808", f"{suffix[:80]!r} is not a DNS suffix", hint="Use one such as hospital.example; no wildcard."
            )
        permitted.append(x509.DNSName(suffix))
    try:
        permitted += [x509.IPAddress(ipaddress.ip_network(text)) for text in ips]
    except ValueError:
        raise InputError(
            "SS-1808", "one of the address ranges is none", hint="Use one such as 10.0.0.0/8, without host bits."
        ) from None
    return x509.NameConstraints(permitted, None)


def constraints_of(authority: x509.Certificate) -> x509.NameConstraints | None:
    """An authority's constraints; None when it has none."""
    try:
        return authority.extensions.get_extension_for_class(x509.NameConstraints).value
    except x509.ExtensionNotFound:
        return None


def permits(authority: x509.Certificate, names: Iterable[x509.GeneralName]) -> bool:
    """Whether an authority may speak for all of these names.

    A constraint of a kind that cannot be checked here permits nothing, because skipping it would permit everything.
    """
    constraints = constraints_of(authority)
    if constraints is None:
        return True
    permitted, excluded = constraints.permitted_subtrees or (), constraints.excluded_subtrees or ()
    if not all(isinstance(tree, _CHECKED) for tree in (*permitted, *excluded)):
        return False
    for name in names:
        alike = [tree for tree in permitted if type(tree) is type(name)]
        if alike and not any(_within(name, tree) for tree in alike):
            return False
        if any(_within(name, tree) for tree in excluded if type(tree) is type(name)):
            return False
    return True


def _within(name: x509.GeneralName, tree: x509.GeneralName) -> bool:
    if isinstance(name, x509.DNSName) and isinstance(tree, x509.DNSName):
        own, suffix = name.value.lower(), tree.value.lower().removeprefix(".")
        return suffix in {"", own} or own.endswith("." + suffix)
    if isinstance(name, x509.UniformResourceIdentifier) and isinstance(tree, x509.UniformResourceIdentifier):
        host, wanted = (urlsplit(name.value).hostname or "").lower(), tree.value.lower()
        return host.endswith(wanted) and host != wanted if wanted.startswith(".") else host == wanted
    if isinstance(name, x509.IPAddress) and isinstance(tree, x509.IPAddress):
        network = tree.value
        assert isinstance(network, _Network)
        return name.value in network
    return False
