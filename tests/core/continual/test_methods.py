import pytest

from became_core import BecameError
from became_core.continual import METHODS, PROJECTORS, MethodSettings, build_method
from became_core.laplace import Became, Published, Secant
from became_core.projection import GPCNS, GPM, NSCL, OGD, SGP, TRGP

SETTINGS = MethodSettings(
    threshold=0.9, increment=0.01, scale=3.0, nscl_ratio=20.0, ogd_samples=7, ogd_capacity=5, ewc_strength=7.0
)
BUILT = {
    "none": None,
    "gpm": GPM(0.9, 0.01),
    "sgp": SGP(0.9, 0.01, scale=3.0),
    "gpcns": GPCNS(0.9, 0.01, scale=3.0),
    "nscl": NSCL(20.0),
    "ogd": OGD(7, 5),
    "trgp": TRGP(0.9, 0.01),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_knows_its_name(name: str) -> None:
    assert build_method(name, SETTINGS).name == name


def test_there_are_those_of_the_table() -> None:
    methods = "became became-paper ewc finetune gpcns gpm joint nscl ogd sgp trgp"
    assert tuple(methods.split()) == METHODS
    assert set(PROJECTORS) == set(BUILT)


@pytest.mark.parametrize("projector", BUILT)
@pytest.mark.parametrize("name", sorted({*METHODS} - {"joint"}))
def test_any_method_takes_any_projector(name: str, projector: str) -> None:
    method = build_method(f"{name}+{projector}", SETTINGS)
    assert method.name == f"{name}+{projector}"
    assert method.projector == BUILT[projector]
    assert method.rule == build_method(name, SETTINGS).rule


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_its_own_projector_otherwise(name: str) -> None:
    expected = {"became": "gpm", "became-paper": "gpm"}.get(name, name if name in BUILT else "none")
    assert build_method(name, SETTINGS).projector == BUILT[expected]


def test_who_does_what() -> None:
    methods = {name: build_method(name, SETTINGS) for name in METHODS}
    assert {name for name, method in methods.items() if method.keeps_posterior} == {"ewc", "became", "became-paper"}
    assert {name for name, method in methods.items() if method.joint} == {"joint"}
    assert methods["ewc"].penalty_strength == 7.0
    assert methods["became"].rule == Became(Secant())
    assert methods["became"].fisher == "empirical"
    assert methods["became-paper"].rule == Became(Published())
    assert methods["became-paper"].fisher == "batch"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hat", f"there is no method 'hat'; choose from {', '.join(METHODS)}."),
        ("became+gmp", f"there is no projector 'gmp'; choose from {', '.join(PROJECTORS)}."),
        ("became+", f"there is no projector ''; choose from {', '.join(PROJECTORS)}."),
        ("joint+gpm", "'joint+gpm': joint training sees all tasks and has nothing to protect; it takes no projector."),
    ],
)
def test_what_there_is_not(name: str, message: str) -> None:
    with pytest.raises(BecameError) as raised:
        build_method(name, SETTINGS)
    assert str(raised.value) == message
