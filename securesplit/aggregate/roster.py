"""Stage 0's outcome: the adverts of U1, checked, and their hash T1.

What this does not protect: the roster of names is only as good as where it came from. A server that also runs the
certificate authority can mint clients; pin the roster from the consortium.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from securesplit.aggregate.config import RoundConfig
from securesplit.aggregate.keys import bind, statement
from securesplit.aggregate.wire import Advertise, Roster, read, unsigned
from securesplit.errors import AggregationAborted, RemoteProtocolError, SecureSplitError

__all__ = ["Peers", "Verify", "check_signature", "peers_of", "read_advert", "read_roster"]

Verify = Callable[[str, bytes, bytes, bytes], None]
"""``verify(name, certificate_der, signature, data)``: returns when the certificate is the permitted one of that name
(chain, role, validity, revocation) and its key made the signature; raises a SecureSplitError otherwise."""


@dataclass(frozen=True, slots=True)
class Peers:
    """U1.

    Attributes:
        adverts: one per client, sorted by name.
        t1: transcript hash over the configuration and the signed adverts.
    """

    adverts: tuple[Advertise, ...] = field(repr=False)
    t1: bytes
    _by_name: Mapping[str, Advertise] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {advert.name: advert for advert in self.adverts})

    @property
    def names(self) -> tuple[str, ...]:
        """The names of U1, sorted."""
        return tuple(advert.name for advert in self.adverts)

    def of(self, name: str) -> Advertise:
        """The advert of a client of U1."""
        return self._by_name[name]


def check_signature(verify: Verify, advert: Advertise, said: bytes, signature: bytes) -> None:
    """Check a client's signature over a :func:`statement` by the certificate of its advert.

    Raises:
        RemoteProtocolError: SS-6002, naming the client.
    """
    try:
        verify(advert.name, advert.certificate, signature, said)
    except SecureSplitError as error:
        raise RemoteProtocolError(
            "SS-6002", f"the signature or the certificate of {advert.name} is not good ({error.code})",
            hint="Check its certificate; if it is good, the server altered the message.",
        ) from None  # fmt: skip


def read_advert(config: RoundConfig, data: bytes) -> Advertise:
    """Parse one advert; its signature is checked elsewhere.

    Raises:
        RemoteProtocolError: SS-6003 for a name outside the roster or a wrong commitment; codes of :func:`wire.read`.
    """
    advert = read(Advertise, data, config)
    if advert.name not in config.roster:
        raise RemoteProtocolError(
            "SS-6003",
            "an advert comes from a client outside the roster",
            hint="Compare the job's roster with the consortium's.",
        )
    if len(advert.commit_group) != (32 if config.blind else 0):
        raise RemoteProtocolError(
            "SS-6003", f"the advert of {advert.name} does not fit a round that is{'' if config.blind else ' not'} blind"
        )
    return advert


def peers_of(config: RoundConfig, adverts: Sequence[bytes]) -> Peers:
    """U1 from the encoded adverts.

    Raises:
        RemoteProtocolError: SS-6003 when they are not in the strict order of names or a public key appears twice;
            codes of :func:`read_advert`.
    """
    parsed = tuple(read_advert(config, data) for data in adverts)
    names = [advert.name for advert in parsed]
    if names != sorted(set(names)):
        raise RemoteProtocolError("SS-6003", "the adverts are not in order, or name a client twice")
    keys = [key for advert in parsed for key in (advert.mask_key, advert.share_key)]
    if len(set(keys)) != len(keys):
        raise RemoteProtocolError(
            "SS-6003",
            "two adverts, or the two uses of one, share a public key",
            hint="One of the clients copies another; start a round without it.",
        )
    return Peers(adverts=parsed, t1=bind("ssa-1/adv", config.digest, adverts))


def read_roster(config: RoundConfig, data: bytes, *, name: str, own: bytes, verify: Verify) -> Peers:
    """Check what the server presents as U1.

    Args:
        config: the round.
        data: a Roster body.
        name: this client.
        own: the advert that this client sent.
        verify: checks the other clients' certificates and signatures.

    Raises:
        AggregationAborted: SS-6003 when the own advert is missing or altered, SS-6010 when U1 is too small.
        RemoteProtocolError: SS-6002 for a bad signature; codes of :func:`peers_of`.
    """
    adverts = read(Roster, data, config).adverts
    if own not in adverts:
        raise AggregationAborted(
            "SS-6003", "this client's own advert is missing or altered", hint="The server is faulty or hostile."
        )
    peers = peers_of(config, adverts)
    if len(peers.adverts) < config.quorum:
        raise AggregationAborted(
            "SS-6010",
            f"{len(peers.adverts)} clients advertised; {config.quorum} are needed",
            hint="Wait until more clients are connected.",
        )
    for advert in peers.adverts:
        if advert.name != name:
            check_signature(verify, advert, statement("advertise", config.digest, unsigned(advert)), advert.signature)
    return peers
