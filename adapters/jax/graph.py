"""How a function of parameters and inputs uses its parameters, read off its jaxpr while it is run.

A parameter is an argument of the jaxpr. Operations that only move its entries (reshapes, transposes, casts) are
followed, and so are calls of inner functions (``jit``, ``checkpoint``). Where the result meets what depends on the
samples, there is a use of the parameter. Layer classes do not matter: flax, nnx, equinox and plain functions are all
seen as what they compute.

| kind | operations | gradient of the parameter, for one sample |
| --- | --- | --- |
| matrix | dot_general, conv_general_dilated | sum over positions of g a^T |
| embedding | gather of whole rows | sum over positions, by key |
| elementwise | additions, products, comparisons, concatenations | JAX's own |
| unknown | all others: loops, branches, functions with derivatives of their own | JAX's own |

A use that is a matrix or an embedding is run with a perturbation of zeros added to its output. The gradient by the
perturbation is g.

Convention: the function sees one sample, as a batch of one. a is [positions, d_in] and g is [positions, d_out].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.extend import core
from numpy.typing import NDArray

from became_core.arrays import Array

__all__ = ["Run", "Unknown", "Use", "dtypes_of"]

# Operations that only move, drop or repeat entries, by what they do to an array of the entries' numbers.
VIEWS: dict[str, Callable[[NDArray[Any], Mapping[str, Any]], NDArray[Any]]] = {
    "reshape": lambda entries, p: entries if p["dimensions"] is not None else entries.reshape(p["new_sizes"]),
    "transpose": lambda entries, p: entries.transpose(p["permutation"]),
    "squeeze": lambda entries, p: entries.squeeze(tuple(p["dimensions"])),
    "convert_element_type": lambda entries, p: entries,
    "copy": lambda entries, p: entries,
    "broadcast_in_dim": lambda entries, p: np.broadcast_to(
        entries.reshape(_in_places(entries.shape, p["broadcast_dimensions"], len(p["shape"]))), p["shape"]
    ),
    "slice": lambda entries, p: entries[
        tuple(map(slice, p["start_indices"], p["limit_indices"], p["strides"] or [1] * entries.ndim))
    ],
}

# Functions within functions, by the name of the parameter of the operation that holds them.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr", "closed_call": "call_jaxpr"}

# Operations that treat each entry by itself, or put entries side by side.
ELEMENTWISE = frozenset(
    ("add", "add_any", "sub", "mul", "div", "max", "min", "select_n", "concatenate", "pad", "pow", "atan2", "rem")
) | frozenset(("lt", "le", "gt", "ge", "eq", "ne", "and", "or"))


def _in_places(shape: Sequence[int], places: Sequence[int], ndim: int) -> list[int]:
    wide = [1] * ndim
    for size, place in zip(shape, places, strict=True):
        wide[place] = size
    return wide


@dataclass(frozen=True)
class Use:
    """One use of a parameter as a matrix or an embedding.

    Attributes:
        name: of the parameter.
        kind: what it is used as.
        inputs: returns a, [positions, d_in]; of an embedding, the keys [positions].
        rows: from the gradient by the output to g, [positions, d_out].
        transposed: of a matrix, whether the parameter is stored as [d_in, d_out].
        groups: of a matrix.
        size: of an embedding, the number of its rows.
    """

    name: str
    kind: Literal["matrix", "embedding"]
    inputs: Callable[[], Array]
    rows: Callable[[Array], Array]
    transposed: bool = False
    groups: int = 1
    size: int = 0


@dataclass(frozen=True)
class Unknown:
    """A use whose gradient is JAX's own.

    Attributes:
        name: of the parameter.
        operation: what JAX calls it.
        is_elementwise: whether each entry is used by itself, so that gradients of samples are small.
    """

    name: str
    operation: str
    is_elementwise: bool


@dataclass(frozen=True)
class _Entries:
    """A value that is a parameter with its entries moved, by the number that each had in the parameter."""

    name: str
    numbers: NDArray[Any]
    size: int


@dataclass(frozen=True)
class _Computed:
    """A value computed from parameters, and from no sample."""

    names: frozenset[str]


# What is known of a value: a parameter's entries, parameters alone, samples, or nothing of both (None).
_State = _Entries | _Computed | Literal["samples"] | None


@dataclass
class Run:
    """One run of a jaxpr, operation by operation, which notes every use of its parameters.

    Attributes:
        perturbations: what is added to the outputs of uses, by the use's number in order.
        uses: all uses in order; those that are unknown have numbers too.
        outputs: the output of each use that is a matrix or an embedding, by its number.
    """

    perturbations: Mapping[int, Array] = field(default_factory=dict)
    uses: list[Use | Unknown] = field(default_factory=list)
    outputs: dict[int, Array] = field(default_factory=dict)

    def __call__(self, closed: Any, parameters: Mapping[str, Array], others: Sequence[Array]) -> list[Array]:
        """Return what the jaxpr returns.

        Args:
            closed: a closed jaxpr, of parameters and then of samples.
            parameters: by name, in the order of the jaxpr's arguments.
            others: the samples.
        """
        states: list[_State] = [
            _Entries(name, np.arange(prod(value.shape), dtype=np.int32).reshape(value.shape), prod(value.shape))
            for name, value in parameters.items()
        ]
        states += ["samples"] * len(others)
        values, after = self._run(closed.jaxpr, closed.consts, [*parameters.values(), *others], states)
        # An output may depend on parameters alone.
        self.uses += [
            Unknown(name, "output", True)
            for state in after
            if isinstance(state, _Entries | _Computed)
            for name in _names(state)
        ]
        return values

    def _run(
        self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Any], states: Sequence[_State]
    ) -> tuple[list[Any], list[_State]]:
        # A constant may be NumPy's, and a backward pass of the user's own may take an entry of it by a traced number.
        known: dict[Any, tuple[Any, _State]] = {
            variable: (jnp.asarray(const), None) for variable, const in zip(jaxpr.constvars, consts, strict=True)
        }
        known |= dict(zip(jaxpr.invars, zip(values, states, strict=True), strict=True))

        def look_up(atom: Any) -> tuple[Any, _State]:
            return (atom.val, None) if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            arguments = [look_up(atom) for atom in equation.invars]
            results, after = self._operation(equation, [a for a, _ in arguments], [s for _, s in arguments])
            known |= dict(zip(equation.outvars, zip(results, after, strict=True), strict=True))
        outputs = [look_up(atom) for atom in jaxpr.outvars]
        return [value for value, _ in outputs], [state for _, state in outputs]

    def _operation(
        self, equation: Any, values: list[Any], states: list[_State]
    ) -> tuple[Sequence[Any], Sequence[_State]]:
        name, params = equation.primitive.name, equation.params
        of_parameters = [state for state in states if isinstance(state, _Entries | _Computed)]
        if of_parameters and name in CALLS:
            inner = params[CALLS[name]]
            return self._run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values, states)
        results = _computed(equation, values)
        if "samples" not in states:
            is_moved = len(states) == 1 and len(results) > 0 and jnp.issubdtype(results[0].dtype, jnp.floating)
            view = VIEWS.get(name) if is_moved else None
            state = self._of_parameters_alone(view, params, of_parameters)
            return results, [state] * len(results)
        if of_parameters:
            use = self._use(name, params, values, states)
            if use is None:
                names = dict.fromkeys(one for state in of_parameters for one in _names(state))
                self.uses += [Unknown(one, name, name in ELEMENTWISE) for one in names]
            else:
                number = len(self.uses)
                self.uses.append(use)
                self.outputs[number] = results[0]
                if number in self.perturbations:
                    results = [results[0] + self.perturbations[number]]
        return results, ["samples"] * len(results)

    @staticmethod
    def _of_parameters_alone(
        view: Callable[..., Any] | None, params: Mapping[str, Any], states: Sequence[_Entries | _Computed]
    ) -> _State:
        if not states:
            return None
        if view is not None and isinstance(states[0], _Entries):
            return _Entries(states[0].name, view(states[0].numbers, params), states[0].size)
        return _Computed(frozenset(one for state in states for one in _names(state)))

    @staticmethod
    def _use(name: str, params: Mapping[str, Any], values: list[Any], states: list[_State]) -> Use | None:
        if name not in OPERATIONS or sum(isinstance(state, _Entries | _Computed) for state in states) != 1:
            return None
        slot = next(place for place, state in enumerate(states) if isinstance(state, _Entries | _Computed))
        entries = states[slot]
        if not isinstance(entries, _Entries) or not entries.size or entries.numbers.size != entries.size:
            return None
        # Of complex products only a part is the gradient of a real parameter.
        if any(jnp.iscomplexobj(value) for value in values):
            return None
        return OPERATIONS[name](entries, slot, params, values)


def dtypes_of(jaxpr: Any) -> set[Any]:
    """Return the dtypes of real numbers that are computed in a jaxpr, and in those within it."""
    dtypes = {variable.aval.dtype for equation in jaxpr.eqns for variable in equation.outvars}
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                dtypes |= dtypes_of(inner)
    return {dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)}


def _computed(equation: Any, values: Sequence[Any]) -> list[Any]:
    """Return the results of one operation, which is run as a jaxpr of its own, so that it keeps its derivatives."""
    given = {
        atom: value for atom, value in zip(equation.invars, values, strict=True) if not isinstance(atom, core.Literal)
    }
    # The whole function's names of arguments and results do not fit one operation's; those of a blank function do.
    blank = jax.make_jaxpr(lambda *values: [0] * len(equation.outvars))(*given.values()).jaxpr
    own = blank.replace(invars=list(given), outvars=list(equation.outvars), eqns=[equation], effects=equation.effects)
    return core.jaxpr_as_fun(core.ClosedJaxpr(own, []))(*given.values())  # type: ignore[no-any-return]


def _names(state: _Entries | _Computed) -> frozenset[str]:
    return frozenset({state.name}) if isinstance(state, _Entries) else state.names


def _layout(
    numbers: NDArray[Any], inner: Sequence[int], outer: Sequence[int]
) -> tuple[list[int], list[int], bool] | None:
    """Return the axes of inputs and of outputs in the order in which they are stored, and whether inputs come first.

    Args:
        numbers: of the entries of an operand.
        inner: its axes of inputs.
        outer: its axes of outputs.

    Returns:
        None if the parameter, flattened, is no matrix of inputs and outputs.
    """

    def by_step(axes: Sequence[int]) -> list[int]:
        steps = {
            axis: int(numbers.take(1, axis).flat[0]) - int(numbers.flat[0]) for axis in axes if numbers.shape[axis] > 1
        }
        return sorted(axes, key=lambda axis: -steps.get(axis, 0))

    inner, outer = by_step(inner), by_step(outer)
    d_in = prod(numbers.shape[axis] for axis in inner)
    in_order = np.arange(numbers.size)
    if np.array_equal(numbers.transpose([*outer, *inner]).reshape(-1), in_order):
        return inner, outer, False
    by_input = numbers.transpose([*inner, *outer]).reshape(d_in, -1)
    return (inner, outer, True) if np.array_equal(by_input.reshape(-1), in_order) else None


def _dot(entries: _Entries, slot: int, params: Mapping[str, Any], values: list[Any]) -> Use | None:
    contracted, batched = params["dimension_numbers"]
    numbers, other = entries.numbers, values[1 - slot]
    if prod(numbers.shape[axis] for axis in batched[slot]) != 1:
        return None
    own, others = list(contracted[slot]), list(contracted[1 - slot])
    free = [axis for axis in range(numbers.ndim) if axis not in (*own, *batched[slot])]
    placed = _layout(numbers, [*own, *batched[slot]], free)
    if placed is None:
        return None
    inner, outer, transposed = placed
    partner = dict(zip([*own, *batched[slot]], [*others, *batched[1 - slot]], strict=True))
    axes = [partner[axis] for axis in inner]
    d_in, d_out = prod(numbers.shape[axis] for axis in inner), prod(numbers.shape[axis] for axis in free)

    def inputs() -> Array:
        rest = [axis for axis in range(other.ndim) if axis not in axes]
        return other.transpose([*rest, *axes]).reshape(-1, d_in)

    def rows(gradient: Array) -> Array:
        # The output has the batch axes, then the free axes of the left operand, then those of the right one.
        begin = len(batched[slot]) + (0 if slot == 0 else gradient.ndim - len(batched[slot]) - len(free))
        place = {axis: begin + index for index, axis in enumerate(free)}
        own_axes = [place[axis] for axis in outer]
        rest = [axis for axis in range(gradient.ndim) if axis not in own_axes]
        return gradient.transpose([*rest, *own_axes]).reshape(-1, d_out)

    return Use(entries.name, "matrix", inputs, rows, transposed)


def _convolution(entries: _Entries, slot: int, params: Mapping[str, Any], values: list[Any]) -> Use | None:
    dimensions, groups = params["dimension_numbers"], params["feature_group_count"]
    if slot != 1 or params["batch_group_count"] != 1:
        return None
    numbers, images = entries.numbers, values[0]
    out_axis, in_axis, *spatial = dimensions.rhs_spec
    placed = _layout(numbers, [in_axis, *spatial], [out_axis])
    if placed is None or (placed[2] and groups > 1 and numbers.shape[in_axis] > 1):
        return None
    inner, _, transposed = placed
    if groups > 1 and transposed:
        return None
    kernel = [numbers.shape[axis] for axis in spatial]
    channels = numbers.shape[in_axis] * groups

    def inputs() -> Array:
        patches = lax.conv_general_dilated_patches(
            images,
            kernel,
            params["window_strides"],
            params["padding"],
            lhs_dilation=params["lhs_dilation"],
            rhs_dilation=params["rhs_dilation"],
            dimension_numbers=dimensions,
            precision=lax.Precision.HIGHEST,
        )
        last = jnp.moveaxis(patches, dimensions.out_spec[1], -1).reshape(-1, channels, *kernel)
        axes = [1 + [in_axis, *spatial].index(axis) for axis in inner]
        return last.transpose([0, *axes]).reshape(last.shape[0], -1)

    def rows(gradient: Array) -> Array:
        return jnp.moveaxis(gradient, dimensions.out_spec[1], -1).reshape(-1, numbers.shape[out_axis])

    return Use(entries.name, "matrix", inputs, rows, transposed, groups)


def _gather(entries: _Entries, slot: int, params: Mapping[str, Any], values: list[Any]) -> Use | None:
    dimensions, sizes, numbers = params["dimension_numbers"], params["slice_sizes"], entries.numbers
    whole_rows = tuple(sizes) == (1, *numbers.shape[1:]) and tuple(dimensions.collapsed_slice_dims) in {(), (0,)}
    in_order = np.array_equal(numbers.reshape(-1), np.arange(numbers.size))
    axes, clips = tuple(dimensions.start_index_map), "CLIP" in str(params["mode"]).upper()
    # A row may have a start along its other axes as well, as under vmap, which is clipped to the only one there is.
    by_row = axes == (0,) or (clips and 0 in axes)
    if slot != 0 or not whole_rows or not in_order or not by_row:
        return None
    keys, count = values[1][..., axes.index(0)].reshape(-1), numbers.shape[0]
    is_inside = (keys >= 0) & (keys < count)

    def rows(gradient: Array) -> Array:
        offset = list(dimensions.offset_dims)
        rest = [axis for axis in range(gradient.ndim) if axis not in offset]
        g = gradient.transpose([*rest, *offset]).reshape(len(keys), -1)
        return g if clips else jnp.where(is_inside[:, None], g, 0)

    return Use(entries.name, "embedding", lambda: jnp.clip(keys, 0, count - 1), rows, size=count)


# Each reads one operation with the parameter in one slot; None if it does not know this form of it.
OPERATIONS: dict[str, Callable[[_Entries, int, Mapping[str, Any], list[Any]], Use | None]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
}
