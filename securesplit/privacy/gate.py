"""The narrow waist: nothing leaves a client except through :meth:`Gate.release`.

    refuse NaN and infinity -> clip (fp64 norm) -> charge the ledger (fsync) -> add noise (own CSPRNG) -> Released

The order is the guarantee: a crash after the charge wastes budget, and no crash sends without a charge. Senders take
:class:`Released`, which only this file can make, never a tensor.

Guarantee of one release at unit ``sequence``, relation ``replace-one``: mu = 2C/sigma, against a server that sees every
byte, knows the policy and the code, and may choose everything it sends. Not covered: message lengths (public buckets),
timing, order; floating-point attacks beyond what securesplit/privacy/noise.py says.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from securesplit.errors import InputError, PolicyDenied
from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.clip import clip_sequence, refuse_non_finite
from securesplit.privacy.clipped_sum import ClippedSum
from securesplit.privacy.ledger import ALL, Charge, Ledger
from securesplit.privacy.noise import gaussian
from securesplit.privacy.plan import At, ChannelPlan, plan_for

_log = logging.getLogger(__name__)
PEERS = "peers"
UNLIMITED = 1 << 62
_MINT = object()

Codec = Literal["f32", "bf16"]


@dataclass(frozen=True, slots=True)
class Released:
    """Rows that may leave. Only a gate can make one.

    Attributes:
        payload: little-endian float bytes of type ``codec``, C order, shape (B, T, D).
        shape: (B, T, D).
        codec: ``f32`` or ``bf16``.
        gain: public factor for B's input; see :meth:`securesplit.privacy.plan.ChannelPlan.gain`.
        graph: the clipped tensor with its autograd graph. It stays on the client; B's gradient is sent back into it.
    """

    payload: bytes = field(repr=False)
    shape: tuple[int, int, int]
    codec: Codec
    gain: float
    graph: Tensor = field(repr=False)
    mint: InitVar[object]  # Not kept, so that no instance lends it to a forgery or to dataclasses.replace.

    def __post_init__(self, mint: object) -> None:
        if mint is not _MINT:
            raise TypeError("Released is made by Gate.release and by nothing else")


@dataclass(frozen=True, slots=True)
class ReleasedUpdate:
    """An adapter update that may enter a secure sum. Only a gate can make one.

    Attributes:
        vector: (d,) float64.
        noised: whether DP noise of this client's own is in it. Without it the update is protected by the masks alone:
            from the server entirely in blind mode, from the other clients only as far as a sum of all hides one part.
    """

    vector: npt.NDArray[np.float64] = field(repr=False)
    noised: bool
    mint: InitVar[object]

    def __post_init__(self, mint: object) -> None:
        if mint is not _MINT:
            raise TypeError("ReleasedUpdate is made by Gate.release_update and by nothing else")


class Gate:
    """One client's only way out.

    Args:
        policy: the client's own policy; no server can change it.
        ledger: the site's ledger; required unless the policy is UnsafeNoPrivacy.
        version: names the state of partition A that produces what is released, such as a digest of its weights. A
            memoised release is reused only under the same version.
        codec: type on the wire; the cast happens after the noise.
        roster: all clients that will hold the same trained C. Each may spend its part of the channel ``decode``, because
            what a trained C generates at one site depends on the records of all.

    Raises:
        InputError: SS-1530 when a private policy comes without a ledger.
    """

    def __init__(
        self,
        policy: Policy,
        ledger: Ledger | None,
        *,
        version: str = "",
        codec: Codec = "f32",
        roster: Sequence[str] = (),
    ) -> None:
        self.policy = policy
        self.codec = codec
        self.version = version
        self._ledger = ledger
        self._roster = tuple(sorted(roster))
        self._plan = plan_for(policy.privacy) if isinstance(policy.privacy, Gaussian) else None
        if self._plan is None:
            _log.warning("policy '%s' is UnsafeNoPrivacy: everything leaves as it is", policy.name)
        elif ledger is None:
            raise InputError("SS-1530", "a private policy needs a ledger", hint="Open one: Ledger(directory).")

    def release(
        self,
        tensor: Tensor,
        *,
        at: At,
        records: Sequence[str] | None = None,
        contents: Sequence[str] | None = None,
        memoise: bool = True,
    ) -> Released:
        """Make a tensor fit to leave.

        Args:
            tensor: (B, T, D), one sequence per row of B. Its graph is kept for the backward pass.
            at: ``cut`` (O1), ``gradient`` (O3) or ``decode`` (O1 of generated tokens).
            records: the ledger key of each sequence's record. Without it, every sequence is charged to all records of
                the site, which is always true and always dearest.
            contents: names what of each record the rows are made from, such as a keyed hash of its tokens. A remembered
                release is resent for the same content only.
            memoise: resend the bytes that were released before for the same record, content, channel, noise, version and
                shape.

        Returns:
            Released rows.

        Raises:
            CheckFailed: SS-1510 for NaN or infinity at the cut (a gradient with them is released as zero: it depends on
                what the server answered, and stopping would tell it for whom), SS-1522 when the ledger cannot be written.
            PolicyDenied: SS-2010 when the policy closes this channel.
            BudgetExhausted: SS-5001, SS-5002. Nothing was noised, nothing may be sent.
        """
        if tensor.dim() != 3:
            raise ValueError("a release is (B, T, D)")
        if self._plan is None:
            refuse_non_finite(tensor)
            return self._mint(
                [_encode(row, self.codec) for row in tensor.detach().float().cpu().numpy()],
                tensor.float(),
                gain=1.0,
            )
        channel = self._open(at)
        if at == "gradient":
            finite = torch.isfinite(tensor).flatten(1).all(1)
            tensor = torch.where(finite[:, None, None], tensor, torch.zeros_like(tensor))
        clipped = clip_sequence(tensor, channel.clip)
        keys = list(records) if records is not None else [ALL] * len(tensor)
        if len(keys) != len(tensor):
            raise ValueError("one record per sequence")
        of = list(contents) if contents else [""] * len(keys)
        if len(of) != len(keys):
            raise ValueError("one content per sequence")
        payloads = self._payloads(clipped, at, channel, keys, of, memoise=memoise and records is not None)
        return self._mint(payloads, clipped, gain=channel.gain(clipped[0].numel()) if keys else 1.0)

    def require(self, count: int, *, at: At) -> None:
        """Check, before anything is sent, that ``count`` releases charged to all records can be paid.

        Raises:
            PolicyDenied: SS-2010 when the policy closes this channel.
            BudgetExhausted: SS-5001, SS-5002.
        """
        if self._plan is None:
            return
        assert self._ledger is not None
        channel = self._open(at)
        self._ledger.require(
            self._priced(ALL, at, channel), count=count, budget=self._plan.budget, cap=self._cap(at, channel)
        )

    def release_update(self, update: npt.NDArray[np.float64] | ClippedSum) -> ReleasedUpdate:
        """Make an adapter update fit for a secure sum.

        Args:
            update: in regime ``round`` a :class:`ClippedSum`, which is charged to each of its records and noised here
                with the full sigma of the channel ``update``, so that the claim needs no honest peer. In regime
                ``frozen`` the plain difference of C's adapters; it is neither noised nor charged, because the policy's
                blind sum keeps it from the server altogether; what the peers learn from the sum is stated in
                docs/threat-model.md.

        Raises:
            PolicyDenied: SS-2010 when the policy has no channel for the sum, SS-2011 when a plain difference is offered
                where only noised sums may leave.
            BudgetExhausted: SS-5001, SS-5002; in regime ``frozen`` for the reserve that peers may spend.
        """
        if isinstance(update, ClippedSum):
            return self._release_sum(update)
        privacy = self.policy.privacy
        if isinstance(privacy, Gaussian):
            if privacy.regime != "frozen" or not self.policy.aggregation.blind:
                raise PolicyDenied(
                    "SS-2011",
                    "an update without noise may enter a blind sum in regime 'frozen' only",
                    hint="This is a bug; report it.",
                )
            self.reserve_for_peers()
        if not np.isfinite(update).all():  # Stopping here would tell the server that its answers provoked it.
            update = np.zeros_like(update)
        return ReleasedUpdate(vector=update, noised=False, mint=_MINT)

    def reserve_for_peers(self) -> None:
        """Charge, once per roster, what the other clients may generate with a C that learnt from this site's records.

        A generated token that is fed back depends on every record that trained C, at whichever site it is generated. This
        site cannot see its peers' ledgers, so it pays for their whole parts of the channel ``decode`` before C is shared.
        All clients of a sum hold the same policy (its digest is in the sum's keys); a peer that breaks it, or hands C to
        the server, is outside every such claim.

        Raises:
            BudgetExhausted: SS-5001; nothing may be shared then.
        """
        if self._plan is None or self._plan.decode is None or len(self._roster) < 2:
            return
        assert self._ledger is not None
        channel, version = self._plan.decode, f"{self.policy.digest}:{'|'.join(self._roster)}"
        count = (len(self._roster) - 1) * (channel.releases // len(self._roster))
        if count == 0 or self._ledger.recall(ALL, PEERS, version) is not None:
            return
        whole = replace(self._priced(ALL, "decode", channel), channel=PEERS, units=count * channel.units)
        self._ledger.charge([whole], budget=self._plan.budget, caps=[UNLIMITED])
        self._ledger.remember(ALL, PEERS, version, b"")

    def _release_sum(self, update: ClippedSum) -> ReleasedUpdate:
        if self._plan is None:
            return ReleasedUpdate(vector=update.vector, noised=False, mint=_MINT)
        channel = self._open("update")
        if update.bound > channel.clip:
            raise PolicyDenied(
                "SS-2010", "a sum was clipped at more than the policy's bound", hint="This is a bug; report it."
            )
        self._charge(update.records, "update", channel)
        return ReleasedUpdate(
            vector=update.vector + gaussian(update.vector.shape, channel.sigma), noised=True, mint=_MINT
        )

    def _payloads(
        self, clipped: Tensor, at: At, channel: ChannelPlan, keys: list[str], contents: list[str], *, memoise: bool
    ) -> list[bytes]:
        assert self._ledger is not None
        same = f"{channel.clip!r}:{channel.sigma!r}:{self.version}:{self.codec}:{tuple(clipped.shape[1:])}"
        # A record that stands twice in a batch, as texts that occur twice do, is released once and sent twice.
        names = [
            (k, f"{same}:{c}") if memoise else (k, str(i)) for i, (k, c) in enumerate(zip(keys, contents, strict=True))
        ]
        sent: dict[tuple[str, str], bytes] = {}
        for key, version in dict.fromkeys(names) if memoise else ():
            if (payload := self._ledger.recall(key, at, version)) is not None:
                sent[key, version] = payload
        fresh: dict[tuple[str, str], int] = {}
        for i, name in enumerate(names):
            if name not in sent:
                fresh.setdefault(name, i)
        self._charge([keys[i] for i in fresh.values()], at, channel)
        rows = clipped.detach().cpu().numpy()
        for name, i in fresh.items():
            noised = rows[i].astype(np.float64) + gaussian(rows[i].shape, channel.sigma)
            sent[name] = _encode(noised.astype(np.float32), self.codec)
            if memoise:
                self._ledger.remember(name[0], at, name[1], sent[name])
        return [sent[name] for name in names]

    def _charge(self, keys: list[str], at: At, channel: ChannelPlan) -> None:
        if not keys:
            return
        assert self._ledger is not None
        assert self._plan is not None
        charges = [self._priced(k, at, channel) for k in keys]
        self._ledger.charge(charges, budget=self._plan.budget, caps=[self._cap(at, channel)] * len(keys))

    def _open(self, at: At) -> ChannelPlan:
        assert self._plan is not None
        channel = self._plan.channel(at)
        if channel is None:
            raise PolicyDenied(
                "SS-2010",
                f"policy '{self.policy.name}' releases nothing at '{at}'",
                hint="Use a policy that opens this channel.",
            )
        return channel

    def _cap(self, at: At, channel: ChannelPlan) -> int:
        """Releases of one record on a channel; of ``decode`` this site has the part of the largest roster it trained in.

        The server chooses the roster of a job; a smaller one later must not enlarge the part that peers reserved for.
        """
        if at != "decode":
            return channel.releases
        assert self._ledger is not None
        rosters = (version.partition(":")[2].count("|") + 1 for version in self._ledger.versions(ALL, PEERS))
        return channel.releases // max(1, len(self._roster), *rosters)

    def _priced(self, record: str, at: At, channel: ChannelPlan) -> Charge:
        return Charge(
            record=record,
            channel=at,
            units=channel.units,
            clip=channel.clip,
            sigma=channel.sigma,
            policy=self.policy.digest,
        )

    def _mint(self, payloads: list[bytes], graph: Tensor, *, gain: float) -> Released:
        b, t, d = graph.shape
        return Released(
            payload=b"".join(payloads), shape=(b, t, d), codec=self.codec, gain=gain, graph=graph, mint=_MINT
        )


def _encode(rows: np.ndarray[tuple[int, ...], np.dtype[np.float32]], codec: Codec) -> bytes:
    if codec == "f32":
        return rows.astype("<f4").tobytes()
    words = torch.from_numpy(np.ascontiguousarray(rows)).to(torch.bfloat16).view(torch.int16).numpy()
    return words.astype("<i2").tobytes()
