"""The commands that the README shows are those that are run."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def shown_commands() -> list[str]:
    """The lines of the README's fenced blocks."""
    blocks = re.findall(
        r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return [line.strip() for block in blocks for line in block.splitlines()]


def test_the_continuous_integration_runs_the_test_command_word_for_word() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").split("\n")
    run = [line for line in lines if re.search(r"\bnox\b", line) and not line.startswith("#")]
    assert run == [line for line in shown_commands() if line.endswith("&& nox")] == ["pip install nox && nox"]


def test_the_continuous_integration_ends_with_the_command_and_so_with_its_status() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert script.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script
    assert script.endswith("\npip install nox && nox\n")


def test_the_readme_shows_the_first_run() -> None:
    assert 'pip install -c constraints.txt -e ".[torch]" && python -m adapters.torch.run' in shown_commands()


def test_the_readme_is_short_and_its_commands_run_in_every_shell() -> None:
    """zsh does not split the value of a variable into words, so that ``$run …`` is no command there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    blocks = re.findall(r"^```sh\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    assert not [line for line in lines if "$" in line]
    assert {line.split()[0] for line in lines} == {"pip", "became"}  # one spelling of each command
