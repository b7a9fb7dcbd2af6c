"""Base classes of projectors that protect each weight by itself: a subspace for each, and a threshold that rises.

Convention: the arrays of a memory are named ``part.weight``, such as ``bases.conv1.weight``.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar, Self

from became_core.arrays import Array, Params, namespace, static
from became_core.errors import BecameError
from became_core.projection.base import Projector, integers
from became_core.projection.subspace import Energies, Subspace, energies, leading_axes, min_directions
from became_core.registry import setting

__all__ = ["LayerwiseProjector", "ThresholdProjector"]


@dataclass(frozen=True)
class LayerwiseProjector(Projector):
    """A projector whose memory is a subspace for each weight, and further arrays that a subclass names.

    Attributes:
        norm_penalty: the strength of a quadratic penalty, strength/2, on what the projector cannot protect,
            normalisation and biases, weighed by Fisher information as in EWC; at 0 these are frozen after the first
            task.
        tasks: how many tasks the memory has.
        spaces: the protected subspace of each weight's input space.

    Raises:
        BecameError: if the penalty is negative.
    """

    _: KW_ONLY
    norm_penalty: float = setting(0.0)
    tasks: int = static(default=0)
    spaces: dict[str, Subspace] = field(default_factory=dict)

    # The names of a subclass's own fields that belong to its memory; each is a mapping from weights to arrays.
    beside: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check the penalty."""
        if self.norm_penalty < 0:
            raise BecameError(f"the penalty on normalisation is {self.norm_penalty}; it must be at least 0.")

    def unprotected_penalty(self) -> float:
        """Return ``norm_penalty``."""
        return self.norm_penalty

    def project(self, updates: Params) -> Params:
        """Return each update without its part in the protected space of its weight.

        Args:
            updates: by name; a parameter that has no protected space is returned as it is.
        """
        return {name: self._project(name, update) for name, update in updates.items()}

    def _project(self, name: str, update: Array) -> Array:
        if name not in self.spaces:
            return update
        xp: Any = namespace(update=update)
        matrix = xp.reshape(update, (update.shape[0], -1))
        return xp.reshape(self.project_rows(name, matrix), update.shape)

    def project_rows(self, name: str, rows: Array) -> Array:
        """Return rows [n, d_in] without their part in the weight's protected space, if it has one."""
        return self.spaces[name].project_rows(name, rows) if name in self.spaces else rows

    def removed_factor(self, name: str) -> Array | None:
        """Return the factor of a weight's subspace, if projecting is what this class does and the subspace has one."""
        own, space = type(self), self.spaces.get(name)
        is_plain = own.project is LayerwiseProjector.project and own.project_rows is LayerwiseProjector.project_rows
        return space.factor if is_plain and space is not None and space.form == "I - F F^T" else None

    @property
    def rowwise(self) -> frozenset[str]:
        """The names of all protected weights."""
        return frozenset(self.spaces)

    @property
    def rank(self) -> dict[str, tuple[int, int]]:
        """For each protected weight, the dimension protected (the sum of importances, rounded down) and its width."""
        return {name: (space.protected, int(space.basis.shape[0])) for name, space in self.spaces.items()}

    @property
    def bases(self) -> Params:
        """For each protected weight, orthonormal columns [d_in, k]."""
        return {name: space.basis for name, space in self.spaces.items()}

    def to_arrays(self) -> dict[str, Array]:
        """Return the bases, the importances, the arrays named by ``beside``, and the number of tasks."""
        parts: dict[str, Params] = {
            "bases": self.bases,
            # Along axes the basis is the importances.
            "importance": {name: s.importance for name, s in self.spaces.items() if len(s.basis.shape) == 2},
            **{part: getattr(self, part) for part in self.beside},
        }
        arrays = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        return arrays | {"tasks": integers(self.tasks, arrays)}

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """Return this projector with the memory that ``to_arrays`` returned.

        Raises:
            BecameError: if an array is no part of such a memory, or there is no number of tasks.
        """
        parts: dict[str, Params] = {part: {} for part in ("bases", "importance", *self.beside)}
        for key, value in arrays.items():
            part, _, name = key.partition(".")
            if part in parts and name:
                parts[part][name] = value
            elif key != "tasks":
                raise BecameError(f"the array '{key}' is no part of a memory of {type(self).__name__}.")
        if "tasks" not in arrays:
            raise BecameError(f"the memory of {type(self).__name__} lacks 'tasks', the number of tasks it remembers.")
        spaces = {name: Subspace.of(basis, parts["importance"].get(name)) for name, basis in parts["bases"].items()}
        beside: dict[str, Any] = {part: parts[part] for part in self.beside}
        return replace(self, tasks=int(arrays["tasks"]), spaces=spaces, **beside)

    def _extended(self, name: str, directions: Array, like: Array) -> Array:
        """Return a weight's basis with directions [d, j] added to its columns, which get the dtype of ``like``."""
        xp: Any = namespace(directions=directions)
        added = xp.astype(directions, like.dtype)
        return xp.concat([self.spaces[name].basis, added], axis=1) if name in self.spaces else added

    def _remembering(self, spaces: Mapping[str, Subspace], **beside: Params) -> Self:
        """Return the memory with one more task: the subspaces and the arrays of ``beside`` are replaced or added."""
        merged: dict[str, Any] = {part: getattr(self, part) | values for part, values in beside.items()}
        return replace(self, tasks=self.tasks + 1, spaces=self.spaces | dict(spaces), **merged)


@dataclass(frozen=True)
class ThresholdProjector(LayerwiseProjector):
    """A projector with a threshold that rises from task to task.

    Attributes:
        threshold: the share of a layer's energy that is protected, epsilon, for the first task; in (0, 1].
        increment: how much the threshold grows from task to task; it never exceeds 1.

    Raises:
        BecameError: if the threshold is not in its range, or the increment is negative.
    """

    threshold: float = setting(0.97)
    increment: float = setting(0.003)

    def __post_init__(self) -> None:
        """Check the threshold."""
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            kind = type(self).__name__
            raise BecameError(f"the {kind} threshold is {self.threshold}; it must be above 0 and at most 1.")
        if not self.increment >= 0:
            raise BecameError(f"the threshold grows by {self.increment} a task; the increment must be at least 0.")

    @property
    def epsilon(self) -> float:
        """The threshold for the next task to be remembered."""
        return min(self.threshold + self.increment * self.tasks, 1.0)

    def _residual(self, name: str, gram: Array) -> tuple[Energies, int]:
        """Return a Gram matrix's energies beside the weight's basis, and how many new directions epsilon needs.

        They are the fewest whose energies, with the energy that the basis captures, are epsilon of the total
        (GPM, eq. 9).
        """
        parts = energies(name, gram, self.bases.get(name))
        wanted = self.epsilon * parts.total
        return parts, min_directions(parts.new, wanted, captured=parts.captured, floor=parts.floor)

    def _axes(self, name: str, gram: Array) -> Array:
        """Return the axes that a diagonal Gram matrix [d] and the memory protect, as booleans [d]."""
        old = self.bases.get(name)
        new = leading_axes(name, gram, old, self.epsilon)
        return new if old is None else new | (old > 0)
