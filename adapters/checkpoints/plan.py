"""The plan of a merge: which models, by which rule, with which weights, into which dtype.

The words are mergekit's where it has them (``models``, ``model``, ``base_model``, ``parameters``, ``weight``,
``merge_method``, ``dtype``, ``out_dtype``, ``normalize``, ``t``, ``lambda``), with ``fisher``, ``mean``, ``gradient``
and ``gram`` beside each model, and ``per``. A word that is not known is refused by its name: a plan never does less
than it says.

Convention: a *setting* is a number, a list of numbers that are spread over the model's depth and joined by straight
lines, or a list of ``{filter, value}``, of which the first whose filter is a part of the tensor's name counts.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from adapters.checkpoints.tensors import FLOATS
from became_core import BecameError

__all__ = [
    "FLOAT_WORDS",
    "MergePlan",
    "PlannedModel",
    "Setting",
    "check_count",
    "check_method",
    "check_words",
    "float_word",
    "group_of_tensor",
    "layer_number",
    "path_of",
    "text_of",
]

# The names that PyTorch and mergekit give the floating-point dtypes, and short ones.
FLOAT_WORDS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "fp32": "F32",
    "fp16": "F16",
    "bf16": "BF16",
}
PERS = ("model", "layer", "leaf", "weight")


@dataclass(frozen=True)
class Setting:
    """A number that may differ from tensor to tensor.

    Attributes:
        choices: a part of a tensor's name, or None for every tensor; and numbers along the model's depth.
    """

    choices: tuple[tuple[str | None, tuple[float, ...]], ...]

    @classmethod
    def of(cls, value: Any, what: str) -> "Setting":
        """Return the setting that a plan or a caller gives.

        Raises:
            BecameError: if it is none.

        Example:
            >>> Setting.of([{"filter": "mlp", "value": 1.0}, {"value": [0.0, 0.5]}], "weight").at("head.weight", 0.5)
            0.25
        """
        if isinstance(value, Setting):
            return value
        if isinstance(value, list | tuple) and value and all(isinstance(choice, Mapping) for choice in value):
            return cls(tuple(cls._choice(choice, what) for choice in value))
        return cls(((None, _numbers(value, what)),))

    @staticmethod
    def _choice(choice: Mapping[str, Any], what: str) -> tuple[str | None, tuple[float, ...]]:
        check_words(choice, {"filter", "value"}, f"an entry of {what}")
        part = choice.get("filter")
        if "value" not in choice or not (part is None or isinstance(part, str)):
            raise BecameError(f"an entry of {what} needs a 'value', and a 'filter' that is a part of a tensor's name.")
        return (None if part in (None, "*") else part), _numbers(choice["value"], what)

    def at(self, name: str, depth: float) -> float:
        """Return the number for a tensor; ``depth`` is 0 for the first layer and 1 for the last.

        Raises:
            BecameError: if no filter fits the name.
        """
        for part, numbers in self.choices:
            if part is None or part in name:
                place = depth * (len(numbers) - 1)
                low = min(int(place), max(len(numbers) - 2, 0))
                high = min(low + 1, len(numbers) - 1)
                return numbers[low] + (place - low) * (numbers[high] - numbers[low])
        raise BecameError(f"no filter fits the tensor '{name}'; end the list with an entry that has a value alone.")

    @property
    def least(self) -> float:
        """The smallest of the numbers."""
        return min(number for _, numbers in self.choices for number in numbers)

    @property
    def is_zero(self) -> bool:
        """Whether it is 0 for every tensor."""
        return not any(number for _, numbers in self.choices for number in numbers)

    def __str__(self) -> str:
        """Return it as a plan writes it."""
        texts = [
            (f"{part}: " if part else "") + (f"{numbers[0]:g}" if len(numbers) == 1 else str(list(numbers)))
            for part, numbers in self.choices
        ]
        return "; ".join(texts)


@dataclass(frozen=True)
class PlannedModel:
    """One of the models of a merge, and what is known about its loss.

    Attributes:
        model: the checkpoint, of any format.
        weight: its coefficient for ``task_arithmetic``, its share for ``linear``, its importance for the others, of
            which ``slerp`` takes none; scalar, gradient or filters.
        fisher: a Fisher file, or any checkpoint of the same names and shapes: the diagonal curvature of its loss.
        gradient: of its loss at its weights, likewise; zero if not given.
        mean: where its loss is expanded, likewise; at its own weights if not given.
        gram: the input Gram matrices of its linear layers, [d_in, d_in] by the weights' names, for ``regmean``.
    """

    model: Path
    weight: Any = 1.0
    fisher: Path | None = None
    gradient: Path | None = None
    mean: Path | None = None
    gram: Path | None = None

    def __post_init__(self) -> None:
        """Bring the values into their types, and check them."""
        object.__setattr__(self, "weight", Setting.of(self.weight, f"the weight of {self.model}"))
        for name in ("model", "fisher", "gradient", "mean", "gram"):
            value = getattr(self, name)
            if value is not None or name == "model":
                object.__setattr__(self, name, path_of(value, name))


@dataclass(frozen=True)
class MergePlan:
    """What to merge, and how.

    Attributes:
        models: at least two, or one beside a base model; a path stands for a model with weight 1.
        merge_method: ``became``, ``linear``, ``fisher``, ``imm-mode``, ``regmean``, ``slerp`` or ``task_arithmetic``.
        base_model: what differences are taken from, and what tokenizer and configuration are copied from; without it
            the latter is the first model. ``linear`` and ``slerp`` only copy from it and need two models beside it;
            ``regmean`` and the rules that merge weight by weight refuse it.
        per: of ``became``: what shares a coefficient, ``model``, ``layer``, ``leaf`` or ``weight``.
        normalize: of ``linear``: whether the weights are divided by their sum.
        t: of ``slerp``: how far along the arc, 0 for the base model, or without one the first, and 1 for the other.
        scale: of ``task_arithmetic``, mergekit's ``lambda``: a factor of all differences.
        out_dtype: the dtype of all merged tensors; without it each has that of the base.
        pad_vocabulary: whether models with fewer tokens take the missing rows from those that have them.
        rank: of LoRA adapters: the rank to compress to; without it the merge is exact and has the sum of the ranks.
        shard_size: the most bytes of a file; of LoRA adapters it has no effect, as a merged adapter is one file.

    Example:
        >>> plan = MergePlan((PlannedModel("A.safetensors"), PlannedModel("B.safetensors")), "linear")
        >>> plan.models[0].weight.at("fc.weight", 0.0)
        1.0
    """

    models: tuple[PlannedModel, ...]
    merge_method: str = "became"
    base_model: Path | None = None
    per: str = "model"
    normalize: bool = True
    t: Any = 0.5
    scale: Any = 1.0
    out_dtype: str | None = None
    pad_vocabulary: bool = False
    rank: int | None = None
    shard_size: int = 5 * 10**9

    def __post_init__(self) -> None:
        """Bring the values into their types, and check what needs no file."""
        listed: Any = self.models  # paths alone, too
        if not isinstance(listed, list | tuple):
            raise BecameError(f"models is {_shown(listed)}; give a tuple of them, each a PlannedModel or a path.")
        models = tuple(model if isinstance(model, PlannedModel) else PlannedModel(model) for model in listed)
        object.__setattr__(self, "models", models)
        object.__setattr__(self, "t", Setting.of(self.t, "t"))
        object.__setattr__(self, "scale", Setting.of(self.scale, "lambda"))
        if self.base_model is not None:
            object.__setattr__(self, "base_model", path_of(self.base_model, "base_model"))
        if self.out_dtype is not None:
            object.__setattr__(self, "out_dtype", float_word(self.out_dtype, "out_dtype"))
        if len(models) + (self.base_model is not None) < 2:
            raise BecameError(f"the plan has {len(models)} models; give at least two, or one beside a base_model.")
        if self.per not in PERS:
            raise BecameError(f"there is no coefficient per '{self.per}'; choose from {', '.join(PERS)}.")
        for name in ("normalize", "pad_vocabulary"):
            if not isinstance(getattr(self, name), bool):
                raise BecameError(f"{name} is {_shown(getattr(self, name))}; give True or False.")
        if self.rank is not None:
            check_count(self.rank, "the rank")
        check_count(self.shard_size, "the shard size in bytes")

    def as_words(self) -> dict[str, Any]:
        """Return the plan in the words of a plan file, without what is as usual."""
        words: dict[str, Any] = {"merge_method": self.merge_method}
        if self.base_model is not None:
            words["base_model"] = str(self.base_model)
        words["models"] = [_words_of(model) for model in self.models]
        usual = {each.name: each.default for each in fields(MergePlan)}
        if self.per != "model":
            words["per"] = self.per
        parameters = {"normalize": self.normalize, "t": self.t, "lambda": self.scale}
        usual_parameters = {"normalize": True, "t": Setting.of(0.5, "t"), "lambda": Setting.of(1.0, "lambda")}
        changed = {
            name: _plain(value) if isinstance(value, Setting) else value
            for name, value in parameters.items()
            if value != usual_parameters[name]
        }
        if changed:
            words["parameters"] = changed
        if self.out_dtype is not None:
            words["out_dtype"] = next(name for name, word in FLOAT_WORDS.items() if word == self.out_dtype)
        for name in ("pad_vocabulary", "rank", "shard_size"):
            if getattr(self, name) != usual[name]:
                words[name] = getattr(self, name)
        return words

    def absolute(self) -> "MergePlan":
        """Return the plan with absolute paths, for a process that works in another folder."""
        names = ("model", "fisher", "gradient", "mean", "gram")
        models = []
        for model in self.models:
            paths = {name: getattr(model, name) for name in names if getattr(model, name) is not None}
            models.append(replace(model, **{name: path.absolute() for name, path in paths.items()}))
        base = None if self.base_model is None else self.base_model.absolute()
        return replace(self, models=tuple(models), base_model=base)

    def replaced(self, **changes: Any) -> "MergePlan":
        """Return the plan with other values."""
        return replace(self, **changes)


METHODS = ("became", "linear", "fisher", "imm-mode", "regmean", "slerp", "task_arithmetic")


def check_method(name: str) -> None:
    """Refuse a method that is not known."""
    if name not in METHODS:
        raise BecameError(f"the merge_method '{text_of(name)}' is not known; known are {', '.join(METHODS)}.")


def check_count(value: Any, what: str) -> None:
    """Refuse what is no whole number of at least 1; raises a BecameError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise BecameError(f"{what} is {_shown(value)}; give a whole number of at least 1.")


def float_word(name: Any, what: str) -> str:
    """Return the safetensors word of a floating-point dtype."""
    if isinstance(name, str) and name in FLOATS:
        return name
    if not isinstance(name, str) or name not in FLOAT_WORDS:
        raise BecameError(
            f"{what} is '{text_of(name)}', which is no known dtype; choose from {', '.join(FLOAT_WORDS)}."
        )
    return FLOAT_WORDS[name]


def layer_number(name: str) -> int | None:
    """Return the first number in a tensor's name, which is that of its layer; None if it has none.

    Example:
        >>> layer_number("model.layers.7.mlp.up_proj.weight"), layer_number("model.norm.weight")
        (7, None)
    """
    numbered = re.search(r"(?:^|\.)(\d{1,9})(?:\.|$)", name)
    return int(numbered[1]) if numbered else None


def group_of_tensor(name: str, per: str) -> str:
    """Return what a tensor shares its coefficient with: ``model.layers.7`` per layer, itself per leaf.

    A layer is what stands in a name up to its first number, or without a number what stands before its last dot.

    Example:
        >>> group_of_tensor("model.layers.7.mlp.up_proj.weight", "layer"), group_of_tensor("fc.weight", "layer")
        ('model.layers.7', 'fc')
    """
    if per == "layer":
        numbered = re.match(r"(?:.*?\.)??\d{1,9}(?=\.|$)", name)
        return numbered[0] if numbered else name.rpartition(".")[0] or name
    return name if per == "leaf" else ""


def check_words(words: Any, known: set[str], where: str) -> None:
    """Refuse what is no mapping, and a word in it that is not known."""
    if not isinstance(words, Mapping):
        raise BecameError(f"{where} is not a mapping of words to values.")
    for word in words:
        if word not in known:
            raise BecameError(
                f"{where} has '{text_of(word)}', which is not known; known are {', '.join(sorted(known))}."
            )


def _numbers(value: Any, what: str) -> tuple[float, ...]:
    numbers = value if isinstance(value, list | tuple) else [value]
    if not numbers or not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        raise BecameError(f"{what} is no number, no list of numbers and no list of 'filter' and 'value'.")
    try:
        floats = tuple(float(number) for number in numbers)
    except OverflowError:
        floats = (math.inf,)
    if not all(map(math.isfinite, floats)):
        raise BecameError(f"{what} has a number that is not finite.")
    return floats


def path_of(value: Any, name: str) -> Path:
    """Return a value of a plan as the path that it must be."""
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise BecameError(f"'{name}' is the path of a file or a folder, not {text_of(value)!r}.")
    return Path(value)


def text_of(value: Any) -> str:
    """A value of a plan, fit for one line."""
    return str(value)[:60] if isinstance(value, str | int | float | bool) else type(value).__name__


def _shown(value: Any) -> str:
    return f"'{text_of(value)}'" if isinstance(value, str) else text_of(value)


def _words_of(model: PlannedModel) -> dict[str, Any]:
    words: dict[str, Any] = {"model": str(model.model)}
    for name in ("fisher", "gradient", "mean", "gram"):
        if getattr(model, name) is not None:
            words[name] = str(getattr(model, name))
    if model.weight != Setting.of(1.0, "weight"):
        words["parameters"] = {"weight": _plain(model.weight)}
    return words


def _plain(setting: Setting) -> Any:
    def value(numbers: Sequence[float]) -> Any:
        return numbers[0] if len(numbers) == 1 else list(numbers)

    if len(setting.choices) == 1 and setting.choices[0][0] is None:
        return value(setting.choices[0][1])
    return [({"filter": part} if part else {}) | {"value": value(numbers)} for part, numbers in setting.choices]
