"""The file in which a method around a user's own loop keeps its memory: what it says, how it is written and read.

A file of safetensors holds the arrays of the posterior and of the projector; its metadata is a description in JSON.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from adapters.backend.calibration import AcrossTasks
from adapters.backend.own_loop import first_difference
from adapters.runs.files import replaced
from became_core import BecameError, Diagonal, LaplacePosterior
from became_core.arrays import Array, Params, namespace
from became_core.curvature import LIKELIHOODS
from became_core.errors import first_line
from became_core.projection import PROJECTORS, Projector

__all__ = [
    "Stored",
    "check_description",
    "described",
    "memory_arrays",
    "read_memory",
    "restored",
    "understood",
    "written",
]

# The format of a memory, and that of one which is calibrated across tasks, which earlier versions do not know.
FORMAT, ACROSS = 1, 2

# What a setting is if nothing says that it is one.
PLAIN = (int, float, str, tuple, type(None), np.generic)


def memory_arrays(
    posterior: LaplacePosterior, projector: Projector, across: AcrossTasks | None = None
) -> dict[str, Array]:
    """Return the arrays of a memory by the names that they have in a file."""
    parts = {
        "mean": posterior.mean,
        "fisher": posterior.precision.diagonal(),
        "projector": projector.to_arrays(),
        "movement": {} if across is None else across.movement,
        "following": {} if across is None else across.following or {},
    }
    return {f"{part}.{name}": value for part, arrays in parts.items() for name, value in arrays.items()}


def described(
    shapes: Mapping[str, Sequence[int]],
    matrices: Mapping[str, bool],
    projector: Projector,
    likelihood: Any,
    across: AcrossTasks | None = None,
    **settings: Any,
) -> dict[str, str]:
    """Return what a memory's file says beside its arrays, as metadata of safetensors.

    Args:
        shapes: of all parameters of the model when old data were remembered.
        matrices: as ``coverage_of`` has them.
        projector: the memory.
        likelihood: of which only one of ``LIKELIHOODS`` is written; one of another class counts as a loss of the
            user's own.
        across: what calibrates the next task; None without calibration across tasks.
        settings: ``uncovered``, ``penalty``, ``decay`` and ``fisher``, and which parameters were ``measured`` last.

    Raises:
        BecameError: if the projector has no registered name, or a setting of it or of the likelihood is neither a
            number, nor a word, nor a list of them.
    """
    names = [name for name in PROJECTORS.names if PROJECTORS[name] is type(projector)]
    if not names:
        raise BecameError(
            f"the projector {type(projector).__name__} has no name in PROJECTORS; register it, so that a file can say "
            "which one it is."
        )
    known = type(likelihood) in LIKELIHOODS.values()
    settings |= {key: float(settings[key]) for key in ("penalty", "decay") if key in settings}
    description = {
        "format": FORMAT if across is None else ACROSS,
        "parameters": {name: list(shape) for name, shape in shapes.items()},
        "matrices": dict(matrices),
        "projector": [names[0], _plain_fields(projector)],
        "likelihood": [type(likelihood).__name__, _plain_fields(likelihood)] if known else None,
        **settings,
    }
    if across is not None:
        description["kappa"] = across.kappa
    return {"became": json.dumps(description)}


@contextmanager
def written(file: str | Path) -> Iterator[Path]:
    """Yield the name of a file to write, which takes this one's place once it is whole.

    Raises:
        BecameError: if it cannot be written; what was saved there before is still there.
    """
    try:
        with replaced(Path(file)) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise BecameError(f"could not write {file}: {getattr(error, 'strerror', None) or first_line(error)}.") from None


@contextmanager
def understood(file: str | Path) -> Iterator[None]:
    """Say in one sentence what a memory's file lacks, or has in another form, where that is found while it is read.

    Args:
        file: what the message calls it.

    Raises:
        BecameError: in place of the error that what is missing or malformed has caused.
    """
    try:
        yield
    except BecameError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise BecameError(f"{file} is no memory that Continual.save wrote ({what}).") from None


def read_memory(file: str | Path, framework: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return what a memory's file says, and its arrays, which stay as they are if the file is written again.

    Args:
        file: the file.
        framework: of the arrays, as safetensors calls it: "pt", "np" or "flax".

    Raises:
        BecameError: if it is no memory.
    """
    try:
        with understood(file), safe_open(str(file), framework) as opened:
            description = json.loads((opened.metadata() or {})["became"])
            names = list(opened.keys())
            # Of some versions of safetensors what is read is the file itself, as the system has mapped it.
            return description, {name: _copied(opened.get_tensor(name)) for name in names}
    except (OSError, SafetensorError) as error:
        raise BecameError(f"{file} is no memory that Continual.save wrote ({first_line(error)}).") from None


def _copied(array: Array) -> Array:
    xp: Any = namespace(array=array)
    return xp.asarray(array, copy=True)


class Stored(NamedTuple):
    """What a file holds of a memory.

    Attributes:
        posterior: the old tasks' loss.
        shapes: of all parameters that the model had when old data were remembered.
        matrices: as ``coverage_of`` has them.
        measured: the parameters that were trained when data were remembered last.
        across: what calibrates the next task; None without calibration across tasks.
        settings: ``projector`` with its memory, ``likelihood``, ``uncovered``, ``penalty``, ``decay``, ``fisher`` and
            ``calibration``.
    """

    posterior: LaplacePosterior
    shapes: dict[str, Sequence[int]]
    matrices: dict[str, bool]
    measured: frozenset[str]
    across: AcrossTasks | None
    settings: dict[str, Any]


def check_description(
    file: str | Path, description: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], *, may_have_grown: bool
) -> None:
    """Raise a BecameError if a file has another format, or is the memory of another architecture.

    Args:
        file: what a message calls it.
        description: what the file says.
        shapes: of all parameters of the model.
        may_have_grown: whether the model may have parameters that the memory does not know, such as a new head.
    """
    with understood(file):
        if description.get("format") not in (FORMAT, ACROSS):
            raise BecameError(
                f"{file} is a memory of format {description.get('format')}, and this version reads formats {FORMAT} "
                f"and {ACROSS}; load it with the version that saved it."
            )
        then = description["parameters"]
        now = {name: shape for name, shape in shapes.items() if name in then} if may_have_grown else shapes
        differs = first_difference(now, then)
    if differs:
        raise BecameError(f"{file} is the memory of another architecture: {differs}.")


def restored(
    file: str | Path,
    description: Mapping[str, Any],
    arrays: Mapping[str, Array],
    shapes: Mapping[str, Sequence[int]],
    settings: Mapping[str, Any],
    *,
    may_have_grown: bool = False,
) -> Stored:
    """Return the memory of ``read_memory``, for a model of these shapes.

    Args:
        file: what a message calls it.
        description: what the file says.
        arrays: where the memory's arrays shall be.
        shapes: of all parameters of the model.
        settings: what shall be otherwise than in the file, or is not in it.
        may_have_grown: as ``check_description`` has it.

    Raises:
        BecameError: if something is missing or malformed, if it has another format, or is the memory of another
            architecture, or of a loss that is not given, or has a projector of another class or another calibration
            than a setting says.
    """
    check_description(file, description, shapes, may_have_grown=may_have_grown)
    with understood(file):
        own = _settings(file, description, settings)
        parts = _parts(arrays)
        across = None
        if description["format"] == ACROSS:
            across = AcrossTasks(parts["movement"], parts["following"] or None, description["kappa"])
        projector = _projector(file, description, settings.get("projector")).with_arrays(parts["projector"])
        posterior = LaplacePosterior(parts["mean"], Diagonal(parts["fisher"]))
        measured = frozenset(description.get("measured", parts["fisher"]))
        then = dict(description["parameters"])
        return Stored(posterior, then, dict(description["matrices"]), measured, across, own | {"projector": projector})


def _settings(file: str | Path, description: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a memory but for its projector; those that are given in place of the file's.

    Raises:
        BecameError: if the memory is of a loss that is not given, or has another calibration than a setting says.
    """
    own = {key: description[key] for key in ("uncovered", "fisher")}
    own |= {key: float(description[key]) for key in ("penalty", "decay")}
    own["calibration"] = "across" if description["format"] == ACROSS else None
    if given.get("calibration", own["calibration"]) != own["calibration"]:
        how = "calibrated" if own["calibration"] else "not calibrated"
        raise BecameError(
            f"the memory in {file} is {how} across tasks; leave calibration= out, or remember the old data anew."
        )
    named = {kind.__name__: kind for kind in LIKELIHOODS.values()}
    name, values = description["likelihood"] or ("", {})
    if name in named:
        own["likelihood"] = named[name](**_as_given(values))
    elif "likelihood" not in given:
        raise BecameError(f"{file} was made with a loss of your own; give it as likelihood=.")
    return own | dict(given)


def _parts(arrays: Mapping[str, Array]) -> dict[str, Params]:
    """Return the arrays of a file by their part of the memory, and by name; raises a ValueError for another part."""
    parts: dict[str, Params] = {"mean": {}, "fisher": {}, "projector": {}, "movement": {}, "following": {}}
    for key, value in arrays.items():
        part, _, name = key.partition(".")
        if part not in parts:
            raise ValueError(f"it has an array '{key}'")
        parts[part][name] = value
    return parts


def _projector(file: str | Path, description: Mapping[str, Any], given: Projector | None) -> Projector:
    """Return the projector of a memory, without its arrays; with the settings of one that is given.

    Raises:
        BecameError: if the one that is given is of another class, which would not know what the arrays mean.
    """
    name, values = description["projector"]
    known = PROJECTORS[name]
    if given is None:
        return known(**_as_given(values))
    if type(given) is not known:
        raise BecameError(
            f"the projector of the memory in {file} is {known.__name__}, not {type(given).__name__}; give "
            f"projector={known.__name__}(...) with other settings, or leave it out."
        )
    return given


def _as_given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a dataclass as they were before JSON made lists of tuples."""

    def given(value: Any) -> Any:
        return tuple(map(given, value)) if isinstance(value, list) else value

    return {name: given(value) for name, value in values.items()}


def _plain_fields(value: Any) -> dict[str, Any]:
    """Return the settings of a dataclass as JSON can hold them; what a projector remembers is not among them.

    Raises:
        BecameError: if JSON cannot hold one.
    """
    remembers, written = isinstance(value, Projector), {}
    if not is_dataclass(value):
        return {}
    for part in fields(value):
        own = getattr(value, part.name)
        # A projector's arrays are written as such, and the number of its tasks is one of them.
        is_memory = remembers and not (part.metadata.get("static") or isinstance(own, PLAIN))
        if part.init and not is_memory and part.name != "tasks":
            written[part.name] = _plain(own, f"'{part.name}' of {type(value).__name__}")
    return written


def _plain(value: Any, name: str) -> Any:
    """Return a setting as JSON can hold it: lists and arrays become tuples, and numbers of a framework Python's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    elif hasattr(value, "__array__"):  # TensorFlow's
        value = np.asarray(value).tolist()
    if isinstance(value, list | tuple):
        return tuple(_plain(each, name) for each in value)
    if isinstance(value, int | float | str | None):
        return value
    raise BecameError(f"{name} is a {type(value).__name__}, which a file cannot hold; give a number or a tuple.")
