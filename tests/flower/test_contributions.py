"""What clients send: every lie is found, and the merge is the formula's."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.flower.contributions import Contribution, limited, merged, why_not
from became_core import Became, FisherMerge, ModeIMM
from became_core.laplace import NativeExpansion

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
SENT = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}


def contribution(node: int, count: int = 10, scale: float = 1.0) -> Contribution:
    draw = np.random.default_rng(node)
    weights = {name: draw.normal(size=value.shape).astype(np.float32) for name, value in SENT.items()}
    fisher = {name: scale * draw.exponential(size=value.shape).astype(np.float32) for name, value in SENT.items()}
    return Contribution(node, weights, fisher, count)


GOOD = contribution(1)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"count": 0}, "its count of samples is 0; it must be a whole number from 1 to 1000000000"),
        ({"count": 10**10}, "its count of samples is 10000000000; it must be a whole number from 1 to 1000000000"),
        ({"count": 2.5}, "its count of samples is 2.5; it must be a whole number from 1 to 1000000000"),
        ({"count": None}, "its count of samples is None; it must be a whole number from 1 to 1000000000"),
        ({"count": True}, "its count of samples is True; it must be a whole number from 1 to 1000000000"),
        ({"weights": {"w": GOOD.weights["w"]}}, "its weights lack 'b'"),
        ({"fisher": {**GOOD.fisher, "c": GOOD.fisher["b"]}}, "its Fisher have an unknown 'c'"),
        (
            {"weights": {**GOOD.weights, "b": np.zeros((3, 1), np.float32)}},
            "its weights of 'b' have shape (3, 1), not (3,)",
        ),
        ({"weights": {**GOOD.weights, "b": np.zeros(3)}}, "its weights of 'b' are float64, not float32"),
        (
            {"weights": {**GOOD.weights, "b": np.array([0, np.nan, 0], np.float32)}},
            "its weights of 'b' are not all finite numbers",
        ),
        ({"fisher": {**GOOD.fisher, "b": np.array([0, np.inf, 0])}}, "its Fisher of 'b' are not all finite numbers"),
        ({"fisher": {**GOOD.fisher, "b": np.zeros(3, complex)}}, "its Fisher of 'b' are not all finite numbers"),
        (
            {"fisher": {name: np.full(value.shape, 1e308) for name, value in SENT.items()}},
            "the sum of its Fisher is not finite",
        ),
        (
            {"fisher": {**GOOD.fisher, "b": np.array([0, -1e-30, 0])}},
            "its Fisher of 'b' is negative, which no Fisher information is",
        ),
    ],
)
def test_what_cannot_be_is_told(changed: dict[str, Any], reason: str | None) -> None:
    assert why_not(replace(GOOD, **changed), SENT) == reason


def test_the_example_of_the_page_takes_a_client_with_a_batch_norm_of_pytorch() -> None:
    (names,) = re.findall(r"without_fisher=\[(.*?)\]", PAGE.read_text(encoding="utf-8"))
    learned = {name: np.zeros(3, np.float32) for name in ("bn1.weight", "bn1.bias")}
    counted = {"bn1.running_mean": np.zeros(3, np.float32), "bn1.running_var": np.ones(3, np.float32)}
    sent: dict[str, Any] = learned | counted | {"bn1.num_batches_tracked": np.asarray(4)}
    assert why_not(Contribution(1, sent, learned, 10), sent, re.findall(r'"(.*?)"', names)) is None


def test_running_statistics_need_no_fisher_and_are_averaged_by_samples() -> None:
    sent: dict[str, Any] = {**SENT, "mean": np.zeros(2, np.float32), "steps": np.zeros((), np.int64)}
    clients = [
        replace(each, count=count, weights={**each.weights, "mean": np.full(2, value, np.float32), "steps": steps})
        for each, count, value, steps in [
            (contribution(1), 10, 1.0, np.asarray(4)),
            (contribution(2), 30, 3.0, np.asarray(8)),
        ]
    ]
    assert why_not(clients[0], sent) == "its Fisher lack 'mean'"
    assert why_not(clients[0], sent, ("mean", "steps")) is None
    theta = merged(clients, FisherMerge())
    assert list(theta) == ["w", "b", "mean", "steps"]
    np.testing.assert_allclose(theta["mean"], 2.5)
    assert theta["steps"].dtype == np.int64
    assert int(theta["steps"]) == 7


@pytest.mark.parametrize("rule", [FisherMerge(), ModeIMM()])
def test_fisher_merges_weigh_by_information_and_samples(rule: Any) -> None:
    clients = [contribution(1, 10), contribution(2, 30), contribution(3, 5)]
    theta = merged(clients, rule)
    for name in SENT:
        information = [each.count * each.fisher[name].astype(float) for each in clients]
        above = sum(share * each.weights[name].astype(float) for share, each in zip(information, clients, strict=True))
        below = sum(information)
        np.testing.assert_allclose(theta[name], above / below, rtol=1e-5)
        assert theta[name].dtype == np.float32


def test_became_is_the_best_mixture_of_the_clients() -> None:
    clients = [contribution(1, 10), contribution(2, 30), contribution(3, 5)]

    def loss(theta: dict[str, Any]) -> float:
        return sum(
            float(np.sum(each.count * np.float64(each.fisher[name]) * (theta[name] - each.weights[name]) ** 2))
            for each in clients
            for name in SENT
        )

    best = loss(merged(clients, Became(NativeExpansion())))
    draw = np.random.default_rng(0)
    for shares in [*np.eye(3), *draw.dirichlet(np.ones(3), size=200)]:
        mixed: Any = {
            name: sum(share * each.weights[name] for share, each in zip(shares, clients, strict=True)) for name in SENT
        }
        assert best <= loss(mixed) * (1 + 1e-6)


def test_of_two_clients_none_has_more_than_its_share_of_the_smaller_one() -> None:
    within, sentences = limited([contribution(1), contribution(2, scale=1e9)], 10.0)
    assert within[1].curvature == pytest.approx(10 * contribution(1).curvature, rel=1e-5)
    assert len(sentences) == 1


def test_a_fisher_of_integers_is_limited_as_well() -> None:
    large = replace(GOOD, fisher={name: np.full(value.shape, 10**9) for name, value in SENT.items()})
    within, _ = limited([contribution(2), contribution(3), large], 10.0)
    assert 0 < within[2].curvature < large.curvature


def test_one_client_is_its_own_merge() -> None:
    theta = merged([GOOD], FisherMerge())
    assert all(np.array_equal(theta[name], GOOD.weights[name]) for name in SENT)


def test_no_client_has_more_than_its_share() -> None:
    clients = [contribution(1), contribution(2), contribution(3, scale=1e9)]
    within, sentences = limited(clients, 10.0)
    assert within[:2] == clients[:2]
    median = float(np.median([each.curvature for each in clients]))
    assert within[2].curvature == pytest.approx(10 * median, rel=1e-5)
    assert sentences == [
        f"node 3 claims {clients[2].curvature / median:.3g} times the median curvature; it counts with 10 times."
    ]
    assert limited(clients, None) == (clients, [])
    zero = replace(GOOD, fisher={name: 0 * value for name, value in GOOD.fisher.items()})
    assert limited([zero, zero, clients[2]], 10.0)[1] == []  # of a median of nothing there is no multiple
