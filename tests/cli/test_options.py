"""Options and presets resolve to one configuration."""

from pathlib import Path

import pytest

from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.cli.configuration import resolve
from adapters.cli.options import Options
from became_core import BecameError


def test_nothing_given_means_the_quick_preset_on_the_embedded_benchmark() -> None:
    options = Options()
    configuration = resolve(options)
    assert options.methods == ("became", "gpm", "finetune")
    assert configuration.benchmark.name == "split-mnist"
    assert configuration.tasks == 5
    assert configuration.preset == BENCHMARKS["split-mnist"].presets["quick"]
    assert configuration.out == Path("runs/split-mnist-quick")


def test_every_option_reaches_the_configuration_and_its_record() -> None:
    options = Options(
        benchmark="split-cifar100", tasks=20, epochs=3, stage2_epochs=2, lr=0.2, batch_size=8, validation=0.1,
        threshold=0.9, increment=0.01, ewc_strength=7.0, projector_samples=11, curvature_samples=0,
        path_points=3, network="mlp", class_order="seeded", augment=True,
        decay=0.5, imm_transfer=False, imm_pull=0.1, coma_alpha=(0.5, 0.25), grid_points=3,
        per="layer", precision="kronecker", norm="group", head_rate=2.0, norm_rate=0.5, first_rate=4.0,
        norm_penalty=3.0, dropout_masks="framework",
    )  # fmt: skip
    record = resolve(options).record()
    assert record["tasks"] == 20
    assert (record["network"], record["norm"], record["class_order"]) == ("mlp", "group", "seeded")
    assert (record["stage1"]["epochs"], record["stage2"]["epochs"]) == (3, 2)
    assert record["stage1"]["lr"] == record["stage2"]["lr"] == 0.2
    assert record["batch_size"] == 8
    assert record["augmentation"] == {"padding": 4, "flips": True}
    assert record["validation"] == 0.1
    assert (record["threshold"], record["increment"], record["ewc_strength"]) == (0.9, 0.01, 7.0)
    assert (record["decay"], record["imm_transfer"], record["imm_pull"]) == (0.5, False, 0.1)
    assert (record["coma_alpha"], record["grid_points"]) == ((0.5, 0.25), 3)
    assert (record["per"], record["precision"]) == ("layer", "kronecker")
    assert record["relative"] == {"heads": 2.0, "norms": 0.5, "first": 4.0}
    assert record["norm_penalty"] == 3.0
    assert record["dropout_masks"] == "framework"
    assert record["projector_samples"] == 11
    assert record["curvature_samples"] is None
    assert record["path_alphas"] == [0.0, 0.5, 1.0]


def test_a_number_given_holds_for_every_projector() -> None:
    options = Options(benchmark="split-miniimagenet", preset="paper", threshold=0.9, methods=("gpm", "sgp"))
    preset = resolve(options).preset
    assert preset.settings_of("gpm")["threshold"] == preset.settings_of("sgp")["threshold"] == 0.9
    assert preset.settings_of("sgp")["increment"] == 0.001


def test_the_number_of_tasks_chooses_the_preset() -> None:
    ratios = [
        resolve(Options(benchmark="split-cifar100", preset="nscl", tasks=tasks)).preset.settings["nscl_ratio"]
        for tasks in (10, 20)
    ]
    assert ratios == [10, 30]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            Options(benchmark="imagenet"),
            "no benchmark 'imagenet'; choose from permuted-mnist, split-cifar",
        ),
        (Options(preset="nscl"), "split-mnist has no preset 'nscl'; choose from quick, paper"),
        (
            Options(methods=("gpm", "gmp")),
            "no method 'gmp'; choose from became, became-0, became-1, became-grid, became-half, became-paper, coma",
        ),
        (Options(methods=()), "at least one method"),
        (Options(seeds=(-1,)), "seed -1 is negative"),
        (Options(epochs=0), "0 epochs"),
        (Options(lr=-0.1), "lr -0.1"),
        (Options(batch_size=0), "--batch-size is 0"),
        (Options(projector_samples=-1), "--projector-samples is -1"),
        (Options(path_points=1), "--path-points must be 0 or at least 2"),
        (Options(methods=("became+gmp",)), "no projector 'gmp'; choose from none, gpm, sgp, gpcns, nscl, ogd, trgp"),
        (Options(methods=("joint+gpm",)), "joint training sees all tasks"),
        (Options(momentum=1.0), "momentum is 1.0"),
        (Options(optimiser="adam", momentum=0.5), "--momentum is SGD's"),
        (Options(weight_decay=-1.0), "weight decay is -1.0"),
        (Options(threshold=1.5), "threshold is 1.5"),
        (Options(ewc_strength=-1.0), "strength is -1.0"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(options: Options, message: str) -> None:
    with pytest.raises(BecameError, match=message):
        resolve(options)
