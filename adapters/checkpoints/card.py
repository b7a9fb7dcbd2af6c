"""The model card of a merge, and what else stands beside the merged weights.

The card says what was merged, how, with which coefficients, what the quadratic predicts of them, of which inputs by
their digests, with which versions, and by which command. Coefficients by layer are a figure too, drawn here as SVG, so
that a merge needs no plotting package.
"""

import json
from collections.abc import Mapping
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from adapters.checkpoints.align import with_vocabulary, without_tie
from adapters.checkpoints.folders import ADAPTER_CONFIG
from adapters.checkpoints.job import Job
from adapters.checkpoints.lora import adapter_config
from adapters.checkpoints.plan import FLOAT_WORDS, MergePlan
from adapters.checkpoints.tensors import size_text
from adapters.runs.provenance import versions

__all__ = ["texts_beside", "yaml_lines"]

FIGURE = "alpha.svg"
COMPUTING = ("python", "became", "numpy", "array-api-compat", "optree", "safetensors")


def texts_beside(job: Job, report: Any, ranks: Mapping[str, int], command: str | None) -> dict[str, bytes]:
    """Return the files beside the weights that are not copied as they are, by name.

    Args:
        job: the merge.
        report: its ``MergeReport``.
        ranks: of LoRA adapters, those of the merged modules.
        command: what made the merge; None if it was made from Python.
    """
    base = next(iter(job.inputs.values()))
    texts = {"README.md": card(report, command), "became_merge.json": _json(as_json(report, command))}
    if len(report.coefficients) > 1:
        texts[FIGURE] = figure(report.coefficients)
    config, changes = base.config, dict[str, Any]()
    if job.alignment.untied:
        config = without_tie(config)
    if job.alignment.vocabulary is not None:
        config = with_vocabulary(config, job.alignment.vocabulary)
    if job.plan.out_dtype is not None:
        word = next(name for name, word in FLOAT_WORDS.items() if word == job.plan.out_dtype)
        changes |= {name: word for name in ("torch_dtype", "dtype") if name in base.config}
    config = {**config, **changes}
    if base.config and config != base.config:
        texts["config.json"] = _json(config)
    if job.adapters:
        texts[ADAPTER_CONFIG] = _json(adapter_config(job.adapters, ranks))
    # A path is bytes, and need not be text in UTF-8.
    return {name: text.encode(errors="backslashreplace") for name, text in texts.items()}


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def card(report: Any, command: str | None) -> str:
    """Return the text of ``README.md``.

    Args:
        report: a ``MergeReport``.
        command: what made the merge; None if it was made from Python.
    """
    models = [path for label, path in report.paths.items() if label.startswith(("base", "model"))]
    lines = ["---", "tags:", "- merge", "- became", "base_model:", *(f"- {json.dumps(path)}" for path in models), "---"]
    lines += [
        "",
        "# A merged model",
        "",
        f"This model was merged with BECAME by the rule `{report.plan.merge_method}`.",
    ]
    lines += ["", *_prediction(report), "## Plan", "", "```yaml", *yaml_lines(report.plan), "```", ""]
    lines += ["## Coefficients", "", *_coefficients(report), ""]
    if report.errors:
        lines += ["## Error of the smaller rank", "", "| module | relative error |", "| --- | ---: |"]
        lines += [*(f"| `{module}` | {error:.4f} |" for module, error in report.errors.items()), ""]
    lines += ["## Inputs", "", "| what | where | digest |", "| --- | --- | --- |"]
    lines += [f"| {label} | `{path}` | `{report.digests[label]}` |" for label, path in report.paths.items()]
    lines += ["", *([f"{note}\n" for note in report.notes])]
    lines += ["## Made by", "", "```", command or "adapters.checkpoints.merge_checkpoints", "```", ""]
    lines += [", ".join(f"{name} {number}" for name, number in _versions().items()) + ".", ""]
    lines += [f"{size_text(report.bytes_read)} were read and {size_text(report.bytes_written)} were written.", ""]
    return "\n".join(lines)


def _prediction(report: Any) -> list[str]:
    if report.gain is None:
        return []
    convex = "convex" if report.convex else "not convex"
    first = "the first model" if report.plan.base_model is None else "the base model"
    lines = [
        f"The sum of the models' losses is predicted to be {report.gain:.6g} lower than at {first}, in the "
        f"unit of the Fisher files. Between the models it is {convex}."
    ]
    if report.slopes is not None:
        start, end = report.slopes
        inside = "so the best point lies between them" if start < 0 < end else "so one of them is the best point"
        second = "the second" if report.plan.base_model is None else "the other one"
        lines.append(f"Its slope is {start:.6g} at {first} and {end:.6g} at {second}, {inside}.")
    return [*lines, ""]


def _coefficients(report: Any) -> list[str]:
    if not report.coefficients:
        return ["The rule measures none: they are the plan's weights, or differ from weight to weight."]
    count = len(next(iter(report.coefficients.values())))
    heads = [f"model {k + 1}" for k in range(count)]
    if report.plan.base_model is not None:
        heads = ["base model", *heads[:-1]]
    lines = [f"![coefficients]({FIGURE})", ""] if len(report.coefficients) > 1 else []
    lines += ["| part | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * count]
    for group, numbers in report.coefficients.items():
        name = f"`{group}`" if group else "the whole model"
        lines.append(f"| {name} | " + " | ".join(f"{number:.6f}" for number in numbers) + " |")
    return lines


def figure(coefficients: Mapping[str, tuple[float, ...]]) -> str:
    """Return the coefficients by group as SVG: a row for each group, a bar for the last model's coefficient."""
    row, label, width = 18, 300, 300
    height = row * len(coefficients) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{label + width + 80}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number in (0.0, 0.5, 1.0):
        x = label + number * width
        parts.append(f'<line x1="{x}" y1="20" x2="{x}" y2="{height - 14}" stroke="#ccc"/>')
        parts.append(f'<text x="{x}" y="14" text-anchor="middle">{number:g}</text>')
    for k, (group, numbers) in enumerate(coefficients.items()):
        y, share = 24 + row * k, numbers[-1]
        name = escape(group if len(group) <= 48 else f"…{group[-47:]}")
        parts.append(f'<text x="{label - 8}" y="{y + 10}" text-anchor="end">{name}</text>')
        parts.append(f'<rect x="{label}" y="{y}" width="{max(0.0, share) * width:.1f}" height="12" fill="#4477aa"/>')
        parts.append(f'<text x="{label + max(0.0, share) * width + 5:.1f}" y="{y + 10}">{share:.3f}</text>')
    return "\n".join([*parts, "</svg>", ""])


def as_json(report: Any, command: str | None) -> dict[str, Any]:
    """Return the report as plain values, for programs."""
    return {
        "plan": report.plan.as_words(),
        "command": command,
        "coefficients": {group: list(numbers) for group, numbers in report.coefficients.items()},
        "predicted_gain": report.gain,
        "slopes": report.slopes,
        "convex": report.convex,
        "inputs": {label: {"path": path, "digest": report.digests[label]} for label, path in report.paths.items()},
        "notes": list(report.notes),
        "errors": dict(report.errors),
        "versions": _versions(),
    }


def yaml_lines(plan: MergePlan) -> list[str]:
    """Return a plan as the lines of a YAML file."""

    def lines(value: Any, indent: str) -> list[str]:
        if isinstance(value, dict):
            result = []
            for name, inner in value.items():
                if isinstance(inner, dict) or (isinstance(inner, list) and inner and isinstance(inner[0], dict)):
                    result += [f"{indent}{name}:", *lines(inner, indent + "  ")]
                else:
                    result.append(f"{indent}{name}: {json.dumps(inner)}")
            return result
        return [
            line if k else f"{indent}- {line.removeprefix(indent + '  ')}"
            for item in value
            for k, line in enumerate(lines(item, indent + "  "))
        ]

    return lines(plan.as_words(), "")


def _versions() -> dict[str, str]:
    """Return the versions of what a merge computes with, whatever else is loaded."""
    numbers = {name: number for name, number in versions().items() if name in COMPUTING}
    try:
        numbers["ml-dtypes"] = version("ml-dtypes")
    except PackageNotFoundError:  # another distribution of the module
        numbers["ml-dtypes"] = "unknown"
    return numbers
