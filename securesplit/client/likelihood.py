"""How likely a gold answer is after its prompt, through the split: what perplexity is made of.

What it costs: prompt and answer together are one release of the example's record, as in training; for one that was trained
on in this state of the adapters the same bytes are sent again. The likelihood is computed here and stays here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from securesplit.client.records import fill_of, users_of
from securesplit.data.answers import answer_tokens, encode_answers, prompt_tokens, tokenise
from securesplit.data.batches import make_batches
from securesplit.data.corpus import Record
from securesplit.data.tasks.fit import examples_of, fitted
from securesplit.data.tasks.item import Item
from securesplit.data.tasks.registry import Task
from securesplit.data.tasks.templates import Template

if TYPE_CHECKING:
    from securesplit.client.client import Client

__all__ = ["Likelihood", "likelihoods"]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of one gold answer, with what leads to it and the token that ends it.

    Attributes:
        nats: negative log-likelihood under the model, the sum over its tokens.
        tokens: how many they are.
    """

    nats: float
    tokens: int


def likelihoods(client: Client, task: Task, template: Template, items: Sequence[Item]) -> Iterator[Likelihood]:
    """For every item in turn, one release at a time.

    Args:
        client: an open site.
        task, template: how prompts and answers are made; passages are shortened as in training.
        items: all with a gold answer.

    Raises:
        InputError: SS-1244, SS-1245 before anything is sent. BudgetExhausted: SS-5001, SS-5002.
    """
    tokenizer: Any = client.tokenizer
    buckets = client.policy.limits.buckets
    rows = tokenise(
        fitted(
            task, template, items, most=buckets[-1], prompt_length=lambda text: len(prompt_tokens(text, tokenizer)),
            answer_length=lambda text: len(answer_tokens(text, tokenizer)),
        ),
        tokenizer,
    )  # fmt: skip
    records = [Record(e.prompt + (e.answer or ""), user=e.user) for e in examples_of(task, template, items)]
    users = users_of(client.policy, records)
    identify: Callable[[bytes], str] = client.ledger.key if client.ledger is not None else bytes.hex
    encoded = encode_answers(rows, [record.text for record in records], buckets[-1], identify, users=users)
    client.train(None)
    for one in encoded:
        (batch,) = make_batches([one], buckets=buckets, size=1, padding=fill_of(tokenizer), seed=0)
        yield Likelihood(max(0.0, client.loss(batch) * batch.scored), batch.scored)
