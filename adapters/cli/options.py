"""The options of a run: what a command is given, and how tyro is told of it.

``Request`` is what a command asks for. Options that belong to it have a field here; those of a configuration are
generated from ``adapters.runs.configuration.options``, whatever is registered, and arrive in ``Request.values``.

Convention: an option that is left out is None here and takes the preset's value, or the recorded one.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from adapters.backend.entry import BackendName
from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.runs.configuration import GROUPS, options
from became_core.continual import METHODS, method_names, projector_names

__all__ = [
    "METHODS_BY_DEFAULT",
    "Level",
    "Output",
    "Request",
    "described",
    "is_completing",
    "parse",
    "parse_request",
    "request_of",
    "request_type",
]

Level = Literal["debug", "info", "warning", "error"]
METHODS_BY_DEFAULT = ("became", "gpm", "finetune")


def described(help_text: str, **more: Any) -> Any:
    """Return what tyro is told of an option: its help as one paragraph, and no default where there is none."""
    return tyro.conf.arg(help=" ".join(help_text.split()), help_behavior_hint="", **more)


@dataclass(frozen=True)
class Output:
    """What a command shows."""

    quiet: Annotated[bool, described("Show only errors and results.")] = False
    log: Annotated[
        Literal["text", "json"],
        described(
            "What standard output has: text, or one JSON object a line for every event and result, and nothing else. "
            "(default: text)"
        ),
    ] = "text"
    log_level: Annotated[
        Level | None,
        described(
            "What standard error has beside errors: messages of this level and of more serious ones. Without it: "
            "warnings; with --quiet: nothing."
        ),
    ] = None

    @property
    def level(self) -> Level:
        """The level of the log."""
        return self.log_level or ("error" if self.quiet else "warning")


@dataclass(frozen=True)
class Request:
    """What a command asks for.

    Attributes:
        methods: the methods to run; None for those of the recorded configuration, or the usual ones.
        projector: the projector of all methods that name none.
        preset: the name of a preset; None for "quick", or for the recorded configuration.
        values: the options of the configuration that were given, by name.
    """

    backend: Annotated[
        BackendName | None,
        described("The framework; without it the recorded one, or the first of these that is installed."),
    ] = None
    methods: tuple[str, ...] | None = None
    projector: str | None = None
    seeds: Annotated[
        tuple[int, ...] | None,
        described("A run for each seed; the seed determines the initial weights and all random draws. (default: 0)"),
    ] = None
    preset: str | None = None
    config: Annotated[
        Path | None, described("The config.json of a run; its values are used instead of a preset's.")
    ] = None
    out: Annotated[Path | None, described("The folder for results. (default: runs/BENCHMARK-PRESET)")] = None
    dry_run: Annotated[
        bool, described("Show how many steps each method takes, and an estimate of its time by phase; learn nothing.")
    ] = False
    print_config: Annotated[bool, described("Print the value of every option as JSON; learn nothing.")] = False
    resume: Annotated[
        bool,
        described(
            "Fail if the folder holds nothing to resume; and resume runs of another backend too, instead of refusing."
        ),
    ] = False
    output: Output = field(default_factory=Output)
    values: Mapping[str, Any] = field(default_factory=dict)


def parse_request(prog: str, arguments: Sequence[str] | None, *, backend: bool) -> Request:
    """Return what the arguments of a run ask for; a question for help and a mistake end the program.

    Args:
        prog: the name of the command.
        arguments: its words; those of this process if None.
        backend: whether ``--backend`` is an option.
    """
    kind = request_type(backend=backend, completing=is_completing(arguments))
    return request_of(parse(kind, prog, arguments))


def request_type(*, backend: bool, completing: bool) -> type:
    """Return a dataclass from which tyro makes the options of a run.

    Args:
        backend: whether ``--backend`` is one of them.
        completing: whether tyro writes a shell's completion. Only then does it know the registered names as choices:
            otherwise it would itself refuse an unknown name, without saying which known one is nearest.
    """

    def name_option(names: Iterable[str], help_text: str, *, several: bool = False) -> Any:
        return Annotated[_names_type(names if completing else None, several=several), described(help_text)]

    presets = dict.fromkeys(name for benchmark in BENCHMARKS for name in BENCHMARKS[benchmark].presets)
    methods, projectors = sorted(method_names()), projector_names()
    combined = [
        f"{method}+{projector}" for method in METHODS.names if not METHODS[method].alone for projector in projectors
    ]
    registered = {
        "methods": name_option(
            [*methods, *combined],
            f"Which methods: {', '.join(methods)}; or a method with a projector, as in became+trgp. (default: "
            f"{' '.join(METHODS_BY_DEFAULT)})",
            several=True,
        ),
        "projector": name_option(
            projectors,
            f"The projector of all methods that name none: {', '.join(projectors)}. Without it became and its "
            "variants have gpm, and other methods none.",
        ),
        "preset": name_option(
            presets,
            f"What gives the values of all options that are left out: {', '.join(presets)}; became list presets says "
            "where each is from. (default: demo for split-mnist, quick for all others)",
        ),
    }
    members: list[tuple[str, Any, Any]] = []
    hints = get_type_hints(Request, include_extras=True)
    for each in fields(Request):
        if each.name == "output":  # it comes last
            members += [(group, *member) for group, member in _groups(completing).items()]
        if each.name != "values" and (backend or each.name != "backend"):
            default = field(default=each.default, default_factory=each.default_factory)
            members.append((each.name, registered.get(each.name, hints[each.name]), default))
    kind = make_dataclass("Run", members, frozen=True)
    kind.__doc__ = (
        "Learn a benchmark's tasks with one or more methods; compare them in a table.\n\n"
        f"Without options: Split-MNIST (embedded), preset demo; {', '.join(METHODS_BY_DEFAULT)}; one seed.\n\n"
        "An option that shows no default has the preset's value if it is left out."
    )
    return kind


def _groups(completing: bool) -> dict[str, tuple[Any, Any]]:
    """The options of a configuration by group, each group as the type and the default of a field."""
    groups: dict[str, list[tuple[str, Any, Any]]] = {group: [] for group in GROUPS}
    for option in options().values():
        kind: Any = option.type | None
        markers: list[Any] = [described(option.help)]
        if option.flag:
            kind = bool
        elif option.names:
            kind = _names_type(option.names if completing else None, several=False)
        elif set(get_args(kind)) == {bool, NoneType}:  # three values, which a flag does not have
            markers.append(tyro.conf.FlagConversionOff)
        default = False if option.flag else None
        groups[option.group].append((option.name, Annotated[kind, *markers], field(default=default)))
    made = {}
    for group, members in groups.items():
        kind = make_dataclass(group, members, frozen=True)
        kind.__doc__ = GROUPS[group]
        made[group] = kind, field(default_factory=kind)
    return made


def request_of(parsed: Any) -> Request:
    """Return the request that an instance of ``request_type`` holds."""
    known, values = options(), dict[str, Any]()
    for group in GROUPS:
        values |= vars(getattr(parsed, group))
    # A flag that is left out is False, and asks for nothing.
    asked = {name: value for name, value in values.items() if value is not None and (value or not known[name].flag)}
    own = {each.name: getattr(parsed, each.name) for each in fields(Request) if hasattr(parsed, each.name)}
    return Request(**own, values=asked)


def _names_type(choices: Iterable[str] | None, *, several: bool) -> Any:
    """Return the type of an option whose values are registered names, all of them known to tyro or none."""
    spec: tyro.constructors.PrimitiveConstructorSpec[Any] = tyro.constructors.PrimitiveConstructorSpec(
        nargs="*" if several else 1,
        metavar="[NAME [NAME ...]]" if several else "NAME",
        instance_from_str=lambda words: tuple(words) if several else words[0],
        is_instance=lambda value: value is None or isinstance(value, tuple if several else str),
        str_from_instance=lambda value: [],  # of the default, which is None and not shown
        choices=None if choices is None else tuple(choices),
    )
    return Annotated[Any, spec]


def parse(kind: Any, prog: str, arguments: Sequence[str] | None, description: str | None = None) -> Any:
    """Return what the arguments hold, of this kind; a question for help and a mistake end the program."""
    # What is left out is None, and a flag that is left out is off: neither is shown in the help.
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(kind, prog=prog, args=arguments, description=description, config=config)


def is_completing(arguments: Sequence[str] | None) -> bool:
    """Return whether the arguments ask tyro for a shell's completion."""
    words = sys.argv[1:] if arguments is None else arguments
    return any(word.startswith(("--tyro-write-completion", "--tyro-print-completion")) for word in words)
