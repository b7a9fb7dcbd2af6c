"""Batches of a user's own: what a model takes, what it returns, and what is known of the targets.

| batch | the model is called as | outputs | targets |
| --- | --- | --- | --- |
| a pair ``(inputs, targets)`` | ``model(inputs)``, or ``model(*inputs)`` of a tuple | a tensor | the second |
| a mapping with ``labels`` | ``model(**the others)``, as ``transformers`` has it | its ``logits`` | ``labels`` |
| anything else | as ``apply`` does | what ``apply`` returns | what ``targets`` returns |

Convention: outputs are [samples, ...]. Tensors go to the device of the model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapters.backend.memory import inputs_and_targets
from adapters.torch.layers import modes_kept
from became_core import BecameError

__all__ = ["Applied", "Reader", "in_evaluation", "to_device"]

Apply = Callable[[nn.Module, Any], Tensor]
Targets = Callable[[Any], Any]


@dataclass(frozen=True)
class Reader:
    """How batches are read.

    Attributes:
        apply: (model, batch) -> outputs; None for the ways of the table above.
        targets: batch -> targets; likewise.
    """

    apply: Apply | None = None
    targets: Targets | None = None

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Return what the model takes, and the targets.

        Raises:
            BecameError: if the batch is of a kind that only ``apply`` and ``targets`` can read.
        """
        if self.apply is not None or self.targets is not None:
            if self.apply is None or self.targets is None:
                raise BecameError("batches of your own need both apply= and targets=; one of them is missing.")
            return batch, self.targets(batch)
        return inputs_and_targets(batch, "or give apply= and targets=, which say what to do with it")


class Applied(nn.Module):
    """A model that takes the inputs of a batch and returns a tensor of outputs."""

    def __init__(self, model: nn.Module, reader: Reader) -> None:
        """Keep both; the model's parameters stay its own."""
        super().__init__()
        self.model = model
        self.reader = reader

    def forward(self, inputs: Any) -> Tensor:
        """Return the outputs, [samples, ...].

        Raises:
            BecameError: if they are no tensor.
        """
        if self.reader.apply is not None:
            outputs: Any = self.reader.apply(self.model, inputs)
        elif isinstance(inputs, Mapping):
            outputs = self.model(**inputs)
        else:
            outputs = self.model(*inputs) if isinstance(inputs, tuple | list) else self.model(inputs)
        outputs = getattr(outputs, "logits", outputs)
        if not isinstance(outputs, Tensor):
            raise BecameError(
                f"the model returned a {type(outputs).__name__}, and no tensor; give apply= and targets=, of which "
                "apply calls the model and returns the outputs that the loss is of."
            )
        return outputs


def to_device(tree: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, Mapping):
        return {key: to_device(value, device) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(to_device(value, device) for value in tree))
    return type(tree)(to_device(value, device) for value in tree) if isinstance(tree, tuple | list) else tree


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back into the mode that it was in."""
    with modes_kept(model):
        model.eval()
        yield
