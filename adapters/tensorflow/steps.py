"""Steps of a Keras optimizer that stay out of what must not change, whatever made them.

The optimizer's ``apply`` is observed: the weights are noted before it, and what it changed is projected after it, in
the same graph, so that this works in a compiled ``model.fit`` too. The optimizer's own state is not touched. What a
projector cannot protect is pulled back by the proximal step of a quadratic penalty,

    theta <- (theta + s mean) / (1 + s)    with s = learning rate x penalty x precision

which is decoupled from the optimizer, as AdamW's weight decay is, and stable at any strength. Of an Adam, s is divided
by the root of its second moments, as its steps are. A call that only accumulates gradients, or that a loss scale skips,
takes no such step.

Steps that are not observed are noticed by the optimizer's count of its iterations. Nothing else moves it on but loading
its state and, under ``fit``, the end of the data: there Keras begins a step that gets no batch, and may count it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from adapters.backend.memory import Moments, pull_of
from adapters.backend.own_loop import say_changed
from adapters.tensorflow.parameters import Parameter
from became_core import BecameError
from became_core.arrays import Array
from became_core.projection import Projector, full

__all__ = ["StepGuard", "Witness", "moments_of", "observed", "parts_of"]


def parts_of(optimizer: keras.Optimizer, variables: Sequence[Any]) -> list[keras.Optimizer]:
    """Return the optimizers that take the steps: those inside a ``MultiOptimizer``, else the one that is given.

    Args:
        optimizer: any.
        variables: those that a ``MultiOptimizer`` is built with, as its first step would, if it is not yet.
    """
    if not isinstance(optimizer, keras.optimizers.MultiOptimizer):
        return [optimizer]
    if not optimizer.built:
        optimizer.build(variables)
    return list(optimizer.optimizers)


def moments_of(optimizer: keras.Optimizer, parameters: Mapping[str, Parameter]) -> dict[str, Moments]:
    """Return what an Adam knows of the parameters' gradients, in the parameters' layouts; nothing of another one."""
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        return {name: own for part in optimizer.optimizers for name, own in moments_of(part, parameters).items()}
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of one that scales losses
    beta = getattr(optimizer, "beta_2", None)
    if beta is None:
        return {}
    seconds: dict[str, list[Any]] = {}
    for variable in optimizer.variables:
        seconds.setdefault(variable.name, []).append(variable)
    moments = {}
    for name, parameter in parameters.items():
        # Keras names them so. Where two layers have one name, theirs are in the layers' order.
        own = seconds.get(f"{parameter.variable.path.replace('/', '_')}_velocity")
        if own:
            second = parameter.canonical(tf.identity(own.pop(0).value))
            second = tf.cast(second, tf.float64 if second.dtype == tf.float64 else tf.float32)
            moments[name] = Moments(second, tf.cast(tf.identity(optimizer.iterations), second.dtype), float(beta))
    return moments


@dataclass(frozen=True)
class StepGuard:
    """Projects what an optimizer's steps change, and pulls back what the projector cannot protect.

    Attributes:
        parameters: all of the model, by name. Each step says which of them it is of.
        projector: the memory.
        transposed: the matrices that are stored as [d_in, d_out].
        frozen: those that the projector does not protect, and that stand still.
        penalised: their mean, and penalty x precision.
        stepped: those that steps were taken of; it is filled while these are traced.
    """

    parameters: Mapping[str, Parameter]
    projector: Projector
    transposed: frozenset[str]
    frozen: frozenset[str]
    penalised: Mapping[str, tuple[Array, Array]]
    stepped: set[str] = field(default_factory=set)

    def stepped_by(self, gradients: Sequence[Any], variables: Sequence[Any] | None) -> dict[str, Parameter]:
        """Return the parameters that a step is of: those of its variables, or all that are trained if it names none.

        Raises:
            BecameError: if it names none and has another number of gradients, so that they cannot be told.
        """
        if variables is None:
            trained = {name: parameter for name, parameter in self.parameters.items() if parameter.variable.trainable}
            if len(gradients) != len(trained):
                raise BecameError(
                    f"the optimizer was given {len(gradients)} gradients without their variables, and the model trains "
                    f"{len(trained)}; call apply(gradients, variables)."
                )
            return trained
        own = {id(variable) for variable in variables}
        return {name: parameter for name, parameter in self.parameters.items() if id(parameter.variable) in own}

    def noted(self, stepped: Mapping[str, Parameter]) -> dict[str, Array]:
        """Return the weights that a step must not move as it likes."""
        protected = self.projector.rank.keys()
        return {n: p.value for n, p in stepped.items() if n in protected or n in self.frozen}

    def correct(
        self,
        stepped: Mapping[str, Parameter],
        before: Mapping[str, Array],
        rate: Array,
        moments: Mapping[str, Moments],
    ) -> None:
        """Take out of a step what it must not change.

        Args:
            stepped: the parameters that the step is of.
            before: the weights that were noted.
            rate: the learning rate of the step that was taken; 0 if none was.
            moments: what an Adam knows of the parameters' gradients.
        """
        standing, ranks = full(self.projector), self.projector.rank
        for name, parameter in stepped.items():
            if name in ranks and name not in standing:
                change = parameter.value - before[name]
                if name in self.transposed:
                    change = tf.linalg.matrix_transpose(tf.reshape(change, (ranks[name][1], -1)))
                allowed = self.projector.project({name: change})[name]
                if name in self.transposed:
                    allowed = tf.reshape(tf.linalg.matrix_transpose(allowed), parameter.shape)
                parameter.variable.assign(parameter.own(before[name] + allowed))
            elif name in before:
                parameter.variable.assign(parameter.own(before[name]))
            elif name in self.penalised:
                mean, strength = self.penalised[name]
                pull = tf.cast(pull_of(tf.cast(rate, strength.dtype), strength, moments.get(name)), strength.dtype)
                value = tf.cast(parameter.value, strength.dtype)
                pulled = value + (tf.cast(mean, strength.dtype) - value) * (pull / (1 + pull))  # exact at the mean
                parameter.variable.assign(tf.cast(parameter.own(pulled), parameter.variable.dtype))


class Witness:
    """Sees at the end whether something else than the guarded steps has changed weights, by the weights' lengths."""

    def __init__(self, parameters: Mapping[str, Parameter], guards: Sequence[StepGuard]) -> None:
        """Note the weights as they are."""
        self._parameters, self._guards, self._lengths = parameters, guards, _lengths(parameters)
        self._trained = {name for name, parameter in parameters.items() if parameter.variable.trainable}

    def at_end(self) -> None:
        """Say so, as ``say_changed`` does, if a weight that no guarded step was taken of has changed.

        What is frozen at both ends is not asked: a running mean of a frozen layer looks like its weights.
        """
        stepped = {name for guard in self._guards for name in guard.stepped}
        trained = {n: p for n, p in self._parameters.items() if n in self._trained or p.variable.trainable}
        for name, total in _lengths({n: p for n, p in trained.items() if n not in stepped}).items():
            if not np.array_equal(total, self._lengths[name], equal_nan=True):
                say_changed(name, has_stepped=bool(stepped))
                break


def _lengths(parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    return {name: tf.norm(tf.cast(own.value, tf.float64)).numpy() for name, own in parameters.items()}


class Tally:
    """Tells by an optimizer's iterations whether it has taken steps that were not observed.

    It is kept in variables, since steps are counted in graphs. A step is announced before it and closed after it. One
    that gets no batch may be counted and not closed, so that one iteration more is right while a step is open.
    """

    def __init__(self, optimizer: keras.Optimizer) -> None:
        """Begin with the iterations as they are."""
        self._optimizer = optimizer
        self._closed = tf.Variable(self.iterations, trainable=False)
        self._is_open, self._is_missed = tf.Variable(False, trainable=False), tf.Variable(False, trainable=False)

    @property
    def iterations(self) -> Array:
        """The optimizer's count now; of one that accumulates gradients, that of its updates."""
        return tf.cast(tf.identity(self._optimizer.iterations), tf.int64)

    @property
    def is_missed(self) -> Array:
        """Whether steps were taken that were not observed."""
        more = self.iterations - self._closed
        return tf.logical_or(self._is_missed, more > tf.cast(self._is_open, tf.int64))

    def announce(self) -> list[Any]:
        """Note that a step begins; return operations that must be done before it, lest it is counted unannounced."""
        is_missed, iterations = self._is_missed.assign(self.is_missed), self.iterations
        with tf.control_dependencies([is_missed]):
            return [is_missed, self._closed.assign(iterations), self._is_open.assign(True)]

    def close(self) -> None:
        """Note that the step is over, or that the iterations are what they are for another good reason."""
        with tf.control_dependencies([self._closed.assign(self.iterations)]):
            self._is_open.assign(False)


@contextmanager
def observed(optimizer: keras.Optimizer, guard: StepGuard) -> Iterator[None]:
    """Correct every step of an optimizer in this context, and leave no trace in it after the context.

    A function that is compiled inside the context corrects no step after it.

    Raises:
        BecameError: if it keeps a running mean of the weights; at the end, if the optimizer has taken steps that were
            not seen, in a function that was compiled before.
    """
    if not isinstance(optimizer, keras.Optimizer):
        raise BecameError(f"a {type(optimizer).__name__} is no optimizer of Keras; give the one that takes steps.")
    if getattr(getattr(optimizer, "inner_optimizer", optimizer), "use_ema", False):
        raise BecameError(
            "the optimizer overwrites the weights by their running mean, which no projection of steps sees; make it "
            "without use_ema."
        )
    original, loading = optimizer.apply, optimizer.load_own_variables
    own = {name: vars(optimizer)[name] for name in ("apply", "load_own_variables") if name in vars(optimizer)}
    is_on, tally = tf.Variable(True, trainable=False), Tally(optimizer)

    def apply(grads: Any, trainable_variables: Any = None) -> Any:
        grads = list(grads)
        trainable_variables = None if trainable_variables is None else list(trainable_variables)
        stepped = guard.stepped_by(grads, trainable_variables)
        guard.stepped.update(stepped)
        if not guard.stepped:
            raise BecameError("the optimizer steps no variable of the model; give stable() the one that trains it.")
        if trainable_variables is not None and not optimizer.built:
            with tf.init_scope():  # XLA makes no variables, and cannot lift those of a step that waits for others
                optimizer.build(trainable_variables)
        # Before the step, which moves a schedule on.
        rate_before = tf.cast(tf.convert_to_tensor(optimizer.learning_rate), tf.float32)
        before, steps = guard.noted(stepped), tally.iterations
        with tf.control_dependencies(tally.announce()):
            result = original(grads, trainable_variables)
        taken = tally.iterations - steps
        tally.close()

        def correct() -> Array:
            rate = tf.cast(taken, tf.float32) * rate_before
            guard.correct(stepped, before, rate, moments_of(optimizer, stepped))
            return tf.constant(True)

        tf.cond(is_on, correct, lambda: tf.constant(False))
        return result

    def load_own_variables(store: Any) -> None:
        tally.announce()
        loading(store)
        tally.close()

    optimizer.apply, optimizer.load_own_variables = apply, load_own_variables
    try:
        yield
        is_missed = bool(tally.is_missed)
    finally:
        is_on.assign(False)
        for name in ("apply", "load_own_variables"):
            delattr(optimizer, name)
        vars(optimizer).update(own)
    if is_missed:
        raise BecameError(
            "steps of the optimizer were not seen, so they were not projected: they were taken by a function that "
            "tf.function had compiled before stable training began; compile it inside of learning.stable()."
        )
