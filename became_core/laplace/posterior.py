"""The Laplace posterior over the tasks learned so far, N(mean, precision^-1) (BECAME, Section 3.1).

Convention: the precision is the Hessian of the cumulative loss, the sum over tasks of weight * (mean curvature of the
task). With weight 1 every task counts alike, as in the paper; with weight = number of samples, every sample does, which
is what densities, evidence and samples mean by a precision. Curvature for parameters that the precision does not cover
is zero; densities and samples ask that it covers all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from became_core.arrays import Array, Params, device, difference, namespace, pytree
from became_core.errors import BecameError
from became_core.laplace.quadratic import Quadratic
from became_core.precision import Diagonal, GramRequest, Precision, gram_matrices

__all__ = ["LaplacePosterior", "offset"]


@pytree
@dataclass(frozen=True)
class LaplacePosterior:
    """A Gaussian posterior; its negative log density is the loss that stands for all old tasks.

    Attributes:
        mean: the weights that the old tasks' loss is expanded at.
        precision: of all or some of these parameters.

    Raises:
        BecameError: if the precision covers a parameter that has no mean, or has it in another shape.

    Examples:
        >>> import numpy as np
        >>> from became_core import Diagonal
        >>> posterior = LaplacePosterior({"w": np.zeros(1)}, Diagonal({"w": np.array([3.0])}))
        >>> posterior.update({"w": np.ones(1)}, Diagonal({"w": np.array([1.0])}), decay=0.5).precision.diagonal()
        {'w': array([2.5])}
    """

    mean: Params
    precision: Precision

    def __post_init__(self) -> None:
        """Check that each parameter of the precision has a mean."""
        for name, shape in self.precision.covered().items():
            if name not in self.mean:
                raise BecameError(f"the precision covers '{name}', of which the mean has no value; give it one.")
            own = tuple(self.mean[name].shape)
            if own != shape and not self.precision._fits(name, own):
                raise BecameError(
                    f"the mean of '{name}' has shape {own} but its precision is for {shape}; make them equal."
                )

    def update(
        self, theta: Params, curvature: Precision, *, weight: Array | float = 1.0, decay: Array | float = 1.0
    ) -> "LaplacePosterior":
        """Return the posterior after one more task: mean theta, precision ``weight * curvature + decay * precision``.

        Args:
            theta: the weights after the task, which become the mean.
            curvature: the task's curvature at theta, of any structure, a mean over its samples.
            weight: 1 to count tasks alike (the paper), the number of samples to count samples alike.
            decay: the paper's gamma; below 1 it forgets old tasks geometrically.
        """
        return LaplacePosterior(mean=theta, precision=curvature * weight + self.precision * decay)

    def assimilate(self, gradient: Params, curvature: Precision) -> "LaplacePosterior":
        """Return the posterior after one Newton step from the mean: precision P + H, mean - (P + H)^-1 g.

        Exact Bayes where the new data's log-likelihood is quadratic (linear-Gaussian models): any sequence of steps, in
        any order, then ends in the posterior of all data at once. Parameters that P + H does not cover keep their mean.

        Args:
            gradient: g, of the new data's negative log-likelihood at the mean, a sum over samples.
            curvature: H, of the same.

        Raises:
            BecameError: as ``Precision.solve`` does.
        """
        precision = self.precision + curvature
        step = precision.solve(gradient)
        known = {name: value for name, value in self.mean.items() if name in step}
        return LaplacePosterior({**self.mean, **difference(known, step)}, precision)

    def loss(self, theta: Params) -> Array:
        """Return 1/2 (theta - mean).P.(theta - mean), a 0-d array."""
        way = offset(theta, self.mean)
        return 0.5 * self.precision.inner(way, way)

    def gradient(self, theta: Params) -> Params:
        """Return P (theta - mean), for the parameters given: all, or a part that P does not couple with the others."""
        return self.precision.apply(offset(theta, self.mean))

    def quadratic(self, origin: Params, directions: Sequence[Params]) -> Quadratic:
        """Return the old tasks' loss at origin + sum_k a_k d_k, up to a constant.

        Args:
            origin: where the coefficients a are zero.
            directions: K of them.

        Returns:
            slope_k = (origin - mean).P.d_k, [K], and curvature_kl = d_k.P.d_l, [K, K].
        """
        from_mean = GramRequest(self.precision, [offset(origin, self.mean)], directions)
        slope, curvature = gram_matrices([from_mean, GramRequest(self.precision, directions)])
        return Quadratic(slope=slope[0, :], curvature=curvature)

    def along(self, directions: Sequence[Params]) -> Quadratic:
        """Return the old tasks' loss along directions from the mean, where it has no slope."""
        return self.quadratic(self.mean, directions)

    def slope(self, origin: Params, directions: Sequence[Params]) -> Array:
        """Return the old tasks' slopes along K directions at a point, [K]."""
        return self.quadratic(origin, directions).slope

    def diagonal(self) -> Diagonal:
        """Return the diagonal of the precision, as a precision."""
        return Diagonal(self.precision.diagonal())

    def log_density(self, theta: Params) -> Array:
        """Return log N(theta; mean, P^-1), normalised, a 0-d array.

        Raises:
            BecameError: if P does not cover all of the mean, is singular, or has no closed form.
        """
        return 0.5 * self._log_normaliser() - self.loss(theta)

    def evidence(self, log_likelihood: Array | float, prior: "LaplacePosterior") -> Array:
        """Return the Laplace approximation of log p(data), a 0-d array; exact where the log-likelihood is quadratic.

        log p(data | mean) + log prior density at the mean + d/2 log(2 pi) - 1/2 log det P (MacKay 1992).

        Args:
            log_likelihood: of the data by which the prior became this posterior, at this posterior's mean; a sum over
                samples, as the precision must be.
            prior: what was believed before those data.

        Raises:
            BecameError: as ``log_density`` does, of either.
        """
        return log_likelihood + prior.log_density(self.mean) - 0.5 * self._log_normaliser()

    def marginal_variance(self) -> Params:
        """Return the variance of each parameter, the diagonal of P^-1; raises as ``log_density`` does."""
        self._check_proper()
        variance = self.precision.inverse_diagonal()
        return {name: namespace(mean=value).reshape(variance[name], value.shape) for name, value in self.mean.items()}

    def sample(self, stream: np.random.Generator) -> Params:
        """Return weights drawn from the posterior, in the mean's framework, dtypes and device.

        Args:
            stream: the noise is drawn from it on the host, parameter by parameter in the order of their names.

        Raises:
            BecameError: as ``log_density`` does.
        """
        self._check_proper()
        noise = {}
        for name, value in sorted(self.mean.items()):
            xp = namespace(mean=value)
            drawn = stream.standard_normal(tuple(value.shape))
            noise[name] = xp.asarray(np.asarray(drawn), dtype=value.dtype, device=device(value))
        spread = self.precision.sample(noise)
        return {name: value + spread[name] for name, value in self.mean.items()}

    def _log_normaliser(self) -> Array:
        """Log det P - d log(2 pi)."""
        self._check_proper()
        d = sum(math.prod(value.shape) for value in self.mean.values())
        return self.precision.log_determinant() - d * math.log(2 * math.pi)

    def _check_proper(self) -> None:
        for name in self.mean:
            if name not in self.precision.covered():
                raise BecameError(
                    f"the precision does not cover '{name}', so that there is no density; add a precision that does."
                )


def offset(theta: Params, mean: Params) -> Params:
    """Return theta - mean: zero for parameters without a mean, such as a new task's head, which have no curvature."""
    known = difference({name: value for name, value in theta.items() if name in mean}, mean)
    return {
        name: known[name] if name in known else namespace(theta=value).zeros_like(value)
        for name, value in theta.items()
    }
