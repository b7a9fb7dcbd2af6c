"""The report of a merging path: the true losses along it, and the alpha of every estimator.

Along theta_gp + alpha delta, the loss of each side is described by a slope at alpha = 0 and a curvature. The new task's
loss is measured at theta_hat, with or without its gradient there; by the secant of its slopes at both ends; and by its
fall from theta_gp to theta_hat, with its minimum there. As in the rule ``Secant``, the fall takes the place of the
secant where the loss bends down. The old tasks' loss is the posterior's, with diagonal or Kronecker curvature. For
reference, it is also measured exactly, from the old tasks' data, which a continual learner no longer has. The
approximate curvature of the old tasks can be calibrated: it is then multiplied by kappa, the ratio of the new task's
exact curvature to its approximate curvature. The posterior is that of the method: if it was tempered, or calibrated
across tasks, so is "diagonal", and ``Secant(calibrates=False)`` is "secant / diagonal".

The true losses are also traced along the curve of ``bezier_path``, which bends towards the mode of both sides'
diagonals, so that what it promises over the segment can be held against what it gives. A posterior that is calibrated
across tasks has another unit than the new task's diagonal, so its report has no curve.

Convention: losses are means over the samples of a task, and sums over tasks. ``batch`` is the published code's estimate
of the Fisher information.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from became_core.arrays import Params, difference
from became_core.continual.data import Task
from became_core.continual.measurement import Measurement
from became_core.continual.methods import Method
from became_core.continual.record import MergePath, PathPoint
from became_core.continual.run_context import RunContext
from became_core.continual.state import Memory, OldTasks
from became_core.laplace import LocalLoss, Precision, Quadratic, bezier_path, predicted_advantage, trace_path
from became_core.laplace.rules import diagonal_of

__all__ = ["Along", "alpha_estimates", "new_sides", "old_sides", "old_tasks_with", "report_path"]


@dataclass(frozen=True)
class Along:
    """A loss along delta.

    Attributes:
        slope: its slope at theta_gp.
        curvature: its curvature.
    """

    slope: float
    curvature: float


def new_sides(measurement: Measurement, theta_gp: Params) -> dict[str, Along]:
    """Return the new task's loss along delta, by each way to measure it.

    Args:
        measurement: of the new task; its learner is at theta_hat, and is left there.
        theta_gp: the stable weights.
    """
    theta_hat = measurement.mean
    delta = difference(theta_hat, theta_gp)
    exact = measurement.along([delta])
    gradient, curvature = float(exact.slope[0]), float(exact.curvature[0, 0])
    slope = float(measurement.slope(theta_gp, [delta])[0])
    fall = max(measurement.loss(theta_gp) - measurement.loss(), 0.0)
    by_fall = Along(-2 * fall, 2 * fall)
    sides = {
        "exact": Along(-curvature, curvature),
        "exact, with gradient": Along(gradient - curvature, curvature),
        "fall": by_fall,
        "secant": Along(slope, gradient - slope) if gradient > slope else by_fall,
    }
    by_samples = _by_samples(measurement)
    approximations: dict[str, Precision] = {
        "batch": replace(measurement, kind="batch").diagonal(),
        "diagonal": by_samples.diagonal(),
        "kronecker": by_samples.kronecker(),
    }
    head = measurement.learner.heads[measurement.task.index]
    shared = {name: value * 0 if name in head else value for name, value in delta.items()}
    sides |= {name: _around(precision, delta) for name, precision in approximations.items()}
    return sides | {"diagonal, without head": _around(approximations["diagonal"], shared)}


def _by_samples(measurement: Measurement) -> Measurement:
    """Return the measurement by single samples: of the run's kind of Fisher information, or of the empirical one."""
    return replace(measurement, kind="empirical") if measurement.kind == "batch" else measurement


def _around(precision: Precision, delta: Params) -> Along:
    """Return a loss along delta from its curvature alone, with its minimum at theta_hat."""
    curvature = float(precision.gram([delta])[0, 0])
    return Along(-curvature, curvature)


def old_sides(
    old_tasks: OldTasks, measurements: Sequence[Measurement], theta_gp: Params, theta_hat: Params
) -> dict[str, Along]:
    """Return the old tasks' loss along delta, by each way to measure it.

    Args:
        old_tasks: the posterior and the other approximations of their loss.
        measurements: one for each old task, on its own data.
        theta_gp: the stable weights.
        theta_hat: the plastic weights.
    """
    delta, offset = difference(theta_hat, theta_gp), difference(theta_gp, old_tasks.posterior.mean)
    precisions: dict[str, Precision] = {
        "diagonal": old_tasks.posterior.diagonal(),
        "kronecker": old_tasks.kronecker,
        "batch": old_tasks.batch,
    }
    sides = {}
    for name, precision in precisions.items():
        gram = precision.gram([delta, offset])
        sides[name] = Along(float(gram[0, 1]), float(gram[0, 0]))
    slope = curvature = 0.0
    for measurement in measurements:
        exact = measurement.along([delta], theta_gp)
        slope, curvature = slope + float(exact.slope[0]), curvature + float(exact.curvature[0, 0])
    return sides | {"exact": Along(slope, curvature)}


def alpha_estimates(new: Mapping[str, Along], old: Mapping[str, Along]) -> dict[str, float]:
    """Return the alpha of every estimator, by its name.

    The name of the paper's form begins with ``published``: it has two diagonals, and the old tasks' minimum at
    theta_gp. The name of any other estimator is ``NEW / OLD``, of the ways in which the two sides are measured. It ends
    with `` x kappa`` if the old side is calibrated, and with ``, at its minimum`` if the old tasks' slope at theta_gp
    is left out. So ``Secant`` is "secant / diagonal x kappa", ``Calibrated`` is "exact, with gradient / diagonal x
    kappa", ``DiagonalFisher`` is "diagonal / diagonal" and ``PaperClosedForm`` is "published, diagonal", or "published,
    batch" with the method's kind of Fisher information.

    Args:
        new: the new task's loss along delta, as ``new_sides`` returns it.
        old: the old tasks' loss along delta, as ``old_sides`` returns it.
    """
    alphas = {f"published, {name}": _alpha(new[name], _flat(old[other])) for name, other in _PUBLISHED.items()}
    for left in (name for name in _WITH_OLD_SIDES if name in new):  # older records have no fall
        for right in ("diagonal", "kronecker", "exact"):
            side = old[right]
            kappas = {"": 1.0}
            if right != "exact":
                known = new[right].curvature > 0
                kappas[" x kappa"] = new["exact"].curvature / new[right].curvature if known else 1.0
            for suffix, kappa in kappas.items():
                scaled = Along(kappa * side.slope, kappa * side.curvature)
                alphas[f"{left} / {right}{suffix}"] = _alpha(new[left], scaled)
                alphas[f"{left} / {right}{suffix}, at its minimum"] = _alpha(new[left], _flat(scaled))
    return alphas


_WITH_OLD_SIDES = ("diagonal", "kronecker", "exact", "exact, with gradient", "secant", "fall")

# For the paper's form: the way in which the new side is measured, and that of the old side.
_PUBLISHED = {"batch": "batch", "diagonal": "diagonal", "diagonal, without head": "diagonal"}


def _flat(side: Along) -> Along:
    return Along(0.0, side.curvature)


def _alpha(new: Along, old: Along) -> float:
    """Return the alpha in [0, 1] at the minimum of the sum of both losses; 0 if the sum is flat."""
    slope, curvature = new.slope + old.slope, new.curvature + old.curvature
    return float(Quadratic(np.asarray([slope]), np.asarray([[curvature]])).minimiser("box")[0])


def old_tasks_with(memory: Memory, measurement: Measurement, method: Method) -> OldTasks:
    """Return what later reports need of the old tasks, with one more task.

    Args:
        memory: the memory of the run; if the method has a posterior, it has been updated with this task.
        measurement: of the task, at the merged weights.
        method: the method of the run.
    """
    before = memory.old_tasks
    batch = replace(measurement, kind="batch").diagonal()
    kronecker = _by_samples(measurement).kronecker()
    if memory.posterior is not None:
        posterior = memory.posterior
    else:
        curvature = measurement.precision(method.precision)
        posterior = method.updated_posterior(None if before is None else before.posterior, measurement.mean, curvature)
    if before is None:
        return OldTasks(posterior, batch, kronecker)
    return OldTasks(posterior, before.batch + batch, before.kronecker + kronecker)


def report_path(context: RunContext, task: Task, theta_gp: Params, theta_hat: Params, memory: Memory) -> MergePath:
    """Return the report of the merge after a task.

    Args:
        context: the run; its learner is at theta_hat, and is left there.
        task: the task that was learned last.
        theta_gp: the stable weights.
        theta_hat: the plastic weights.
        memory: the memory of the old tasks.
    """
    assert memory.old_tasks is not None

    def truth(theta: Params) -> tuple[float, float]:
        with context.at(task, theta, memory):
            losses = [measurement.loss() for measurement in measurements]
            return sum(losses), float(np.mean(context.accuracies(task, memory).accuracy))

    measurements = [
        replace(context.measurement(learned, "merge", memory), last=task) for learned in context.tasks_until(task)
    ]
    new = new_sides(measurements[-1], theta_gp)
    old = old_sides(memory.old_tasks, measurements[:-1], theta_gp, theta_hat)
    alphas, truths = trace_path(truth, theta_gp, theta_hat, context.training.path_alphas)
    path = MergePath(
        [PathPoint(alpha, *point) for alpha, point in zip(alphas, truths, strict=True)],
        new={name: (side.slope, side.curvature) for name, side in new.items()},
        old={name: (side.slope, side.curvature) for name, side in old.items()},
    )
    if context.method.calibrates:
        return path
    sides: tuple[LocalLoss, ...] = memory.old_tasks.posterior, _by_samples(measurements[-1])
    fisher_old, fisher_new = (diagonal_of(side, theta_gp) for side in sides)
    four = theta_gp, theta_hat, fisher_old, fisher_new
    curve = bezier_path(*four)
    return replace(
        path,
        curve=[PathPoint(t, *truth(curve.at(t))) for t in alphas],
        predicted_advantage=float(predicted_advantage(*four)),
    )
