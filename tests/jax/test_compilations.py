"""The tests' own store of compiled programs, which other processes write too, and which outlives them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import Array
from jax.experimental.compilation_cache.compilation_cache import reset_cache


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Path]:
    """A folder in which JAX keeps whatever is compiled during a test."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def _twice_and_one() -> Callable[[Array], Array]:
    """Return a function that JAX traces and looks up anew, although it is the same program each time."""

    def twice_and_one(values: Array) -> Array:
        return 2 * values + 1

    return jax.jit(twice_and_one)  # type: ignore[no-any-return]


def test_a_program_that_was_half_written_is_compiled_anew(stored: Path) -> None:
    values = jnp.arange(3.0)
    _twice_and_one()(values)
    entries = list(stored.glob("jit_twice_and_one-*-cache"))
    assert len(entries) == 1
    for kept in (entries[0].read_bytes()[:100], b""):
        entries[0].write_bytes(kept)
        assert _twice_and_one()(values).tolist() == [1, 3, 5]
