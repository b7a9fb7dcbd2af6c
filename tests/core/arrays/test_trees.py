import dataclasses
import gc
import importlib
import weakref
from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import array_api_strict
import numpy as np
import optree
import pytest

from became_core import BecameError, merge, optimal_alpha
from became_core.arrays import aligned_leaves, map_leaves, named_leaves, size_in_bytes
from tests.backends import to_numpy


class Layer(NamedTuple):
    weight: Any
    bias: Any


@dataclasses.dataclass(frozen=True)
class Model:
    layer: Any
    scale: Any
    width: int = dataclasses.field(default=3, init=False)

    def __repr__(self) -> str:
        raise AssertionError("a tree is printed, for which an accelerator's values would have to be waited for")


class Registered:
    """A class that nothing but optree knows how to open."""

    def __init__(self, inner: Any, name: str) -> None:
        self.inner, self.name = inner, name


REGISTER: Any = optree.register_pytree_node  # its types ask for a collection, which is no need of its own
REGISTER(
    Registered,
    lambda node: ((node.inner,), node.name, ("inner",)),
    lambda name, children: Registered(children[0], name),
    namespace=optree.registry.__GLOBAL_NAMESPACE,
)


def numbers(tree: Any) -> dict[str, float]:
    return {path: float(leaf) for path, leaf in named_leaves(tree).items()}


def test_leaves_are_named_by_dotted_paths(xp: Any) -> None:
    tree = {"encoder": [xp.ones(()), {"weight": xp.ones(())}], "bias": xp.ones(())}
    assert sorted(named_leaves(tree)) == ["bias", "encoder.0", "encoder.1.weight"]


def test_a_bare_array_has_an_empty_path(xp: Any) -> None:
    assert list(named_leaves(xp.ones((2,)))) == [""]
    assert [list(row) for row in aligned_leaves(first=xp.ones((2,)), second=xp.ones((2,)))] == [["first", "second"]]


def test_trees_are_walked_side_by_side(xp: Any) -> None:
    first = {"b": xp.asarray(1.0), "a": xp.asarray(2.0)}
    second = OrderedDict(a=xp.asarray(20.0), b=xp.asarray(10.0))
    rows = [{label: float(array) for label, array in row.items()} for row in aligned_leaves(x=first, y=second)]
    assert sorted(rows, key=str) == [{"x 'a'": 2.0, "y 'a'": 20.0}, {"x 'b'": 1.0, "y 'b'": 10.0}]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"a": (2,)}, r"^y lacks the leaf 'b' that x has; give equal structures\.$"),
        ({"a": (2,), "b": (3,), "c": (1,)}, r"^y has a leaf 'c' that x lacks; give equal structures\.$"),
        ({"a": (2,), "b": (2,)}, r"^y 'b' has shape \(2,\) but x 'b' has \(3,\); make them equal\.$"),
        ({"a": (2,), "b": (3, 1)}, r"^y 'b' has shape \(3, 1\) but x 'b' has \(3,\); make them equal\.$"),
    ],
)
def test_the_first_mismatched_leaf_is_named(xp: Any, second: dict[str, tuple[int, ...]], message: str) -> None:
    first = {"a": xp.ones((2,)), "b": xp.ones((3,))}
    with pytest.raises(BecameError, match=message):
        list(aligned_leaves(x=first, y={name: xp.ones(shape) for name, shape in second.items()}))


def test_mixed_frameworks_name_the_leaf() -> None:
    with pytest.raises(BecameError, match=r"^x 'a' is an array of numpy but y 'a' is one of array_api_strict"):
        list(aligned_leaves(x={"a": np.ones(2)}, y={"a": array_api_strict.ones(2)}))


def test_containers_must_agree_not_only_names(xp: Any) -> None:
    # The dotted names are equal here; only the nesting differs, and mapping over both would fail.
    first, second = {"a": {"b": xp.ones((2,))}}, {"a.b": xp.ones((2,))}
    with pytest.raises(BecameError, match=r"^y is nested otherwise than x; give equal structures\.$"):
        list(aligned_leaves(x=first, y=second))


def test_map_keeps_the_structure(xp: Any) -> None:
    tree = {"a": [xp.asarray(1.0), xp.asarray(2.0)], "b": xp.asarray(3.0)}
    mapped = map_leaves(lambda x, y: x + y, tree, tree)
    assert [float(leaf) for leaf in named_leaves(mapped).values()] == [2.0, 4.0, 6.0]
    assert isinstance(mapped["a"], list)


def test_two_leaves_of_one_path_are_refused(xp: Any) -> None:
    with pytest.raises(BecameError, match="two leaves of a tree have the same dotted path"):
        named_leaves({"a.b": xp.ones(()), "a": {"b": xp.ones(())}})


def test_named_tuples_and_dataclasses_are_nodes(xp: Any) -> None:
    tree = Model(layer=Layer(xp.asarray(1.0), [xp.asarray(2.0)]), scale=xp.asarray(3.0))
    assert numbers(tree) == {"layer.weight": 1.0, "layer.bias.0": 2.0, "scale": 3.0}
    doubled = map_leaves(lambda leaf: 2 * leaf, tree)
    assert numbers(doubled) == {"layer.weight": 2.0, "layer.bias.0": 4.0, "scale": 6.0}
    assert (type(doubled), type(doubled.layer), doubled.width) == (Model, Layer, 3)
    assert float(optimal_alpha(tree, doubled, tree, doubled)) == pytest.approx(2 / 3)
    assert numbers(merge(tree, doubled, 0.5)) == {"layer.weight": 1.5, "layer.bias.0": 3.0, "scale": 4.5}


def test_a_node_registered_with_optree_is_a_node(xp: Any) -> None:
    tree = {"a": Registered(Layer(xp.asarray(1.0), xp.asarray(2.0)), "kept"), "b": defaultdict(list, c=xp.asarray(3.0))}
    assert numbers(tree) == {"a.inner.weight": 1.0, "a.inner.bias": 2.0, "b.c": 3.0}
    negated = map_leaves(lambda leaf: -leaf, tree)
    assert numbers(negated) == {"a.inner.weight": -1.0, "a.inner.bias": -2.0, "b.c": -3.0}
    assert (negated["a"].name, negated["b"].default_factory) == ("kept", list)


def test_a_tree_that_was_walked_is_freed_at_once() -> None:
    """And not when Python next looks for cycles: the arrays of an old posterior are as many as the model's."""
    array = np.zeros(3)
    watched = weakref.ref(array)
    gc.disable()
    try:
        named_leaves({"a": [array]})
        del array
        assert watched() is None
    finally:
        gc.enable()


def test_none_is_an_empty_node(xp: Any) -> None:
    tree = {"a": xp.asarray(1.0), "b": None, "c": []}
    assert numbers(tree) == {"a": 1.0}
    assert map_leaves(lambda leaf: None, tree) == {"a": None, "b": None, "c": []}
    with pytest.raises(BecameError, match=r"^y is nested otherwise than x; give equal structures\.$"):
        list(aligned_leaves(x=tree, y={"a": xp.asarray(1.0), "b": [], "c": None}))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1], (1,)),
        ({"layer": 1, "scale": 2}, Model(1, 2)),
        (Layer(1, 2), {"weight": 1, "bias": 2}),
        ({"0": 1}, [1]),
    ],
)
def test_containers_of_other_kinds_do_not_meet(first: Any, second: Any) -> None:
    with pytest.raises(BecameError, match=r"^y is nested otherwise than x; give equal structures\.$"):
        list(aligned_leaves(x=first, y=second))
    with pytest.raises(BecameError, match=r"^tree 2 is nested otherwise than tree 1; give equal structures\.$"):
        map_leaves(lambda one, other: one, first, second)


def test_map_meets_leaves_by_path_and_keeps_the_first_order(xp: Any) -> None:
    first = OrderedDict(b=xp.asarray(1.0), a=xp.asarray(2.0))
    second = {"a": xp.asarray(20.0), "b": xp.asarray(10.0)}
    total = map_leaves(lambda one, other: one + other, first, second)
    assert type(total) is OrderedDict
    assert list(numbers(total).items()) == [("b", 11.0), ("a", 22.0)]
    with pytest.raises(BecameError, match=r"^tree 2 lacks the leaf 'b' that tree 1 has; give equal structures\.$"):
        map_leaves(lambda one, other: one, first, {"a": second["a"]})


def test_leaves_without_elements_are_leaves(xp: Any) -> None:
    tree = {"a": xp.zeros((0, 3)), "b": xp.asarray([1.0])}
    assert float(optimal_alpha(tree, map_leaves(lambda leaf: leaf + 1, tree), tree, tree)) == 0.5
    assert tuple(merge(tree, tree, 0.5)["a"].shape) == (0, 3)


def test_what_no_framework_knows_is_a_leaf_and_named(xp: Any) -> None:
    with pytest.raises(BecameError, match=r"^x 'a' is a builtins\.set, not an array of a known framework\.$"):
        list(aligned_leaves(x={"a": {1}}, y={"a": xp.ones(2)}))
    with pytest.raises(BecameError, match=r"^x is a builtins\.type, not an array of a known framework\.$"):
        list(aligned_leaves(x=Model, y=xp.ones(2)))  # the class itself is no dataclass instance


def test_nodes_registered_with_jax_are_nodes(backend: str, xp: Any) -> None:
    if backend != "jax":
        pytest.skip(f"needs JAX's registry, and the backend is {backend}")
    jax, flax, nnx = (importlib.import_module(name) for name in ("jax", "flax", "flax.nnx"))
    struct: Any = flax.struct

    @struct.dataclass
    class State:
        params: Any
        step: int = struct.field(pytree_node=False, default=7)

    make: Any = State
    tree = make(flax.core.FrozenDict(dense={"kernel": xp.asarray(1.0), "bias": None}, scales=(xp.asarray(2.0),)))
    assert numbers(tree) == {"params.dense.kernel": 1.0, "params.scales.0": 2.0}
    doubled = map_leaves(lambda leaf: 2 * leaf, tree)
    assert numbers(doubled) == {"params.dense.kernel": 2.0, "params.scales.0": 4.0}
    assert jax.tree_util.tree_structure(doubled) == jax.tree_util.tree_structure(tree)
    # A FrozenDict is a mapping like any other.
    assert numbers(merge(tree.params, tree.params.unfreeze(), 0.5)) == {"dense.kernel": 1.0, "scales.0": 2.0}

    first, second = (nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(seed))) for seed in (0, 1))
    assert list(named_leaves(first)) == ["bias.value", "kernel.value"]
    alpha = jax.jit(optimal_alpha)(first, second, *[jax.tree_util.tree_map(xp.ones_like, first)] * 2)
    assert float(alpha) == 0.5
    merged = merge(first, second, alpha)
    assert isinstance(merged, nnx.State)
    expected = (first["kernel"][...] + second["kernel"][...]) / 2
    np.testing.assert_allclose(merged["kernel"][...], expected, atol=1e-7)


def test_the_size_of_a_tree_is_that_of_its_arrays(xp: Any) -> None:
    tree = {
        "weights": Layer(xp.ones((3, 2), dtype=xp.float32), xp.ones((5,), dtype=xp.float64)),
        "masks": [xp.ones((7,), dtype=xp.bool), xp.ones((2, 2), dtype=xp.uint8), xp.ones((), dtype=xp.int64)],
        "name": "no array",
        "nothing": None,
    }
    assert size_in_bytes(tree) == 3 * 2 * 4 + 5 * 8 + 7 + 4 + 8


def test_variables_of_keras_are_leaves(backend: str) -> None:
    if backend != "tensorflow":
        pytest.skip("Keras computes with TensorFlow here")
    import keras

    keras.utils.set_random_seed(0)  # other weights may nearly cancel, and their sum then has few exact digits
    models = [keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]) for _ in range(2)]
    kernels = [model.variables[0].numpy() for model in models]
    merged = merge(models[0].variables, models[1].variables, 0.5)
    np.testing.assert_allclose(to_numpy(merged[0]), (kernels[0] + kernels[1]) / 2, rtol=1e-6)
    for variable, value in zip(models[0].variables, merged, strict=True):
        variable.assign(value)
    by_path = {variable.path: variable for variable in models[0].variables}
    ones = {path: variable.value * 0 + 1 for path, variable in by_path.items()}
    assert float(optimal_alpha(by_path, by_path, ones, ones)) == 0


def test_an_array_in_two_places_takes_its_memory_once(xp: Any) -> None:
    array = xp.ones((3, 2), dtype=xp.float32)
    assert size_in_bytes({"basis": array, "factor": array}) == 24
