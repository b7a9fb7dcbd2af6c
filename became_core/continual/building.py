"""Methods by name: ``build_method`` makes a ``Method`` from a name and settings, such as ``became+sgp``.

The first part of a name is a registered recipe, whose settings a user may choose, and the second part is a registered
projector. A projector by itself is a method too, such as ``gpm``.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from became_core.continual.methods import Method
from became_core.continual.recipes import METHODS
from became_core.errors import BecameError
from became_core.projection import PROJECTORS
from became_core.registry import Setting, nearest

__all__ = ["build_method", "check_settings", "method_names", "method_settings", "projector_names"]


def method_names() -> tuple[str, ...]:
    """Return the names of all methods: all recipes, and all projectors, which are methods by themselves."""
    return (*METHODS.names, *PROJECTORS.names)


def projector_names() -> tuple[str, ...]:
    """Return the names of the projectors that a method can be combined with, and "none"."""
    return ("none", *(name for name in PROJECTORS.names if not PROJECTORS[name].alone))


def method_settings() -> dict[str, Setting]:
    """Return all settings of methods and projectors, by the name of their option.

    Raises:
        BecameError: if a method and a projector share an option and differ in its type or default.
    """
    settings = METHODS.settings()
    for option, new in PROJECTORS.settings().items():
        settings[option] = settings[option].shared_with(new) if option in settings else new
    return settings


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check values of settings, no matter which method they are for.

    Args:
        settings: by option name.

    Raises:
        BecameError: if there is no such setting, or a method or projector that has it cannot use the value.
    """
    known = _check_known(settings)
    for option, value in settings.items():
        for owner in known[option].owners:
            if owner in METHODS:
                METHODS.build(owner, {option: value}).build()
            else:
                PROJECTORS.build(owner, {option: value})


def _check_known(settings: Mapping[str, Any]) -> dict[str, Setting]:
    """Return all settings that there are; refuse an option that is none of them."""
    known = method_settings()
    for option in settings:
        if option not in known:
            raise BecameError(f"there is no setting '{option}'{nearest(option, known)}.")
    return known


def build_method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """Return the method with a name of the form ``METHOD``, ``PROJECTOR`` or ``METHOD+PROJECTOR``.

    Args:
        name: such as ``became``, ``gpm``, ``became+trgp`` or ``became+none``.
        settings: by option name. Settings of other methods and projectors have no effect, so that one mapping can be
            used for several methods.

    Raises:
        BecameError: if there is no such method, projector or setting; if method and projector cannot be combined; or if
            the value of a setting cannot be used, or not together with another one.

    Examples:
        >>> build_method("became+sgp", {"threshold": 0.9, "scale": 3.0}).projector.scale
        3.0
    """
    settings = dict(settings or {})
    _check_known(settings)
    base, plus, chosen = name.partition("+")
    if base in METHODS:
        recipe = METHODS.build(base, settings)
        if recipe.contradiction:
            raise BecameError(f"'{name}': {recipe.contradiction}.")
        method, projector, alone = recipe.build(), chosen if plus else recipe.projector, recipe.alone
    elif base in PROJECTORS:
        # A projector by itself needs a posterior only for the penalty on what it cannot protect. It is the one of
        # Wang 2021: the sum of every task's own quadratic.
        method, projector = Method(base, fisher="batch", recentred=False), chosen if plus else base
        alone = PROJECTORS[base].alone or "it is a projector by itself"
    else:
        raise BecameError(f"there is no method '{base}'{nearest(base, method_names())}.")
    if plus and alone:
        raise BecameError(f"'{name}': {alone}; it takes no projector.")
    if projector == "none":
        return replace(method, name=name)
    if projector not in PROJECTORS:
        raise BecameError(f"there is no projector '{projector}'{nearest(projector, projector_names())}.")
    if plus and PROJECTORS[projector].alone:
        raise BecameError(f"'{name}': {PROJECTORS[projector].alone}; {projector} takes no other method.")
    return replace(method, name=name, projector=PROJECTORS.build(projector, settings))
