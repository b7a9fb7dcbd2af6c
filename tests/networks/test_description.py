"""What is said of a described network: shapes, parameters, masks, the order of its layers; what is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adapters.networks import (
    Architecture,
    AveragePool,
    BatchNorm,
    Branches,
    Convolution,
    Dropout,
    Flatten,
    Latent,
    Linear,
    MaxPool,
    Parameter,
    ReLU,
    Residual,
    Step,
)
from became_core import BecameError

IMAGE = (2, 7, 6)
BODY = Convolution("a.conv", 4, 3, stride=2, padding=1, bias=True), Dropout(0.25), BatchNorm("a.bn")
SHORTCUT = Convolution("a.shortcut", 4, 1, stride=2), Dropout(0.5)
WHOLE = Architecture((Residual(BODY, SHORTCUT), ReLU(), Dropout(0.0), Flatten(), Linear("fc", 5, bias=True)), IMAGE)


def test_layers_run_in_order_a_body_before_its_shortcut() -> None:
    ran = []

    def run(layer: object, inputs: int) -> int:
        ran.append(layer)
        return inputs + 1

    assert WHOLE(run, 0) == 5 + 4  # the residual's rows, of three layers and two, are added
    assert ran == [layer for layer, _ in WHOLE.steps] == [*BODY, *SHORTCUT, *WHOLE.layers[1:]]


def test_a_residual_without_a_shortcut_adds_its_inputs() -> None:
    network = Architecture((Residual((ReLU(), ReLU())), Flatten()), IMAGE)
    assert network(lambda layer, inputs: 3 * inputs, 1) == 3 * (9 + 1)


def test_shapes_follow_from_the_image() -> None:
    sides = [shape for _, shape in WHOLE.steps]
    assert sides == [IMAGE, (4, 4, 3), (4, 4, 3), IMAGE, *[(4, 4, 3)] * 4, (48,)]
    assert WHOLE.width == 5
    for pool in (MaxPool(3), AveragePool(3)):
        assert Architecture((pool, Flatten()), IMAGE).width == 2 * 2 * 2


def test_parameters_are_named_shaped_and_know_their_fan_in() -> None:
    assert list(WHOLE.parameters.items()) == [
        ("a.conv.weight", Parameter((4, 2, 3, 3), 18)),
        ("a.conv.bias", Parameter((4,), 18)),
        ("a.bn.weight", Parameter((4,), None)),
        ("a.bn.bias", Parameter((4,), None)),
        ("a.shortcut.weight", Parameter((4, 2, 1, 1), 2)),
        ("fc.weight", Parameter((5, 48), 48)),
        ("fc.bias", Parameter((5,), 48)),
    ]
    assert [layer.name for layer in WHOLE.tapped] == ["a.conv", "a.bn", "a.shortcut", "fc"]


def test_masks_have_channels_last_and_layers_that_drop_nothing_need_none() -> None:
    assert WHOLE.masks == (((4, 3, 4), 2**14), ((4, 3, 4), 2**15))


def test_branches_see_their_parts_and_lie_in_a_row() -> None:
    parts = (0, 5, (Linear("first", 6), Latent())), (2, 4, ()), (4, 9, (Linear("second", 1),))
    network = Architecture((Flatten(), Branches(parts)), (9, 1, 1))
    assert [(type(layer).__name__, shape) for layer, shape in network.steps] == [
        ("Flatten", (9, 1, 1)),
        ("Linear", (5,)),
        ("Latent", (6,)),
        ("Linear", (5,)),
    ]
    assert (network.width, network.masks) == (2 + 2 + 1, (((2,), None),))
    inputs = np.arange(18.0).reshape(2, 9)

    def run(layer: Step, a: Any) -> Any:
        return {"Linear": lambda: a + 100, "Latent": lambda: a[:, :2], "Flatten": lambda: a}[type(layer).__name__]()

    expected = np.concatenate([inputs[:, :2] + 100, inputs[:, 2:4], inputs[:, 4:9] + 100], axis=1)
    np.testing.assert_array_equal(network(run, inputs), expected)


def test_it_is_a_value() -> None:
    assert hash(replace(WHOLE)) == hash(WHOLE)
    assert replace(WHOLE) == WHOLE != replace(WHOLE, image=(2, 6, 7))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((Flatten(), Linear("fc", 3), Linear("fc", 3)), "two layers are called 'fc'; give each a name of its own"),
        ((Residual((Convolution("c", 2, 1),), (Convolution("c", 2, 1),)), Flatten()), "two layers are called 'c'"),
        ((ReLU(),), r"the backbone must map images \[N, C, H, W\] to features \[N, features\]"),
        ((Linear("fc", 3),), r"the layer 'fc' is linear, but sees images \[2, 7, 6\]; put Flatten before it"),
        ((Flatten(), MaxPool(2)), r"MaxPool needs images \[C, H, W\], but sees \[84\]; put it before Flatten"),
        ((Flatten(), Convolution("c", 2, 1)), r"'c' needs images \[C, H, W\], but sees \[84\]"),
        ((MaxPool(2), Convolution("c", 2, 4), Flatten()), "too small: 'c' sees 3x3 pixels, its windows are 4x4"),
        ((AveragePool(7), Flatten()), "too small: AveragePool sees 7x6 pixels, its windows are 7x7"),
        ((Flatten(), Linear("fc", 4), Latent()), r"Latent needs means, .* in a row, \[3 d\], but sees \[4\]"),
        (
            (Branches(((0, 2, ()),)), Flatten()),
            r"a branch has the features 0 to 2 of \[2, 7, 6\]; give a part",
        ),
        ((Flatten(), Branches(((80, 90, ()),))), r"a branch has the features 80 to 90 of \[84\]; give a part of a row"),
        (
            (Residual((ReLU(), Convolution("b.conv", 3, 1))), Flatten()),
            r"the residual of 'b.conv' has a body that gives \[3, 7, 6\] and a shortcut that gives \[2, 7, 6\]",
        ),
    ],
)
def test_what_is_no_network_is_refused(layers: tuple[ReLU, ...], message: str) -> None:
    with pytest.raises(BecameError, match=message):
        Architecture(layers, IMAGE)
