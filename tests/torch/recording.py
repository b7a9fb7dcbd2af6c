"""CUDA graphs imitated on the CPU, so that what is captured and replayed can be tested without a GPU.

A recording runs each operation once, notes it with the tensors that it reads and writes, and then puts back what it
overwrote. A replay runs the same operations on the same tensors, and writes their results where they were at first.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from adapters.torch.compiled import CompiledSteps

__all__ = ["imitate_graphs"]

# What a capture cannot hold: a look at a value, an array made of the host's numbers, a shape that depends on values.
FORBIDDEN = ("aten._local_scalar_dense", "aten.lift_fresh", "aten.nonzero", "aten.masked_select")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


class _Graph(TorchDispatchMode):  # type: ignore[no-untyped-call] # PyTorch leaves its constructor untyped
    """A recording that can be replayed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations: list[tuple[Any, Sequence[Any], Mapping[str, Any], Any]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(FORBIDDEN):
            raise RuntimeError(f"{func} is not permitted when a stream is capturing")
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(value):
                    self._before.setdefault(id(tensor), (tensor, tensor.clone()))
        result = func(*args, **kwargs)
        self._operations.append((func, args, kwargs, result))
        return result

    def put_back(self) -> None:
        """Undo what the recording has written, so that it has computed nothing."""
        for tensor, before in self._before.values():
            tensor.copy_(before)

    def replay(self) -> None:
        """Run the recorded operations once more."""
        with torch.no_grad():
            for func, args, kwargs, first in self._operations:
                for old, new in zip(_tensors(first), _tensors(func(*args, **kwargs)), strict=True):
                    if old is not new and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)


class _Stream:
    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        """Nothing runs beside anything here."""


@contextmanager
def _recorded(graph: _Graph, stream: Any) -> Iterator[None]:  # noqa: ARG001 - as PyTorch's own
    state = torch.get_rng_state()
    with graph:
        yield
    graph.put_back()
    torch.set_rng_state(state)


def imitate_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps on the CPU be captured and replayed as those on a GPU are."""
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "graph", _recorded)
    monkeypatch.setattr(CompiledSteps, "captures_on", staticmethod(lambda device: True))
