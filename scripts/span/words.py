"""What stands around the tables of the benchmark's page."""

from __future__ import annotations

import platform
from importlib.metadata import version

__all__ = ["WORDS", "made_on"]

WORDS = {
    "head": """
# What LoRA updates and their secure sums show of the text

A server that opens secure sums holds the mean of what its clients' adapters learnt. Two attacks read it: `span`, the span check
of DAGER (arXiv 2405.15586), which names a token only where nothing else in the vocabulary explains the update; and `update-bag`,
which learns on public text what each token leaves in an update and finds the few tokens that explain it (sparse Bayesian
learning). SmolLM2-135M, cut 2/26/2, adapters on all seven projections, AdamW at 2e-3. Private text: passages of MultiRC's test
file that share no eight words with the public ones, from its train file. Each figure is a mean over the draws in the JSON.

Laboratory, not a job: B is the public model and does not learn, and nothing crosses a wire (`scripts/span/lab.py`). The optimiser,
the ring of the secure sum and its rounding are the product's. **The product refuses sums of fewer than three clients**; rows with
one or two are what is left when colluding clients take their own updates out.

*Recall* counts distinct tokens of all records. *By the prior alone*: recall of as many tokens, the likeliest in public text.
*Positions*: share of all places named rightly, each claimed sequence given to one record. The last token of a record predicts
nothing and leaves no trace on the input side, so that `span` cannot name it unless it occurs before.
""",
    "textbook": """
Exact while the distinct tokens are fewer than the rank, nothing beyond: the first round's factor B has rows in the span of
`X A^T`, which has the rank's dimensions. Sequences need as much of the second layer, where every prefix counts, not every token.
""",
    "first": """
One step of AdamW moves a coordinate by `rate * g / (|g| + eps)`, which looks like a sign and is not: 1 - |moved| / rate is
eps / |g|, and enough of it survives a float32 to read the gradient back (`attacks/adamw.py`). The grid of the sum decides how
much: with `weights = "uniform"` it is 255 times finer than with weights by records.
""",
    "foot": """
## What is thin

* Few draws, one model, one kind of text; attack seconds are those of a busy machine.
* `update-bag` claims no order. Its lenses look at C's last layers and at A's first; the layers between are not used.
* The steps of AdamW are read backwards for one client and one step only. For means and for several steps only signs and sizes
  of what stands out are used; a cleverer attacker may do better.
* The mean of a job's own rounds over the same records is explained together for the first three rounds only.

How to repeat it: `scripts/bench-span --data DIR --out FILE --page FILE`, DIR with MultiRC's train.jsonl and test.jsonl.
""",
}


def made_on() -> str:
    """On what the figures were measured."""
    parts = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "securesplit"))
    return f"Measured on {platform.machine()}, one thread of a machine that others used; python {platform.python_version()}, {parts}."
