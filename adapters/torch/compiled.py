"""Training steps that are compiled: what the option ``--compile`` does on PyTorch.

On a GPU a whole step (forward and backward pass, projection, optimiser and update) is captured as one CUDA graph and
then replayed, so that PyTorch's Python and its launches, which take longer than the arithmetic of small networks, are
paid once a stage. On the CPU nothing can be captured: there ``torch.compile`` compiles the forward and the backward
pass of the network.

A compiled step computes what the step itself computes, up to rounding. It holds for one constraint: a stage with
another one begins anew, and steps in a region, whose scales are new arrays in every epoch, are not compiled.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from became_core import BecameError
from became_core.arrays import map_leaves
from became_core.continual import Batch, Constraint, Optimiser, Views
from became_core.errors import first_line

__all__ = ["CompiledSteps", "TakesStep", "compiled_forward", "placed"]


def placed(
    batches: Sequence[Batch], rates: NDArray[np.float64], device: torch.device, dtype: torch.dtype | None = None
) -> Iterator[tuple[Batch, Any]]:
    """Yield batches whose rows and views are tensors on a device, and their learning rates.

    All are copied there together: a copy for each batch would make the processor wait for a GPU every time.

    Args:
        batches: the batches of an epoch, all seen as they are or all with views.
        rates: one for each batch.
        device: where the data are.
        dtype: of rates that are tensors on the device, as captured steps need them; None for plain numbers.
    """

    def there(arrays: Sequence[NDArray[Any]]) -> Sequence[Any]:
        whole = torch.from_numpy(np.concatenate(arrays)).to(device)
        return torch.split(whole, [len(array) for array in arrays])

    rows = there([batch.indices for batch in batches])
    seen: list[Views] = [batch.views for batch in batches if batch.views is not None]
    offsets, flips = ([view.offsets for view in seen], [view.flips for view in seen])
    views = map(Views, there(offsets), there(flips)) if seen else repeat(None)
    steps = map(float, rates) if dtype is None else torch.from_numpy(rates).to(device, dtype)
    for batch, indices, view, rate in zip(batches, rows, views, steps, strict=False):
        yield Batch(batch.task, indices, view), rate


def compiled_forward(network: nn.Module) -> Callable[[Tensor, int], Tensor]:
    """Return a network's forward pass compiled by ``torch.compile``, with the backward pass that belongs to it.

    It draws at random what the network itself draws.

    Args:
        network: of inputs and the number of a head.

    Raises:
        BecameError: by the pass, if the network cannot be compiled.
    """
    compiled: Callable[[Tensor, int], Tensor] = torch.compile(network, options={"fallback_random": True})

    def forward(inputs: Tensor, task: int) -> Tensor:
        try:
            return compiled(inputs, task)
        except RuntimeError as error:
            raise BecameError(f"this network cannot be compiled ({first_line(error)}); leave out --compile.") from error

    return forward


class TakesStep(Protocol):
    """A function that takes a training step."""

    def __call__(self, batch: Batch, rate: Any, optimiser: Optimiser) -> tuple[Tensor, Optimiser]:
        """Change the weights in place.

        Args:
            batch: whose rows and views are tensors on the device.
            rate: the learning rate, a number; a tensor if the step must read it anew at each replay.
            optimiser: before the step.

        Returns:
            The mean loss, apart from its graph, and the optimiser after the step.
        """


class CompiledSteps:
    """The compiled steps of one stage.

    Attributes:
        forwards: what layers run under the stage's constraint, by their weights' names. ``torch.compile`` compiles
            anew for every other function, so the same ones must come back in every epoch.
    """

    # Steps of a batch's size before the one that is captured, in which libraries choose their kernels.
    WARM_UPS = 3

    def __init__(self, constraint: Constraint, optimiser: Optimiser, device: torch.device) -> None:
        """Begin a stage.

        Args:
            constraint: of the stage.
            optimiser: of the stage, in any state.
            device: where the network is.
        """
        self.forwards: dict[str, Callable[[Tensor], Tensor]] = {}
        self._constraint, self._kind = constraint, type(optimiser)
        captures = self.captures_on(device)
        self._stream = torch.cuda.Stream(device) if captures else None  # type: ignore[no-untyped-call]
        self._warmed: dict[tuple[int, int], int] = {}
        self._captured: dict[tuple[int, int], _Captured] = {}

    @staticmethod
    def captures_on(device: torch.device) -> bool:
        """Whether steps on a device can be captured."""
        return device.type == "cuda"

    @property
    def captures(self) -> bool:
        """Whether steps are captured; then they read their rates from the device."""
        return self._stream is not None

    def hold_for(self, constraint: Constraint, optimiser: Optimiser) -> bool:
        """Whether these are steps under a constraint with an optimiser: the same arrays, not only equal ones."""
        own = self._constraint
        return (
            self._kind is type(optimiser)
            and own.trainable == constraint.trainable
            and own.projector is constraint.projector
            and own.penalty is constraint.penalty
            and own.relative == constraint.relative
        )

    def steps(self, step: TakesStep) -> TakesStep:
        """Return the function that takes the steps of an epoch: on a GPU it captures the given one, and replays it."""
        return step if self._stream is None else lambda *arguments: self._replayed(step, *arguments)

    def _replayed(self, step: TakesStep, batch: Batch, rate: Any, optimiser: Optimiser) -> Any:
        key = batch.task, len(batch.indices)
        captured = self._captured.get(key)
        if captured is not None:
            return captured(batch, rate, optimiser)
        assert self._stream is not None
        self._warmed[key] = self._warmed.get(key, 0) + 1
        if self._warmed[key] > self.WARM_UPS:
            self._captured[key] = captured = _Captured(step, self._stream, batch, rate, optimiser)
            return captured(batch, rate, optimiser)
        # The stream of the capture runs the first steps as well: autograd remembers on which one a weight was used.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = step(batch, rate, optimiser)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result


class _Captured:
    """A step as a CUDA graph, with the arrays that it reads and those that it writes."""

    def __init__(
        self, step: TakesStep, stream: torch.cuda.Stream, batch: Batch, rate: Any, optimiser: Optimiser
    ) -> None:
        """Capture a step; nothing is computed."""
        self._rate: Tensor = rate.clone()
        self._seen: tuple[Any, Any] = map_leaves(torch.clone, (batch.indices, batch.views))
        self._optimiser: Optimiser = map_leaves(torch.clone, optimiser)
        own = Batch(batch.task, *self._seen)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, stream=stream):
                self._loss, after = step(own, self._rate, self._optimiser)
                map_leaves(Tensor.copy_, self._optimiser, after)
        except RuntimeError as error:
            message = f"a step of this network cannot be captured ({first_line(error)}); leave out --compile."
            raise BecameError(message) from error

    def __call__(self, batch: Batch, rate: Any, optimiser: Optimiser) -> tuple[Tensor, Optimiser]:
        """Take the step; the loss that is returned is overwritten by the next step."""
        map_leaves(Tensor.copy_, self._seen, (batch.indices, batch.views))
        self._rate.copy_(rate)
        if optimiser is not self._optimiser:
            map_leaves(Tensor.copy_, self._optimiser, optimiser)
        self._graph.replay()
        return self._loss, self._optimiser
