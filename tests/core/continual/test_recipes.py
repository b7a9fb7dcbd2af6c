from typing import Any

import numpy as np
import pytest

from became_core import BecameError, Diagonal, LaplacePosterior
from became_core.continual import build_method, check_settings, method_names, method_settings, projector_names
from became_core.continual.methods import Method, Transfer
from became_core.continual.task_rules import ChosenAlphas, EqualShares, TrueLossGrid
from became_core.laplace import (
    Became,
    BecameCurve,
    DiagonalFisher,
    Fixed,
    ModeIMM,
    NativeExpansion,
    PaperClosedForm,
    Secant,
)
from became_core.projection import GPCNS, GPM, HAT, NSCL, OGD, SGP, TRGP, InfLoRA, OLoRA, PackNet

SETTINGS: dict[str, Any] = {
    "threshold": 0.9,
    "increment": 0.01,
    "scale": 3.0,
    "nscl_ratio": 20.0,
    "ogd_samples": 7,
    "ogd_capacity": 5,
    "ewc_strength": 7.0,
    "decay": 0.9,
    "imm_transfer": False,
    "imm_pull": 0.5,
    "coma_alpha": (0.5, 0.25),
    "grid_points": 5,
    "packnet_share": 0.75,
    "hat_sharpness": 50.0,
    "hat_sparsity": 0.25,
}
METHODS = tuple(sorted(method_names()))
UNLIKE_DIAGONALS = (
    "compares the diagonals of both sides, and --precision across, which some presets have, calibrates that of the old "
    "side alone; give --precision exact."
)
BUILT = {
    "none": None,
    "gpm": GPM(0.9, 0.01),
    "sgp": SGP(0.9, 0.01, scale=3.0),
    "gpcns": GPCNS(0.9, 0.01, scale=3.0),
    "nscl": NSCL(20.0),
    "ogd": OGD(7, 5),
    "trgp": TRGP(0.9, 0.01),
    "inflora": InfLoRA(0.9, 0.01),
    "olora": OLoRA(),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_name_by_which_it_is_built(name: str) -> None:
    assert build_method(name, SETTINGS).name == name


def test_the_methods_are_those_of_the_table() -> None:
    methods = (
        "became became-0 became-1 became-curve became-grid became-half became-paper coma ewc ewc-online finetune "
        "gpcns gpm hat imm-mean imm-mode inflora joint nscl ogd olora packnet sgp trgp"
    )
    assert tuple(methods.split()) == METHODS
    assert set(projector_names()) == set(BUILT)


@pytest.mark.parametrize("projector", BUILT)
@pytest.mark.parametrize("name", sorted({*METHODS} - {"joint", "packnet", "hat", *BUILT}))
def test_any_method_takes_any_projector(name: str, projector: str) -> None:
    method = build_method(f"{name}+{projector}", SETTINGS)
    assert method.name == f"{name}+{projector}"
    assert method.projector == BUILT[projector]
    assert method.rule == build_method(name, SETTINGS).rule


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_its_own_projector_by_default(name: str) -> None:
    expected = "gpm" if name.startswith("became") else name if name in BUILT else "none"
    own = {"packnet": PackNet(0.75), "hat": HAT(50.0, 0.25)}
    assert build_method(name, SETTINGS).projector == own.get(name, BUILT[expected])


def test_methods_have_the_parts_that_the_table_says() -> None:
    methods = {name: build_method(name, SETTINGS) for name in METHODS}
    keeping = {"ewc", "ewc-online", "became", "became-curve", "became-paper", "imm-mode"}
    assert {name for name, method in methods.items() if method.keeps_posterior} == keeping
    assert {name for name, method in methods.items() if method.joint} == {"joint"}
    assert {name for name, method in methods.items() if method.merges == "tasks"} == {"coma", "imm-mean", "imm-mode"}
    assert {name for name, method in methods.items() if method.stages == 2} == {
        n for n in METHODS if "became" in n or n == "packnet"
    }
    assert methods["ewc"].penalty_strength == methods["ewc-online"].penalty_strength == 7.0
    assert (methods["ewc"].recentred, methods["ewc-online"].recentred) == (False, True)
    decaying = {"became", "became-curve", "became-paper", "ewc-online"}
    assert {name: method.decay for name, method in methods.items()} == {
        name: 0.9 if name in decaying else 1.0 for name in METHODS
    }
    assert methods["imm-mean"].rule == EqualShares()
    assert methods["imm-mode"].rule == ModeIMM()
    assert methods["imm-mean"].transfer == methods["imm-mode"].transfer == Transfer(weights=False, pull=0.5)
    assert (methods["coma"].rule, methods["coma"].transfer) == (ChosenAlphas((0.5, 0.25)), None)
    assert methods["became-grid"].rule == TrueLossGrid(5)
    ablations = {"became-0": 0.0, "became-half": 0.5, "became-1": 1.0}
    assert {name: methods[name].rule for name in ablations} == {n: Fixed(alpha) for n, alpha in ablations.items()}
    assert methods["became"].rule == Became(Secant())
    assert methods["became"].fisher == "empirical"
    assert methods["became-paper"].rule == Became(PaperClosedForm())
    assert methods["became-paper"].fisher == "batch"
    assert methods["became-curve"].rule == BecameCurve(Secant())


def test_became_merges_by_the_chosen_curvature() -> None:
    rules = {
        precision: build_method("became", SETTINGS | {"precision": precision, "per": "layer"})
        for precision in ("exact", "across", "diagonal", "kronecker")
    }
    assert rules["exact"].rule == Became(Secant(), "layer")
    assert rules["across"].rule == Became(Secant(calibrates=False), "layer")
    assert {name for name, method in rules.items() if method.calibrates} == {"across"}
    assert rules["diagonal"].rule == Became(DiagonalFisher(), "layer")
    assert rules["kronecker"].rule == Became(NativeExpansion(), "layer")
    assert {name: method.precision for name, method in rules.items()} == {
        "exact": "diagonal",
        "across": "diagonal",
        "diagonal": "diagonal",
        "kronecker": "kronecker",
    }
    by_weight = build_method("became", SETTINGS | {"per": "weight", "shrinkage": 0.25})
    assert by_weight.rule == Became(Secant(), "weight", shrinkage=0.25)
    curve = build_method("became-curve", SETTINGS | {"precision": "kronecker"})
    assert (curve.rule, curve.precision) == (BecameCurve(NativeExpansion()), "kronecker")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("became", {"decay": 1.5}, "the decay of old curvature is 1.5; it must be in [0, 1]."),
        ("became", {"shrinkage": 1.5}, "the shrinkage is 1.5; it must be in [0, 1]."),
        ("became+sgp", {"norm_penalty": -1.0}, "the penalty on normalisation is -1.0; it must be at least 0."),
        ("became-grid", {"grid_points": 1}, "a grid of 1 points has no ends; give at least 2."),
        ("coma", {"coma_alpha": ()}, "there is no merging coefficient; give at least one alpha."),
        ("coma", {"coma_alpha": (0.5, 1.5)}, "the merging coefficient is 1.5; it must be in [0, 1]."),
        ("imm-mean", {"imm_pull": -1.0}, "the strength of L2-transfer is -1.0; it must be at least 0."),
        ("became+sgp", {"precision": "across", "per": "weight"}, f"'became+sgp': --per weight {UNLIKE_DIAGONALS}"),
        ("became-curve", {"precision": "across"}, f"'became-curve': the curve {UNLIKE_DIAGONALS}"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BecameError) as raised:
        build_method(name, SETTINGS | settings)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("si", f"there is no method 'si'; choose from {', '.join(METHODS)}."),
        ("becme", f"there is no method 'becme'; did you mean 'became'? Choose from {', '.join(METHODS)}."),
        ("became+gmp", f"there is no projector 'gmp'; did you mean 'gpm'? Choose from {', '.join(sorted(BUILT))}."),
        ("became+", f"there is no projector ''; choose from {', '.join(sorted(BUILT))}."),
        ("gpm+sgp", "'gpm+sgp': it is a projector by itself; it takes no projector."),
        ("became+hat", "'became+hat': gates protect every unit that is in use; hat takes no other method."),
        ("joint+gpm", "'joint+gpm': joint training sees all tasks and has nothing to protect; it takes no projector."),
        ("hat+gpm", "'hat+gpm': gates protect every unit that is in use; it takes no projector."),
        ("packnet+gpm", "'packnet+gpm': masks protect every weight that is in use; it takes no projector."),
    ],
)
def test_an_unknown_or_impossible_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(BecameError) as raised:
        build_method(name, SETTINGS)
    assert str(raised.value) == message


def test_an_unknown_setting_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(BecameError, match=r"there is no setting 'treshold'; did you mean 'threshold'\? Choose from"):
        build_method("gpm", {"treshold": 0.9})


def test_settings_of_other_methods_have_no_effect_and_defaults_are_those_of_the_fields() -> None:
    assert build_method("finetune", SETTINGS) == build_method("finetune")
    assert build_method("gpm").projector == GPM(0.97, 0.003)
    assert build_method("became", {"norm_penalty": 2.0}).norm_penalty == 2.0


@pytest.mark.parametrize(
    "settings",
    [{"ewc_strength": -1.0}, {"coma_alpha": (2.0,)}, {"threshold": 1.5}, {"nscl_ratio": 0.5}, {"imm_pull": -1.0}],
    ids=str,
)
def test_a_value_that_cannot_be_used_is_refused_whichever_method_it_is_for(settings: dict[str, Any]) -> None:
    with pytest.raises(BecameError, match="must be"):
        check_settings(SETTINGS | settings)


def test_values_that_some_method_can_use_are_not_refused_for_another() -> None:
    check_settings({"precision": "across", "per": "weight"})


def test_defaults_and_unknown_settings_are_checked_as_well() -> None:
    check_settings({option: setting.default for option, setting in method_settings().items()})
    with pytest.raises(BecameError, match="there is no setting 'strength'"):
        check_settings({"strength": 1.0})


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_setting_that_is_no_number_is_refused(number: float) -> None:
    for method, option in (("ewc", "ewc_strength"), ("gpm", "threshold"), ("became+gpm", "increment")):
        with pytest.raises(BecameError, match=rf"^the setting '{option}' is (nan|inf); it must be a finite number\.$"):
            build_method(method, {option: number})


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_a_mean_that_is_not_recentred_is_the_minimum_of_the_decayed_quadratics(decay: float) -> None:
    old = LaplacePosterior({"w": np.zeros(1)}, Diagonal({"w": np.array([2.0])}))
    method = Method("own", recentred=False, decay=decay)
    found = method.updated_posterior(old, {"w": np.ones(1)}, Diagonal({"w": np.ones(1)}))
    assert found.mean["w"] == pytest.approx(1 / (1 + 2 * decay))


def test_a_minimum_is_not_kept_of_other_structures_than_diagonals() -> None:
    with pytest.raises(BecameError, match="known for diagonals alone; choose the precision 'diagonal'"):
        Method("own", recentred=False, precision="kronecker")
