"""What each record of a batch did to the loss and to the adapters: per-record losses and gradients from one pass.

A record's gradient must be known alone before it can be clipped, and the loss it comes from must not know its neighbours:
a mean over a batch's tokens, as transformers' losses are, makes every record's gradient depend on how many tokens the
others have. Here losses stay apart, record by record, and the caller divides by public numbers only.

The gradients come from opacus' hooks, which multiply each linear layer's inputs and output gradients record by record
within the ordinary backward pass. They see whatever gradient arrives, also one that a server sent for A's output. Only
the adapters' own linear layers are hooked; every other layer stays in evaluation mode, so no dropout draws.

What this does not do: it neither clips nor noises. One record's gradient may show its text word by word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from securesplit.model.lora import adapter_parameters
from securesplit.model.parts import Part

__all__ = ["PerSample", "per_sample", "record_losses"]

_IGNORED = -100


def record_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Each record's own cross-entropy, summed over its predicted tokens.

    Row i, and the gradient of its sum, depend on row i of the arguments alone, bit for bit: no count of another record's
    tokens enters. ``record_losses(...).sum() / (predicted tokens of the batch)`` is transformers' loss.

    Args:
        logits: (B, T, V), any float type.
        labels: (B, T) token ids, -100 where ignored; shifted inside: position t predicts label t + 1.

    Returns:
        (B,) float32, in nats.
    """
    shifted = functional.pad(labels[:, 1:], (0, 1), value=_IGNORED)
    nats = functional.cross_entropy(
        logits.float().flatten(0, 1), shifted.flatten(), ignore_index=_IGNORED, reduction="none"
    )
    return nats.view(shifted.shape).sum(1)


class PerSample:
    """The gradients of one backward pass, record by record; from :func:`per_sample`."""

    def __init__(self, parameters: tuple[nn.Parameter, ...]) -> None:
        self._parameters = parameters

    def gradients(self) -> Tensor:
        """The gradient of what was backpropagated, split by record.

        It counts the loss as a *sum* over records, so that row i is d loss / d adapters through record i, unscaled.

        Returns:
            (B, d) float32: parts in order, then :func:`securesplit.model.lora.adapter_parameters` of each, in C order.

        Raises:
            ValueError: unless there was exactly one forward and one backward pass through every trainable adapter.
        """
        samples = [getattr(parameter, "grad_sample", None) for parameter in self._parameters]
        rows = [sample.flatten(1) for sample in samples if isinstance(sample, Tensor)]
        if not rows or len(rows) != len(samples):
            raise ValueError("per-record gradients need one forward and one backward pass through every adapter")
        return torch.cat(rows, 1)


@contextmanager
def per_sample(parts: Sequence[Part]) -> Iterator[PerSample]:
    """Keep per-record gradients of these parts' trainable adapters, during one forward and backward pass.

    On leaving, hooks, kept inputs and all gradients are taken off again, the plain sum in ``.grad`` included: it carries
    no noise, and no optimiser should find it.

    Args:
        parts: A and C, or one of them; what is trainable in them must be adapters and nothing else.

    Yields:
        Where to read the gradients, within the context.

    Raises:
        ValueError: when a trainable parameter is no linear layer's weight, because its gradient would be left out.
    """
    from opacus.grad_sample.grad_sample_module import GradSampleHooks

    parameters = tuple(parameter for part in parts for parameter in adapter_parameters(part))
    layers = [layer for part in parts for layer in part.module.modules() if _learns(layer)]
    held = {id(layer.weight) for layer in layers if type(layer) is nn.Linear and layer.bias is None}
    if len(held) != len(layers) or held != {id(parameter) for parameter in parameters}:
        raise ValueError("everything but the adapters must be frozen")
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(_clear, layer, layer.training)
            layer.train()  # A linear layer computes the same; opacus keeps nothing of a layer in evaluation mode.
            hooks = GradSampleHooks(layer, batch_first=True, loss_reduction="sum")
            stack.callback(hooks.cleanup)
            stack.callback(layer.register_forward_pre_hook(_want_gradient).remove)
        yield PerSample(parameters)


def _learns(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def _want_gradient(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """In A's first layers no input wants a gradient, and torch warns of a backward hook that sees none: let it want one."""
    if inputs[0].requires_grad or not torch.is_grad_enabled():
        return None
    return (inputs[0].detach().requires_grad_(), *inputs[1:])


def _clear(layer: nn.Module, training: bool) -> None:  # noqa: FBT001 - a saved flag
    layer.train(training)
    for name in ("activations", "max_batch_len"):  # What opacus leaves on a layer; the first are private.
        if hasattr(layer, name):
            delattr(layer, name)
    for parameter in layer.parameters(recurse=False):
        parameter.grad = None
