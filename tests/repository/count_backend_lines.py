"""How many lines a backend writes itself: ``python -m tests.repository.count_backend_lines``.

Counted are lines that are not blank, docstrings and comments included. ``learner`` is what a new framework must write:
placement, steps and derivatives. Apart from it are the table of layers, the adapter of users' own models, and the
command.
"""

from pathlib import Path

__all__ = ["LIMIT", "count_lines"]

ADAPTERS = Path(__file__).parents[2] / "adapters"

# For JAX, the first to be written on the shared floor of ``adapters/backend``.
LIMIT = 250

PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "jax": {
        "learner": ("learner",),
        "layers": ("layers",),
        "own models": ("flax_module",),
        "own loops": ("checking", "data_loss", "derivatives", "graph", "memory", "own_loop", "tapping", "trees"),
        "command": ("run",),
        "processes": ("mesh", "processes"),
    },
    "tensorflow": {
        "learner": ("learner",),
        "layers": ("layers",),
        "own models": ("keras_model", "own_layers"),
        "own loops": (
            *("batches", "checking", "continual", "data_loss", "derivatives"),
            *("graph", "parameters", "steps", "tapping", "traced"),
        ),
        "command": ("run",),
    },
    "torch": {
        "learner": ("learner", "linear", "compiled"),
        "layers": ("layers", "networks"),
        "own models": ("graph", "operations", "rows", "tapping", "derivatives", "hub", "timm_network"),
        "own loops": ("batches", "checking", "continual", "data_loss", "matrices", "steps"),
        "command": ("run",),
        "processes": ("processes", "share", "shared_model", "sharded_memory"),
    },
}


def count_lines(framework: str, part: str) -> int:
    """Return the number of lines of a part of an adapter that are not blank."""
    files = [ADAPTERS / framework / f"{name}.py" for name in PARTS[framework][part]]
    return sum(1 for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip())


def main() -> None:
    """Print the counts as a Markdown table."""
    parts = list(dict.fromkeys(part for files in PARTS.values() for part in files))
    print(f"| framework | {' | '.join(parts)} |\n| --- |{' ---: |' * len(parts)}")
    for framework, files in PARTS.items():
        counts = (str(count_lines(framework, part)) if part in files else "" for part in parts)
        print(f"| {framework} | {' | '.join(counts)} |")


if __name__ == "__main__":
    main()
