"""What a turn of a conversation costs, whether it can be paid, and what is left.

Every turn sends the whole conversation so far: a new, longer prompt, a release of its own. The ledger counts each prompt as a
record. But what was said first stands in every later prompt, too, so what the server learns of it grows turn by turn. Here
each thing that the user said is counted with all prompts that it stood in, and a turn that would take any of them above the
policy's budget is refused before anything is sent. Nothing but keyed hashes is kept, in memory, for the life of one process: a
program that replays an older conversation to a new process starts that count anew, while the ledger's own stays.

System messages are not counted: one text for all conversations is an instruction, not a record. Put nothing private there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from securesplit.errors import BudgetExhausted
from securesplit.policy.meaning import Meaning, meaning_of
from securesplit.policy.schema import Gaussian
from securesplit.privacy.ledger import ALL
from securesplit.privacy.plan import UNITS, enforced_epsilon

if TYPE_CHECKING:
    from securesplit.client.client import Client

__all__ = ["Price", "Toll"]


@dataclass(frozen=True, slots=True)
class Price:
    """What one turn costs; for people, before and after it.

    Attributes:
        before, after: epsilon of what has been said in this conversation, before and after this turn.
        budget: the policy's epsilon.
        meaning: of all three.
        tokens_left: how many generated tokens this site can still feed back, after this turn.
    """

    before: float
    after: float
    budget: float
    meaning: Meaning
    tokens_left: int

    def __str__(self) -> str:
        return (
            f"epsilon {self.before:.2f} -> {self.after:.2f} of {self.budget:g} {self.meaning}; "
            f"{self.tokens_left} generated tokens left"
        )


@dataclass(slots=True)
class Toll:
    """The count of one process.

    Args:
        each_turn_alone: count a prompt alone, as the ledger does, and not the conversation that it grew from. The price still
            says what the conversation has cost.
    """

    each_turn_alone: bool = False
    _stood_in: dict[str, set[str]] = field(default_factory=dict, repr=False)

    def price(self, client: Client, said: Sequence[str], prompt: Sequence[int], max_new_tokens: int) -> Price | None:
        """What a turn would cost; None where nothing is counted.

        Args:
            client: an open site.
            said: the user's messages of this conversation.
            prompt: tokens of this turn.
            max_new_tokens: as asked for; under a private policy so many are paid for, whatever the text does.
        """
        privacy, plan = client.policy.privacy, client.gate.plan
        if not isinstance(privacy, Gaussian) or plan is None or client.ledger is None:
            return None
        before, after = self._units(client, said, prompt, max_new_tokens)
        spent = client.ledger.spent_units(ALL)
        return Price(
            before=enforced_epsilon(math.sqrt((spent + before) / UNITS), privacy.delta),
            after=enforced_epsilon(math.sqrt((spent + after) / UNITS), privacy.delta),
            budget=privacy.epsilon,
            meaning=meaning_of(privacy),
            tokens_left=max(0, tokens_left(client) - (max_new_tokens - 1)),
        )

    def require(self, client: Client, said: Sequence[str], prompt: Sequence[int], max_new_tokens: int) -> None:
        """Refuse a turn that cannot be paid, before anything is sent.

        Raises:
            PolicyDenied: SS-2010 when the policy allows no generation.
            BudgetExhausted: SS-5001, SS-5002.
        """
        plan = client.gate.plan
        if plan is None or client.ledger is None:
            return
        if max_new_tokens > 1:
            client.gate.require(max_new_tokens - 1, at="decode")
        spent = client.ledger.spent_units(ALL)
        _, whole = self._units(client, said, prompt, max_new_tokens)
        _, alone = Toll()._units(client, (), prompt, max_new_tokens)  # noqa: SLF001 - another object of this class
        if spent + (alone if self.each_turn_alone else whole) > plan.budget:
            grown = whole > alone and spent + alone <= plan.budget
            raise BudgetExhausted(
                "SS-5001",
                "what was said in this conversation has stood in too many prompts for the policy's budget; nothing was sent"
                if grown
                else "this turn would cost more than is left of the policy's budget; nothing was sent",
                hint="Begin a new conversation, in other words, and ask all at once."
                if grown
                else "Ask for fewer new tokens. A budget does not refill; `securesplit privacy ledger` shows what was spent.",
            )

    def pay(self, client: Client, said: Sequence[str], prompt: Sequence[int]) -> None:
        """Count a prompt that is about to be sent, for everything that was said in it."""
        if client.ledger is None:
            return
        name = _name(client, prompt)
        for text in said:
            self._stood_in.setdefault(client.ledger.key(b"said:" + text.encode()), set()).add(name)

    def _units(
        self, client: Client, said: Sequence[str], prompt: Sequence[int], max_new_tokens: int
    ) -> tuple[int, int]:
        """mu^2 of what was said and has been sent most often, before and after this turn, in units.

        Without what all records of the site have been charged. A prompt that was sent before is resent as it was, for nothing.
        """
        plan, ledger = client.gate.plan, client.ledger
        assert plan is not None
        assert ledger is not None
        name = _name(client, prompt)
        prompts = [self._stood_in.get(ledger.key(b"said:" + text.encode()), set()) for text in said] or [set()]
        before = max(len(one) for one in prompts)
        after = max(len(one | {name}) for one in prompts)
        fed_back = 0 if plan.decode is None else (max_new_tokens - 1) * plan.decode.units
        if isinstance(client.policy.privacy, Gaussian) and client.policy.privacy.unit == "user":
            return 0, plan.cut.units + fed_back  # The ledger has charged everybody for what went before.
        return before * plan.cut.units, after * plan.cut.units + fed_back


def tokens_left(client: Client) -> int:
    """How many generated tokens this site can still pay for; 0 where the policy allows none."""
    plan, ledger = client.gate.plan, client.ledger
    if plan is None or plan.decode is None or ledger is None:
        return 0
    # The gate knows the caps of a roster; it is asked, by halving, because it answers yes or no.
    low, high = 0, max(0, (plan.budget - ledger.spent_units()) // plan.decode.units)
    while low < high:
        middle = (low + high + 1) // 2
        try:
            client.gate.require(middle, at="decode")
            low = middle
        except BudgetExhausted:
            high = middle - 1
    return low


def _name(client: Client, prompt: Sequence[int]) -> str:
    assert client.ledger is not None
    return client.ledger.key(b"prompt:" + b",".join(b"%d" % i for i in prompt))
