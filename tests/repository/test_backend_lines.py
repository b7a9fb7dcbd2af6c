"""What a backend must write itself stays as short as it is promised to be, and no module is left out of the count."""

from tests.repository.count_backend_lines import ADAPTERS, LIMIT, PARTS, count_lines


def test_a_jax_learner_is_no_longer_than_promised() -> None:
    assert 100 < count_lines("jax", "learner") <= LIMIT


def test_every_module_of_an_adapter_is_counted_once() -> None:
    for framework, parts in PARTS.items():
        counted = [name for names in parts.values() for name in names]
        modules = [file.stem for file in (ADAPTERS / framework).glob("*.py") if file.stem != "__init__"]
        assert sorted(counted) == sorted(modules)
