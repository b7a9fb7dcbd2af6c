"""What every learner must do, whatever its framework: checks of the learner protocol.

Each check takes ``make(stream, seed)``, which returns a fresh learner in double precision without dropout and batch
statistics, so that a loss is a smooth function of the parameters which finite differences can probe. A backend that
passes them needs no further test to be trusted in the loop. Nothing is framework-specific: arrays are read by NumPy.
"""

from collections.abc import Callable

import pytest

from tests.conformance import measuring, running, training
from tests.conformance.learners import BACKBONES, STREAM, Make, convolutional, fresh_rng, linear, listened, numbers

__all__ = [
    "BACKBONES",
    "CHECKS",
    "STREAM",
    "Make",
    "conforms_where_all_is_compiled",
    "convolutional",
    "fresh_rng",
    "linear",
    "listened",
    "numbers",
]

CHECKS: list[Callable[[Make], None]] = [
    check
    for module in (measuring, running, training)
    for name, check in sorted(vars(module).items())
    if name.startswith("check_")
]
# They penalise, train in a region, and remember gradients. Other checks run what merges, gates units or frees weights.
ONE_OF_EACH_KIND = ("ewc", "trgp", "ogd")


def conforms_where_all_is_compiled(check: Callable[[Make], None], make: Make, backbone: str) -> None:
    """Run a check on a framework that compiles each operation for each shape.

    Every method runs with one backbone, and with the others one method of each kind, which ask a learner for all that
    a method can ask for: a merge in ``check_tasks_may_differ_in_their_classes``, masks in
    ``check_masks_keep_what_an_old_task_says_to_the_bit``, and the others one after the other. The first task has fewer
    classes with one backbone, and more with the others. PyTorch's learner and the reference's run every method with
    every backbone, and all orders. Regression with the product of two layers is left out: by plain steps its loss grows
    beyond all bounds.
    """
    if check is running.check_regression_is_learned_and_protected and backbone == "own":
        pytest.skip("the squared loss of a product of two layers diverges")
    if check is running.check_tasks_may_differ_in_their_classes:
        running.check_tasks_may_differ_in_their_classes(make, [2 if backbone == "linear" else 4])
    elif backbone == "linear":
        check(make)
    elif check is running.check_every_method_runs_and_repeats:
        running.check_every_method_runs_and_repeats(make, ONE_OF_EACH_KIND)
    elif check is running.check_regression_is_learned_and_protected:
        running.check_regression_is_learned_and_protected(make, ("gpm", "finetune"))
    else:
        check(make)
