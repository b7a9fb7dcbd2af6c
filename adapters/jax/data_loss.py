"""The loss of a JAX function on a user's batches: its Fisher information, slopes and curvature, and what it reads.

A likelihood gives all of it. Any other loss, (outputs, targets) -> the mean over the samples of a batch, has the
empirical Fisher information, and curvature along a direction as the difference of slopes at its two sides.

Convention: means over samples or over tokens, as the likelihood says. Parameters go by dotted path, and are those of
real numbers; the function is ``apply(params, inputs)``, and it returns [samples, ...].
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from adapters.backend.batches import (
    counted,
    drawn,
    gradient_by_outputs,
    inputs_and_targets,
    length_of,
    mean_loss,
    units_of,
    with_progress,
)
from adapters.backend.checking import check_network
from adapters.backend.memory import InputGrams, Moments, matrices_with
from adapters.backend.merging import by_slopes
from adapters.backend.own_loop import NetworkCheck
from adapters.backend.own_loss import OwnLoss
from adapters.jax.checking import FunctionView
from adapters.jax.derivatives import Derivatives
from adapters.jax.mesh import is_explicit
from adapters.jax.tapping import Apply, TappedFunction, trained_of
from adapters.jax.trees import here, leaves_of, with_leaves_of
from became_core import BecameError, Quadratic
from became_core.arrays import Array, Params, namespace
from became_core.curvature import FisherTargets, GramSums, Likelihood, per_sample_square_sum
from became_core.errors import first_line

__all__ = ["DataLoss", "Loss", "moments_of"]

Loss = Callable[[Array, Any], Array]


class JaxLoss(OwnLoss):
    """A loss of the user's own, of JAX's arrays."""

    def gradient(self, outputs: Array, targets: Any) -> Array:
        """Return the gradient of the sum of all samples' losses by the outputs."""
        gradient: Array = jax.grad(lambda outputs: self.value(outputs, targets) * len(outputs))(outputs)
        return gradient


class DataLoss:
    """A function's loss on batches, as a function of its trained parameters.

    Attributes:
        loss: a likelihood, or a loss of the user's own as one.
        theta: the trained parameters as they were given.
        ways: of all inputs so far: the parameters that are used as matrices alone, and whether they are stored as
            [d_in, d_out]; None of those that are used otherwise.
        checked: what the first look at the function found; None before it, or if there is none.
        derivatives: of the outputs, along directions.
    """

    def __init__(
        self,
        apply: Apply,
        params: Any,
        likelihood: Likelihood | Loss,
        *,
        fisher: FisherTargets,
        checks: bool,
        shows: bool,
    ) -> None:
        """Keep what is needed.

        Args:
            apply: (params, inputs) -> outputs, [samples, ...].
            params: a tree of arrays.
            likelihood: or a loss.
            fisher: of which targets the Fisher information is: those given, or the model's own, exactly or drawn.
            checks: whether the function is checked at the first look.
            shows: whether a terminal shows how far a pass is.

        Raises:
            BecameError: if nothing can be trained.
        """
        self.loss = likelihood if isinstance(likelihood, Likelihood) else JaxLoss(likelihood)
        self.theta: Params = {name: jnp.asarray(value) for name, value in trained_of(params).items()}
        if not self.theta:
            raise BecameError("no array of the parameters holds real numbers; there is nothing to learn.")
        for name, value in self.theta.items():
            if jnp.iscomplexobj(value):
                raise BecameError(f"'{name}' is complex; let apply make it of two arrays of real numbers.")
            _check_mesh(value, f"'{name}'")
        namespace(values=next(iter(self.theta.values())))  # JAX learns of the core's values
        self.ways: dict[str, bool | None] = {}
        self.checked: NetworkCheck | None = None
        self._apply, self._params, self._kind, self._checks, self._shows = apply, params, fisher, checks, shows
        self._tapped: dict[Any, tuple[TappedFunction, Any]] = {}
        self._kinds: dict[Any, tuple[set[int], set[int]]] = {}
        self._is_looked_at = False
        self._outputs = jax.jit(self._run)
        self._gradient = jax.jit(lambda theta, inputs, seed: jax.vjp(lambda t: self._run(t, inputs), theta)[1](seed)[0])
        self._slopes = jax.jit(self._slopes_of_batch)
        self.derivatives = Derivatives(self._run, self._outputs)

    def tree(self, theta: Params) -> Any:
        """Return the user's tree with these values of the trained parameters."""
        return with_leaves_of(self._params, leaves_of(self._params) | theta)

    def _run(self, theta: Params, inputs: Any) -> Array:
        return self._apply(self.tree(theta), inputs)

    def _read(self, batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        for batch in batches:
            parts = inputs_and_targets(batch, "or a generator that makes such pairs of your batches")
            inputs, targets = (_arrays(part) for part in parts)
            if any(leaf.ndim and not len(leaf) for leaf in jax.tree.leaves(inputs)):
                raise BecameError("a batch has no sample; leave empty batches out.")
            for leaf in jax.tree.leaves(parts):
                _check_mesh(leaf, "a batch")
            targets = self._beside(inputs, targets)
            self._look(inputs, targets)
            yield inputs, targets

    def _beside(self, inputs: Any, targets: Any) -> Any:
        """Return targets on all devices that outputs are spread over: only inputs are placed there by JAX."""
        leaves = (*self.theta.values(), *jax.tree.leaves(inputs))
        places = [leaf.sharding.mesh for leaf in leaves if isinstance(leaf.sharding, NamedSharding)]
        if not places:
            return targets
        whole = NamedSharding(places[0], PartitionSpec())
        return jax.tree.map(lambda leaf: jax.device_put(leaf, whole) if _is_on_one_device(leaf) else leaf, targets)

    def _shared(self, inputs: Any, samples: int) -> frozenset[int]:
        """Return which leaves of the inputs all samples share: those whose length differs from some batch's.

        Raises:
            BecameError: if an earlier batch was as long as such a leaf by chance, and it was taken for the samples'.
        """
        leaves, structure = jax.tree.flatten(inputs)
        shared, own = self._kinds.setdefault(structure, (set(), set()))
        for number, leaf in enumerate(leaves):
            if leaf.ndim == 0 or len(leaf) != samples:
                shared.add(number)
            elif samples > 1 and number not in shared:
                own.add(number)
        if shared & own:
            shape = list(leaves[min(shared & own)].shape)
            raise BecameError(
                f"an input has shape {shape} in a batch of {samples} samples, and was as long as a batch before; if "
                "all samples share it, begin with a batch of another length."
            )
        return frozenset(shared)

    def _function(self, inputs: Any, samples: int) -> tuple[TappedFunction, Any]:
        """Return what collects taps for inputs of these shapes, and what measures squares and Gram matrices of them."""
        leaves, structure = jax.tree.flatten(inputs)
        shared = self._shared(inputs, samples)
        key = (structure, *((leaf.shape, leaf.dtype) for leaf in leaves), shared)
        if key not in self._tapped:
            tapped = TappedFunction(self._apply, self._params, inputs, shared)
            if not self._tapped:
                if not tapped.uses_parameters:
                    raise BecameError(
                        "the outputs depend on none of the parameters; let the function compute with those that it is "
                        "given, and not with others that it knows."
                    )
                tapped.warn()
            known = {name: way for name, way in self.ways.items() if way is not None}
            held = self.ways.keys() - known.keys()
            self.ways |= matrices_with(known, tapped.ways, held)
            self.ways |= {name: None for name, way in tapped.ways.items() if way is None}

            @partial(jax.jit, static_argnames="weights")
            def measure(theta: Params, inputs: Any, seed: Array, weights: frozenset[str]) -> tuple[Params, Any]:
                taps, grams = tapped.taps(self.tree(theta), inputs, seed), GramSums()
                grams.add(taps, weights)
                return per_sample_square_sum(taps), grams.parts()

            self._tapped[key] = tapped, measure
        return self._tapped[key]

    def _look(self, inputs: Any, targets: Any) -> None:
        """Look at the function once: the noise of the data, and whether we compute what it computes."""
        if self._is_looked_at:
            return
        try:
            outputs = self._outputs(self.theta, inputs)
        except Exception as error:
            said = first_line(error).partition(" (http")[0]
            raise BecameError(
                f"the function cannot be compiled and run with parameters and inputs alone ({said}); give one that can."
            ) from error
        if not hasattr(outputs, "shape") or not outputs.shape:
            raise BecameError("the function must return one array of outputs, [samples, ...]; give one that does.")
        if not jnp.issubdtype(outputs.dtype, jnp.floating):
            raise BecameError(f"the outputs have dtype {outputs.dtype}; they must be real floating-point numbers.")
        try:
            jax.eval_shape(self._gradient, self.theta, inputs, outputs)
        except Exception as error:
            raise BecameError(f"the function's gradients cannot be taken ({first_line(error)}).") from error
        self.loss = self.loss.fitted(outputs, targets)
        if self._checks:
            self.checked = self._check(inputs, len(outputs))
            self.checked.assert_sound()
        self._is_looked_at = True

    def _check(self, batch: Any, size: int) -> NetworkCheck:
        """Return what was compared for a few samples of a batch of this size, and how far it differs."""
        leaves, structure = jax.tree.flatten(batch)
        # JAX would compile every slice; NumPy has no keys of random numbers.
        leaves = [
            leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.extended) else np.asarray(here(leaf)) for leaf in leaves
        ]
        # It is read off the whole batch, as long as which an array that samples share rarely is.
        shared = self._shared(batch, size)

        def samples(at: slice) -> Any:
            few = [leaf if number in shared else leaf[:3][at] for number, leaf in enumerate(leaves)]
            return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in few])

        tapped, _ = self._function(batch, size)
        return check_network(
            FunctionView(
                self.theta,
                samples,
                outputs=self._outputs,
                own=lambda inputs: self._apply(self.tree(self.theta), inputs),  # not compiled
                taps=lambda inputs, seed: tapped.taps(self.tree(self.theta), inputs, seed),
                gradient=self._gradient,
                derivatives=self.derivatives,
                rounding=tapped.rounding,
            )
        )

    def fisher(
        self,
        batches: Iterable[Any],
        *,
        with_memory: bool,
        theta: Params | None = None,
        held: frozenset[str] = frozenset(),
        share: float | None = 1.0,
    ) -> tuple[Params, InputGrams]:
        """Return the diagonal Fisher information at these weights, or as given, and what a projector remembers.

        Args:
            batches: of the data.
            with_memory: whether a projector shall remember them.
            theta: the weights.
            held: the parameters that old data hold otherwise than by the spaces of a projector, which they go on to do.
            share: of the batches, drawn at random, that is measured; None for one that suits their number.
        """
        theta = self.theta if theta is None else theta
        what = "remembering" if with_memory else "measuring"
        squares: Params = {}
        finished, units, rng = InputGrams(), 0.0, np.random.default_rng(0)
        total = length_of(batches)
        for inputs, targets in self._read(drawn(with_progress(batches, what, self._shows, total), share, total)):
            outputs = self._outputs(theta, inputs)
            units += units_of(self.loss, outputs, targets)
            tapped, measure = self._function(inputs, len(outputs))
            seeds = self.loss.cotangents(outputs, targets, self._kind, rng)
            matrices = frozenset(name for name in tapped.matrices if self.ways[name] is not None) - held
            for index, seed in enumerate(seeds):
                # What is read is the same for all targets.
                weights = matrices if with_memory and index == 0 else frozenset[str]()
                more, grams = measure(theta, inputs, seed, weights=weights)
                squares = _sum(squares, more) if squares else more
                finished.add_parts(grams)
        means = _mean(squares, theta, counted(units))
        # XLA chooses where results lie; Fisher information lies where its parameter does.
        spread = (name for name, value in theta.items() if isinstance(value.sharding, NamedSharding))
        return means | {name: jax.device_put(means[name], theta[name].sharding) for name in spread}, finished

    def slopes(
        self, batches: Iterable[Any], theta: Params, directions: Sequence[Params], places: Sequence[Sequence[float]]
    ) -> Array:
        """Return the slopes of the mean loss along K directions at M places, [M, K], in float64 of NumPy."""
        units, total = 0.0, np.zeros((len(places), len(directions)))
        for inputs, targets in self._read(batches):
            for row, place in zip(total, places, strict=True):
                moved = _moved(theta, list(directions), list(place))
                outputs = self._outputs(moved, inputs)
                seed = gradient_by_outputs(self.loss, outputs, targets)
                row += np.asarray(self._slopes(moved, list(directions), inputs, seed), np.float64).sum(1)
            units += units_of(self.loss, outputs, targets)
        return total / counted(units)

    def _slopes_of_batch(self, theta: Params, directions: list[Params], inputs: Any, seed: Array) -> Array:
        """Return the parts of the slopes by parameter, [directions, parameters]; they are summed on the host."""
        gradient = self._gradient(theta, inputs, seed)
        return jnp.stack(
            [jnp.stack([jnp.vdot(_wide(gradient[n]), _wide(value)) for n, value in d.items()]) for d in directions]
        )

    def along(
        self, batches: Iterable[Any], theta: Params, directions: Sequence[Params], share: float | None = 1.0
    ) -> tuple[Quadratic, str]:
        """Return the mean loss along directions from theta, and how its curvature was measured."""
        batches, count = drawn(batches, share, length_of(batches)), len(directions)
        if isinstance(self.loss, OwnLoss):
            return by_slopes(partial(self.slopes, batches, theta, directions), theta, count), "a difference of slopes"
        slope, curvature, units = np.zeros(count), np.zeros((count, count)), 0.0
        for inputs, targets in self._read(batches):
            outputs, tangents = self.derivatives.along(theta, directions, inputs)
            units += units_of(self.loss, outputs, targets)
            first, second = self.loss.derivatives(outputs, tangents, targets)
            slope, curvature = slope + np.asarray(first, np.float64), curvature + np.asarray(second, np.float64)
        return Quadratic(slope / counted(units), curvature / units), self.derivatives.way

    def mean(self, batches: Iterable[Any], theta: Params | None = None) -> float:
        """Return the mean loss at these weights, or at those that were given first."""
        theta = self.theta if theta is None else theta
        passes = ((self._outputs(theta, inputs), targets) for inputs, targets in self._read(batches))
        first = list(islice(passes, 1))  # to which the likelihood is fitted, if it was not yet
        return mean_loss(self.loss, chain(first, passes))

    @staticmethod
    def in_dtype(numbers: Any, like: Array) -> Array:
        """Return numbers in the dtype of an array, in at least float32, and on all devices that it is spread over."""
        numbers = jnp.asarray(numbers, _wide(like).dtype)
        spread = isinstance(like.sharding, NamedSharding)
        return jax.device_put(numbers, NamedSharding(like.sharding.mesh, PartitionSpec())) if spread else numbers


def _arrays(part: Any) -> Any:
    """Return the inputs or the targets of a batch as JAX's arrays."""
    try:
        return jax.tree.map(jnp.asarray, part)
    except (TypeError, ValueError) as error:
        raise BecameError(f"a batch holds what is no array of numbers ({first_line(error)}); leave it out.") from error


def _is_on_one_device(array: Array) -> bool:
    return len(array.sharding.device_set) == 1


def _check_mesh(array: Any, what: str) -> None:
    """Raise a BecameError if an array's sharding is a part of its type: a function cannot be traced for one sample."""
    sharding = getattr(array, "sharding", None)
    if isinstance(sharding, NamedSharding) and is_explicit(sharding.mesh):
        raise BecameError(
            f"{what} lies on a mesh with Explicit axes, which jax.make_mesh makes unless it is told otherwise; make it "
            f"with axis_types=(jax.sharding.AxisType.Auto,) * {len(sharding.mesh.axis_names)}."
        )


def moments_of(state: Any, b2: float) -> dict[str, Moments]:
    """Return what the Adams in an optimiser's state know of the parameters' gradients."""

    def is_adam(node: Any) -> bool:
        # Of an AMSGrad, nu is what the other frameworks' have too; the largest it has had only grows.
        return isinstance(node, optax.ScaleByAdamState | optax.ScaleByAmsgradState)

    moments: dict[str, Moments] = {}
    for adam in filter(is_adam, jax.tree.leaves(state, is_leaf=is_adam)):
        # Where several optimisers share the parameters, each has a mask in the place of the others'.
        seconds = {name: value for name, value in leaves_of(adam.nu).items() if hasattr(value, "dtype")}
        count = jax.tree.leaves(adam.count)[0]  # within a variable, if nnx keeps the state
        moments |= {name: Moments(value, count, b2) for name, value in seconds.items()}
    return moments


def _wide(array: Array) -> Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


# Whole trees in one program: JAX would compile every operation for every shape.


@jax.jit  # type: ignore[untyped-decorator] # JAX is taken as untyped
def _moved(theta: Params, directions: list[Params], coefficients: list[float]) -> Params:
    """Return weights plus directions times coefficients, in the weights' dtypes."""
    ways = list(zip(coefficients, directions, strict=True))
    return {
        name: sum((way * direction[name] for way, direction in ways), value).astype(value.dtype)
        for name, value in theta.items()
    }


@jax.jit  # type: ignore[untyped-decorator] # JAX is taken as untyped
def _sum(left: Params, right: Params) -> Params:
    return {name: value + right[name].reshape(value.shape) for name, value in left.items()}


@jax.jit  # type: ignore[untyped-decorator] # JAX is taken as untyped
def _mean(sums: Params, theta: Params, units: float) -> Params:
    """Return sums in the shapes of these parameters, divided by the units."""
    return {name: sums[name].reshape(value.shape) / units for name, value in theta.items()}
