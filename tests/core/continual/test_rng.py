"""Generators of random numbers: equal arguments draw equal numbers in any process; different arguments do not."""

import os
import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from became_core.continual.rng import random_generator

NAMES = st.tuples(st.integers(0, 2**63), st.text(), st.lists(st.integers(0, 2**32), max_size=3).map(tuple))


@given(NAMES)
def test_equal_arguments_draw_equal_numbers(name: tuple[int, str, tuple[int, ...]]) -> None:
    seed, purpose, indices = name
    first, second = random_generator(seed, purpose, *indices), random_generator(seed, purpose, *indices)
    np.testing.assert_array_equal(first.random(8), second.random(8))


@given(st.integers(0, 2**31), st.sampled_from(["batches", "validation", "dropout"]), st.integers(1, 50))
def test_any_difference_in_the_arguments_gives_another_generator(seed: int, purpose: str, index: int) -> None:
    draw = random_generator(seed, purpose, index).random(8)
    for other in (
        random_generator(seed + 1, purpose, index),
        random_generator(seed, purpose + "s", index),
        random_generator(seed, purpose, index + 1),
        random_generator(seed, purpose, index, 0),
        random_generator(seed, purpose, index, 1),
    ):
        assert not np.array_equal(draw, other.random(8))


def test_equal_arguments_draw_equal_numbers_in_another_process() -> None:
    draw = "from became_core.continual import random_generator as r; print(r(3, 'batches', 1).permutation(9).tolist())"
    for hash_seed in ("1", "2"):  # what would change the built-in hash of the purpose
        done = subprocess.run(
            [sys.executable, "-c", draw],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == str(random_generator(3, "batches", 1).permutation(9).tolist())
