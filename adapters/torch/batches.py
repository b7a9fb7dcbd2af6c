"""Batches of a user's own: what a model takes, what it returns, and what is known of the targets.

| batch | the model is called as | outputs | targets |
| --- | --- | --- | --- |
| a pair ``(inputs, targets)`` | ``model(inputs)`` | a tensor | the second |
| a pair whose inputs are a tuple or a list, and no texts | ``model(*inputs)`` | a tensor | the second |
| a mapping with ``labels`` | ``model(**the others)``, as ``transformers`` has it | its ``logits`` | ``labels`` |
| anything else | as ``apply`` does | what ``apply`` returns | what ``targets`` returns |

Convention: outputs are [samples, ...]. Tensors go to the device of the model.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from adapters.backend.batches import Reader
from adapters.torch.layers import buffers_kept, modes_kept
from adapters.torch.shared_model import first_changed, lengths_of
from became_core import BecameError
from became_core.errors import first_line

__all__ = ["Applied", "few_samples", "in_evaluation", "not_a_few", "samples_of", "tensors_of", "to_device"]

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
        elif isinstance(inputs, tuple | list) and not all(isinstance(part, str) for part in inputs):
            outputs = self.model(*inputs)  # a DataLoader makes a list of a sample's several inputs
        else:
            outputs = self.model(inputs)
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


def samples_of(arguments: tuple[Any, ...], rows: slice | list[int], samples: int) -> tuple[Any, ...]:
    """Return a network's arguments with some of the samples.

    A list or tuple within the first argument that has an entry for each sample, texts or images of several sizes, say,
    is cut itself.

    Args:
        arguments: the first is the samples; the others are left as they are.
        rows: which samples.
        samples: how many there are; a tensor with another length is no samples'.
    """

    def sliced(tree: Any, *, is_within: bool = True) -> Any:
        if isinstance(tree, Tensor):
            return tree[rows] if tree.ndim and len(tree) == samples else tree
        if isinstance(tree, Mapping):
            return {key: sliced(value) for key, value in tree.items()}
        if isinstance(tree, tuple) and hasattr(tree, "_fields"):
            return type(tree)(*map(sliced, tree))
        if not isinstance(tree, tuple | list):
            return tree
        if _has_one_for_each(tree, samples, is_within):
            return type(tree)(tree[rows] if isinstance(rows, slice) else [tree[row] for row in rows])
        return type(tree)(map(sliced, tree))

    return sliced(arguments[0], is_within=False), *arguments[1:]


def _has_one_for_each(parts: Sequence[Any], samples: int, is_within: bool) -> bool:
    """Whether a list has a text for each sample, or a tensor that has no axis of samples.

    Tensors that are a model's arguments are not within a list, and of a single sample nothing tells one from another.
    """
    if len(parts) != samples:
        return False
    if all(isinstance(part, str) for part in parts):
        return True
    are_tensors = is_within and samples > 1 and all(isinstance(part, Tensor) for part in parts)
    return are_tensors and not any(part.ndim and len(part) == samples for part in parts)


def not_a_few(samples: int, error: Exception) -> BecameError:
    """Return what is said if a model does not run with some of a batch's samples."""
    return BecameError(
        f"the model takes {samples} samples and not a few of them ({first_line(error)}); samples are on the first axis "
        "of a tensor, or entries of a list of texts or of tensors within the batch. If an input that all samples "
        "share, such as a mask, is as long as the batch, or a list of tensors is, begin with a batch of another length."
    )


def few_samples(arguments: tuple[Any, ...], samples: int) -> tuple[Any, ...]:
    """Return a network's arguments with about three of the samples, or with a single one twice.

    Which tensors are samples' is told by their lengths, so there are not as many samples as another tensor is long.
    What all samples share, such as positions, shows only if there are two.
    """
    if samples == 1:
        return samples_of(arguments, [0, 0], samples)
    others = {len(tensor) for tensor in tensors_of(arguments[0]) if tensor.ndim and len(tensor) != samples}
    return samples_of(arguments, slice(next(few for few in count(3) if few not in others)), samples)


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of a tree."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | tuple | list):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors_of(part)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back into the mode that it was in.

    Buffers get the values back that they had: a model may count its calls, or keep what it has seen.

    Raises:
        BecameError: if a module changes weights when its mode changes, as adapters do that merge themselves.
    """
    switching = [layer for layer in model.modules() if getattr(layer.train, "__func__", None) is not nn.Module.train]
    inside = {id(value) for layer in switching for value in layer.parameters() if value.is_floating_point()}
    weights = {name: value for name, value in model.named_parameters() if id(value) in inside}
    with buffers_kept(model), modes_kept(model):
        before, modes = lengths_of(weights), [layer.training for layer in switching]
        model.eval()
        try:
            changed = first_changed(before, lengths_of(weights), weights)
            if changed is not None:
                raise BecameError(
                    f"the model changes '{changed}' when it goes into evaluation mode, as adapters do that merge "
                    "themselves into a frozen weight; let them not do so (merge_weights=False)."
                )
            yield
        finally:  # a layer with a method ``train`` of its own may have more to put back than the mode
            for layer, mode in zip(switching, modes, strict=True):
                layer.train(mode)
