import pytest

from became_core import BecameError
from became_core.continual import METHODS, MethodSettings, build_method
from became_core.laplace import Became, Calibrated, Published
from became_core.projection import GPM

SETTINGS = MethodSettings(gpm_threshold=0.9, gpm_increment=0.01, ewc_strength=7.0)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_knows_its_name(name: str) -> None:
    assert build_method(name, SETTINGS).name == name


def test_there_are_those_of_the_table() -> None:
    assert sorted(METHODS) == ["became", "became-paper", "ewc", "finetune", "gpm", "joint"]


@pytest.mark.parametrize("name", ["gpm", "became", "became-paper"])
def test_settings_reach_the_projector(name: str) -> None:
    assert build_method(name, SETTINGS).projector == GPM(threshold=0.9, increment=0.01)


def test_who_does_what() -> None:
    methods = {name: build_method(name, SETTINGS) for name in METHODS}
    assert {name for name, method in methods.items() if method.projector} == {"gpm", "became", "became-paper"}
    assert {name for name, method in methods.items() if method.keeps_posterior} == {"ewc", "became", "became-paper"}
    assert {name for name, method in methods.items() if method.joint} == {"joint"}
    assert methods["ewc"].penalty_strength == 7.0
    assert methods["became"].rule == Became(Calibrated())
    assert methods["became"].fisher == "empirical"
    assert methods["became-paper"].rule == Became(Published())
    assert methods["became-paper"].fisher == "batch"


def test_an_unknown_method_is_told_which_exist() -> None:
    with pytest.raises(BecameError) as raised:
        build_method("hat", SETTINGS)
    assert str(raised.value) == (
        "there is no method 'hat'; choose from became, became-paper, ewc, finetune, gpm, joint."
    )
