"""From an address to an open session: verify the server, learn the job, admit or refuse it, sign the handshake.

Nothing but the handshake is sent before the client's own policy has admitted the job.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from securesplit.admit import admit, require_proof
from securesplit.agree import agree
from securesplit.client.diary import Diary
from securesplit.client.link import FINAL, OPENING, Link
from securesplit.errors import ConnectionFailed, LeakageExceeded, PolicyDenied, SecureSplitError
from securesplit.pki.certificate import verify_signature
from securesplit.pki.passphrase import Passphrase
from securesplit.pki.store import KeyFolder
from securesplit.policy.leakage import Proof, read_proofs
from securesplit.policy.schema import Policy
from securesplit.protocol.codec import Caps
from securesplit.protocol.messages import Welcome
from securesplit.protocol.session import Party, Session
from securesplit.transport.client import host_of, open_pipe
from securesplit.transport.pipe import Pipe

__all__ = ["dial", "greet", "refuse_remote", "waiting"]


def greet(
    pipe: Pipe, party: Party, policy: Policy, *, name: str, server: str, patience: float = 600.0, opening: float = OPENING,
    proofs: Sequence[Proof] = (), diary: Diary | None = None,
) -> Link:  # fmt: skip
    """Run the handshake over an open pipe and admit the job.

    Args:
        pipe: verified by its transport.
        party: both certificates and the signing key.
        policy: the client's own.
        name, server: certificate names of both ends.
        patience: seconds to wait for any answer once the session is open.
        opening: seconds for the server's greeting.
        proofs: this site's reports of the attack suite, for a policy with ``[leakage]`` limits.
        diary: this client's audit log.

    Raises:
        PolicyDenied: SS-2001 with every breach of the policy by the job, SS-2060 and SS-2061 with every rule by which the
            server's own policy does not suit, SS-2027. LeakageExceeded: SS-7002.
        RemoteProtocolError, ConnectionFailed: as in :meth:`Link.next`.
    """
    session = Session("client", party, Caps(message_bytes=policy.limits.max_message_bytes))
    link = Link(pipe, session, policy, name=name, patience=patience)
    session.hail(nonce=os.urandom(32), policy=policy.digest)
    for data in session.data_to_send():
        pipe.send(data)
    link.expect(Welcome, within=opening)
    try:
        admit(policy, link.job, peer=server)
        offer = session.offered
        agreed = policy if offer is None else agree(policy, offer, peer=server)
        if agreed is not policy:
            admit(agreed, link.job, peer=server)
        require_proof(agreed, link.job, model=link.model, proofs=proofs)
    except (PolicyDenied, LeakageExceeded) as error:
        _tell(pipe, session, error.code)
        raise
    link.hold_to(agreed)
    session.confirm(agreed.digest)
    for data in session.data_to_send():
        pipe.send(data)
    if diary is not None:
        assert session.welcome is not None
        diary.opened(
            session=session.welcome.session,
            certificate=party.peer,
            policy=agreed.digest,
            job=link.job.digest,
            model=link.model,
        )
        link.diary = diary
        link.checkpoint(within=opening)
    return link


def _tell(pipe: Pipe, session: Session, code: str) -> None:
    """Say by which code this client refuses, so that the server's operator reads it, too; it may have gone meanwhile."""
    session.fail(code)
    with suppress(SecureSplitError):
        for data in session.data_to_send():
            pipe.send(data)


def dial(
    url: str,
    *,
    keys: str | Path,
    policy: Policy,
    patience: float = 600.0,
    opening: float = OPENING,
    evidence: Path | None = None,
    diary: Diary | None = None,
    passphrase: Passphrase | None = None,
) -> Link:
    """Connect to a server.

    Args:
        url: ``wss://host:port``.
        keys: the client's key folder, such as ``keys/alice``.
        policy: the client's own policy.
        patience: seconds to wait for any answer once the session is open.
        opening: seconds for the connection, and again for the server's greeting.
        evidence: folder with this site's reports of the attack suite, for a policy with ``[leakage]`` limits.
        diary: the audit log to go on with; by default the one beside the keys, which the link then closes.
        passphrase: asked when the client's key is encrypted, and again for every new connection.

    Raises:
        ConnectionFailed: SS-30xx with the cause, PolicyDenied: SS-20xx, RemoteProtocolError: SS-40xx.
        LeakageExceeded: SS-7002 when the last report exceeds the policy's limits.
        CheckFailed: SS-1580 to SS-1585 when the client's audit log was tampered with or takes no rows.
    """
    try:
        folder = KeyFolder.open(Path(keys), "client", passphrase=passphrase)
    except SecureSplitError:
        refuse_remote(url, policy)  # Which does not need keys, and is the better thing to hear.
        raise
    book = Diary.beside(folder) if diary is None else diary
    try:
        book.begins(policy.digest)
        link = _dialled(url, folder, policy, patience=patience, opening=opening, evidence=evidence, diary=book)
    except SecureSplitError as error:
        with suppress(SecureSplitError):  # What went wrong first matters more than a log that cannot be written.
            book.refused(error)
        if diary is None:
            book.close()
        raise
    except BaseException:
        if diary is None:
            book.close()
        raise
    link.own_log = diary is None
    link.redial = lambda within: dial(
        url,
        keys=keys,
        policy=policy,
        patience=patience,
        opening=within,
        evidence=evidence,
        diary=book,
        passphrase=passphrase,
    )
    return link


def waiting(connect: Callable[[], Link], within: float, tell: Callable[[str], None]) -> Link:
    """Connect, and where the server is not there yet try again for so many seconds.

    Raises:
        ConnectionFailed: the last failure; at once for a refusal that no second try can change.
    """
    deadline, pause = time.monotonic() + within, 0.2
    while True:
        try:
            return connect()
        except ConnectionFailed as error:
            left = deadline - time.monotonic()
            if error.code in FINAL or left <= pause:
                raise
            tell(f"the server is not there ({error.code}), trying for another {left:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 2.0)


def _dialled(
    url: str, folder: KeyFolder, policy: Policy, *, patience: float, opening: float, evidence: Path | None, diary: Diary
) -> Link:
    refuse_remote(url, policy)
    proofs = () if evidence is None else read_proofs(evidence)
    pipe = open_pipe(url, folder, max_message=policy.limits.max_message_bytes, timeout=opening)
    try:
        party = Party(folder.cert_der, pipe.peer, folder.sign, verify_signature)
        link = greet(
            pipe, party, policy, name=folder.identity.name, server=pipe.identity.name, patience=patience, opening=opening,
            proofs=proofs, diary=diary,
        )  # fmt: skip
        refuse_remote(url, link.policy)
    except BaseException:
        pipe.close()
        raise
    link.folder = folder
    return link


def refuse_remote(url: str, policy: Policy) -> None:
    """Hold a loopback-only policy to loopback.

    Raises:
        InputError: SS-1140 when the address is not a wss:// URL.
        PolicyDenied: SS-2003.
    """
    host = host_of(url)
    if not policy.transport.loopback_only:
        return
    try:
        local = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise PolicyDenied(
            "SS-2003", f"policy '{policy.name}' is for loopback only", hint="Use a policy that protects what it sends."
        )
