"""The method around a training loop in JAX that is not ours: pure functions, and a transformation for optax.

The model is any function ``apply(params, inputs)``, of flax, nnx, equinox or plain, and runs as it is. What old data
need is a value, ``Memory``, which ``remember`` returns. ``projected`` makes a transformation of it that comes last in
an optax chain: what is projected is the step, whatever made it. What a projector cannot protect is pulled back by the
proximal step of a quadratic penalty,

    theta <- (theta + s mean) / (1 + s)    with s = learning rate x penalty x precision

which is decoupled from the optimiser, as AdamW's weight decay is, and stable at any strength. Of an Adam that
``projected`` is given, s is divided by the root of its second moments, as its steps are.

Convention: losses and Fisher information are means over samples or over tokens, as the likelihood says, and tasks count
alike, each with its mean. Parameters go by dotted path. Every array of real numbers in ``params`` is a parameter, so
what is not trained, such as running statistics, must not be in that tree but in ``apply``. ``merge`` therefore cannot
estimate running statistics anew, as it does for models that hold their own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax import numpy as jnp
from safetensors.flax import save_file

from adapters.backend import memory as shared
from adapters.backend.batches import Kind
from adapters.backend.own_loop import (
    Coverage,
    MergeReport,
    NetworkCheck,
    Uncovered,
    coverage_of,
    first_difference,
)
from adapters.jax.data_loss import DataLoss, Loss, moments_of
from adapters.jax.tapping import Apply, trained_of
from became_core import BecameError, LaplacePosterior, Secant
from became_core import merge as merge_trees
from became_core.arrays import Array, Params, named_leaves, namespace, pytree, static, with_leaves
from became_core.curvature import Likelihood, likelihood_named
from became_core.laplace import Estimator
from became_core.projection import GPM, Projector, full

__all__ = ["Memory", "Merged", "Parameter", "coverage", "load", "merge", "penalty", "projected", "remember", "save"]

# What holds where neither the user nor a memory says otherwise.
DEFAULTS: dict[str, Any] = {"uncovered": "penalised", "penalty": 100.0, "decay": 1.0, "fisher": "empirical"}


class Parameter(NamedTuple):
    """What is known of one parameter.

    Attributes:
        name: its dotted path.
        shape: its shape.
        is_matrix: whether it is used as a whole matrix alone.
        is_transposed: of a matrix, whether it is stored as [d_in, d_out].
    """

    name: str
    shape: tuple[int, ...]
    is_matrix: bool
    is_transposed: bool


@pytree
@dataclass(frozen=True)
class Memory:
    """What must not be lost: the spaces that old data use, and the old tasks' loss. It is a tree for JAX.

    Attributes:
        posterior: the old tasks' loss, to second order.
        projector: the memory of the spaces that old tasks use.
        parameters: all of them, in the order of the tree.
        likelihood: how probable targets are, or the loss that was given; a Gaussian one's noise is fitted.
        uncovered: what is done with parameters that the projector cannot protect.
        penalty: the strength of the penalty on them.
        decay: the share of the old tasks' precision that each new task leaves.
        fisher: of which targets the Fisher information is.
        checked: what the look at the function found; None if there was none.
    """

    posterior: LaplacePosterior
    projector: Projector
    parameters: tuple[Parameter, ...] = static()
    likelihood: Likelihood | Loss = static()
    uncovered: Uncovered = static()
    penalty: float = static()
    decay: float = static()
    fisher: Kind = static()
    checked: NetworkCheck | None = static(default=None)

    @property
    def matrices(self) -> dict[str, bool]:
        """The parameters that are used as matrices alone, and whether they are stored as [d_in, d_out]."""
        return {parameter.name: parameter.is_transposed for parameter in self.parameters if parameter.is_matrix}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters."""
        return {parameter.name: parameter.shape for parameter in self.parameters}

    @property
    def penalised(self) -> dict[str, tuple[Array, Array]]:
        """The mean of every parameter that is pulled back to it, and penalty x precision."""
        if self.uncovered != "penalised":
            return {}
        precision, mean = self.posterior.precision.diagonal(), self.posterior.mean
        return {n: (mean[n], self.penalty * v) for n, v in precision.items() if n not in self.projector.rank}


def remember(
    apply: Apply,
    params: Any,
    batches: Iterable[Any] | None = None,
    likelihood: str | Likelihood | Loss | None = None,
    memory: Memory | None = None,
    *,
    state: Any = None,
    samples: int | None = None,
    b2: float = 0.999,
    projector: Projector | None = None,
    uncovered: Uncovered | None = None,
    penalty: float | None = None,
    fisher: Kind | None = None,
    decay: float | None = None,
    check: bool = True,
    progress: bool = True,
) -> Memory:
    """Return the memory with the data that the parameters have learned.

    One pass over the batches gives the spaces that they use and the exact diagonal of the Fisher information, both at
    these parameters. With a memory, its settings hold where no other is given. Without old data there may be the state
    of an optimiser: the second moments of optax's Adam, without their bias and times the samples of a step, stand for
    the Fisher information; then there is no memory of spaces, and nothing is protected but penalised.

    Args:
        apply: (params, inputs) -> outputs, [samples, ...], as in evaluation: without dropout and without statistics of
            the batch.
        params: a tree of arrays.
        batches: of the old data: pairs of inputs and targets, or mappings with ``labels``, of which ``apply`` takes the
            rest. Inputs are an array or a tree of arrays. None if there is a state.
        likelihood: "categorical" (the default), "gaussian" or "bernoulli", a value of ``became_core.curvature``, or any
            loss: (outputs, targets) -> the mean over the samples of the batch, of which Fisher information is the
            empirical one, and curvature along a direction a difference of slopes.
        memory: of the tasks before; None for none.
        state: of an optax optimiser with an Adam in it that has just trained the parameters, instead of batches.
        samples: with a state, how many samples (or tokens) a step had.
        b2: with a state, the decay of that Adam's second moments, which the state does not say.
        projector: what protects matrices: an empty ``GPM()`` (the default), ``SGP()`` or ``NSCL()``, or another that
            needs only what layers read; not with a memory, which has one.
        uncovered: what is done with parameters that it cannot protect: they are "penalised" (the default) for leaving
            the old tasks' posterior, "frozen" or "free".
        penalty: the strength of that penalty; 100 by default, as in NSCL's published runs.
        fisher: the Fisher information of "empirical" targets, those given (the default); or of the model's own, as the
            "true" expectation (a backward pass for each class or output) or "sampled".
        decay: the share of the old tasks' precision that each new task leaves, the paper's gamma; 1 by default.
        check: whether the function is looked at first: per-sample gradients are held against a loop, for example.
        progress: whether a terminal shows how far the pass is.

    Raises:
        BecameError: if there is no batch, if something of these cannot be used, or if the memory is that of another
            architecture.

    Examples:
        >>> def apply(params, inputs):
        ...     return inputs @ params["w"] + params["b"]
        >>> params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
        >>> memory = remember(apply, params, [(jnp.eye(3)[:2], jnp.array([0, 1]))])
        >>> print(coverage(memory))
        parameter  use                 treatment  weights  rank
        ---------------------------------------------------------
        w          matrix, transposed  protected  6        2 of 3
        b          other               penalised  2
        8 weights: 75.0 % protected, 25.0 % penalised. Of the protected ones' directions, 33.3 % may still move.
    """
    chosen = {"uncovered": uncovered, "penalty": penalty, "decay": decay, "fisher": fisher}
    settings = DEFAULTS if memory is None else {name: getattr(memory, name) for name in DEFAULTS}
    settings = settings | {name: value for name, value in chosen.items() if value is not None}
    if memory is not None and projector is not None:
        raise BecameError("the memory has a projector of its own; leave projector= out, or begin without a memory.")
    if likelihood is None:
        likelihood = "categorical" if memory is None else memory.likelihood
    known = likelihood_named(likelihood) if isinstance(likelihood, str) else likelihood
    before: Projector = memory.projector if memory is not None else GPM() if projector is None else projector
    shared.check_settings(before, **settings)
    data = DataLoss(apply, params, known, fisher=settings["fisher"], checks=check, shows=progress)
    if memory is not None:
        _check_architecture(memory, data.theta)
    if (batches is None) == (state is None):
        raise BecameError("remember needs either batches or the state of an optimiser; give one of them.")
    if batches is None:
        squares = shared.fisher_of_moments(moments_of(state, b2), samples, data.theta, stacklevel=2)
    else:
        squares, finished = data.fisher(batches, with_memory=True)
        before = before.remember(finished)
    matrices = data.matrices if memory is None else memory.matrices | data.matrices
    turned = [name for name, way in matrices.items() if memory is not None and memory.matrices.get(name, way) != way]
    if turned:
        raise BecameError(f"'{turned[0]}' was multiplied from its other side in the memory; let apply use it alike.")
    # A compiled step may take its arguments' memory away, so the mean is a copy.
    mean = _copied(data.theta)
    return Memory(
        posterior=shared.grown(None if memory is None else memory.posterior, mean, squares, settings["decay"]),
        projector=before,
        parameters=_parameters({name: value.shape for name, value in data.theta.items()}, matrices),
        likelihood=data.likelihood,
        checked=data.checked,
        **settings,
    )


def coverage(memory: Memory) -> Coverage:
    """Return a table of what happens to every parameter in training with ``projected``; print it."""
    sizes = {parameter.name: prod(parameter.shape) for parameter in memory.parameters}
    return coverage_of(sizes, sizes, memory.matrices, memory.projector, memory.uncovered)


# Training.


class ProjectedState(NamedTuple):
    """The state of ``projected``; its arrays are arguments of a compiled step, and no constants in it.

    Attributes:
        count: how many steps were taken.
        projector: the memory.
        penalised: the mean of every parameter that is pulled back to it, and penalty x precision.
        inner: the state of the optimiser that was given.
    """

    count: Array
    projector: Projector
    penalised: dict[str, tuple[Array, Array]]
    inner: Any


def projected(
    memory: Memory,
    learning_rate: float | Callable[[Any], Any],
    optimizer: optax.GradientTransformation | None = None,
    *,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """Return an optimiser whose steps stay out of the spaces that old data use.

    Without an optimiser it comes last in ``optax.chain``. It then cannot see an Adam's second moments, and its pull is
    weak beside an Adam's steps. Its updates need the parameters: ``optimizer.update(gradients, state, params)``. It is
    given the whole tree of parameters, so it stands outside of ``optax.masked`` and ``optax.multi_transform``.

    Args:
        memory: of the old data.
        learning_rate: a number, or a schedule of the steps' count, as the optimiser has it; it scales the pull on
            parameters that are penalised, and 0 leaves that to ``penalty`` in the loss.
        optimizer: whose steps are projected.
        b2: the decay of second moments, if an Adam is in the optimiser.

    Raises:
        BecameError: in ``init``, if the parameters are not those of the memory; in ``update``, if there are none.

    Examples:
        >>> apply, params = lambda params, inputs: inputs @ params["w"], {"w": jnp.ones((3, 2))}
        >>> memory = remember(apply, params, [(jnp.eye(3)[:2], jnp.array([0, 1]))], check=False)
        >>> optimizer = projected(memory, 0.5, optax.sgd(0.5))
        >>> gradients, state = {"w": jnp.ones((3, 2))}, optimizer.init(params)
        >>> updates, state = optimizer.update(gradients, state, params)
        >>> bool(jnp.allclose(updates["w"], jnp.array([[0.0, 0], [0, 0], [-0.5, -0.5]]), atol=1e-6))
        True
    """
    # Only what is no array is taken from the memory here; the arrays come from the state.
    ranks, matrices, standing = memory.projector.rank, memory.matrices, full(memory.projector)
    taking_steps = optax.identity() if optimizer is None else optimizer

    def init(params: Any) -> ProjectedState:
        _check_architecture(memory, trained_of(params))
        namespace(values=next(iter(memory.posterior.mean.values())))  # JAX learns of the core's values
        # A compiled step may take its arguments' memory away.
        projector, penalised = _copied((memory.projector, memory.penalised))
        return ProjectedState(jnp.zeros((), jnp.int32), projector, penalised, taking_steps.init(params))

    def update(updates: Any, state: ProjectedState, params: Any = None) -> tuple[Any, ProjectedState]:
        if params is None:
            raise BecameError("projected needs the parameters; call optimizer.update(gradients, state, params).")
        updates, inner = taking_steps.update(updates, state.inner, params)
        theta, steps, moments = trained_of(params), named_leaves(updates), moments_of(inner, b2)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
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
                rows = state.projector.project({name: matrix})[name]
                wide = (rows.T if matrices.get(name) else rows).reshape(step.shape)
            elif name in state.penalised:
                mean, strength = state.penalised[name]
                pull = shared.pull_of(rate, strength, moments.get(name))
                wide = (wide + pull * (mean - theta[name])) / (1 + pull)
            allowed[name] = wide.astype(step.dtype)
        return with_leaves(updates, allowed), state._replace(count=state.count + 1, inner=inner)

    return optax.GradientTransformation(init, update)


def penalty(memory: Memory, params: Any) -> Array:
    """Return penalty/2 x (theta - mean).F.(theta - mean) over the parameters that are penalised, a 0-d array.

    It may be added to a loss instead of the pull of ``projected``, whose learning rate is then 0. The pull is stable at
    any strength, and the gradient of this is not. ``memory`` may be an argument of a compiled function.

    Args:
        memory: of the old data.
        params: the present parameters.

    Examples:
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
    """

    params: Any = field(repr=False)


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
        estimator: how losses along the way between the two are estimated; ``Secant()`` if not given.
        trace: at how many alphas the true loss of the new data is measured, both ends among them; 0 for none.
        check: whether the function is looked at first, as in ``remember``.
        progress: whether a terminal shows how far a pass is.

    Raises:
        BecameError: if a tree is not of the memory's architecture, or a batch cannot be used.

    Examples:
        >>> def apply(params, inputs):
        ...     return inputs @ params["w"]
        >>> theta_gp, theta_hat = ({"w": jnp.array([[0.0, 0], [0, scale], [0, 0]])} for scale in (0, 4))
        >>> memory = remember(apply, theta_gp, [(jnp.eye(3)[:2], jnp.array([0, 0]))], check=False)
        >>> report = merge(apply, memory, theta_gp, theta_hat, [(jnp.eye(3)[:2], jnp.array([0, 1]))])
        >>> 0 < report.alpha < 1
        True
        >>> report.curvature
        'forward mode'
    """
    data = DataLoss(apply, theta_hat, memory.likelihood, fisher=memory.fisher, checks=check, shows=progress)
    stable = {name: jnp.asarray(value) for name, value in trained_of(theta_gp).items()}
    _check_architecture(memory, stable)
    _check_architecture(memory, data.theta)
    stable = {name: stable[name] for name in data.theta}
    new = shared.NewTask(data, new_batches, data.theta)
    report = shared.merge_report(Secant() if estimator is None else estimator, memory.posterior, stable, new, trace)
    found = {part.name: getattr(report, part.name) for part in fields(report)}
    return Merged(**found, params=data.tree(merge_trees(stable, data.theta, report.alpha)))


# On disk.


def save(memory: Memory, file: str | Path) -> None:
    """Write a memory as safetensors with metadata in JSON, in the format of PyTorch's ``Continual``.

    Raises:
        BecameError: if the projector has no registered name, or the parameters are one array without a name.
    """
    if "" in memory.shapes:
        raise BecameError("the parameters are one array without a name; put it in a dict, so that a file can name it.")
    settings = {name: getattr(memory, name) for name in DEFAULTS}
    metadata = shared.described(memory.shapes, memory.matrices, memory.projector, memory.likelihood, **settings)
    arrays = shared.memory_arrays(memory.posterior, memory.projector)
    save_file({name: jnp.asarray(value) for name, value in arrays.items()}, str(file), metadata)


def load(
    params: Any,
    file: str | Path,
    likelihood: str | Likelihood | Loss | None = None,
    *,
    projector: Projector | None = None,
    uncovered: Uncovered | None = None,
    penalty: float | None = None,
    fisher: Kind | None = None,
    decay: float | None = None,
) -> Memory:
    """Return the memory that ``save`` wrote, or ``Continual.save`` of another framework.

    A memory of another framework is taken if names and shapes agree: ``params["fc"]["weight"]`` of shape [out, in] is
    ``self.fc.weight`` of PyTorch. What is given holds instead of what the file says.

    Args:
        params: a tree of the model's architecture.
        file: the memory.
        likelihood: as in ``remember``; a file does not hold a loss of one's own.
        projector: of the class of the memory's, with other settings.
        uncovered: as in ``remember``.
        penalty: as in ``remember``.
        fisher: as in ``remember``.
        decay: as in ``remember``.

    Raises:
        BecameError: if the file is no memory, or is one of another architecture.
    """
    chosen = {"likelihood": likelihood, "projector": projector, "uncovered": uncovered, "penalty": penalty}
    chosen |= {"fisher": fisher, "decay": decay}
    description, arrays = shared.read_memory(file, "flax")
    shapes = {name: tuple(jnp.shape(value)) for name, value in trained_of(params).items()}
    stored = shared.restored(
        file, description, arrays, shapes, {name: value for name, value in chosen.items() if value is not None}
    )
    settings = {name: stored.settings[name] for name in DEFAULTS}
    shared.check_settings(stored.settings["projector"], **settings)
    known = stored.settings["likelihood"]
    return Memory(
        stored.posterior,
        stored.settings["projector"],
        _parameters(shapes, stored.matrices),
        likelihood_named(known) if isinstance(known, str) else known,
        **settings,
    )


@jax.jit  # type: ignore[untyped-decorator] # JAX is taken as untyped
def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _parameters(shapes: dict[str, tuple[int, ...]], matrices: dict[str, bool]) -> tuple[Parameter, ...]:
    return tuple(
        Parameter(name, tuple(shape), name in matrices, matrices.get(name, False)) for name, shape in shapes.items()
    )


def _check_architecture(memory: Memory, theta: Params) -> None:
    differs = first_difference({name: jnp.shape(value) for name, value in theta.items()}, memory.shapes)
    if differs:
        raise BecameError(f"the memory is of another architecture: {differs}.")
