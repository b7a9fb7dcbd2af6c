"""The Laplace posterior over the tasks learned so far, N(mean, precision^-1) (BECAME, Section 3.1).

Convention: the precision is the Hessian of the cumulative loss, the sum over tasks of weight * (mean curvature of the
task). With weight 1 every task counts alike, as in the paper; with weight = number of samples, every sample does.
"""

from dataclasses import dataclass

from became_core.arrays import Array, Params, namespace
from became_core.laplace.precision import Diagonal
from became_core.laplace.quadratic import Quadratic

__all__ = ["LaplacePosterior"]


@dataclass(frozen=True)
class LaplacePosterior:
    """A Gaussian posterior; its negative log density is the loss that stands for all old tasks."""

    mean: Params
    precision: Diagonal

    def update(self, theta: Params, fisher: Diagonal, *, weight: float = 1.0, decay: float = 1.0) -> "LaplacePosterior":
        """Return the posterior after one more task: mean theta, precision ``weight * fisher + decay * precision``.

        Args:
            theta: the weights after the task, which become the mean.
            fisher: the task's curvature at theta, a mean over its samples.
            weight: 1 to count tasks alike (the paper), the number of samples to count samples alike.
            decay: the paper's gamma; below 1 it forgets old tasks geometrically.
        """
        return LaplacePosterior(mean=theta, precision=fisher * weight + self.precision * decay)

    def loss(self, theta: Params) -> Array:
        """Return 1/2 (theta - mean).P.(theta - mean), a 0-d array."""
        offset = self._offset(theta)
        return 0.5 * self.precision.inner(offset, offset)

    def gradient(self, theta: Params) -> Params:
        """Return P (theta - mean), for the parameters given."""
        return self.precision.apply(self._offset(theta))

    def quadratic(self, origin: Params, directions) -> Quadratic:
        """TEMP."""
        from became_core.laplace.expansion import subspace_quadratic
        return subspace_quadratic(directions, self.precision, offset=self._offset(origin))

    def diagonal(self):
        return self.precision

    def along(self, directions):
        curvature = self.precision.gram(directions)
        return Quadratic(namespace(c=curvature).zeros_like(curvature[:, 0]), curvature)

    def _offset(self, theta: Params) -> Params:
        return {name: value - self.mean[name] for name, value in theta.items()}
