"""The registry of named classes, and the settings that they are built with."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Literal

import pytest

from became_core import BecameError
from became_core import registry as module
from became_core.registry import Registry, nearest, setting


@dataclass(frozen=True)
class Base:
    """What both share.

    Attributes:
        shared: a number that
            both have.
        memory: no setting.
    """

    shared: float = setting(0.5)
    memory: int = 0


@dataclass(frozen=True)
class First(Base):
    """The first one.

    Attributes:
        own: a word.
    """

    own: Literal["a", "b"] = setting("a", option="first_own")


@dataclass(frozen=True)
class Second(Base):
    """The second one."""


@dataclass(frozen=True)
class Clashing:
    """Has another default for a shared option."""

    shared: float = setting(0.25)


def registry() -> Registry[object]:
    return Registry("became.tests", "thing", {"first": First, "second": Second})


def test_settings_have_type_default_help_and_owners() -> None:
    settings = registry().settings()
    assert list(settings) == ["shared", "first_own"]
    assert (settings["shared"].type, settings["shared"].default) == (float, 0.5)
    assert settings["shared"].help == "a number that both have."
    assert settings["shared"].owners == ("first", "second")
    assert settings["first_own"].type == Literal["a", "b"]
    assert (settings["first_own"].help, settings["first_own"].owners) == ("a word.", ("first",))
    assert registry().options_of("second") == ("shared",)
    assert registry().summary("first") == "The first one"


def test_a_class_is_built_with_the_values_that_are_its_own() -> None:
    values = {"shared": 0.75, "first_own": "b", "of another": 1}
    assert registry().build("first", values) == First(shared=0.75, own="b")
    assert registry().build("second", values) == Second(shared=0.75)


def test_an_unknown_name_is_answered_with_the_nearest_known_one() -> None:
    with pytest.raises(BecameError, match=r"no thing 'frist'; did you mean 'first'\? Choose from first, second"):
        registry()["frist"]
    assert nearest("zzz", ["b", "a"]) == "; choose from a, b"


def test_a_registered_class_is_found_and_a_clash_of_options_is_refused() -> None:
    things = registry()
    things.register("third", Second)
    assert list(things.names) == ["first", "second", "third"]
    with pytest.raises(BecameError, match="'other' and 'first' share the option 'shared' and differ in its type"):
        things.register("other", Clashing)
    assert "other" not in things
    things.remove("third")
    assert list(things.names) == ["first", "second"]
    with pytest.raises(BecameError, match="there is no thing 'third'"):
        things.remove("third")


def test_entry_points_of_other_packages_are_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def entry_points(*, group: str) -> list[EntryPoint]:
        asked.append(group)
        return [EntryPoint("elsewhere", "package.module:Second", group)]

    monkeypatch.setattr(module, "entry_points", entry_points)
    monkeypatch.setattr(EntryPoint, "load", lambda self: Second)
    things = registry()
    assert things.names == ("first", "second", "elsewhere")
    assert things["elsewhere"] is Second
    assert asked == ["became.tests"]


def test_a_plug_in_that_cannot_be_loaded_is_reported_each_time_and_loses_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries = [
        EntryPoint("broken", "no.module:Second", "became.tests"),
        EntryPoint("third", "module:Second", "became.tests"),
    ]
    monkeypatch.setattr(module, "entry_points", lambda *, group: entries)
    real = EntryPoint.load
    monkeypatch.setattr(EntryPoint, "load", lambda self: real(self) if self.name == "broken" else Second)
    things = registry()
    for _ in range(2):
        with pytest.raises(BecameError, match=r"the thing 'broken' of another package, no\.module:Second, cannot be"):
            assert things.names
    del entries[0]
    assert things.names == ("first", "second", "third")
    other = registry()
    with pytest.raises(BecameError, match="share the option 'shared'"):
        other.register("own", Clashing)
    assert other.names == ("first", "second", "third")  # a value that is refused takes nothing else with it
    kept = registry()
    kept.register("third", First)
    assert kept["third"] is First  # what the user registers is not replaced by a plug-in


@pytest.mark.parametrize("name", ["", "a/b", "..", "one+two", "with space", "-begins"])
def test_a_name_that_cannot_be_that_of_a_folder_is_refused(name: str) -> None:
    things = registry()
    with pytest.raises(BecameError, match="cannot be that of a thing; give letters"):
        things.register(name, Second)
    assert things.names == ("first", "second")
