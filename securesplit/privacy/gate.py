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
from securesplit.privacy.clip import clip_sequence, clip_tokens, refuse_non_finite
from securesplit.privacy.ledger import ALL, Charge, Ledger
from securesplit.privacy.noise import gaussian
from securesplit.privacy.plan import At, ChannelPlan, plan_for

_log = logging.getLogger(__name__)
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


class ClippedSum:
    """A sum of per-record gradients, each clipped to L2 norm C before it is added, so that one record moves it by 2C.

    Args:
        dim: d.
        bound: C, over all coordinates of one record's gradient together.
    """

    def __init__(self, dim: int, bound: float) -> None:
        self.vector = np.zeros(dim)
        self.bound = bound
        self.records: list[str] = []

    def add(self, gradient: Tensor, record: str) -> None:
        """Clip one record's gradient (d,) and add it.

        Raises:
            CheckFailed: SS-1510 for NaN or infinity.
            ValueError: when the record is in the sum already; twice would move it by 4C.
        """
        if record in self.records:
            raise ValueError("a record enters a round's sum once")
        self.vector += clip_tokens(gradient[None, None], self.bound)[0, 0].double().numpy()
        self.records.append(record)


class Gate:
    """One client's only way out.

    Args:
        policy: the client's own policy; no server can change it.
        ledger: the site's ledger; required unless the policy is UnsafeNoPrivacy.
        version: names the state of partition A that produces what is released, such as a digest of its weights. A
            memoised release is reused only under the same version.
        codec: type on the wire; the cast happens after the noise.
        sites: how many clients hold the same trained C. Each of them may spend its part of the channel ``decode``, because
            what a trained C generates at one site depends on the records of all.

    Raises:
        InputError: SS-1530 when a private policy comes without a ledger.
    """

    def __init__(
        self, policy: Policy, ledger: Ledger | None, *, version: str = "", codec: Codec = "f32", sites: int = 1
    ) -> None:
        self.policy = policy
        self.codec = codec
        self.version = version
        self._ledger = ledger
        self._sites = sites
        self._plan = plan_for(policy.privacy) if isinstance(policy.privacy, Gaussian) else None
        if self._plan is None:
            _log.warning("policy '%s' is UnsafeNoPrivacy: everything leaves as it is", policy.name)
        elif ledger is None:
            raise InputError("SS-1530", "a private policy needs a ledger", hint="Open one: Ledger(directory).")

    def release(
        self, tensor: Tensor, *, at: At, records: Sequence[str] | None = None, memoise: bool = True
    ) -> Released:
        """Make a tensor fit to leave.

        Args:
            tensor: (B, T, D), one sequence per row of B. Its graph is kept for the backward pass.
            at: ``cut`` (O1), ``gradient`` (O3) or ``decode`` (O1 of generated tokens).
            records: the ledger key of each sequence's record. Without it, every sequence is charged to all records of
                the site, which is always true and always dearest.
            memoise: resend the bytes that were released before for the same record, channel, version and shape.

        Returns:
            Released rows.

        Raises:
            CheckFailed: SS-1510 for NaN or infinity, SS-1522 when the ledger cannot be written.
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
        clipped = clip_sequence(tensor, channel.clip)
        keys = list(records) if records is not None else [ALL] * len(tensor)
        if len(keys) != len(tensor):
            raise ValueError("one record per sequence")
        payloads = self._payloads(clipped, at, channel, keys, memoise=memoise and records is not None)
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

    def reserve_for_peers(self, roster: Sequence[str]) -> None:
        """Charge, once per roster, what the other clients may generate with a C that learnt from this site's records.

        A generated token that is fed back depends on every record that trained C, at whichever site it is generated. This
        site cannot see its peers' ledgers, so it pays for their whole parts of the channel ``decode`` before C is shared.
        It assumes that peers keep the same policy; a peer that hands C to the server is outside every such claim.

        Raises:
            BudgetExhausted: SS-5001; the sum must not be joined then.
        """
        if self._plan is None or self._plan.decode is None or self._sites < 2:
            return
        assert self._ledger is not None
        channel, version = self._plan.decode, f"{self.policy.digest}:{'|'.join(sorted(roster))}"
        count = (self._sites - 1) * self._cap("decode", channel)
        if count == 0 or self._ledger.recall(ALL, "peers", version) is not None:
            return
        whole = replace(self._priced(ALL, "decode", channel), channel="peers", units=count * channel.units)
        self._ledger.charge([whole], budget=self._plan.budget, caps=[UNLIMITED])
        self._ledger.remember(ALL, "peers", version, b"")

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
            CheckFailed: SS-1510 for NaN or infinity.
            BudgetExhausted: SS-5001, SS-5002.
        """
        if isinstance(update, ClippedSum):
            return self._release_sum(update)
        refuse_non_finite(torch.from_numpy(update))
        privacy = self.policy.privacy
        if isinstance(privacy, Gaussian) and not (privacy.regime == "frozen" and self.policy.aggregation.blind):
            raise PolicyDenied(
                "SS-2011",
                "an update without noise may enter a blind sum in regime 'frozen' only",
                hint="This is a bug; report it.",
            )
        return ReleasedUpdate(vector=update, noised=False, mint=_MINT)

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
        self, clipped: Tensor, at: At, channel: ChannelPlan, keys: list[str], *, memoise: bool
    ) -> list[bytes]:
        assert self._ledger is not None
        version = f"{self.policy.digest}:{self.version}:{self.codec}:{tuple(clipped.shape[1:])}"
        # A record that stands twice in a batch, as texts that occur twice do, is released once and sent twice.
        names = keys if memoise else [str(i) for i in range(len(keys))]
        sent: dict[str, bytes] = {}
        for key in dict.fromkeys(keys) if memoise else ():
            if (payload := self._ledger.recall(key, at, version)) is not None:
                sent[key] = payload
        fresh: dict[str, int] = {}
        for i, name in enumerate(names):
            if name not in sent:
                fresh.setdefault(name, i)
        self._charge([keys[i] for i in fresh.values()], at, channel)
        rows = clipped.detach().cpu().numpy()
        for name, i in fresh.items():
            noised = rows[i].astype(np.float64) + gaussian(rows[i].shape, channel.sigma)
            sent[name] = _encode(noised.astype(np.float32), self.codec)
            if memoise:
                self._ledger.remember(keys[i], at, version, sent[name])
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
        return channel.releases // self._sites if at == "decode" else channel.releases

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
