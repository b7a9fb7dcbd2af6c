"""The effective weights of a HAT task: a region with trained gates while it is learned, then a view of open gates.

With a gate a_i for unit i of a layer, the next layer reads a_i h_i, so its effective weight is W diag(a).
``became_core.projection.hat`` has the paper and its equations.

Convention: a gate goes by the name of the weight [d_out, d_in] that reads its units; d_in is units x positions, and the
positions of one unit are side by side.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from became_core.arrays import Array, Params, device, namespace, pytree, static
from became_core.errors import BecameError
from became_core.projection.base import Region, View

__all__ = ["GatedRegion", "GatedView", "filled", "spread"]

# An embedding outside [-LARGEST, LARGEST] has the gate of the nearest end, as in the published code.
LARGEST = 6.0
# In the published compensation of gradients (eq. 4), |s e| is at most this.
LARGEST_EXPONENT = 50.0


@pytree
@dataclass(frozen=True)
class GatedView(View):
    """The effective weights of a learned task: columns of a closed gate are zero.

    Attributes:
        gates: whether each gate is open, bool [units], by the weight that reads the units.
    """

    gates: Params

    @property
    def weights(self) -> frozenset[str]:
        """The names of the weights that read gated units."""
        return frozenset(self.gates)

    def effective(self, theta: Params) -> Params:
        """Return all parameters, with the gated weights in the place of the shared ones.

        Raises:
            BecameError: if a weight is missing.
        """
        result = dict(theta)
        for name, gate in self.gates.items():
            if name not in theta:
                raise BecameError(f"the weights lack '{name}', which reads gated units.")
            xp: Any = namespace(weight=theta[name], gate=gate)
            matrix = xp.reshape(theta[name], (theta[name].shape[0], -1))
            is_open = spread(gate, matrix.shape[1])[None, :]
            result[name] = xp.reshape(xp.where(is_open, matrix, xp.zeros_like(matrix)), theta[name].shape)
        return result


@pytree
@dataclass(frozen=True)
class GatedRegion(Region):
    """The region of a task that is being learned: its gates are sigmoids of embeddings, which are trained.

    Attributes:
        scales: the embeddings e [units]. The key has the weight that reads the units, such as ``conv2.weight@gates``.
        unused: 1 - A of the same units, by the same keys.
        steepness: s, 0-d.
        sharpness: s_max.
        sparsity: c.
        clamped: whether embeddings and their gradients have the clamps of the published code.
    """

    scales: Params
    unused: Params
    steepness: Array
    sharpness: float = static()
    sparsity: float = static()
    clamped: bool = static(default=False)

    anneals: ClassVar[bool] = True

    @property
    def weights(self) -> frozenset[str]:
        """The names of the weights that read gated units."""
        return frozenset(key.rpartition("@")[0] for key in self.scales)

    def annealed(self, progress: float) -> Self:
        """Return the region for one batch of an epoch: s rises from 1 / s_max at progress 0 to s_max at 1.

        If the region is clamped, embeddings that the last step has moved out of [-LARGEST, LARGEST] are put back.
        """
        steepness = 1 / self.sharpness + (self.sharpness - 1 / self.sharpness) * progress
        scales = {key: _clipped(scale) for key, scale in self.scales.items()} if self.clamped else self.scales
        return replace(self, scales=scales, steepness=filled(scales, steepness))

    def with_scales(self, scales: Params) -> Self:
        """Return the region with other embeddings."""
        return replace(self, scales=scales)

    def gates(self) -> Params:
        """Return the gates a = sigmoid(s e), [units], by the weight that reads the units."""
        gates = {}
        for key, embedding in self.scales.items():
            xp: Any = namespace(embedding=embedding)
            # sigmoid(x) = (1 + tanh(x / 2)) / 2, which does not overflow as exp(-x) does.
            gates[key.rpartition("@")[0]] = (1 + xp.tanh(0.5 * self.steepness * _clipped(embedding))) / 2
        return gates

    def effective(self, theta: Params) -> Params:
        """Return all parameters, with the gated weights in the place of the shared ones.

        Raises:
            BecameError: if a weight is missing.
        """
        result = dict(theta)
        for name, gate in self.gates().items():
            if name not in theta:
                raise BecameError(f"the weights lack '{name}', which reads gated units.")
            xp: Any = namespace(weight=theta[name])
            matrix = xp.reshape(theta[name], (theta[name].shape[0], -1))
            by_column = xp.astype(spread(gate, matrix.shape[1]), matrix.dtype, copy=False)[None, :]
            result[name] = xp.reshape(matrix * by_column, theta[name].shape)
        return result

    def pull_back(self, gradients: Params, theta: Params) -> Params:
        """Return gradients by shared weights and embeddings, from those by effective weights.

        The gradient of the capacity term (eq. 5) is added to that of the embeddings.

        Args:
            gradients: by name; the gradient of a weight that reads no gated units is returned as it is.
            theta: the shared weights W, of at least the region's names.
        """
        result = dict(gradients)
        free_units = self._free_units()
        for name, gate in self.gates().items():
            if name not in gradients:
                continue
            key = f"{name}@gates"
            gradient, weight = gradients[name], theta[name]
            xp: Any = namespace(gradient=gradient, weight=weight)
            g, w = (xp.reshape(array, (array.shape[0], -1)) for array in (gradient, weight))
            by_column = xp.astype(spread(gate, g.shape[1]), g.dtype, copy=False)[None, :]
            result[name] = xp.reshape(g * by_column, gradient.shape)
            by_gate = xp.sum(xp.reshape(xp.sum(g * w, axis=0), (gate.shape[0], -1)), axis=1)
            by_gate = by_gate + self.sparsity * self.unused[key] / free_units
            if self.clamped:
                result[key] = by_gate * self._clamped_derivative(self.scales[key])
                continue
            # The true derivative of a gate, s sigmoid'(s e), nearly vanishes at both ends of the annealing. By eq. 4,
            # s_max sigmoid'(e) takes its place, with sigmoid'(e) = (1 - tanh(e / 2)^2) / 4.
            half = xp.tanh(0.5 * _clipped(self.scales[key]))
            result[key] = by_gate * self.sharpness * (1 - half * half) / 4
        return result

    def _clamped_derivative(self, embedding: Array) -> Array:
        """Return what takes the place of the derivative of a gate by its embedding, as the published code computes it.

        It is s a (1 - a) times the factor of eq. 4. It vanishes where a is rounded to 1, which in single precision is
        for s e above 17, and where s e is far below -50, from where on the factor no longer grows.
        """
        xp: Any = namespace(embedding=embedding)
        inner = self.steepness * embedding
        small = xp.exp(-xp.abs(inner))  # at most 1, so that nothing overflows
        gate = xp.where(inner >= 0, xp.ones_like(small), small) / (1 + small)
        numerator = _cosh(xp.clip(inner, -LARGEST_EXPONENT, LARGEST_EXPONENT)) + 1
        factor = self.sharpness / self.steepness * (numerator / (_cosh(embedding) + 1))
        return self.steepness * (gate * (1 - gate)) * factor

    def _free_units(self) -> Array:
        """Return the number of units that no old task uses, or 1 if there is none, so that it can be divided by."""
        parts = []
        for unused in self.unused.values():
            xp: Any = namespace(unused=unused)
            parts.append(xp.sum(unused))
        total = sum(parts[1:], parts[0])
        return xp.where(total > 0, total, xp.ones_like(total))


def spread(gate: Array, columns: int) -> Array:
    """Return the value of each column, [units x positions], from the value of each unit, [units]."""
    xp: Any = namespace(gate=gate)
    units = int(gate.shape[0])
    return xp.reshape(xp.broadcast_to(gate[:, None], (units, columns // units)), (columns,))


def _cosh(values: Array) -> Array:
    xp: Any = namespace(values=values)
    return (xp.exp(values) + xp.exp(-values)) / 2


def _clipped(embedding: Array) -> Array:
    xp: Any = namespace(embedding=embedding)
    return xp.clip(embedding, -LARGEST, LARGEST)


def filled(like: Params, number: float) -> Array:
    """Return a number as a 0-d array with the framework, dtype and device of other arrays."""
    first = next(iter(like.values()))
    xp: Any = namespace(like=first)
    return xp.asarray(number, dtype=first.dtype, device=device(first))
