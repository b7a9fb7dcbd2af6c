"""Taps of any JAX function: the inputs and output gradients of each use that it makes of a parameter.

The uses are read off the jaxpr of the function for one sample (``adapters/jax/graph.py``), and all samples are run by
``jax.vmap``. So what a tap holds belongs to one sample, whatever the function does with its axes, and per-sample
gradients of parameters that are used otherwise come from the same backward pass.

Convention: as in ``became_core.curvature.taps``. The function returns [samples, ...] for a batch; of the inputs, arrays
whose first axis is as long as the outputs' belong to the samples. Parameters go by their dotted paths in the tree, and
their taps by the same names. Only parameters of real numbers are tapped.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from adapters.jax.graph import Run, Unknown, Use, dtypes_of
from adapters.jax.trees import leaves_of, with_leaves_of
from became_core import BecameError
from became_core.arrays import Array, Params, namespace
from became_core.curvature import Tap, Taps, joined_uses
from became_core.errors import first_line

__all__ = ["Apply", "TappedFunction", "trained_of"]

# (params, inputs) -> outputs [samples, ...].
Apply = Callable[[Any, Any], Array]


def trained_of(params: Any) -> Params:
    """Return the arrays of a tree that have gradients, by dotted path; numbers of Python's are arrays, too.

    Raises:
        BecameError: if a leaf is no array and no number, as the functions in an equinox module are.

    Examples:
        >>> list(trained_of({"fc": {"kernel": jnp.ones((2, 3))}, "step": jnp.array(3)}))
        ['fc.kernel']
    """
    leaves = leaves_of(params)
    for name, leaf in leaves.items():
        if not (hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)):
            raise BecameError(
                f"'{name}' of the parameters is a {type(leaf).__name__} and no array; give a tree of arrays alone, as "
                "eqx.partition(model, eqx.is_inexact_array) makes it of a module."
            )
    dtypes = {name: jnp.result_type(leaf) for name, leaf in leaves.items()}
    # Arrays stay as they are, since JAX would compile a conversion of each.
    return {
        name: leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        for name, leaf in leaves.items()
        if jnp.issubdtype(dtypes[name], jnp.inexact)
    }


class TappedFunction:
    """A function of parameters and inputs, whose taps can be collected; it is read once for inputs of one kind.

    Attributes:
        matrices: the parameters that are used as whole matrices alone, on samples, and whether they are stored as
            [d_in, d_out] when they are flattened. An embedding is multiplied with one-hot vectors.
        ways: the same, and None of each parameter that is used otherwise.
        others: the parameters that no tap explains, but elementwise operations do.
        slow: the parameters that are used by operations that taps do not know, and these.
        uses_parameters: whether the outputs depend on any parameter.
        rounding: the epsilon of the coarsest dtype that the function computes in.

    Examples:
        >>> def apply(params, inputs):
        ...     return inputs @ params["kernel"] + params["bias"]
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> inputs, seed = jnp.ones((5, 2)), jnp.ones((5, 3))
        >>> tapped = TappedFunction(apply, params, inputs)
        >>> tapped.matrices
        {'kernel': True}
        >>> {name: tap.inputs.shape for name, tap in tapped.taps(params, inputs, seed).items()}
        {'bias': (5, 1, 3), 'kernel': (5, 1, 2)}
    """

    def __init__(self, apply: Apply, params: Any, inputs: Any, shared: Collection[int] = ()) -> None:
        """Read the function, for inputs of these shapes but for their number of samples.

        Args:
            apply: (params, inputs) -> outputs, [samples, ...].
            params: a tree of arrays.
            inputs: of a batch: an array, or a tree of arrays.
            shared: which leaves of the inputs, by number, no sample has for itself though they are as long as the
                batch; leaves of other lengths need not be named.

        Raises:
            BecameError: if the outputs are no array with an axis of samples, or there must be so many samples.
        """
        trained = trained_of(params)
        namespace(values=jnp.zeros(()))  # JAX learns of the core's values, also where parameters are NumPy's

        def of_trained(trained: Params, inputs: Any) -> Array:
            # What is not trained is part of the function.
            return apply(with_leaves_of(params, leaves_of(params) | trained), inputs)

        outputs = jax.eval_shape(of_trained, trained, inputs)
        if not hasattr(outputs, "shape") or not outputs.shape:
            raise BecameError("the function must return one array of outputs, [samples, ...]; give one that does.")
        self._samples = outputs.shape[0]
        self._params = params
        leaves, self._structure = jax.tree.flatten(inputs)
        self._is_samples = [
            jnp.ndim(leaf) > 0 and jnp.shape(leaf)[0] == self._samples and number not in shared
            for number, leaf in enumerate(leaves)
        ]

        def of_leaves(trained: Params, leaves: Sequence[Array]) -> Array:
            return of_trained(trained, jax.tree.unflatten(self._structure, leaves))

        one = [leaf[:1] if own else leaf for leaf, own in zip(leaves, self._is_samples, strict=True)]
        try:
            self._closed = jax.make_jaxpr(of_leaves)(trained, one)
        except (TypeError, ValueError) as error:  # the whole batch went through the function above
            raise BecameError(
                f"the function takes the whole batch, but not one sample of it ({first_line(error)}); give one that "
                "takes any number of samples."
            ) from error
        # A dict's leaves are sorted in a jaxpr.
        self._names = sorted(trained)
        run = Run()
        jax.eval_shape(lambda: run(self._closed, {name: trained[name] for name in self._names}, one))
        self._shapes = {n: jax.ShapeDtypeStruct(o.shape, o.dtype) for n, o in run.outputs.items()}
        self._explain(run.uses)
        # Gradients and movements of a parameter are rounded to its dtype, even if no operation computes in that.
        dtypes = dtypes_of(self._closed.jaxpr) | {jnp.result_type(value) for value in trained.values()}
        self.rounding = max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)
        self.taps = jax.jit(self._taps)
        self.outputs = jax.jit(self._outputs)

    def _explain(self, uses: Sequence[Use | Unknown]) -> None:
        self.uses_parameters = bool(uses)
        self._tapped: dict[str, list[int]] = {}
        self.ways: dict[str, bool | None] = {}
        self.others: list[str] = []
        self.slow: dict[str, list[str]] = {}
        for name in self._names:
            own = {number: use for number, use in enumerate(uses) if use.name == name}
            if own:
                self.ways[name] = None
            if own and all(isinstance(use, Use) for use in own.values()):
                self._tapped[name] = list(own)
                ways = {(use.kind, use.transposed, use.groups) for use in own.values() if isinstance(use, Use)}
                kind, transposed, groups = next(iter(ways))
                # A stack of matrices that are looked up, as those of experts are, would stand still as a whole.
                is_stack = kind == "embedding" and jnp.ndim(trained_of(self._params)[name]) != 2
                if len(ways) == 1 and groups == 1 and not is_stack:
                    self.ways[name] = transposed or kind == "embedding"
                continue
            self.others.append(name)
            how = {use.operation for use in own.values() if isinstance(use, Unknown) and not use.is_elementwise}
            if how:
                self.slow[name] = sorted(how)
        self.matrices = {name: way for name, way in self.ways.items() if way is not None}

    def warn(self) -> None:
        """Warn of the parameters whose per-sample gradients cost much memory, and of what operations they meet."""
        if self.slow:
            parts = ", ".join(f"'{name}' (by {' and '.join(how)})" for name, how in self.slow.items())
            warnings.warn(
                f"taps do not know how these parameters are used: {parts}; their gradients are computed for each "
                "sample, which is exact but takes more memory and time.",
                stacklevel=2,
            )

    def _leaves(self, inputs: Any) -> tuple[list[Array], list[int | None]]:
        leaves = jax.tree.leaves(inputs)
        return leaves, [0 if own else None for own in self._is_samples]

    def _outputs(self, params: Any, inputs: Any) -> Array:
        """Return the outputs [samples, ...], each sample's alone, as the taps' own pass computes them."""
        theta = {name: trained_of(params)[name] for name in self._names}
        leaves, axes = self._leaves(inputs)

        def one(leaves: Sequence[Array]) -> Array:
            alone = [leaf if axis is None else leaf[None] for leaf, axis in zip(leaves, axes, strict=True)]
            return Run()(self._closed, theta, alone)[0][0]

        outputs: Array = _of_each_sample(one, leaves, axes)
        return outputs

    def _taps(self, params: Any, inputs: Any, seed: Array) -> Taps:
        """Return the taps of a batch.

        Args:
            params: the parameters.
            inputs: of the batch.
            seed: the gradient of each sample's own loss by its outputs, [samples, ...].
        """
        trained = trained_of(params)
        theta = {name: trained[name] for name in self._names}
        leaves, axes = self._leaves(inputs)

        def one(leaves: Sequence[Array], seed: Array) -> tuple[Mapping[int, tuple[Array, Array]], Params]:
            alone = [leaf if axis is None else leaf[None] for leaf, axis in zip(leaves, axes, strict=True)]

            def function(perturbations: Mapping[int, Array], others: Params) -> tuple[Array, Any]:
                run = Run(perturbations)
                outputs = run(self._closed, theta | others, alone)[0]
                uses = {number: run.uses[number] for number in self._shapes}
                self._kinds = {n: use for n, use in uses.items() if isinstance(use, Use)}
                return outputs[0], {n: use.inputs() for n, use in self._kinds.items()}

            zeros = {n: jnp.zeros(shape.shape, shape.dtype) for n, shape in self._shapes.items()}
            others = {name: theta[name] for name in self.others}
            _, backward, inputs = jax.vjp(function, zeros, others, has_aux=True)
            by_outputs, by_others = backward(seed)
            return {n: (inputs[n], use.rows(by_outputs[n])) for n, use in self._kinds.items()}, by_others

        pairs, lone = _of_each_sample(lambda given: one(given[:-1], given[-1]), [*leaves, seed], [*axes, 0])
        taps = {name: self._tap([pairs[n] for n in numbers], numbers) for name, numbers in self._tapped.items()}
        for name, gradient in lone.items():
            flat = gradient.reshape(gradient.shape[0], 1, -1)
            taps[name] = Tap("gradient", flat, jnp.ones_like(flat[..., :1]))
        return {name: taps[name] for name in trained}

    def _tap(self, pairs: Sequence[tuple[Array, Array]], numbers: Sequence[int]) -> Tap:
        """Return all uses of one parameter as one tap."""
        uses = [(self._kinds[number], a, g) for (a, g), number in zip(pairs, numbers, strict=True)]
        return joined_uses(
            [
                Tap(use.kind, a, g, groups=use.groups, size=use.size, own_name=True, transposed=use.transposed)
                for use, a, g in uses
            ]
        )


def _of_each_sample(
    function: Callable[[Sequence[Array]], Any], leaves: Sequence[Array], axes: Sequence[int | None]
) -> Any:
    """Return what a function returns for each sample, stacked; by a loop if JAX has no batched form of an operation.

    Args:
        function: of leaves.
        leaves: of a batch.
        axes: 0 of leaves that belong to samples, and None of those that all samples share.
    """
    try:
        return jax.vmap(function, in_axes=(list(axes),))(list(leaves))
    except NotImplementedError:
        own = [place for place, axis in enumerate(axes) if axis == 0]

        def of_one(rows: Sequence[Array]) -> Any:
            rows_of = dict(zip(own, rows, strict=True))
            return function([rows_of.get(place, leaf) for place, leaf in enumerate(leaves)])

        return lax.map(of_one, [leaves[place] for place in own])
