"""The method around a training loop in JAX that is not ours: pure functions, and a transformation for optax.

``projected`` makes a transformation of a ``Memory`` (``memory.py``) that goes around an optax optimiser, or comes last
in a chain: what is projected is the step, whatever made it. What a projector cannot protect is pulled back by the
proximal step of a quadratic penalty,

    theta <- (theta + s mean) / (1 + s)    with s = learning rate x penalty x precision

which is decoupled from the optimiser, as AdamW's weight decay is, and stable at any strength. Of an Adam that
``projected`` is given, s is divided by the root of its second moments, as its steps are.

Convention: as in ``memory.py``. Since running statistics are not in ``params``, ``merge`` cannot estimate them anew, as
it does for models that hold their own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import jax
import optax
from jax import numpy as jnp

from adapters.backend import memory as shared
from adapters.backend.batches import repeatable
from adapters.backend.calibration import estimator_for
from adapters.backend.merging import TaskLoss, check_trace, merge_report
from adapters.backend.own_loop import MergeReport
from adapters.jax.data_loss import DataLoss, moments_of
from adapters.jax.memory import Memory, copied
from adapters.jax.tapping import Apply, trained_of
from adapters.jax.trees import leaves_of, with_leaves_of
from became_core import BecameError
from became_core import merge as merge_trees
from became_core.arrays import Array, Params, named_leaves, namespace, with_leaves
from became_core.laplace import Estimator
from became_core.projection import full

__all__ = ["Merged", "merge", "penalty", "projected"]

# Training.


class ProjectedState(NamedTuple):
    """The state of ``projected``; its arrays are arguments of a compiled step, and no constants in it.

    It is of tuples, dicts and arrays that are not empty, as libraries that write states to disk want it.

    Attributes:
        count: how many steps were taken.
        spaces: the projector's arrays by their paths; empty ones, and what is no array, stay in the memory.
        penalised: the mean of every parameter that is pulled back to it, and penalty x precision.
        inner: the state of the optimiser that was given.
    """

    count: Array
    spaces: Params
    penalised: dict[str, tuple[Array, Array]]
    inner: Any


def projected(
    memory: Memory,
    learning_rate: float | Callable[[Any], Any],
    optimizer: optax.GradientTransformation | None = None,
    *,
    b2: float = 0.999,
) -> optax.GradientTransformationExtraArgs:
    """Return an optimiser whose steps stay out of the spaces that old data use.

    Without an optimiser it comes last in ``optax.chain``. It then cannot see an Adam's second moments, and its pull is
    weak beside an Adam's steps. Its updates need the parameters: ``optimizer.update(gradients, state, params)``. It is
    given the whole tree of parameters, so it stands outside of ``optax.masked`` and ``optax.multi_transform``;
    ``optax.MultiSteps`` may be inside or outside. What else an update needs, such as ``value=``, is passed on.

    The state of an Adamax looks like an Adam's, so that the pull would be divided by numbers that are no second
    moments: let ``projected`` come last in a chain after it, or leave the pull to ``penalty``.

    Args:
        memory: of the old data.
        learning_rate: a number, or a schedule of the steps' count, as the optimiser has it; it scales the pull on
            parameters that are penalised, and 0 leaves that to ``penalty`` in the loss.
        optimizer: whose steps are projected.
        b2: the decay of second moments, if an Adam is in the optimiser.

    Raises:
        BecameError: if the learning rate is an optimiser; in ``init`` and ``update``, if the parameters are not those
            of the memory; in ``init``, if the optimiser keeps means of steps before they are projected; in ``update``,
            if there are no parameters.

    Examples:
        >>> from adapters.jax.memory import remember
        >>> apply, params = lambda params, inputs: inputs @ params["w"], {"w": jnp.ones((3, 2))}
        >>> memory = remember(apply, params, [(jnp.eye(3)[:2], jnp.array([0, 1]))], check=False)
        >>> optimizer = projected(memory, 0.5, optax.sgd(0.5))
        >>> gradients, state = {"w": jnp.ones((3, 2))}, optimizer.init(params)
        >>> updates, state = optimizer.update(gradients, state, params)
        >>> bool(jnp.allclose(updates["w"], jnp.array([[0.0, 0], [0, 0], [-0.5, -0.5]]), atol=1e-6))
        True
    """
    _check_rate(learning_rate)
    # Only what is no array is taken from the memory here; the arrays come from the state.
    ranks, matrices, standing = memory.projector.rank, memory.matrices, full(memory.projector)
    taking_steps = optax.with_extra_args_support(optax.identity() if optimizer is None else optimizer)

    def init(params: Any) -> ProjectedState:
        if not _is_placeholder(params):
            memory.check(trained_of(params))
        namespace(values=next(iter(memory.posterior.mean.values())))  # JAX learns of the core's values
        arrays = {name: value for name, value in named_leaves(memory.projector).items() if value.size}
        spaces, penalised = copied((arrays, memory.penalised))
        inner = taking_steps.init(params)
        _check_no_means_of_steps(inner)
        return ProjectedState(jnp.zeros((), jnp.int32), spaces, penalised, inner)

    def update(updates: Any, state: ProjectedState, params: Any = None, **others: Any) -> tuple[Any, ProjectedState]:
        if params is None:
            raise BecameError("projected needs the parameters; call optimizer.update(gradients, state, params).")
        updates, inner = taking_steps.update(updates, state.inner, params, **others)
        count = state.count + _is_taken(state.inner, inner)
        theta, steps, moments = trained_of(params), leaves_of(updates), moments_of(inner, b2)
        memory.check(theta)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rate = rate * (count - state.count)  # gradients that are only gathered are no step
        projector = with_leaves(memory.projector, named_leaves(memory.projector) | state.spaces)
        allowed = dict(steps)
        for name, step in steps.items():
            if name not in theta:
                continue
            if name in standing or (name not in ranks and memory.uncovered == "frozen"):
                allowed[name] = jnp.zeros_like(step)
                continue
            wide = step.astype(jnp.promote_types(step.dtype, jnp.float32))
            if name in ranks:
                width = ranks[name][1]
                matrix = wide.reshape(width, -1).T if matrices.get(name) else wide.reshape(-1, width)
                rows = projector.project({name: matrix})[name]
                wide = (rows.T if matrices.get(name) else rows).reshape(step.shape)
            elif name in state.penalised:
                mean, strength = state.penalised[name]
                pull = shared.pull_of(rate, strength, moments.get(name))
                wide = (wide + pull * (mean - theta[name])) / (1 + pull)
            allowed[name] = wide.astype(step.dtype)
        return with_leaves_of(updates, allowed), state._replace(count=count, inner=inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_placeholder(params: Any) -> bool:
    """Return whether this is a node without children, which optax gives to ask where in a state parameters stand."""
    structure = jax.tree.structure(params)
    return bool(structure.num_nodes == 1 and structure.num_leaves == 0)


def _check_rate(learning_rate: Any) -> None:
    if hasattr(learning_rate, "update"):
        raise BecameError(
            "projected was given an optimizer for its learning rate; call projected(memory, learning_rate, optimizer)."
        )


def _check_no_means_of_steps(state: Any) -> None:
    if _nodes(state, optax.contrib.ScheduleFreeState):
        raise BecameError(
            "a schedule-free optimizer takes means of its steps, and must know them as they are projected; let it "
            "come around: optax.contrib.schedule_free(projected(memory, rate, optimizer), rate)."
        )


def _nodes(state: Any, kind: type) -> list[Any]:
    return [n for n in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind)) if isinstance(n, kind)]


def _is_taken(before: Any, after: Any) -> Any:
    """Return 1 if an optimiser took a step; 0 if it only gathered gradients, or left out some that are not finite."""
    counts = [[node.gradient_step for node in _nodes(state, optax.MultiStepsState)] for state in (before, after)]
    steps = [now - then for then, now in zip(*counts, strict=True)]
    is_finite = [node.last_finite for node in _nodes(after, optax.ApplyIfFiniteState)]
    taken = jnp.max(jnp.stack(steps)) if steps else 1
    return taken * jnp.all(jnp.stack(is_finite)) if is_finite else taken


def penalty(memory: Memory, params: Any) -> Array:
    """Return penalty/2 x (theta - mean).F.(theta - mean) over the parameters that are penalised, a 0-d array.

    It may be added to a loss instead of the pull of ``projected``, whose learning rate is then 0. The pull is stable at
    any strength, and the gradient of this is not. ``memory`` may be an argument of a compiled function.

    Args:
        memory: of the old data.
        params: the present parameters.

    Examples:
        >>> from adapters.jax.memory import remember
        >>> def apply(params, inputs):
        ...     return inputs @ params["w"] + params["b"]
        >>> params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
        >>> memory = remember(apply, params, [(jnp.eye(3)[:2], jnp.array([0, 1]))], check=False)
        >>> round(float(penalty(memory, {"w": jnp.ones((3, 2)), "b": jnp.ones(2)})), 4)  # 100 / 2 x (1/4 + 1/4)
        25.0
    """
    theta = trained_of(params)
    terms = [
        jnp.sum(strength * jnp.square(theta[name] - mean)) / 2 for name, (mean, strength) in memory.penalised.items()
    ]
    return jnp.sum(jnp.stack(terms)) if terms else jnp.zeros(())


# Merging.


@dataclass(frozen=True, kw_only=True)
class Merged(MergeReport):
    """The report of a merge, with its result.

    Attributes:
        params: the merged parameters, theta*; what is no real number is the plastic tree's.
        memory: the memory with which to remember the new data; of calibration across tasks it knows of the merge.
    """

    params: Any = field(repr=False)
    memory: Memory = field(repr=False)


def merge(
    apply: Apply,
    memory: Memory,
    theta_gp: Any,
    theta_hat: Any,
    new_batches: Iterable[Any],
    *,
    estimator: Estimator | None = None,
    trace: int = 0,
    check: bool = False,
    progress: bool = True,
) -> Merged:
    """Merge the stable and the plastic parameters at alpha*, theta* = (1 - alpha*) theta_gp + alpha* theta_hat.

    Args:
        apply: as in ``remember``.
        memory: of the old data, without the new ones.
        theta_gp: the stable tree, at the end of training with ``projected``.
        theta_hat: the plastic tree, at the end of free training from there.
        new_batches: of the new data; a part of them will do.
        estimator: how losses along the way between the two are estimated; the paper's closed form,
            ``PaperClosedForm()``, if not given. A memory that is calibrated across tasks has its own.
        trace: at how many alphas the true loss of the new data is measured, both ends among them; 0 for none.
        check: whether the function is looked at first, as in ``remember``.
        progress: whether a terminal shows how far a pass is.

    Raises:
        BecameError: if a tree is not of the memory's architecture, one point alone is to be traced, or a batch
            cannot be used.

    Examples:
        >>> from adapters.jax.memory import remember
        >>> def apply(params, inputs):
        ...     return inputs @ params["w"]
        >>> theta_gp, theta_hat = ({"w": jnp.array([[0.0, 0], [0, scale], [0, 0]])} for scale in (0, 4))
        >>> memory = remember(apply, theta_gp, [(jnp.eye(3)[:2], jnp.array([0, 0]))], check=False)
        >>> report = merge(apply, memory, theta_gp, theta_hat, [(jnp.eye(3)[:2], jnp.array([0, 1]))])
        >>> 0 < report.alpha < 1
        True
        >>> report.curvature
        'the diagonal Fisher information'
    """
    check_trace(trace)
    data = DataLoss(apply, theta_hat, memory.likelihood, fisher=memory.fisher, checks=check, shows=progress)
    stable = {name: jnp.asarray(value) for name, value in trained_of(theta_gp).items()}
    memory.check(stable)
    memory.check(data.theta)
    stable = {name: stable[name] for name in data.theta}
    if all(value is data.theta[name] for name, value in stable.items()):
        raise BecameError(
            "theta_gp and theta_hat are the same arrays, as those of nnx are, which its optimizer changes in place; "
            "copy the stable ones by jax.tree.map(jnp.copy, theta_gp) before plastic training."
        )
    kept, across, posterior = repeatable(new_batches), memory.across, memory.posterior
    chosen = estimator_for(None if across is None else "across", estimator)
    if across is not None:

        def at_stable() -> tuple[TaskLoss, Params]:
            fisher, _ = data.fisher(kept, with_memory=False, theta=stable)
            return TaskLoss(data, kept, stable), fisher

        across, posterior = across.merged(posterior, stable, data.theta, at_stable)
    report = merge_report(chosen, posterior, stable, TaskLoss(data, kept, data.theta), trace)
    found = {part.name: getattr(report, part.name) for part in fields(report)}
    theta = data.tree(merge_trees(stable, data.theta, report.alpha))
    return Merged(**found, params=theta, memory=replace(memory, posterior=posterior, across=across))
