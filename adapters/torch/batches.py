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
from typing import Any

import torch
from torch import Tensor, nn

from adapters.backend.batches import Reader
from adapters.torch.layers import modes_kept
from became_core import BecameError

__all__ = ["Applied", "in_evaluation", "to_device"]

Apply = Callable[[nn.Module, Any], Tensor]
Targets = Callable[[Any], Any]


class Applied(nn.Module):
    """A model that takes the inputs of a batch and returns a tensor of outputs."""

    def __init__(self, model: nn.Module, reader: Reader[nn.Module]) -> None:
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
        if not outputs.ndim or not len(outputs):
            raise BecameError(
                f"the model returned outputs of shape {list(outputs.shape)} for a batch; they must be [samples, ...], "
                "of one sample or more."
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
