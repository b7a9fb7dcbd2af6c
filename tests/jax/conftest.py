"""JAX for the tests of its adapter: in double precision, on the CPU; without JAX there is nothing here to collect."""

from importlib.util import find_spec

from tests.backends import load

collect_ignore_glob: list[str] = []

if find_spec("jax") is None:
    collect_ignore_glob.append("test_*.py")
else:
    load("jax")
