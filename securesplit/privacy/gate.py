"""The narrow waist: nothing leaves a client except through :meth:`Gate.release`.

    A and C in a sound state -> refuse NaN and infinity -> clip (fp64 norm) -> lattice -> noise (own CSPRNG)
    -> charge the ledger and keep the bytes, in one commit (fsync) -> Released

Nothing is handed over before the commit, and a commit that the budget refuses leaves nothing behind. Senders take
:class:`Released`, which only this file can make, never a tensor.

Guarantee of one release, relation ``replace-one``: the Renyi curve of a Gaussian with mu = sensitivity/sigma, exactly,
because both the clipped values and the noise are integers (securesplit/privacy/lattice.py); against a server that sees
every byte, knows the policy and the code, and may choose everything it sends. Not covered: message lengths (public
buckets), timing, order.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from securesplit.errors import InputError, PolicyDenied
from securesplit.policy.schema import Gaussian, Policy
from securesplit.privacy.clip import refuse_non_finite
from securesplit.privacy.clipped_sum import ClippedSum
from securesplit.privacy.lattice import SIGMA, discrete_gaussian, step_for
from securesplit.privacy.ledger import ALL, Ledger
from securesplit.privacy.let import Witness, nobody, told
from securesplit.privacy.lineage import Lineage
from securesplit.privacy.mechanism import clipped, encode, noised
from securesplit.privacy.plan import At, ChannelPlan, Plan, plan_for, rows_moved
from securesplit.privacy.purse import Purse
from securesplit.privacy.released import _MINT, Codec, Released, ReleasedCommon, ReleasedUpdate, Responded
from securesplit.privacy.response import respond

__all__ = ["ClippedSum", "Codec", "Gate", "Released", "ReleasedCommon", "ReleasedUpdate", "Responded"]

_log = logging.getLogger(__name__)


class Gate:
    """One client's only way out.

    Args:
        policy: the client's own policy; no server can change it.
        ledger: the site's ledger; required unless the policy is UnsafeNoPrivacy.
        version: names the public part of what produces releases, such as the model's digest.
        state: names, at any moment, the trained part: a digest of the adapters whose state may differ between releases.
            Its value now is taken for the public start. A remembered release is reused only under the same version and
            state, and a private policy releases only from states of the gate's lineage.
        codec: type on the wire; the cast happens after the noise.
        roster: all clients that will hold the same trained C. Each may spend its part of the channel ``decode``, because
            what a trained C generates at one site depends on the records of all.
        ring: how many steps one client's coordinate may have in the ring of the job's sums, where noise is shared.
        front: decoder layers in A; under unit ``token`` it decides how many rows one token moves.
        witness: told of every release before it is handed over; what it raises stops the release.

    Raises:
        InputError: SS-1530 when a private policy comes without a ledger.
        PolicyDenied: SS-2016 when the ledger counts in another unit.
    """

    def __init__(
        self,
        policy: Policy,
        ledger: Ledger | None,
        *,
        version: str = "",
        state: Callable[[], str] = str,
        codec: Codec = "f32",
        roster: Sequence[str] = (),
        front: int = 1,
        ring: int = 0,
        witness: Witness = nobody,
    ) -> None:
        self.policy = policy
        self._digest = policy.digest
        self.codec = codec
        self.version = version
        self._state = state
        self._lineage = Lineage(state())
        self._ring = ring
        self._witness = witness
        self._once: Callable[[], str] = str
        self._settled = b""  # Digest of what all clients held alike when the present round began.
        self.plan: Plan | None = None
        self._purse: Purse | None = None
        if isinstance(policy.privacy, Gaussian):
            self.plan = plan_for(policy.privacy, rows=rows_moved(front, policy.limits.buckets))
            self._purse = _opened(ledger, policy, self.plan, tuple(sorted(roster)))
        else:
            _log.warning("policy '%s' is UnsafeNoPrivacy: everything leaves as it is", policy.name)

    def remember(self, name: Callable[[], str]) -> None:
        """Keep what is otherwise drawn anew each time, gradients and noised sums, under names of one run's moments.

        A run that goes on after a crash asks for the very same releases again, and gets the bytes that were paid for, free of
        charge; they are in the commit that paid. Another content, state or record under the same name is another release.

        Args:
            name: gives the present moment's name, unique within the site for ever; empty where there is none.
        """
        self._once = name

    def moved(self, by: ReleasedUpdate) -> None:
        """Tell the gate that a released update, and public values besides, moved A and C to their present state.

        Raises:
            PolicyDenied: SS-2014 when the state has moved and the update carries no noise, or the regime is ``frozen``.
        """
        if by.noised:
            self._extend()
        elif self.plan is not None:
            self._lineage.require(self._state())

    def restored(self, policy: str) -> None:
        """Tell the gate that A and C now hold adapters which a run under this same policy left on this site.

        It takes the site's own files at their word: adapters that were trained elsewhere, without noise, do not belong here.

        Raises:
            PolicyDenied: SS-2013 when they learnt under another policy, SS-2014 when they moved A in regime ``frozen``.
        """
        if policy != self._digest:
            raise PolicyDenied(
                "SS-2013", "these adapters learnt under another policy", hint="Generate under the policy of the run."
            )
        self._extend()

    def settled(self, values: bytes) -> None:
        """Tell the gate what all clients hold alike as a round begins, before this site's own work in it.

        These are public values, and what secure sums gave: each client of the sums has them already.

        Args:
            values: of what is summed, as bytes.
        """
        self._settled = hashlib.sha256(values).digest()

    def release_common(self, values: bytes, *, whole: bool = True) -> ReleasedCommon:
        """Hand what all clients hold alike to another client of the roster, which was away when the sums were made.

        It is a function of sums that are out, so nothing is charged; nothing else passes here, above all not the state that
        this site's own work of a round has moved. The caller seals it for that client; a policy's blind sum keeps it from
        the server.

        Args:
            values: as :meth:`settled` was told.
            whole: hand them over; else nothing but their digest, which the caller makes, and which is asked for here all the same.

        Raises:
            PolicyDenied: SS-2011 for other values than :meth:`settled` was told.
        """
        if not hmac.compare_digest(hashlib.sha256(values).digest(), self._settled):
            raise PolicyDenied(
                "SS-2011",
                "only what all clients hold alike may be handed to one that comes late",
                hint="This is a bug; report it.",
            )
        privacy = self.policy.privacy
        noised = isinstance(privacy, Gaussian) and (privacy.regime != "frozen" or privacy.updates is not None)
        self._witness(told("common", [values if whole else self._settled], 1, noised=noised))
        return ReleasedCommon(payload=values if whole else b"", mint=_MINT)

    def received(self) -> None:
        """Tell the gate that A and C now hold what the other clients hand to one that comes late.

        Whatever they chose, it tells of this site's records only what was released before: they know nothing else.

        Raises:
            PolicyDenied: SS-2014 when it moved A in regime ``frozen``.
        """
        self._extend()

    def _extend(self) -> None:
        """Take in the present state; in regime ``frozen`` there is only one, because no noised value may move A there."""
        privacy = self.policy.privacy
        if isinstance(privacy, Gaussian) and privacy.regime == "frozen":
            self._lineage.require(self._state())
        else:
            self._lineage.extend(self._state())

    def release(
        self,
        tensor: Tensor,
        *,
        at: At,
        records: Sequence[str] | None = None,
        contents: Sequence[str] | None = None,
        memoise: bool = True,
        responded: Responded | None = None,
    ) -> Released:
        """Make a tensor fit to leave.

        Args:
            tensor: (B, T, D), one sequence per row of B. Its graph is kept for the backward pass.
            at: ``cut`` (O1), ``gradient`` (O3) or ``decode`` (O1 of generated tokens).
            records: (not at ``decode``, where all pay, because a generated token depends on all that trained C) the ledger
                key of each sequence's record; under unit ``user``, of its user. Without it, every
                sequence is charged to all records of the site, which is always true and always dearest.
            contents: names what of each record the rows are made from, such as a keyed hash of its tokens. A remembered
                release is resent for the same content only.
            memoise: resend the bytes that were released before for the same record, content, channel, noise, version and
                shape.
            responded: at ``gradient``, where the policy releases labels: the labels that the loss was computed from, and
                nothing else of the records. The gradient then is a function of what the server has and may leave as it is.

        Returns:
            Released rows.

        Raises:
            CheckFailed: SS-1510 for NaN or infinity at the cut (a gradient with them is released as zero: it depends on
                what the server answered, and stopping would tell it for whom), SS-1522 when the ledger cannot be written.
            PolicyDenied: SS-2010 when the policy closes this channel, SS-2014 when A or C is in no sound state, SS-20xx
                when the ledger was tampered with.
            BudgetExhausted: SS-5001, SS-5002. Nothing may be sent.
        """
        if tensor.dim() != 3:
            raise ValueError("a release is (B, T, D)")
        if self.plan is None:
            refuse_non_finite(tensor)
            return self._plain(tensor.float(), at)
        self._lineage.require(self._state())
        if at == "gradient":
            finite = torch.isfinite(tensor).flatten(1).all(1)
            tensor = torch.where(finite[:, None, None], tensor, torch.zeros_like(tensor))
            if self.plan.labels is not None and responded is not None and self._made_from(responded, tensor, records):
                return self._plain(tensor.float(), at)
        channel = self._open(at)
        self._require_countable(tensor, channel, known=bool(contents) or records is None or not memoise)
        bounded = clipped(tensor, channel)
        if at == "decode":
            records = contents = None
        keys = list(records) if records is not None else [ALL] * len(tensor)
        of = list(contents) if contents else [""] * len(keys)
        if not len(keys) == len(tensor) == len(of):
            raise ValueError("one record and one content per sequence")
        known = memoise and records is not None
        if (once := self._once()) and not known:
            of = [
                self._paying.name(once, f"{i}", row.numpy().tobytes())
                for i, row in enumerate(bounded.detach().float().cpu())
            ]
        payloads = self._payloads(bounded, at, channel, keys, of, memoise=known or bool(once))
        coordinates = (bounded[0, 0] if channel.per_row else bounded[0]).numel() if keys else 0
        return self._mint(payloads, bounded, gain=channel.gain(coordinates) if keys else 1.0)

    def respond(self, labels: Tensor, *, records: Sequence[str], contents: Sequence[str]) -> Responded:
        """Answer for class labels by randomised response, once per record; the same answer for ever after.

        Args:
            labels: (B,) in 0..K-1, K the policy's ``labels.classes``.
            records: the ledger key of each record.
            contents: names what of each record was labelled.

        Raises:
            PolicyDenied: SS-2010 when the policy has no channel for labels.
            BudgetExhausted: SS-5001, SS-5002.
            ValueError: for a label outside of 0..K-1.
        """
        if self.plan is None:
            return Responded(labels=labels.clone(), records=tuple(records), policy=self._digest, mint=_MINT)
        if (plan := self.plan.labels) is None:
            raise self._closed("labels")
        drawn = [respond(int(label), plan.classes, plan.epsilon) for label in labels.tolist()]
        answers, fresh = self._paying.pay_answers(drawn, plan, records=records, contents=contents)
        self._witness(told("labels", [answer.to_bytes(4, "little") for answer in answers], len(answers), fresh))
        return Responded(
            labels=torch.tensor(answers, dtype=torch.int64), records=tuple(records), policy=self._digest, mint=_MINT
        )

    def require(self, count: int, *, at: At) -> None:
        """Check, before anything is sent, that ``count`` releases charged to all records can be paid.

        Raises:
            PolicyDenied: SS-2010 when the policy closes this channel.
            BudgetExhausted: SS-5001, SS-5002.
        """
        if self._purse is not None:
            self._purse.require(count, at, self._open(at))

    def release_update(self, update: npt.NDArray[np.float64] | ClippedSum) -> ReleasedUpdate:
        """Make an adapter update fit for a secure sum, or for a local step after which A and C are used again.

        Args:
            update: a :class:`ClippedSum` in regimes ``round`` and ``step``: charged to each of its records and noised here,
                with the full sigma of the channel ``update``, so that the claim needs no honest peer; or, where the policy
                says ``honest``, with this client's part of it, and then the claim is about the *sum* and holds only
                inside a secure sum with as many honest clients (the round refuses others). In regime
                ``frozen`` the plain difference of C's adapters. With a channel ``update`` it is clipped as a whole,
                noised and charged to all records, which bounds what the other clients learn. Without one it is neither,
                because the policy's blind sum keeps it from the server altogether; what the peers learn from the sum is
                stated in docs/threat-model.md. In regime ``step`` the difference between two states of the lineage, which
                is a function of noised values already and free.

        Raises:
            PolicyDenied: SS-2010 when the policy has no channel for the sum, SS-2011 when a plain difference is offered
                where only noised sums may leave.
            BudgetExhausted: SS-5001, SS-5002; in regime ``frozen`` for the reserve that peers may spend.
        """
        if isinstance(update, ClippedSum):
            return self._release_sum(update)
        if not np.isfinite(update).all():  # Stopping here would tell the server that its answers provoked it.
            update = np.zeros_like(update)
        privacy = self.policy.privacy
        if not isinstance(privacy, Gaussian):
            return self._bare(update, noised=False)
        if privacy.regime == "step":
            self._lineage.require(self._state())
            return self._bare(update, noised=True)
        if privacy.regime == "frozen" and privacy.updates is not None:
            channel = self._open("update")
            whole = ClippedSum(update.size, channel.clip, step_for(channel.part))
            whole.add(torch.from_numpy(update), ALL)
            return self._release_sum(whole)
        if privacy.regime != "frozen" or not self.policy.aggregation.blind:
            raise PolicyDenied(
                "SS-2011",
                "an update without noise may enter a blind sum in regime 'frozen' only",
                hint="This is a bug; report it.",
            )
        self.reserve_for_peers()
        self._paying.note_bare_update()
        return self._bare(update, noised=False)

    def _bare(self, update: npt.NDArray[np.float64], *, noised: bool) -> ReleasedUpdate:
        self._witness(told("update", [update.tobytes()], 1, noised=noised))
        return ReleasedUpdate(vector=update, noised=noised, mint=_MINT)

    def receipt(self, update: ReleasedUpdate) -> str:
        """Proof, for this site alone, that a gate under this policy released this very update: HMAC-SHA256 in hex.

        With it the update can be kept on disk until its round is closed, and given to the same sum again after a crash.
        """
        about = f"securesplit.update.v1|{self._digest}|{update.noised}|{update.honest}|{update.step!r}|"
        said = about.encode() + update.vector.astype("<f8").tobytes()
        return hashlib.sha256(said).hexdigest() if self._purse is None else self._purse.ledger.key(said)

    def recall_update(
        self, vector: npt.NDArray[np.float64], *, noised: bool, honest: int, step: float, receipt: str
    ) -> ReleasedUpdate:
        """An update that was released, and charged, before a crash. Nothing is drawn and nothing is charged.

        Args:
            vector, noised, honest, step: of the :class:`ReleasedUpdate`.
            receipt: of :meth:`receipt`.

        Raises:
            PolicyDenied: SS-2011 when no gate of this site released that under this policy.
        """
        update = ReleasedUpdate(vector=vector, noised=noised, honest=honest, step=step, mint=_MINT)
        if not hmac.compare_digest(self.receipt(update), receipt):
            raise PolicyDenied(
                "SS-2011",
                "an update on disk is not one that this site released under this policy",
                hint="Its file was changed, or belongs to another site or policy. Begin the round anew.",
            )
        self._witness(told("update", [update.vector.tobytes()], 1, noised=noised))
        return update

    def reserve_for_peers(self) -> None:
        """Charge, once per roster, what the other clients may generate with a C that learnt from this site's records.

        A generated token that is fed back depends on every record that trained C, at whichever site it is generated. This
        site cannot see its peers' ledgers, so it pays for their whole parts of the channel ``decode`` before C is shared.
        All clients of a sum hold the same policy (its digest is in the sum's keys); a peer that breaks it, or hands C to
        the server, is outside every such claim. Where updates are noised, peers hold a function of what was charged for
        already, and nothing is reserved.

        Raises:
            BudgetExhausted: SS-5001; nothing may be shared then.
        """
        if self._purse is not None:
            self._purse.reserve_for_peers()

    def _release_sum(self, update: ClippedSum) -> ReleasedUpdate:
        purse, channel = self._paying, self._open("update")
        if update.bound > channel.clip or update.step != step_for(channel.part):
            raise PolicyDenied(
                "SS-2010",
                "a sum was clipped or rounded otherwise than the policy says",
                hint="This is a bug; report it.",
            )
        shared = channel.honest > 1
        name = (once := self._once()) and purse.name(
            once, f"{channel!r}:{self.version}:{self._state()}:{update.records}", update.steps.tobytes()
        )
        # The first record's charge keeps the bytes for all of them; one commit took them together.
        first = update.records[0] if update.records else ""
        if name and (before := purse.recall(first, "update", name)) is not None:
            return self._summed(before, channel, update.step, [])
        steps = self._within_ring(update.steps) if shared else update.steps
        noised = steps + discrete_gaussian(steps.shape)
        vector = noised.astype(np.float64) * update.step
        payload = vector.tobytes()  # Once: a sum over a thousand records must not take a thousand times its size.
        # Without a version: a sum is drawn anew, and paid anew, every time that it is not asked for by a name.
        charges = [purse.priced(record, "update", channel, payload=payload) for record in update.records]
        if name and charges:
            charges[0] = replace(charges[0], version=name)
        stored = purse.pay(charges, "update", channel)
        return self._summed(stored[0] if stored else payload, channel, update.step, [c.units for c in charges])

    def _summed(self, payload: bytes, channel: ChannelPlan, step: float, units: list[int]) -> ReleasedUpdate:
        self._witness(told("update", [payload], 1, units))
        shared = step if channel.honest > 1 else 0.0
        vector = np.frombuffer(payload, dtype=np.float64).copy()
        return ReleasedUpdate(vector=vector, noised=True, honest=channel.honest, step=shared, mint=_MINT)

    def _within_ring(self, steps: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Bring each coordinate of a sum so far into the ring that noise never reaches its end.

        What sticks out of the ring would be clipped *with* its noise, and a client whose coordinate always sticks out would add
        none to the sum that others count on. Bringing a coordinate into a range moves no two sums farther apart, so it costs
        nothing. Twelve deviations are passed once in 10^31 coordinates.
        """
        most = self._ring - 12 * SIGMA
        if most <= 0:
            raise PolicyDenied(
                "SS-2010",
                "noise can be shared only in a secure sum whose ring has room for it",
                hint="Ask for sums.ring_bits = 64.",
            )
        return np.clip(steps, -most, most)

    def _payloads(
        self, rows: Tensor, at: At, channel: ChannelPlan, keys: list[str], contents: list[str], *, memoise: bool
    ) -> list[bytes]:
        purse = self._paying
        same = f"v2:{purse.unit}:{channel.per_row}:{channel.clip!r}:{channel.sigma!r}:{self.version}:{self._state()}:{self.codec}:{tuple(rows.shape[1:])}"
        # A record that stands twice in a batch, as texts that occur twice do, is released once and sent twice.
        names = [
            (k, f"{same}:{c}" if memoise else f"once:{i}") for i, (k, c) in enumerate(zip(keys, contents, strict=True))
        ]
        sent: dict[tuple[str, str], bytes] = {}
        for key, version in dict.fromkeys(names) if memoise else ():
            if (payload := purse.recall(key, at, version)) is not None:
                sent[key, version] = payload
        fresh: dict[tuple[str, str], int] = {}
        for i, name in enumerate(names):
            if name not in sent:
                fresh.setdefault(name, i)
        drawn = noised(rows[list(fresh.values())], channel, self.codec)
        charges = [
            purse.priced(key, at, channel, version=version if memoise else "", payload=payload)
            for (key, version), payload in zip(fresh, drawn, strict=True)
        ]
        sent.update(zip(fresh, purse.pay(charges, at, channel), strict=True))
        leaving = [sent[name] for name in names]
        self._witness(told(at, leaving, len(leaving), [charge.units for charge in charges]))
        return leaving

    def _require_countable(self, tensor: Tensor, channel: ChannelPlan, *, known: bool) -> None:
        """Refuse what the plan does not count: more rows than one token was said to move, a user's records without names."""
        if channel.per_row and tensor.shape[1] > max(self.policy.limits.buckets):
            raise ValueError("a sequence is longer than the longest public length, for which its noise was sized")
        if not known and isinstance(self.policy.privacy, Gaussian) and self.policy.privacy.unit == "user":
            raise ValueError("under unit 'user' a memory needs contents, or one record would be sent as another")

    def _made_from(self, responded: Responded, rows: Tensor, records: Sequence[str] | None) -> bool:
        """Whether answers are this policy's, and for exactly these rows; an unsafe gate's are the true labels."""
        named = records is not None and responded.records == tuple(records)
        return named and len(responded.records) == len(rows) and responded.policy == self._digest

    @property
    def _paying(self) -> Purse:
        assert self._purse is not None, "only a private policy has anything to pay"
        return self._purse

    def _open(self, at: At) -> ChannelPlan:
        assert self.plan is not None
        channel = self.plan.channel(at)
        if channel is None:
            raise self._closed(at)
        return channel

    def _closed(self, at: str) -> PolicyDenied:
        return PolicyDenied(
            "SS-2010",
            f"policy '{self.policy.name}' releases nothing at '{at}'",
            hint="Use a policy that opens this channel.",
        )

    def _plain(self, rows: Tensor, at: At) -> Released:
        payloads = [encode(row, self.codec) for row in rows.detach().cpu().numpy()]
        self._witness(told(at, payloads, len(payloads), noised=False))
        return self._mint(payloads, rows, gain=1.0)

    def _mint(self, payloads: list[bytes], graph: Tensor, *, gain: float) -> Released:
        b, t, d = graph.shape
        return Released(
            payload=b"".join(payloads), shape=(b, t, d), codec=self.codec, gain=gain, graph=graph, mint=_MINT
        )


def _opened(ledger: Ledger | None, policy: Policy, plan: Plan, roster: tuple[str, ...]) -> Purse:
    """The purse of a private policy. Another unit is refused before anything that was remembered under it is resent."""
    if ledger is None:
        raise InputError("SS-1530", "a private policy needs a ledger", hint="Open one: Ledger(directory).")
    purse = Purse(ledger, policy, plan, roster)
    if ledger.unit not in {None, purse.unit}:
        raise PolicyDenied(
            "SS-2016",
            f"this ledger counts by {ledger.unit}, and policy '{policy.name}' protects by {purse.unit}",
            hint="One site keeps to one unit. Use a policy of the same unit.",
        )
    return purse
