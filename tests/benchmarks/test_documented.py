"""The tables of ``docs/protocol.md`` are the presets, field by field."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.benchmarks.presets import Preset
from became_core.continual import (
    SGD,
    Adam,
    Annealed,
    Augmentation,
    Patience,
    RelativeRates,
    Schedule,
    Stepped,
    method_settings,
)

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")


def presets() -> list[tuple[str, str, int, Preset]]:
    """Every preset there is: benchmark, name, number of tasks."""
    found = []
    for benchmark in BENCHMARKS.values():
        usual = {(name, benchmark.tasks): preset for name, preset in benchmark.presets.items()}
        for tasks, others in benchmark.otherwise.items():
            usual |= {(n, tasks): preset for n, preset in others.items() if preset != benchmark.presets[n]}
        found += [(benchmark.name, name, tasks, preset) for (name, tasks), preset in usual.items()]
    return found


def shown(schedule: Schedule) -> str:
    if isinstance(schedule, Annealed):
        return f"{schedule.lr:g} annealed, {schedule.epochs} epochs"
    if isinstance(schedule, Stepped):
        steps = " and ".join(f"{share * schedule.epochs:g}" for share in schedule.milestones)
        return f"{schedule.lr:g}, {schedule.epochs} epochs" + (f", / {schedule.factor:g} at {steps}" if steps else "")
    assert isinstance(schedule, Patience)
    return f"{schedule.lr:g} / {schedule.factor:g} after {schedule.patience}, to {schedule.minimum:g}"


def training_row(benchmark: str, name: str, tasks: int, preset: Preset) -> str:
    training = preset.training
    assert training.optimiser in (SGD(), Adam(weight_decay=5e-5))
    optimiser = "SGD" if training.optimiser == SGD() else "Adam"
    stage1, stage2 = shown(training.stage1), shown(training.stage2)
    stage2 = "the same" if stage1 == stage2 else stage2
    what = f"{benchmark} | `{name}` | {preset.network}, {optimiser} | {tasks}"
    return f"| {what} | {training.batch_size} | {stage1} | {stage2} | {preset.validation:.0%} |"


def value(settings: Mapping[str, Any], option: str) -> float:
    """A preset's value of a setting, or the setting's default."""
    return float(settings.get(option, method_settings()[option].default))


def thresholds(settings: Mapping[str, Any]) -> str:
    return f"{value(settings, 'threshold'):g}, {value(settings, 'increment'):g}"


def memory_row(benchmark: str, name: str, tasks: int, preset: Preset) -> str:
    training, scaled = preset.training, preset.settings_of("sgp")
    assert preset.settings_of("gpcns") == scaled
    assert training.augmentation in (None, Augmentation())
    samples = ["all" if n is None else f"{n:,}" for n in (training.projector_samples, training.curvature_samples)]
    images = "as they are" if training.augmentation is None else "cropped, flipped"
    of_scaled = f"{thresholds(scaled)}; s = {value(scaled, 'scale'):g}"
    title = benchmark if tasks == BENCHMARKS[benchmark].tasks else f"{benchmark}, {tasks} tasks"
    return f"| {title} | `{name}` | {thresholds(preset.settings)} | {of_scaled} | {' | '.join(samples)} | {images} |"


def rates_row(benchmark: str, name: str, tasks: int, preset: Preset) -> str:
    lr, by = preset.training.stage1.lr, preset.training.relative
    rates = " | ".join(f"{rate:.2g}" for rate in (lr * by.first, lr, lr * by.heads, lr * by.norms))
    return f"| {benchmark} | `{name}` | {tasks} | {rates} | {value(preset.settings, 'norm_penalty'):g} |"


def with_rates() -> list[tuple[str, str, int, Preset]]:
    """The presets in which groups of parameters have rates of their own."""
    found = [each for each in presets() if each[3].training.relative != RelativeRates()]
    assert all(
        value(preset.settings, "norm_penalty") == 0 for *where, preset in presets() if (*where, preset) not in found
    )
    return found


def test_every_preset_has_its_row_of_training() -> None:
    assert [row for row in (training_row(*each) for each in presets()) if row not in PAGE] == []


def test_every_preset_has_its_row_of_memory() -> None:
    assert [row for row in (memory_row(*each) for each in presets()) if row not in PAGE] == []


def test_every_preset_with_rates_by_group_has_its_row() -> None:
    assert [row for row in (rates_row(*each) for each in with_rates()) if row not in PAGE] == []


def test_a_row_is_of_a_preset() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith(("| split-", "| permuted-"))]
    assert len(rows) == 2 * len(presets()) + len(with_rates())


def test_a_ratio_that_is_not_the_usual_one_is_named() -> None:
    usual = value({}, "nscl_ratio")
    others = {value(preset.settings, "nscl_ratio") for *_, preset in presets()} - {usual}
    assert [ratio for ratio in others if f"a = {ratio:g}" not in " ".join(PAGE.split())] == []
