"""Taps of any Keras model: the inputs and output gradients of each use that it makes of a parameter.

The uses are read off the graph of the model's own forward pass (``adapters/tensorflow/graph.py``), and one backward
pass stops at their outputs. No parameter is passed over in silence: one that is used in a way that no known operation
explains, or whose rows are not those of the samples in their order, has its gradients computed sample by sample, with
one warning that names it. Which is the case is found by trying: rows of a few samples together must be those of each
sample alone.

Convention: as in ``became_core.curvature.taps``; the taps of a pass go by the names of parameters.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from adapters.tensorflow.graph import Unknown, Use, operations_of, uses_of
from adapters.tensorflow.parameters import Parameter
from adapters.tensorflow.traced import Traced, kind_of, samples_of
from became_core import BecameError
from became_core.arrays import Array, Params, namespace
from became_core.curvature import Tap, Taps, joined_uses

__all__ = ["TappedNetwork", "Tapping"]

# For each parameter's use, the rows that it was met by (empty if it has none) and the gradients by its outputs.
Rows = Mapping[str, Sequence[tuple[Array, Array]]]


@dataclass(frozen=True)
class _Plan:
    """What is known of a model on inputs of one kind.

    Attributes:
        uses: by parameter, without tensors.
        others: the parameters that no tap explains.
    """

    uses: Mapping[str, Sequence[Use]]
    others: frozenset[str]


class TappedNetwork(Protocol):
    """A function of weights and inputs whose taps are collected, such as a ``KerasFunction``."""

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The parameters by name, those that are trained among them."""

    @property
    def trained(self) -> Mapping[str, Parameter]:
        """The parameters whose taps are asked for."""

    def in_order(self, theta: Params) -> list[Array]:
        """Return the weights of a pass: those of ``trained`` in the shapes of their variables, and then all others."""

    def run(self, weights: Sequence[Array], inputs: Any) -> Array:
        """Return the outputs, [samples, ...], inside a trace or eagerly."""


class Tapping:
    """Collects taps of a model."""

    def __init__(self, network: TappedNetwork) -> None:
        """Keep the model as a function."""
        self._network = network
        self._warned: set[str] = set()
        self.retrace()

    def retrace(self) -> None:
        """Trace the model anew from here on."""
        self._traced = Traced(self._trace, needs_graph=True)
        self._uses: dict[Any, dict[str, list[Use | Unknown]]] = {}
        self._plans: dict[Any, _Plan] = {}
        self._by_sample: dict[frozenset[str], Traced] = {}

    def taps(
        self,
        theta: Params,
        inputs: Any,
        seed: Array,
        *,
        by_sample: bool = True,
        joined: Mapping[str, Sequence[Array]] | None = None,
    ) -> Taps:
        """Return the taps of a forward pass and of the backward pass that begins with a seed.

        Args:
            theta: the trained parameters.
            inputs: of a batch.
            seed: the gradients of each sample's own loss by the logits.
            by_sample: whether the parameters that no known operation explains are among them, by a pass a sample.
            joined: what ``inputs_of_uses`` returned of another seed's taps of the same batch, which these share.
        """
        plan, weights = self._plan(theta, inputs, seed), self._network.in_order(theta)
        samples = int(seed.shape[0])
        taps: dict[str, Tap] = {}
        if plan.uses:
            rows = self._traced(weights, (inputs, seed))
            shapes = {name: self._network.parameters[name].shape for name, uses in plan.uses.items() if uses}
            taps |= {
                name: joined_uses(
                    [_of_use(use, pair, samples, shape) for use, pair in zip(plan.uses[name], rows[name], strict=True)],
                    None if joined is None else joined.get(name),
                )
                for name, shape in shapes.items()
            }
        if plan.others and by_sample:
            rows_of = self._sample_by_sample(plan, weights, inputs, seed)
            taps |= {name: _lone(self._network.parameters[name].canonical_rows(rows_of[name])) for name in rows_of}
        return taps

    def ways(self, theta: Params, inputs: Any, seed: Array) -> dict[str, bool | None]:
        """Return the parameters that are used as whole matrices alone, and whether they are stored as [d_in, d_out].

        A projector can protect such a parameter: all that it does to the network is to be multiplied with rows, those
        of an embedding being one-hot vectors. Of a parameter that is used otherwise there is None.
        """
        plan = self._plan(theta, inputs, seed)
        every = self._uses.get(kind_of(inputs), {})
        ways: dict[str, bool | None] = {
            name: None for name in plan.others if any(isinstance(use, Unknown) for use in every.get(name, ()))
        }
        for name, uses in plan.uses.items():
            kinds = {(use.kind, use.transposed, use.groups) for use in uses}
            kind, transposed, groups = next(iter(kinds), ("", False, 0))
            # A stack of matrices that are looked up, as those of experts are, would stand still as a whole.
            is_embedding = kind == "embedding" and len(self._network.parameters[name].shape) == 2
            if len(kinds) == 1 and (kind == "matrix" or is_embedding) and groups == 1:
                ways[name] = transposed or is_embedding
            elif kinds:
                ways[name] = None
        return ways

    def _trace(self, weights: list[Array], batch: tuple[Any, Array]) -> dict[str, list[tuple[Array, Array]]]:
        """Return the rows of all uses that are known; the uses themselves are noted while the graph is traced."""
        inputs, seed = batch
        trained = self._network.trained
        leaves = {name: tf.identity(weight) for name, weight in zip(trained, weights, strict=False)}
        logits = self._network.run([*leaves.values(), *weights[len(leaves) :]], inputs)
        uses = uses_of(leaves, trained, tf.nest.flatten(inputs), logits)
        explained = {name: [use for use in own if isinstance(use, Use)] for name, own in uses.items() if _is_known(own)}
        self._uses[kind_of(inputs)] = {
            name: [replace(use, output=None, inputs=None) if isinstance(use, Use) else use for use in own]
            for name, own in uses.items()
        }
        outputs = [use.output for own in explained.values() for use in own]
        gradients = iter(tf.gradients(logits, outputs, seed, unconnected_gradients="zero") if outputs else [])
        empty = tf.zeros((0,), logits.dtype)
        return {
            name: [(empty if use.inputs is None else use.inputs, use.rows(next(gradients))) for use in own]
            for name, own in explained.items()
        }

    def _plan(self, theta: Params, inputs: Any, seed: Array) -> _Plan:
        kind = kind_of(inputs), tuple(self._network.trained)
        if kind not in self._plans:
            try:
                self._plans[kind] = self._studied(theta, inputs, seed)
            except BecameError:
                raise
            except Exception:  # there is no graph
                self._plans[kind] = _Plan({}, frozenset(self._network.trained))
            self._warn_of(self._plans[kind].others, self._uses.get(kind[0], {}))
        return self._plans[kind]

    def _studied(self, theta: Params, inputs: Any, seed: Array) -> _Plan:
        """Trace the model, and find out whose rows of a few samples are those of each sample alone."""
        weights, network = self._network.in_order(theta), self._network
        few = samples_of(inputs, slice(3))
        count = min(3, int(seed.shape[0]))
        if count == 1:  # what two equal samples share would show as well
            few, count = tf.nest.map_structure(lambda x: tf.concat([x, x], 0) if x.shape.rank else x, few), 2
        drawn = np.random.default_rng(0).normal(size=(count, *seed.shape[1:]))
        random = tf.constant(drawn, seed.dtype)
        together: Rows = self._traced(weights, (few, random))
        alone = [self._traced(weights, (samples_of(few, at), random[at])) for at in (slice(0, 1), slice(1, 2))]
        uses = self._uses[kind_of(inputs)]
        sound = {
            name
            for name, own in together.items()
            if all(
                _is_part(whole, part[name][index], place, count)
                for index, whole in enumerate(own)
                for place, part in enumerate(alone)
            )
        }
        known = {name: [use for use in own if isinstance(use, Use)] for name, own in uses.items() if name in sound}
        return _Plan(known, frozenset(name for name in network.trained if name not in known))

    def _sample_by_sample(self, plan: _Plan, weights: list[Array], inputs: Any, seed: Array) -> Params:
        """Return the gradients of parameters that no tap explains, [samples, *variable's shape], by a pass each."""
        if plan.others not in self._by_sample:
            self._by_sample[plan.others] = self._function_of_one(plan.others)
        one = self._by_sample[plan.others]
        rows = [
            one(weights, (samples_of(inputs, at), seed[at]))
            for at in (slice(n, n + 1) for n in range(int(seed.shape[0])))
        ]
        return {name: tf.stack([row[name] for row in rows]) for name in sorted(plan.others)}

    def _function_of_one(self, others: frozenset[str]) -> Traced:
        places = {name: place for place, name in enumerate(self._network.trained) if name in others}

        def one(weights: list[Array], batch: tuple[Any, Array]) -> Params:
            chosen = [weights[place] for place in places.values()]
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(chosen)
                logits = self._network.run(weights, batch[0])
            gradients = tape.gradient(logits, chosen, batch[1], unconnected_gradients="zero")
            return {name: tf.convert_to_tensor(gradient) for name, gradient in zip(places, gradients, strict=True)}

        return Traced(one)

    def _warn_of(self, others: frozenset[str], uses: Mapping[str, Sequence[Use | Unknown]]) -> None:
        """Warn once of the parameters whose per-sample gradients take longer."""
        new = [name for name in self._network.trained if name in others and name not in self._warned]
        if not new:
            return
        self._warned |= set(new)
        parts = []
        for name in new:
            how = operations_of(uses.get(name, ()))
            by = f", by {' and '.join(how)}" if how else ""
            parts.append(f"'{name}' (in a {self._network.parameters[name].owner}{by})")
        warnings.warn(
            f"taps do not know how these parameters are used: {', '.join(parts)}; their per-sample gradients are "
            "computed sample by sample, which is exact but slower.",
            stacklevel=2,
        )


def _is_known(uses: Sequence[Use | Unknown]) -> bool:
    """Whether all uses are known, and none is for each element beside others that are not."""
    kinds = {use.kind if isinstance(use, Use) else "unknown" for use in uses}
    return kinds <= {"elementwise"} or kinds.isdisjoint({"elementwise", "unknown"})


def _is_part(whole: tuple[Array, Array], part: tuple[Array, Array], place: int, count: int) -> bool:
    """Whether rows of some samples, cut into equal parts, have at one place those of that sample alone."""
    for together, alone in zip(whole, part, strict=True):
        if not alone.shape[0] and not together.shape[0]:
            continue
        if together.shape[0] != count * alone.shape[0] or together.shape[1:] != alone.shape[1:]:
            return False
        own = together[place * alone.shape[0] : (place + 1) * alone.shape[0]]
        if not alone.dtype.is_floating:
            if not bool(tf.reduce_all(own == alone)):
                return False
            continue
        # Several samples may round in another order than one.
        tolerance = 10 * namespace(alone=alone).finfo(alone.dtype).eps ** 0.5
        if not bool(
            tf.reduce_max(tf.abs(own - alone)) <= tolerance * tf.maximum(tf.reduce_max(tf.abs(together)), 1e-30)
        ):
            return False
    return True


def _of_use(use: Use, rows: tuple[Array, Array], samples: int, shape: Sequence[int]) -> Tap:
    """Return the tap of one use of a parameter of this shape."""
    inputs, gradients = rows
    g = tf.reshape(gradients, (samples, -1, gradients.shape[-1]))
    if use.kind == "elementwise":
        return _lone(tf.reduce_sum(g, 1))
    if use.kind == "embedding":
        return Tap("embedding", tf.reshape(inputs, (samples, -1)), g, size=shape[0], own_name=True)
    a = tf.reshape(inputs, (samples, -1, inputs.shape[-1]))
    return Tap("matrix", a, g, groups=use.groups, transposed=use.transposed, own_name=True)


def _lone(gradient: Array) -> Tap:
    """Return per-sample gradients, [samples, ...], as a tap."""
    flat = tf.reshape(gradient, (gradient.shape[0], 1, -1))
    return Tap("gradient", flat, tf.ones_like(flat[..., :1]), own_name=True)
