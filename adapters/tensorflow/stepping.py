"""The two parts of a step, each fit to be compiled: the network's, to gradients, and the constraint's, from there on.

The network's part has the head as an argument and knows of no memory, so it is traced once for all tasks and methods,
and once more for batches of another size. The constraint's part is a few operations, whose structure is the memory's,
so it is traced for each stage.

Convention: gradients are of a batch's mean loss. Those of linear layers' weights come as factors, the gradient by the
outputs, g [n, d_out], and the inputs, a [n, d_in], of which they are the product g^T a: so projecting a few inputs can
stand for projecting d_out rows.
"""

from collections.abc import Callable, Sequence

import tensorflow as tf

from adapters.networks import Backbone, Linear, Tapped, is_statistic
from adapters.tensorflow.layers import Pass
from became_core.arrays import Array, Params
from became_core.continual import Constraint, Optimiser, Penalty
from became_core.laplace import LaplacePosterior
from became_core.projection import Projector, Region

__all__ = ["Factors", "advanced", "loss_and_gradients"]

# g and a of linear layers, by the weight's name.
Factors = dict[str, tuple[Array, Array]]


def loss_and_gradients(
    backbone: Backbone,
    head: Linear,
    theta: Params,
    images: Array,
    targets: Array,
    masks: Sequence[Array],
    products: tf.DType | None = None,
) -> tuple[Array, Params, Factors]:
    """Return the sum of the samples' losses, and of their mean the gradients, those of linear weights as factors.

    Args:
        backbone: what sees the images.
        head: what sees its features.
        theta: the parameters of both, and no others.
        images: normalised, [N, H, W, C].
        targets: labels within the task, [N].
        masks: of dropout, as in a ``Pass``.
        products: likewise.
    """
    inputs: Params = {}
    outputs: Params = {}
    with tf.GradientTape() as tape:
        tape.watch(theta)

        def record(layer: Tapped, seen: Callable[[], Array], output: Array) -> Array:
            if isinstance(layer, Linear):
                tape.watch(output)
                inputs[f"{layer.name}.weight"], outputs[f"{layer.name}.weight"] = seen(), output
            return output

        run = Pass(theta, masks, record=record, products=products)
        logits = run(head, backbone(run, images))
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
        mean = tf.reduce_mean(losses)
    others = {name: value for name, value in theta.items() if name not in outputs and not is_statistic(name)}
    gradients, by_outputs = tape.gradient(mean, (others, outputs))
    factors = {name: (_as_rows(by_outputs[name]), _as_rows(a)) for name, a in inputs.items()}
    return tf.reduce_sum(losses), gradients, factors


def advanced(
    theta: Params,
    gradients: Params,
    factors: dict[str, tuple[Array, Array]],
    rate: Array,
    optimiser: Optimiser,
    memory: tuple[Projector | None, LaplacePosterior | None, Region | None],
    strength: float,
    trains_scales: bool,
    relative: dict[str, float],
) -> tuple[Params, Optimiser, Region | None, Params]:
    """Return what is trained, the optimiser and the region after a step, and the region's effective weights.

    Args:
        theta: the parameters beneath that are trained, and the region's scales by their keys.
        gradients: of those that have no factors.
        factors: of the others.
        rate: the learning rate, 0-d.
        optimiser: before the step.
        memory: projector, posterior and region of the constraint.
        strength: of the penalty by the posterior.
        trains_scales: whether the region's scales are trained.
        relative: of the learning rate, as in a ``Constraint``.
    """
    projector, posterior, region = memory
    penalty = None if posterior is None else Penalty(posterior, strength)
    constraint = Constraint(frozenset(theta), projector, penalty, region, trains_scales, relative)
    # A gradient g^T a is projected for less work by projecting a.
    early = constraint.projector_of_gradients(optimiser)
    by_inputs = frozenset[str]() if early is None else early.rowwise & factors.keys()
    by_inputs -= frozenset() if region is None else region.weights
    for name, (g, a) in factors.items():
        seen = early.project_rows(name, a) if early is not None and name in by_inputs else a
        gradients = gradients | {name: tf.matmul(g, seen, transpose_a=True)}
    directions, optimiser = constraint.directions(gradients, theta, rate, optimiser, by_inputs)
    theta = theta | {name: theta[name] - rate * direction for name, direction in directions.items()}
    if region is None:
        return theta, optimiser, None, {}
    region = region.with_scales({key: theta[key] for key in region.scales})
    return theta, optimiser, region, region.effective({name: theta[name] for name in region.weights})


def _as_rows(array: Array) -> Array:
    return tf.reshape(array, (-1, array.shape[-1]))
