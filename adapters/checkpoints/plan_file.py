"""A plan of a merge as a YAML file, in the words that ``plan`` documents.

A file that could mean something else than it says is refused: a word that is not known or stands twice, a reference by
``*``, a tag, brackets that nest too deep.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapters.checkpoints.plan import METHODS, MergePlan, PlannedModel, check_method, check_words, path_of, text_of
from adapters.runs.files import read_file
from became_core import BecameError

__all__ = ["plan_of", "read_plan"]

LONGEST_PLAN = 250_000
# The time that a YAML reader takes grows with the square of the depth.
DEEPEST_PLAN = 20
# The words of a plan file, by the place where they stand.
IN_PLAN = {"models", "merge_method", "base_model", "parameters", "dtype", "out_dtype", "per", "tokenizer_source"} | {
    "pad_vocabulary",
    "rank",
    "shard_size",
}
OF_MODEL = {"weight", "fisher", "gradient", "mean", "gram"}
# The methods that make use of a parameter; all others of a plan's are for every method, or say so themselves.
USED_BY = {"normalize": ("linear",), "t": ("slerp",), "lambda": ("task_arithmetic",)}
IN_PARAMETERS = {"normalize", "t", "lambda", "weight", "per"}


def read_plan(file: Path | str) -> MergePlan:
    """Return the plan of a YAML file.

    Raises:
        BecameError: if it cannot be read, is no plan, or has a word that is not known; the message names the word.
    """
    return plan_of(_yaml(path_of(file, "file")), str(file))


def plan_of(words: Any, where: str) -> MergePlan:
    """Return the plan that a mapping of words describes; raises as ``read_plan`` does."""
    check_words(words, IN_PLAN, where)
    # Before the words that only a method of mergekit's knows.
    method = _typed(words.get("merge_method", METHODS[0]), str, "merge_method", where)
    check_method(method)
    listed = words.get("models")
    if not isinstance(listed, list) or not listed:
        raise BecameError(f"{where} has no list of 'models'.")
    parameters = words.get("parameters") or {}
    _check_parameters(parameters, words, method, where)
    if words.get("tokenizer_source", "base") != "base":
        raise BecameError(f"{where} has a tokenizer_source other than 'base', which is not known here.")
    weight = parameters.get("weight", 1.0)
    given: dict[str, Any] = {
        "models": tuple(_planned(entry, weight, where) for entry in listed),
        "merge_method": method,
        "base_model": words.get("base_model"),
        "out_dtype": words.get("dtype") if words.get("out_dtype") is None else words["out_dtype"],
    }
    for name, key in (("normalize", "normalize"), ("t", "t"), ("lambda", "scale"), ("per", "per")):
        if name in parameters:
            given[key] = parameters[name]
    for name, kind in (("per", str), ("pad_vocabulary", bool), ("rank", int), ("shard_size", int)):
        if name in words:
            given[name] = _typed(words[name], kind, name, where)
    if "normalize" in given:
        _typed(given["normalize"], bool, "normalize", where)
    return MergePlan(**given)


def _check_parameters(parameters: Any, words: Mapping[str, Any], method: str, where: str) -> None:
    """Refuse parameters of a plan that are not known, are of no use to its method, or are given beside them, too."""
    check_words(parameters, IN_PARAMETERS, f"the parameters of {where}")
    for word, owners in USED_BY.items():
        # mergekit's task_arithmetic does not normalise either, unless it is told to.
        is_usual = word == "normalize" and method == "task_arithmetic" and parameters.get(word) is False
        if word in parameters and method not in owners and not is_usual:
            raise BecameError(f"{where} has '{word}', of which {method} makes no use; leave it out.")
    if "per" in words and "per" in parameters:
        raise BecameError(f"{where} has 'per' twice, also among its parameters; leave one out.")


def _planned(entry: Any, weight: Any, where: str) -> PlannedModel:
    if isinstance(entry, str):
        return PlannedModel(Path(entry), weight)
    check_words(entry, OF_MODEL | {"model", "parameters"}, f"a model of {where}")
    if not isinstance(entry.get("model"), str):
        raise BecameError(f"a model of {where} has no 'model', the path of a checkpoint.")
    parameters = entry.get("parameters") or {}
    check_words(parameters, OF_MODEL, f"the parameters of {path_of(entry['model'], 'model')} in {where}")
    twice = sorted(OF_MODEL & set(entry) & set(parameters))
    if twice:
        raise BecameError(f"{path_of(entry['model'], 'model')} in {where} has '{twice[0]}' twice; leave one out.")
    merged = {"weight": weight} | {name: value for name, value in entry.items() if name in OF_MODEL} | parameters
    return PlannedModel(Path(entry["model"]), **merged)


def _yaml(file: Path) -> Any:
    try:
        import yaml
    except ModuleNotFoundError:
        raise BecameError("plans are YAML; pip install 'became[merge]', which has PyYAML.") from None

    class Strict(yaml.SafeLoader):  # type: ignore[misc,unused-ignore] # it may carry no types
        """A loader that refuses a key that stands twice."""

    def mapping(loader: Any, node: Any) -> Any:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise BecameError(f"{file} has '{text_of(key)}' twice in one place.")
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    # As in YAML 1.2: to PyYAML, which knows 1.1, a number such as 1e-3 is a text unless it has a point and a sign.
    exponent = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Strict.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))
    try:
        text = _read(file)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise BecameError(f"{file} refers to a part of itself by '*'; write it out.")
        return yaml.load(text, Loader=Strict)  # a SafeLoader
    except BecameError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise BecameError(f"{file} is no valid YAML{line}.") from None
    except (ValueError, TypeError, RecursionError):  # no text, a date that is none, a key that is a list
        raise BecameError(f"{file} is no valid YAML.") from None


def _read(file: Path) -> str:
    """Return the text of a plan; raises a UnicodeDecodeError if it is none."""
    text = read_file(file, LONGEST_PLAN).decode()
    depth = np.cumsum([(letter in "[{") - (letter in "]}") for letter in text])
    if depth.size and depth.max() > DEEPEST_PLAN:
        raise BecameError(f"{file} nests brackets more than {DEEPEST_PLAN} deep.")
    return text


def _typed(value: Any, kind: type, name: str, where: str) -> Any:
    if type(value) is not kind:
        raise BecameError(f"{where} has '{name}' with a value that is no {kind.__name__}.")
    return value
