"""Gates of units, as effective weights of the next layer: what a task of HAT sees, while it is learned and afterwards.

With a gate a_i for unit i of a layer, a_i h_i is what the next layer sees: W diag(a) is its effective weight.
``became_core.projection.hat`` has the paper and its equations.

Convention: gates go by the weight [d_out, d_in] that sees them; d_in is units x places, a unit's places side by side.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from became_core.arrays import Array, Params, device, namespace, pytree, static
from became_core.errors import BecameError
from became_core.projection.base import Region, View

__all__ = ["GatedRegion", "GatedView", "filled", "spread"]

LARGEST = 6.0  # of an embedding, in effect


@pytree
@dataclass(frozen=True)
class GatedView(View):
    """The weights of a task that is learned: columns that see a closed gate are zero.

    Attributes:
        gates: by the weight that sees them, bool [units].
    """

    gates: Params

    @property
    def weights(self) -> frozenset[str]:
        """The names of the weights that see gates."""
        return frozenset(self.gates)

    def effective(self, theta: Params) -> Params:
        """Return the weights that the task's network works with.

        Raises:
            BecameError: if a weight is missing.
        """
        result = dict(theta)
        for name, gate in self.gates.items():
            if name not in theta:
                raise BecameError(f"the weights lack '{name}', which sees gates.")
            xp: Any = namespace(weight=theta[name], gate=gate)
            matrix = xp.reshape(theta[name], (theta[name].shape[0], -1))
            seen = spread(gate, matrix.shape[1])[None, :]
            result[name] = xp.reshape(xp.where(seen, matrix, xp.zeros_like(matrix)), theta[name].shape)
        return result


@pytree
@dataclass(frozen=True)
class GatedRegion(Region):
    """A task while it is learned: its gates are sigmoids, and their embeddings are trained with the weights.

    Attributes:
        scales: embeddings e [units] by the weight that sees the gates: ``conv2.weight@gates``.
        unused: 1 - A of the same units.
        steepness: s, 0-d.
        sharpness: s_max.
        sparsity: c.
    """

    scales: Params
    unused: Params
    steepness: Array
    sharpness: float = static()
    sparsity: float = static()

    anneals: ClassVar[bool] = True

    @property
    def weights(self) -> frozenset[str]:
        """The names of the weights that see gates."""
        return frozenset(key.rpartition("@")[0] for key in self.scales)

    def annealed(self, progress: float) -> Self:
        """Return the region in a batch of an epoch: s rises from 1 / s_max at progress 0 to s_max at 1."""
        steepness = 1 / self.sharpness + (self.sharpness - 1 / self.sharpness) * progress
        return replace(self, steepness=filled(self.scales, steepness))

    def with_scales(self, scales: Params) -> Self:
        """Return the region with other embeddings."""
        return replace(self, scales=scales)

    def gates(self) -> Params:
        """Return a = sigmoid(s e) [units], by the weight that sees them."""
        found = {}
        for key, embedding in self.scales.items():
            xp: Any = namespace(embedding=embedding)
            # By tanh, which does not overflow.
            found[key.rpartition("@")[0]] = (1 + xp.tanh(0.5 * self.steepness * _clipped(embedding))) / 2
        return found

    def effective(self, theta: Params) -> Params:
        """Return the weights that the task's network works with.

        Raises:
            BecameError: if a weight is missing.
        """
        result = dict(theta)
        for name, gate in self.gates().items():
            if name not in theta:
                raise BecameError(f"the weights lack '{name}', which sees gates.")
            xp: Any = namespace(weight=theta[name])
            matrix = xp.reshape(theta[name], (theta[name].shape[0], -1))
            seen = xp.astype(spread(gate, matrix.shape[1]), matrix.dtype, copy=False)[None, :]
            result[name] = xp.reshape(matrix * seen, theta[name].shape)
        return result

    def pull_back(self, gradients: Params, theta: Params) -> Params:
        """Return gradients by weights and embeddings, given those by effective weights; capacity's is among them.

        Args:
            gradients: by name; weights that see no gates keep theirs.
            theta: the weights W beneath, of at least the region's names.
        """
        result = dict(gradients)
        room = self._room()
        for name, gate in self.gates().items():
            if name not in gradients:
                continue
            key = f"{name}@gates"
            gradient, weight = gradients[name], theta[name]
            xp: Any = namespace(gradient=gradient, weight=weight)
            g, w = (xp.reshape(each, (each.shape[0], -1)) for each in (gradient, weight))
            seen = xp.astype(spread(gate, g.shape[1]), g.dtype, copy=False)[None, :]
            result[name] = xp.reshape(g * seen, gradient.shape)
            by_gate = xp.sum(xp.reshape(xp.sum(g * w, axis=0), (gate.shape[0], -1)), axis=1)
            by_gate = by_gate + self.sparsity * self.unused[key] / room
            opening = xp.tanh(0.5 * _clipped(self.scales[key]))
            result[key] = by_gate * self.sharpness * (1 - opening * opening) / 4  # sigmoid'(e)
        return result

    def _room(self) -> Array:
        """The number of units that no old task uses; 1 where there is none."""
        parts = []
        for unused in self.unused.values():
            xp: Any = namespace(unused=unused)
            parts.append(xp.sum(unused))
        total = sum(parts[1:], parts[0])
        return xp.where(total > 0, total, xp.ones_like(total))


def spread(gate: Array, columns: int) -> Array:
    """Return a value of each unit, [units], as one of each column, [units x places]."""
    xp: Any = namespace(gate=gate)
    units = int(gate.shape[0])
    return xp.reshape(xp.broadcast_to(gate[:, None], (units, columns // units)), (columns,))


def _clipped(embedding: Array) -> Array:
    xp: Any = namespace(embedding=embedding)
    return xp.clip(embedding, -LARGEST, LARGEST)


def filled(like: Params, number: float) -> Array:
    """A number as a 0-d array of the framework, dtype and device of others."""
    first = next(iter(like.values()))
    xp: Any = namespace(like=first)
    return xp.asarray(number, dtype=first.dtype, device=device(first))
