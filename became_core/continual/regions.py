"""Trust regions around a learner: to look at a task is to look at its effective weights, to learn it at those beneath.

TRGP lets every task work with weights of its own, W + sum_j W B_j (Q_j - I) B_j^T, of which W alone is shared. A
learner knows of them in training only; whatever else is asked of it about a task is asked while it holds that task's
effective weights, and what comes back is carried over to W, in which posteriors and merges live. PackNet's tasks see a
part of the weights each, in evaluation alone: while a task is trained, the weights hold nothing but what it sees.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from became_core.continual.learner import Learner
from became_core.curvature import Taps
from became_core.projection import TrustRegion, View

__all__ = ["beneath", "reparametrised"]


@contextmanager
def reparametrised(learner: Learner, region: View | None) -> Iterator[None]:
    """Let a learner hold a region's effective weights for the time of this context; its own if there is no region."""
    if region is None or not region.weights:
        yield
        return
    theta = learner.parameters()
    learner.assign(region.effective(theta))
    try:
        yield
    finally:
        learner.assign(theta)


def beneath(region: TrustRegion | None, taps: Taps) -> Taps:
    """Return the taps of the weights beneath, given those of effective weights."""
    if region is None or not region.bases:
        return taps
    return {
        layer: replace(tap, inputs=region.seen(f"{layer}.weight", tap.inputs))
        if f"{layer}.weight" in region.weights
        else tap
        for layer, tap in taps.items()
    }
