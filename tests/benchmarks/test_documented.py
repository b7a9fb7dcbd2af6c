"""The tables of ``docs/protocol.md`` are the presets, field by field."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.runs.configuration import Configuration
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


@dataclass(frozen=True)
class Row:
    """A preset of a benchmark, for a number of tasks."""

    benchmark: str
    name: str
    tasks: int

    def configured(self, method: str = "gpm") -> Configuration:
        return Configuration.of({"benchmark": self.benchmark, "tasks": self.tasks}, method, self.name)


def presets() -> list[Row]:
    """Every preset there is; one of another number of tasks if it differs."""
    rows = []
    for name in BENCHMARKS.names:
        benchmark = BENCHMARKS[name]
        rows += [Row(name, preset, benchmark.tasks) for preset in benchmark.presets]
        for tasks, others in benchmark.otherwise.items():
            rows += [Row(name, preset, tasks) for preset in others if others[preset] != benchmark.presets[preset]]
    return rows


def shown(schedule: Schedule) -> str:
    if isinstance(schedule, Annealed):
        return f"{schedule.lr:g} annealed, {schedule.epochs} epochs"
    if isinstance(schedule, Stepped):
        steps = " and ".join(f"{share * schedule.epochs:g}" for share in schedule.milestones)
        return f"{schedule.lr:g}, {schedule.epochs} epochs" + (f", / {schedule.factor:g} at {steps}" if steps else "")
    assert isinstance(schedule, Patience)
    return f"{schedule.lr:g} / {schedule.factor:g} after {schedule.patience}, to {schedule.minimum:g}"


def training_row(row: Row) -> str:
    configuration, training = row.configured("became"), row.configured("became").training()
    assert training.optimiser in (SGD(), Adam(), Adam(weight_decay=5e-5))
    optimiser = "SGD" if training.optimiser == SGD() else "Adam"
    stage1, stage2 = shown(training.stage1), shown(training.stage2)
    stage2 = "the same" if stage1 == stage2 else stage2
    alone = row.configured("gpm").training().stage1
    stage1 += "" if alone == training.stage1 else f"; {alone.epochs} without a stage 2"
    what = f"{row.benchmark} | `{row.name}` | {configuration.network}, {optimiser} | {row.tasks}"
    return f"| {what} | {training.batch_size} | {stage1} | {stage2} | {configuration.validation:.0%} |"


def thresholds(settings: Mapping[str, Any]) -> str:
    return f"{settings['threshold']:g}, {settings['increment']:g}"


def memory_row(row: Row) -> str:
    training, settings, scaled = row.configured().training(), row.configured().settings, row.configured("sgp").settings
    other = row.configured("gpcns").settings
    assert {**other, "scale": scaled["scale"]} == scaled
    assert training.augmentation in (None, Augmentation())
    samples = ["all" if n is None else f"{n:,}" for n in (training.projector_samples, training.curvature_samples)]
    images = "as they are" if training.augmentation is None else "cropped, flipped"
    of_scaled = f"{thresholds(scaled)}; s = {scaled['scale']:g}"
    of_scaled += "" if other == scaled else f", GPCNS {other['scale']:g}"
    usual = row.tasks == BENCHMARKS[row.benchmark].tasks
    title = row.benchmark if usual else f"{row.benchmark}, {row.tasks} tasks"
    return f"| {title} | `{row.name}` | {thresholds(settings)} | {of_scaled} | {' | '.join(samples)} | {images} |"


def rates_row(row: Row) -> str:
    configuration = row.configured()
    lr, by = configuration.lr, configuration.training().relative
    rates = " | ".join(f"{rate:.2g}" for rate in (lr * by.first, lr, lr * by.heads, lr * by.norms))
    return f"| {row.benchmark} | `{row.name}` | {row.tasks} | {rates} | {configuration.settings['norm_penalty']:g} |"


def with_rates() -> list[Row]:
    """The presets in which groups of parameters have rates of their own."""
    rows = [row for row in presets() if row.configured().training().relative != RelativeRates()]
    assert all(row.configured().settings["norm_penalty"] == 0 for row in presets() if row not in rows)
    return rows


def test_every_preset_has_its_row_of_training() -> None:
    assert [line for line in map(training_row, presets()) if line not in PAGE] == []


def test_every_preset_has_its_row_of_memory() -> None:
    assert [line for line in map(memory_row, presets()) if line not in PAGE] == []


def test_every_preset_with_rates_by_group_has_its_row() -> None:
    assert [line for line in map(rates_row, with_rates()) if line not in PAGE] == []


def test_long_training_and_drawn_digits_are_calibrated_across_tasks() -> None:
    for row in presets():
        configuration = row.configured("became")
        is_long = isinstance(configuration.training().stage1, Patience)
        across = is_long or row.benchmark == "split-mnist-vae"
        assert configuration.settings["precision"] == ("across" if across else "exact")
    assert (
        "Patience is long training: its presets have `--precision across`, and so has that of `split-mnist-vae`" in PAGE
    )


def test_a_row_is_of_a_preset() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith(("| split-", "| permuted-", "| tabular", "| text-"))]
    assert len(rows) == 2 * len(presets()) + len(with_rates())


def test_a_ratio_that_is_not_the_usual_one_is_named() -> None:
    usual = method_settings()["nscl_ratio"].default
    others = {row.configured("nscl").settings["nscl_ratio"] for row in presets()} - {usual}
    assert [ratio for ratio in others if f"a = {ratio:g}" not in " ".join(PAGE.split())] == []
