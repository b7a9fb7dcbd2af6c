"""Batches of a user's own: what a model takes, what it returns, and what is known of the targets.

| batch | the model is called as | outputs | targets |
| --- | --- | --- | --- |
| a pair ``(inputs, targets)`` | ``model(inputs)``, or ``model(*inputs)`` of a tuple | a tensor | the second |
| a mapping with ``labels`` | ``model(**the others)``, as ``transformers`` has it | its ``logits`` | ``labels`` |
| anything else | as ``apply`` does | what ``apply`` returns | what ``targets`` returns |

Convention: outputs are [samples, ...]. Tensors go to the device of the model.
"""

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
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
    if isinstance(tree, MutableMapping) and type(tree) is not dict:
        moved = copy(tree)  # of the class that the user's function may count on, such as a BatchEncoding
        for key, value in tree.items():
            moved[key] = to_device(value, device)
        return moved
    if isinstance(tree, Mapping):
        return {key: to_device(value, device) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(to_device(value, device) for value in tree))
    return type(tree)(to_device(value, device) for value in tree) if isinstance(tree, tuple | list) else tree


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back into the mode that it was in.

    Raises:
        BecameError: if a module changes weights when its mode changes, as adapters do that merge themselves.
    """
    own = [layer for layer in model.modules() if getattr(layer.train, "__func__", None) is not nn.Module.train]
    with modes_kept(model):
        before, modes = _lengths(model, own), [layer.training for layer in own]
        model.eval()
        try:
            for name, length in _lengths(model, own).items():
                if length != before[name] and not math.isnan(length):
                    raise BecameError(
                        f"the model changes '{name}' when it goes into evaluation mode, as adapters do that merge "
                        "themselves into a frozen weight; let them not do so (merge_weights=False)."
                    )
            yield
        finally:
            for layer, mode in zip(own, modes, strict=True):
                layer.train(mode)


@torch.no_grad()
def _lengths(model: nn.Module, layers: Sequence[nn.Module]) -> dict[str, float]:
    """Return the length of each of the model's parameters that lie within these layers, by name."""
    inside = {id(value) for layer in layers for value in layer.parameters() if value.is_floating_point()}
    return {
        name: float(torch.linalg.vector_norm(value, dtype=torch.float64))
        for name, value in model.named_parameters()
        if id(value) in inside
    }
