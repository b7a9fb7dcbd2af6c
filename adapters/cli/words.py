"""How options describe themselves to a reader of ``--help``."""

import ast
import inspect
import textwrap
from itertools import pairwise
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args

import tyro

__all__ = ["worded"]

Class = TypeVar("Class", bound=type)


def worded(options: Class) -> Class:
    """Give tyro each option's words as one paragraph, and no default where there is none but None, or off.

    For a class of options below ``dataclass``; its lines of words would else be broken where those of the source are.
    """
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(options))).body
    assert isinstance(body, ast.ClassDef)
    for option, words in pairwise(body.body):
        if isinstance(option, ast.AnnAssign) and isinstance(option.target, ast.Name) and isinstance(words, ast.Expr):
            name, hint = option.target.id, options.__annotations__[option.target.id]
            if hasattr(hint, "__metadata__"):  # it is told already
                continue
            text = " ".join(str(ast.literal_eval(words.value)).split())
            plain = getattr(options, name, ...) in (None, False)
            told: list[Any] = [tyro.conf.arg(help=text, help_behavior_hint="" if plain else None)]
            if set(get_args(hint)) == {bool, NoneType}:  # three values, which a flag does not have
                told.append(tyro.conf.FlagConversionOff)
            options.__annotations__[name] = Annotated[hint, *told]
    return options
