"""TRGP, trust region gradient projection (Lin, Yang, Fan & Zhang, ICLR 2022, arXiv 2202.02931).

A basis M of all old tasks projects the weights' updates, as in GPM. In addition, each task has a basis B_t of its own:

    basis B_t       The candidates are the directions m_i of M, with energies |m_i^T R|^2, and the directions u_i of
                    R' = R - M M^T R, with energies sigma_i^2. B_t are the fewest of them whose energies sum to
                    epsilon_t |R|^2. Those of the u_i that are chosen are added to M.
    trust region    of a new task, for each layer: at most two old tasks, those with the largest |G B B^T|_F, if that is
                    more than |G|_F / 2. G is the gradient when the task begins.
    effective       weight in a trust region: W + sum_j W B_j (Q_j - I) B_j^T. The Q_j are learned; they begin as I.
    update          G <- G - G M M^T for W; updates of Q_j are not projected.

The span of B_t lies in that of M, so updates do not change W B_t; they leave every old task's effective weight as it is
on that task's inputs.

What differs: the published code leaves out the first new direction among those chosen (``sel_index > r_pre``); here it
is added. A basis B_t is stored as the positions of its columns in M.

G is the gradient with batch statistics as constants, while the published code has that of training, through them. With
batch norm by batch, the two differ by 0.66 to 1.25 of the norm on the same samples, and so do the old tasks that are
trusted. The published code also has these differences, which we do not follow: batch norm is trained in later tasks; a
task's inputs are collected with the plain weights W and not with the effective ones; and BECAME's script for TRGP
goes on training the scales in stage 2 and merges them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from became_core.arrays import Array, Params, device, namespace, pytree
from became_core.errors import BecameError
from became_core.projection.base import FinishedTask, Region, TaskStart, integers
from became_core.projection.layerwise import ThresholdProjector
from became_core.projection.subspace import Subspace, energies, min_directions

__all__ = ["TRGP", "TrustRegion"]

MOST_TASKS = 2  # old tasks that a layer's trust region has, at most
LEAST_SHARE = 0.5  # of the gradient's norm that must lie in an old task's space


@pytree
@dataclass(frozen=True)
class TRGP(ThresholdProjector):
    """Trust region gradient projection: as gpm, with old weights rescaled in trusted old tasks' spaces (Lin 2022).

    The memory is a basis M of the sum of all tasks' spaces, and which of its columns belong to which task. The settings
    are those of ``ThresholdProjector``.

    Attributes:
        selections: the positions in M of the columns of a task's basis, integers [k_t]. The key has the weight and the
            task, such as ``conv1.weight@0``.
        regions: the trust region of each task that was trained in one, by the task's number.
    """

    selections: Params = field(default_factory=dict, kw_only=True)
    regions: dict[int, "TrustRegion"] = field(default_factory=dict, kw_only=True)

    beside: ClassVar[tuple[str, ...]] = ("selections",)
    no_adapters: ClassVar[str] = "it trains a task in a trust region of its own, of scales of the old weights"
    needs_own_heads: ClassVar[str] = "a task works with scales of its own, which a shared head would not fit"

    def remember(self, task: FinishedTask) -> Self:
        """Return the memory with one more task's basis.

        Raises:
            BecameError: if a Gram matrix is not square, not finite, or does not fit the basis of its weight.
        """
        spaces: dict[str, Subspace] = {}
        selections: Params = {}
        for name, gram in task.input_grams().items():
            xp: Any = namespace(gram=gram)
            parts = energies(name, gram, self.bases.get(name))
            joint = xp.concat([parts.old, parts.new])
            order = xp.argsort(joint, descending=True)
            count = min_directions(xp.take(joint, order), self.epsilon * parts.total, floor=parts.floor)
            chosen = order[:count]
            # New directions are in the order of falling energy, so those that are chosen are the first of them.
            added = int(xp.sum(xp.astype(chosen >= parts.old.shape[0], xp.int32)))
            spaces[name] = Subspace.of(self._extended(name, parts.directions[:, :added], gram))
            selections[f"{name}@{self.tasks}"] = chosen
        return self._remembering(spaces, selections=selections)

    def task_basis(self, name: str, task: int) -> Array:
        """Return the basis B_t of a weight and a task, orthonormal columns [d_in, k_t]."""
        basis = self.spaces[name].basis
        xp: Any = namespace(basis=basis)
        return xp.take(basis, self.selections[f"{name}@{task}"], axis=1)

    def begin_task(self, start: TaskStart) -> "TrustRegion | None":
        """Return the trust region of a new task, with identity matrices as scales; None for the first task."""
        return self.trust_region(start.gradients()) if self.tasks else None

    def end_stage(self, task: int, region: Region | None) -> Self:
        """Return the memory with the task's trust region as it was learned."""
        return replace(self, regions=self.regions | {task: region}) if isinstance(region, TrustRegion) else self

    def region(self, task: int) -> "TrustRegion | None":
        """Return the trust region of a task, if it has one."""
        return self.regions.get(task)

    def to_arrays(self) -> dict[str, Array]:
        """Return the arrays of ``LayerwiseProjector``, and the bases and scales of each trust region."""
        arrays = super().to_arrays()
        for task, region in self.regions.items():
            # The number of bases is there so that a region without any is restored as well.
            arrays[f"regions.{task}"] = integers(len(region.bases), arrays)
            arrays |= {f"regions.{task}.bases.{key}": basis for key, basis in region.bases.items()}
            arrays |= {f"regions.{task}.scales.{key}": scale for key, scale in region.scales.items()}
        return arrays

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """Return this projector with the memory that ``to_arrays`` returned.

        Raises:
            BecameError: if an array is no part of such a memory, or one is missing.
        """
        memory = super().with_arrays({key: array for key, array in arrays.items() if not key.startswith("regions.")})
        parts: dict[int, dict[str, Params]] = {}
        for key, array in arrays.items():
            match = re.fullmatch(r"regions\.(\d+)(?:\.(bases|scales)\.(.+))?", key)
            if match is not None:
                region = parts.setdefault(int(match[1]), {"bases": {}, "scales": {}})
                if match[2]:
                    region[match[2]][match[3]] = array
            elif key.startswith("regions."):
                raise BecameError(f"the array '{key}' is no part of a memory of TRGP.")
        return replace(memory, regions={task: TrustRegion(**part) for task, part in parts.items()})

    def trust_region(self, gradients: Params) -> "TrustRegion":
        """Return the trust region of a new task, with identity matrices as scales.

        Args:
            gradients: the gradients of the new task's loss before it is trained, by weight; a weight that the memory
                does not have gets no trust region.
        """
        bases: Params = {}
        for name, gradient in gradients.items():
            if name in self.spaces:
                for task in self._trusted(name, gradient):
                    bases[f"{name}@{task}"] = self.task_basis(name, task)
        return TrustRegion(bases, {key: _identity(basis) for key, basis in bases.items()})

    def _trusted(self, name: str, gradient: Array) -> list[int]:
        """Return the old tasks that a layer trusts, the one with the largest norm of G B B^T first."""
        xp: Any = namespace(gradient=gradient)
        matrix = xp.reshape(gradient, (gradient.shape[0], -1))
        least = LEAST_SHARE * float(xp.linalg.vector_norm(matrix))
        norms = {}
        for task in range(self.tasks):
            if f"{name}@{task}" in self.selections:
                basis = xp.astype(self.task_basis(name, task), matrix.dtype, copy=False)
                norms[task] = float(xp.linalg.vector_norm(xp.matmul(matrix, basis)))  # |G B| = |G B B^T|
        strongest = sorted(norms, key=lambda task: -norms[task])[:MOST_TASKS]
        return [task for task in strongest if norms[task] > least]


@pytree
@dataclass(frozen=True)
class TrustRegion(Region):
    """A task's trust region: for some layers and old tasks, a basis, and a scale of the weight in its span.

    Attributes:
        bases: B, orthonormal columns [d_in, k]. The key has the weight and the old task, such as ``conv1.weight@0``.
        scales: the scale Q [k, k] of each basis, by the same keys.

    Raises:
        BecameError: if a basis has no scale, or one that does not fit.

    Examples:
        >>> import numpy as np
        >>> region = TrustRegion({"fc.weight@0": np.array([[1.0], [0.0]])}, {"fc.weight@0": np.array([[3.0]])})
        >>> region.effective({"fc.weight": np.array([[1.0, 2.0]])})["fc.weight"]
        array([[3., 2.]])
    """

    bases: Params
    scales: Params

    def __post_init__(self) -> None:
        """Check that bases and scales fit."""
        for key in self.bases | self.scales:
            if key not in self.bases or key not in self.scales:
                raise BecameError(f"the trust region has no {'scale' if key in self.bases else 'basis'} '{key}'.")
            rank, shape = self.bases[key].shape[1], tuple(self.scales[key].shape)
            if shape != (rank, rank):
                raise BecameError(f"the scale '{key}' has shape {shape}; it must be [{rank}, {rank}].")

    def effective(self, theta: Params) -> Params:
        """Return all parameters, with the effective weights in the place of those that have a trust region.

        They are linear in the shared weights.

        Raises:
            BecameError: if a weight of the region is missing.
        """
        result = dict(theta)
        for name, keys in self._by_weight():
            if name not in theta:
                raise BecameError(f"the weights lack '{name}', which has a trust region.")
            weight = theta[name]
            xp: Any = namespace(weight=weight)
            flat = matrix = xp.reshape(weight, (weight.shape[0], -1))
            for key in keys:
                basis, scale = self._factors(xp, key, weight)
                within = xp.matmul(flat, basis)
                matrix = matrix + xp.matmul(xp.matmul(within, scale) - within, xp.matrix_transpose(basis))
            result[name] = xp.reshape(matrix, weight.shape)
        return result

    def pull_back(self, gradients: Params, theta: Params) -> Params:
        """Return gradients by shared weights and scales, from those by effective weights.

        With S = sum_j B_j (Q_j - I) B_j^T: dW = G + G S^T, dQ_j = (W B_j)^T (G B_j).

        Args:
            gradients: G, by name; the gradient of a weight outside the region is returned as it is.
            theta: the shared weights W, of at least the region's names.
        """
        result = dict(gradients)
        for name, keys in self._by_weight():
            if name not in gradients:
                continue
            gradient, weight = gradients[name], theta[name]
            xp: Any = namespace(gradient=gradient, weight=weight)
            g, w = (xp.reshape(array, (array.shape[0], -1)) for array in (gradient, weight))
            total = g
            for key in keys:
                basis, scale = self._factors(xp, key, g)
                within = xp.matmul(g, basis)
                back = xp.matmul(within, xp.matrix_transpose(scale)) - within
                total = total + xp.matmul(back, xp.matrix_transpose(basis))
                result[key] = xp.matmul(xp.matrix_transpose(xp.matmul(w, basis)), within)
            result[name] = xp.reshape(total, gradient.shape)
        return result

    @property
    def rowwise(self) -> frozenset[str]:
        """The names of the weights that have a trust region: they do nothing but change what a layer sees."""
        return self.weights

    def inputs_beneath(self, name: str, rows: Array) -> Array:
        """Return a + S a for each row a of [..., d_in], S being that of ``pull_back``.

        The effective weight times a is W times a + S a, so taps of the effective weight become taps of W this way.
        """
        total = rows
        for key in dict(self._by_weight()).get(name, []):
            xp: Any = namespace(rows=rows)
            basis, scale = self._factors(xp, key, rows)
            within = xp.matmul(rows, basis)
            onward = xp.matmul(within, xp.matrix_transpose(scale)) - within
            total = total + xp.matmul(onward, xp.matrix_transpose(basis))
        return total

    @property
    def weights(self) -> frozenset[str]:
        """The names of the weights that have a trust region."""
        return frozenset(name for name, _ in self._by_weight())

    def with_scales(self, scales: Params) -> Self:
        """Return the region with other scales."""
        return replace(self, scales=scales)

    def without(self, weights: frozenset[str]) -> Self:
        """Return the region without these weights."""
        keys = [key for name, keys in self._by_weight() if name not in weights for key in keys]
        bases, scales = ({key: arrays[key] for key in keys} for arrays in (self.bases, self.scales))
        return replace(self, bases=bases, scales=scales)

    def _factors(self, xp: Any, key: str, like: Array) -> tuple[Array, Array]:
        """Return the basis and the scale of a key in the dtype of ``like``."""
        return xp.astype(self.bases[key], like.dtype, copy=False), xp.astype(self.scales[key], like.dtype, copy=False)

    def _by_weight(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each weight that has a trust region, with the keys of its bases."""
        for name in dict.fromkeys(key.rpartition("@")[0] for key in self.bases):
            yield name, [key for key in self.bases if key.rpartition("@")[0] == name]


def _identity(basis: Array) -> Array:
    xp: Any = namespace(basis=basis)
    return xp.eye(basis.shape[1], dtype=basis.dtype, device=device(basis))
