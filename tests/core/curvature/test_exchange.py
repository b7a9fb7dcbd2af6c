"""Sums that processes have made of their own batches, brought together, are those of all batches; threads stand in."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from became_core.curvature import (
    Exchange,
    GramSums,
    Pushforward,
    Tap,
    Taps,
    derivatives_along,
    diagonal_fisher,
    gradient_grams,
    input_grams,
    kronecker_factors,
)
from became_core.curvature.fisher import FisherKind
from tests.processes import WAIT

PROCESSES, SIZES = 2, (4, 4, 3)
WEIGHTS = frozenset({"few.weight", "many.weight"})
SHAPES = {"few.weight": np.zeros((2, 30)), "many.weight": np.zeros((2, 5)), "no.weight": np.zeros(1)}


def batches() -> list[Taps]:
    """Of a layer with more inputs than there are samples, and of one with fewer."""
    draw = np.random.default_rng(0)
    return [
        {
            "few": Tap("matrix", draw.normal(size=(size, 1, 30)), draw.normal(size=(size, 1, 2))),
            "many": Tap("matrix", draw.normal(size=(size, 2, 5)), draw.normal(size=(size, 2, 2))),
        }
        for size in SIZES
    ]


def by_all(work: Callable[[int, Exchange], Any]) -> list[Any]:
    """What each process returns that does its part of the work."""
    barrier, told = Barrier(PROCESSES, timeout=WAIT), dict[int, Any]()

    def tell(rank: int, mine: Any) -> list[Any]:
        told[rank] = mine
        barrier.wait()
        of_all = [told[other] for other in range(PROCESSES)]
        barrier.wait()
        return of_all

    def exchange(rank: int) -> Exchange:
        def total(sums: dict[str, Any]) -> dict[str, Any]:
            of_all = tell(rank, dict(sums))  # a copy, since the caller may change its own
            return {name: sum(theirs[name] for theirs in of_all) for name in sums}

        return Exchange(total, lambda rows: np.concatenate(tell(rank, rows)))

    with ThreadPoolExecutor(PROCESSES) as pool:
        return list(pool.map(lambda rank: work(rank, exchange(rank)), range(PROCESSES)))


def assert_alike(results: list[Any], expected: dict[str, Any]) -> None:
    for result in results:
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(result[name], value, rtol=1e-12, atol=1e-14)


def test_gram_matrices_and_factors_of_few_inputs_are_those_of_all_batches() -> None:
    whole = input_grams(batches(), WEIGHTS)
    assert whole["few.weight"].shape == (sum(SIZES), 30)
    assert whole["many.weight"].shape == (5, 5)
    results = by_all(lambda rank, exchange: input_grams(batches()[rank::PROCESSES], WEIGHTS, exchange))
    for result in [*results, whole]:
        assert result["few.weight"].shape == (sum(SIZES), 30)  # in another order: F^T F is the same
        result["few.weight"] = result["few.weight"].T @ result["few.weight"]
    assert_alike(results, whole)


@pytest.mark.parametrize("forgotten", [None, "few.weight", "many.weight", "words.weight"])
def test_gram_matrices_are_those_of_all_batches_where_processes_use_other_layers(forgotten: str | None) -> None:
    """In one process a layer has summed its rows, few of another wait, and an embedding is looked up."""
    few, many = ({name: batches()[0][name]} for name in ("few", "many"))
    words = {"words": Tap("embedding", np.asarray([[2, 0, 2]]), np.ones((1, 3, 2)), size=3)}
    parts = [[few], [many, {"many": batches()[1]["many"][:1]}, words]]
    weights = WEIGHTS | {"words.weight"}

    def work(rank: int, exchange: Exchange) -> Any:
        sums = GramSums()
        for taps in parts[rank]:
            sums.add(taps, weights)
        sums.keep(weights - {forgotten})
        layouts[rank] = sums.layouts()
        barrier.wait()
        sums.agree(layouts, dict.fromkeys(weights, np.zeros(1)))
        return sums.means(exchange)

    layouts: list[Any] = [None] * PROCESSES
    barrier = Barrier(PROCESSES, timeout=WAIT)
    assert_alike(by_all(work), input_grams([*parts[0], *parts[1]], weights - {forgotten}))


def test_gradient_grams_are_means_over_all_batches() -> None:
    results = by_all(lambda rank, exchange: gradient_grams(batches()[rank::PROCESSES], WEIGHTS, exchange))
    assert_alike(results, gradient_grams(batches(), WEIGHTS))


@pytest.mark.parametrize("kind", ["empirical", "batch"])
def test_fisher_information_is_that_of_all_samples(kind: FisherKind) -> None:
    """Of the kind "batch" the first batch of all is what smaller ones are measured by, in every process."""
    samples, sizes = sum(SIZES), list(SIZES)[::-1]
    reversed_batches = batches()[::-1]

    def work(rank: int, exchange: Exchange) -> Any:
        own, own_sizes = reversed_batches[rank::PROCESSES], sizes[rank::PROCESSES]
        return diagonal_fisher(own, SHAPES, kind, samples=samples, sizes=own_sizes, first=sizes[0], exchange=exchange)

    expected = diagonal_fisher(reversed_batches, SHAPES, kind, samples=samples, sizes=sizes)
    assert_alike(by_all(work), expected)


def test_kronecker_factors_are_those_of_all_samples() -> None:
    def work(rank: int, exchange: Exchange) -> Any:
        factors, rest = kronecker_factors(batches()[rank::PROCESSES], samples=sum(SIZES), exchange=exchange)
        assert rest == {}
        return {f"{name}, {side}": factor for name, pair in factors.items() for side, factor in enumerate(pair)}

    whole, _ = kronecker_factors(batches(), samples=sum(SIZES))
    expected = {f"{name}, {side}": factor for name, pair in whole.items() for side, factor in enumerate(pair)}
    assert_alike(by_all(work), expected)


def test_derivatives_along_directions_are_means_over_all_samples() -> None:
    draw = np.random.default_rng(1)
    parts = [
        Pushforward(draw.normal(size=(size, 3)), draw.normal(size=(2, size, 3)), draw.integers(0, 3, size))
        for size in SIZES
    ]
    results = by_all(lambda rank, exchange: derivatives_along(parts[rank::PROCESSES], None, exchange))
    names = ("slope", "curvature")
    expected = dict(zip(names, derivatives_along(parts), strict=True))
    assert_alike([dict(zip(names, result, strict=True)) for result in results], expected)
