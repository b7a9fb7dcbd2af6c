"""Running statistics of normalisation layers: a function of a model's weights and of the images that it learned last.

They are no exponential averages of what was seen in training, but estimated afresh for the weights as they are, in one
pass over the training images: exact, the same on every backend, there for merged weights as for trained ones (as is
usual after averaging weights: Izmailov et al., UAI 2018). So every model has its own, theta_gp, theta_hat and the best
of a stage, and nothing else needs to know of them: no gradient, optimiser, projector, penalty, curvature or delta.

Convention: of a layer, ``NAME.running_mean`` and ``NAME.running_var``, the biased variance; the mean and the variance
over all images of what the layer sees when those before it normalise by each batch's own, without dropout.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from became_core.arrays import Params
from became_core.continual.learner import Learner
from became_core.continual.regions import reparametrised
from became_core.continual.seeding import random_stream
from became_core.continual.stream import Task
from became_core.projection import View

__all__ = ["place", "pooled", "refresh", "weights_of"]

MEAN, VARIANCE = ".running_mean", ".running_var"


def weights_of(learner: Learner) -> Params:
    """Return a learner's parameters but for running statistics."""
    return {name: value for name, value in learner.parameters().items() if name not in learner.statistics}


def place(
    learner: Learner, weights: Params, tasks: Sequence[Task], batch_size: int, seed: int, region: View | None = None
) -> None:
    """Let a learner have these weights, and the statistics that belong to them; arguments as of ``refresh``."""
    held = learner.parameters() if learner.statistics else {}
    learner.assign(held | weights)
    refresh(learner, tasks, batch_size, seed, region)


def refresh(learner: Learner, tasks: Sequence[Task], batch_size: int, seed: int, region: View | None = None) -> None:
    """Estimate a learner's statistics for its weights.

    Args:
        learner: nothing is done if it has none.
        tasks: whose training images are seen, in a shuffled order.
        batch_size: of the pass; a last batch of one image, which has no statistics, is left out.
        seed: the run's, which with the last task names the order.
        region: what the last task sees of the weights, if it sees them otherwise than they are.
    """
    if not learner.statistics:
        return
    rows = np.concatenate([task.train for task in tasks])
    rows = random_stream(seed, "statistics", tasks[-1].index).permutation(rows)
    if len(rows) > 1 and len(rows) % batch_size == 1:
        rows = rows[:-1]
    with reparametrised(learner, region):
        found = pooled(learner.batch_statistics(rows, batch_size))
    learner.assign(learner.parameters() | found)


def pooled(batches: Iterable[tuple[int, Params]]) -> Params:
    """Return the statistics of all batches together, given each one's size and own.

    The mean of all is that of the batches' means; their variance, the mean of the batches' variances and the variance
    of their means.
    """
    parts = list(batches)
    found: Params = {}
    for name in dict.fromkeys(name.removesuffix(MEAN) for _, part in parts for name in part if name.endswith(MEAN)):
        of_layer = [(n, part[name + MEAN], part[name + VARIANCE]) for n, part in parts if name + MEAN in part]
        total = sum(n for n, _, _ in of_layer)
        mean = sum((n / total * m for n, m, _ in of_layer[1:]), of_layer[0][0] / total * of_layer[0][1])
        spread = [n / total * (v + (m - mean) ** 2) for n, m, v in of_layer]
        found |= {name + MEAN: mean, name + VARIANCE: sum(spread[1:], spread[0])}
    return found
