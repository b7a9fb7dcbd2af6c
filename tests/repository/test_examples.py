"""The README's examples run, each where its framework is: ``python`` everywhere, ``python torch`` on PyTorch, …"""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python ?(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_there_is_one_for_each_framework() -> None:
    assert {framework for framework, _ in EXAMPLES} == {"", "torch", "jax", "tensorflow"}


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(number: int, backend: str) -> None:
    framework, source = EXAMPLES[number]
    if framework not in ("", backend):
        pytest.skip(f"this example is for {framework}")
    exec(compile(source, f"README.md example {number + 1}", "exec"), {})
