from collections import OrderedDict
from typing import Any

import array_api_strict
import numpy as np
import pytest

from became_core import BecameError
from became_core.arrays import aligned_leaves, map_leaves, named_leaves


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
