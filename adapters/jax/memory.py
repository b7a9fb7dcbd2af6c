"""What must not be lost when a JAX model learns on: the spaces that old data use, and the old tasks' loss.

The model is any function ``apply(params, inputs)``, of flax, nnx, equinox or plain, and runs as it is. ``remember``
looks at it on old data and returns a value, ``Memory``, which training and merging take (``own_loop.py``).

Convention: losses and Fisher information are means over samples or over tokens, as the likelihood says, and tasks count
alike, each with its mean. Parameters go by dotted path. Every array of real numbers in ``params`` is a parameter, so
what is not trained, such as running statistics, must not be in that tree but in ``apply``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.experimental.multihost_utils import broadcast_one_to_all
from safetensors.flax import save_file

from adapters.backend import memory as shared
from adapters.backend.batches import repeatable
from adapters.backend.calibration import NO_BATCHES, AcrossTasks, Calibration, check_calibration, has_moved
from adapters.backend.memory_file import described, memory_arrays, read_memory, restored, written
from adapters.backend.merging import TaskLoss
from adapters.backend.own_loop import Coverage, NetworkCheck, Uncovered, coverage_of, first_difference, known_likelihood
from adapters.backend.own_loss import as_given
from adapters.jax.data_loss import DataLoss, Loss, moments_of
from adapters.jax.tapping import Apply, trained_of
from adapters.jax.trees import here
from became_core import BecameError, LaplacePosterior
from became_core.arrays import Array, Params, pytree, static
from became_core.curvature import FisherTargets, Likelihood
from became_core.projection import GPM, Projector

__all__ = ["Memory", "Parameter", "copied", "coverage", "load", "remember", "save"]

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
        across: what calibrates the next task; None without calibration across tasks.
        checked: what the look at the function found; None if there was none.
    """

    posterior: LaplacePosterior
    projector: Projector
    across: AcrossTasks | None
    parameters: tuple[Parameter, ...] = static()
    likelihood: Likelihood | Loss = static()
    uncovered: Uncovered = static()
    penalty: float = static()
    decay: float = static()
    fisher: FisherTargets = static()
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

    def check(self, theta: Params) -> None:
        """Raise a BecameError if parameters, by dotted path, are those of another architecture."""
        differs = first_difference({name: jnp.shape(value) for name, value in theta.items()}, self.shapes)
        if differs:
            raise BecameError(f"the memory is of another architecture: {differs}.")


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
    share: float | None = None,
    projector: Projector | None = None,
    uncovered: Uncovered | None = None,
    penalty: float | None = None,
    fisher: FisherTargets | None = None,
    decay: float | None = None,
    calibration: Calibration | None = None,
    begin: Any = None,
    check: bool = True,
    progress: bool = True,
) -> Memory:
    """Return the memory with the data that the parameters have learned.

    One pass over the batches gives the spaces that they use and the exact diagonal of the Fisher information, both at
    these parameters. Both are means. So of many batches a random share is measured, which tells nearly the same in a
    part of the time; but what no drawn batch uses, such as the embedding of a rare word, is then taken for unused. With
    a memory, its settings hold where no other is given.

    Without old data there may be the state of an optimiser: the second moments of optax's Adam, without their bias and
    times the samples of a step, stand for the Fisher information; then there is no memory of spaces, and nothing is
    protected but penalised. The state of an Adamax looks like an Adam's, and has no squares in it: do not give one.

    Args:
        apply: (params, inputs) -> outputs, [samples, ...], as in evaluation: without dropout and without statistics of
            the batch.
        params: a tree of arrays.
        batches: of the old data: pairs of inputs and targets, or mappings with ``labels``, of which ``apply`` takes the
            rest. Inputs are an array or a tree of arrays. None if there is a state.
        likelihood: "categorical" (the default), "gaussian" or "bernoulli", a value of ``became_core.curvature``, or any
            loss: (outputs, targets) -> the mean over the samples of the batch, of which Fisher information is the
            empirical one, and curvature along a direction a difference of slopes.
        memory: of the tasks before, and after a merge that of its result; None for none.
        state: of an optax optimiser with an Adam in it that has just trained the parameters, instead of batches.
        samples: with a state, how many samples (or tokens) a step had.
        b2: with a state, the decay of that Adam's second moments, which the state does not say.
        share: of the batches, drawn at random, that is measured: 1 for all. If not given, all of up to 64 batches, 64
            of up to 256, and a quarter of more; all, if their number is not known.
        projector: what protects matrices: an empty ``GPM()`` (the default), ``SGP()`` or ``NSCL()``, or another that
            needs only what layers read; not with a memory, which has one.
        uncovered: what is done with parameters that it cannot protect: they are "penalised" (the default) for leaving
            the old tasks' posterior, "frozen" or "free".
        penalty: the strength of that penalty; 100 by default, as in NSCL's published runs.
        fisher: the Fisher information of "empirical" targets, those given (the default); or of the model's own, as the
            "true" expectation (a backward pass for each class or output) or "sampled".
        decay: the share of the old tasks' precision that each new task leaves, the paper's gamma; 1 by default.
        calibration: "across" tasks: the curvature of each is calibrated when it is remembered, along the movement of
            the task before, and a merge has an estimator of its own. A memory keeps it. None, as in the paper, if
            neither has it.
        begin: with calibration across tasks, the parameters before the last stage of this task's training: of the first
            task the initial ones. After a merge, its memory knows them.
        check: whether the function is looked at first: per-sample gradients are held against a loop, for example.
        progress: whether a terminal shows how far the pass is.

    Raises:
        BecameError: if there is no batch, if something of these cannot be used, if the memory is that of another
            architecture, or if it is not known by how much a task has moved the parameters that is to be calibrated.

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
    known = known_likelihood(likelihood)
    before: Projector = memory.projector if memory is not None else GPM() if projector is None else projector
    shared.check_settings(before, **settings)
    data = DataLoss(apply, params, known, fisher=settings["fisher"], checks=check, shows=progress)
    if memory is not None:
        memory.check(data.theta)
    if (batches is None) == (state is None):
        raise BecameError("remember needs either batches or the state of an optimiser; give one of them.")
    posterior = None if memory is None else memory.posterior
    across = _across_of(memory, calibration, begin, data.theta)
    known_matrices, held = {} if memory is None else memory.matrices, frozenset[str]()
    if batches is None:
        if across is not None:
            raise BecameError(NO_BATCHES)
        squares = shared.fisher_of_moments(moments_of(state, b2), samples, data.theta, stacklevel=2)
    else:
        of_old = {} if posterior is None else posterior.precision.diagonal()
        held = shared.held_by_curvature(of_old, known_matrices)
        kept = batches if across is None else repeatable(batches)
        squares, finished = data.fisher(kept, with_memory=True, held=held, share=share)
        before = before.remember(finished)
        if across is not None and posterior is not None:
            task = TaskLoss(data, kept, data.theta, share=share)
            across, posterior, squares = across.remembered(posterior, squares, task)
    matrices = shared.matrices_with(known_matrices, data.ways, held)
    mean = copied(data.theta)
    return Memory(
        posterior=shared.grown(posterior, mean, squares, settings["decay"]),
        projector=before,
        across=copied(across),
        parameters=_parameters({name: value.shape for name, value in data.theta.items()}, matrices),
        likelihood=as_given(data.loss),
        checked=data.checked,
        **settings,
    )


def _across_of(memory: Memory | None, calibration: Calibration | None, begin: Any, theta: Params) -> AcrossTasks | None:
    """Return what calibrates a task that is to be remembered, or what is known of the first one; None if nothing does.

    Raises:
        BecameError: if the memory is calibrated otherwise, or the movement of the task is not known.
    """
    check_calibration(calibration)
    if calibration is not None and memory is not None and memory.across is None:
        raise BecameError(
            "the memory is not calibrated across tasks; leave calibration= out, or begin without a memory."
        )
    if calibration is None and (memory is None or memory.across is None):
        if begin is not None:
            raise BecameError("begin= is for calibration across tasks; leave it out, or choose calibration='across'.")
        return None
    first = None if begin is None else {name: jnp.asarray(value) for name, value in trained_of(begin).items()}
    if memory is None or memory.across is None:
        return AcrossTasks.since(theta if first is None else first, theta, "give begin=, the parameters before it.")
    if first is not None:
        return memory.across.after_stage(first, theta)
    if memory.across.following is None and has_moved(memory.posterior.mean, theta):
        raise BecameError(
            "the memory does not know by how much the parameters were moved by the task that is to be remembered; give "
            "the memory of the merge's result, or begin=, the parameters before the task's last stage."
        )
    return memory.across


def coverage(memory: Memory) -> Coverage:
    """Return a table of what happens to every parameter in training with ``projected``; print it."""
    sizes = {parameter.name: prod(parameter.shape) for parameter in memory.parameters}
    return coverage_of(sizes, sizes, memory.matrices, memory.projector, memory.uncovered)


# On disk.


def save(memory: Memory, file: str | Path) -> None:
    """Write a memory as safetensors with metadata in JSON, in the format of PyTorch's ``Continual``.

    Of several processes all must call this. The first one writes the file, and the others wait until it is there.

    Raises:
        BecameError: if the projector has no registered name, a setting is neither a number, nor a word, nor a list of
            them, or the parameters are one array without a name; in all processes, if the first of several cannot
            write.
    """
    if "" in memory.shapes:
        raise BecameError("the parameters are one array without a name; put it in a dict, so that a file can name it.")
    settings = {name: getattr(memory, name) for name in DEFAULTS}
    metadata = described(memory.shapes, memory.matrices, memory.projector, memory.likelihood, memory.across, **settings)
    arrays, is_first, failure = {}, jax.process_index() == 0, None
    for name, value in memory_arrays(memory.posterior, memory.projector, memory.across).items():
        whole = here(value)
        if is_first:
            arrays[name] = jnp.asarray(whole)
    if is_first:
        try:
            with written(file) as temporary:
                save_file(arrays, temporary, metadata)
        except BecameError as error:
            if jax.process_count() == 1:
                raise
            failure = error
    # The others wait until the file is there.
    if jax.process_count() > 1 and broadcast_one_to_all(np.asarray(failure is not None)):
        raise BecameError(f"process 1 could not write {file}; give a path that it can write.") from failure


def load(
    params: Any,
    file: str | Path,
    likelihood: str | Likelihood | Loss | None = None,
    *,
    projector: Projector | None = None,
    uncovered: Uncovered | None = None,
    penalty: float | None = None,
    fisher: FisherTargets | None = None,
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
    description, arrays = read_memory(file, "flax")
    shapes = {name: tuple(jnp.shape(value)) for name, value in trained_of(params).items()}
    stored = restored(
        file, description, arrays, shapes, {name: value for name, value in chosen.items() if value is not None}
    )
    settings = {name: stored.settings[name] for name in DEFAULTS}
    shared.check_settings(stored.settings["projector"], **settings)
    known = stored.settings["likelihood"]
    return Memory(
        stored.posterior,
        stored.settings["projector"],
        stored.across,
        _parameters(shapes, stored.matrices),
        known_likelihood(known),
        **settings,
    )


@jax.jit  # type: ignore[untyped-decorator] # JAX is taken as untyped
def copied(tree: Any) -> Any:
    """Return a tree of copies, because a compiled step may take its arguments' memory away."""
    return jax.tree.map(jnp.copy, tree)


def _parameters(shapes: dict[str, tuple[int, ...]], matrices: dict[str, bool]) -> tuple[Parameter, ...]:
    return tuple(
        Parameter(name, tuple(shape), name in matrices, matrices.get(name, False)) for name, shape in shapes.items()
    )
