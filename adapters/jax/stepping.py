"""A step of training, and, where that pays, many steps as one program, with the same arithmetic in the same order.

On an accelerator a program for each step leaves the device waiting for Python; on a CPU XLA's convolutions are slower
within a loop of its own.

Convention: a state is what is trained, with the task's head by the name ``head``, and the optimiser.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from adapters.jax import compiled
from adapters.jax.dropout import Masks
from adapters.networks import Backbone
from became_core.arrays import Array, Params
from became_core.continual import Optimiser, Views

__all__ = ["State", "Steps", "many_steps", "stacked", "step"]

State = tuple[Params, Optimiser]


class Steps(NamedTuple):
    """What differs from step to step: of one step, or of several, stacked.

    Attributes:
        rows: of the batch.
        rate: the learning rate.
        masks: of dropout.
        views: how the images are seen.
    """

    rows: Array
    rate: Any
    masks: Masks
    views: Views | None


def step(
    backbone: Backbone,
    state: State,
    frozen: Params,
    data: compiled.Data,
    each: Steps,
    respected: dict[str, Any],
    *,
    factored: frozenset[str],
    products: str | None,
) -> tuple[State, Array]:
    """Return the state after a step, and the batch's loss; takes the state's buffers.

    Args:
        backbone: the network.
        state: before the step.
        frozen: the parameters that are not trained.
        data: on the device.
        each: of this step.
        respected: what an update must respect, by the arguments of ``compiled.update``.
        factored: names of weights whose gradients come as factors.
        products: as in a ``Pass``.
    """
    own, optimiser = state
    region = respected["region"]
    weights, beside = frozen | own, frozenset[str]()
    if region is not None:
        weights |= compiled.effective(own, frozen, region)
        beside = region.scales.keys()
    moving = {name: weights[name] for name in own if name not in beside and name not in factored}
    linear, still = ({name: weights[name] for name in names} for names in (sorted(factored), frozen))
    loss, gradients, factors = compiled.gradients(
        backbone, moving, linear, still, data, each.rows, each.masks, each.views, products=products
    )
    multiplied = compiled.multiplied(factors, respected["projector"], region) if factors else {}
    return compiled.update(own, optimiser, frozen, gradients, multiplied, each.rate, **respected), loss


def _many_steps(
    backbone: Backbone,
    state: State,
    frozen: Params,
    data: compiled.Data,
    steps: Steps,
    respected: dict[str, Any],
    *,
    trains_scales: bool,
    factored: frozenset[str],
    products: str | None,
) -> tuple[State, Array]:
    """Return the state after all steps, and their losses [steps]; arguments as of ``step``, steps stacked."""
    respected = respected | {"trains_scales": trains_scales}

    def one(state: State, each: Steps) -> tuple[State, Array]:
        return step(backbone, state, frozen, data, each, respected, factored=factored, products=products)

    return lax.scan(one, state, steps)  # type: ignore[no-any-return]


many_steps: Any = jax.jit(
    _many_steps, static_argnums=0, static_argnames=("trains_scales", "factored", "products"), donate_argnums=1
)


def stacked(steps: Sequence[Steps], dtype: str) -> Steps:
    """Return steps of equal batches as ``many_steps`` takes them; rates in the dtype of the weights."""
    together: Steps = jax.tree.map(
        lambda *each: jnp.stack(each) if isinstance(each[0], jax.Array) else np.stack(each), *steps
    )
    return together._replace(rate=together.rate.astype(dtype))
