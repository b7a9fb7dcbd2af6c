"""The merge of a task's two models (BECAME, Algorithm 1), and the truth along the path between them."""

from dataclasses import replace

import numpy as np

from became_core.arrays import Params
from became_core.continual.looking import look_along
from became_core.continual.record import MergePath
from became_core.continual.setting import Setting
from became_core.continual.state import Memory
from became_core.continual.stream import Task
from became_core.laplace import LaplacePosterior, LocalLoss, Precision
from became_core.laplace.rules import Merged

__all__ = ["merge", "trace"]


def merge(
    setting: Setting, task: Task, theta_gp: Params, theta_hat: Params, memory: Memory, curvature: Precision | None
) -> Merged:
    """Return what the method's rule makes of two models; the learner, at theta_hat, is left there.

    Args:
        setting: of the run.
        task: the last one.
        theta_gp: the stable model, or the old one.
        theta_hat: the task's own.
        memory: of the old tasks.
        curvature: the task's at theta_hat, if it has been measured.
    """
    method = setting.method
    measured = setting.measurement(task, "merge", memory)
    if curvature is None and method.precision != "diagonal":
        curvature = measured.precision(method.precision)
    new: LocalLoss = measured if curvature is None else LaplacePosterior(theta_hat, curvature)
    rule = method.rule_after(task.index, lambda theta: setting.true_loss(task, theta, memory))
    assert rule is not None
    losses = (new,) if memory.posterior is None else (memory.posterior, new)
    merged = rule.merge((theta_gp, theta_hat), losses)
    setting.place(task, theta_hat, memory)
    return merged


def trace(setting: Setting, task: Task, theta_gp: Params, theta_hat: Params, memory: Memory) -> MergePath:
    """Return the truth along the path, and what every estimator makes of it; the learner is at theta_hat."""
    assert memory.posterior is not None
    assert memory.approximations is not None

    def truth(theta: Params) -> tuple[float, float]:
        return setting.true_loss(task, theta, memory), float(np.mean(setting.accuracies(task, memory)[0]))

    measurements = [replace(setting.measurement(each, "merge", memory), last=task) for each in setting.seen(task)]
    known = memory.posterior, memory.approximations
    return look_along(measurements, *known, (theta_gp, theta_hat), truth, setting.training.path_alphas)
