"""Tasks for tests of projectors, and the projectors that the tests of the base class use."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from became_core.arrays import Params, pytree
from became_core.projection import GPCNS, NSCL, OGD, FinishedTask, LowRankRegion, OLoRA, Products, Projector
from became_core.projection import PROJECTORS as REGISTRY
from tests.backends import to_numpy, to_xp
from tests.strategies import few_if_compiled

__all__ = [
    "EPSILONS",
    "PROJECTORS",
    "WIDTH",
    "Finished",
    "Started",
    "finished",
    "largest_angle",
    "orthonormal",
    "representations",
    "updates_for",
]

Array = NDArray[Any]
WIDTH = 8
EPSILONS = st.sampled_from([0.5, 0.9, 0.97, 0.999])


@pytree
@dataclass(frozen=True)
class OfInputs(OLoRA):
    """O-LoRA for tests of the interface: as rows of adapters it remembers combinations of a task's inputs."""

    def remember(self, task: FinishedTask) -> Self:
        # The strictest namespace has no slices beyond the end.
        rows = {name: gram[: min(3, gram.shape[0]), :] for name, gram in task.input_grams().items()}
        weights = {name: gram[: min(2, gram.shape[0]), :] for name, gram in task.input_grams().items()}
        return super().remember(task).end_stage(self.tasks, LowRankRegion.initial(rows, weights))


SETTINGS = {"threshold": 0.9, "increment": 0.003, "ogd_samples": 30, "ogd_capacity": 6}
# Projectors that the tests of the interface build otherwise, by their registered names.
BUILT_OTHERWISE: dict[str, Callable[[], Projector]] = {
    "gpcns": lambda: GPCNS(0.97, increment=0.003),
    "nscl": lambda: NSCL(normalised=False),
    "olora": OfInputs,
}
# Every registered projector that can be combined with others; a new one needs no line here.
PROJECTORS: dict[str, Callable[[], Projector]] = {
    REGISTRY[name].__name__: BUILT_OTHERWISE.get(name, partial(REGISTRY.build, name, SETTINGS))
    for name in REGISTRY.names
    if not REGISTRY[name].alone
}


@dataclass(frozen=True)
class Finished:
    """A finished task that returns stored values."""

    inputs: Params
    gradients: Params
    logits: tuple[dict[str, Any], ...] = ()

    def input_grams(self) -> Params:
        return self.inputs

    def gradient_grams(self) -> Params:
        return self.gradients

    def logit_gradients(self, count: int) -> Iterator[dict[str, Any]]:
        for batch in self.logits:
            size = min(count, min(getattr(leaf, "left", leaf).shape[0] for leaf in batch.values()))
            if size:
                yield {
                    name: leaf[:size] if isinstance(leaf, Products) else leaf[:size, ...]
                    for name, leaf in batch.items()
                }
            count -= size


@dataclass(frozen=True)
class Started:
    """A task that begins, which returns stored values."""

    index: int
    weights: Params
    generator: np.random.Generator = field(default_factory=np.random.default_rng)
    stored_gradients: Params = field(default_factory=dict)
    stored_grams: Params = field(default_factory=dict)

    @property
    def projectable(self) -> frozenset[str]:
        return frozenset(self.weights)

    @property
    def heads(self) -> list[frozenset[str]]:
        return [frozenset(name for name in self.weights if name.startswith("heads."))]

    def rng(self, purpose: str) -> np.random.Generator:
        return self.generator

    def gradients(self) -> Params:
        return self.stored_gradients

    def input_grams(self) -> Params:
        return self.stored_grams

    def inputs(self, theta: Params) -> Params:
        raise NotImplementedError


def finished(xp: Any, representation: Array, name: str = "fc.weight", *, batch: int = 4) -> Finished:
    """Return a task whose inputs, weight gradients (as rows) and logit gradients are the columns of [WIDTH, n]."""
    gram = representation @ representation.T / representation.shape[1]
    rows = representation.T
    inputs = rows / len(rows) ** 0.5 if len(rows) < rows.shape[1] else gram  # few inputs have a factor, as from taps
    logits = [leaves(rows[start : start + batch]) for start in range(0, len(rows), batch)]
    return Finished(
        {name: to_xp(xp, inputs)}, {name: to_xp(xp, gram)}, tuple(to_xp(xp, part) for part in logits if len(part))
    )


def leaves(rows: Array) -> dict[str, Array]:
    """Return rows [n, d] as two leaves, a matrix and a vector, which have d numbers together."""
    half = rows.shape[1] // 2
    return {"fc.weight": rows[:, :half].reshape(len(rows), 1, half), "fc.bias": rows[:, half:]}


def updates_for(projector: Projector, draw: np.random.Generator, width: int = WIDTH, dtype: Any = np.float64) -> Any:
    """Return random updates in the shapes of the parameters that a projector protects after such tasks."""
    if projector.protects_all:
        return {name: leaf[0].astype(dtype) for name, leaf in leaves(draw.normal(size=(1, width))).items()}
    return {"fc.weight": draw.normal(size=(5, 2, width // 2)).astype(dtype)}


@st.composite
def representations(draw: st.DrawFn, *, most: int = 3, columns: tuple[int, int] = (1, 20)) -> list[Array]:
    """Return layer inputs of two or more tasks as columns [d_in, n], with falling energy along random directions."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    decay = 2.0 ** -(np.arange(WIDTH)[:, None] ** draw(st.sampled_from([0.5, 1.0])))
    # Fewer columns than one batch of ``finished``, a batch and a smaller one, and whole batches.
    number = few_if_compiled(st.integers(*columns), [max(columns[0], few) for few in (5, 20)])
    return [
        np.linalg.qr(random.normal(size=(WIDTH, WIDTH)))[0] @ (decay * random.normal(size=(WIDTH, draw(number))))
        for _ in range(draw(st.integers(2, most)))
    ]


def orthonormal(memory: OGD, names: Sequence[str]) -> Array:
    """Return the directions of OGD as orthonormal rows, over the parameters of these names in a row."""
    rows = [to_numpy(memory.gradients[name].values) for name in names]
    together = np.concatenate([part.reshape(len(part), -1) for part in rows], axis=1)
    return np.asarray(to_numpy(memory.whitening) @ together)


def largest_angle(first: Array, second: Array) -> float:
    """Return the sine of the largest principal angle between the spans of two orthonormal bases."""
    return float(np.linalg.norm(first - second @ (second.T @ first), ord=2)) if first.shape[1] else 0.0
