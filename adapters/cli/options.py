"""The options of a run: what a command is given, and how tyro is told of it.

``Request`` is what a command asks for. Options that belong to it have a field here; those of a configuration are
generated from ``adapters.runs.options``, whatever is registered, and arrive in ``Request.values``.

Convention: an option that is left out is None here and takes the preset's value, or the recorded one.
"""

import ast
import io
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from adapters.backend.entry import BACKENDS, BackendName
from adapters.benchmarks.catalogue import BENCHMARKS
from adapters.runs.options import GROUPS, Option, options
from became_core.continual import METHODS, method_names, projector_names
from became_core.registry import nearest

__all__ = [
    "METHODS_BY_DEFAULT",
    "Level",
    "Output",
    "Request",
    "Scheduler",
    "Workers",
    "described",
    "is_completing",
    "one_of",
    "parse",
    "parse_request",
    "request_of",
    "request_type",
    "with_short_help",
]

Level = Literal["debug", "info", "warning", "error"]
METHODS_BY_DEFAULT = ("became", "gpm", "finetune")

# The options that belong to a request, by the group they stand in; those of a configuration say theirs themselves.
_REQUESTED = {
    "methods": ("methods", "projector", "preset", "seeds"),
    "where": ("backend", "out", "config", "resume", "workers", "scheduler"),
    "output": ("dry_run", "print_config"),
}
# Those that a first look at the help explains.
_EXPLAINED = {
    "learn": ("benchmark", "tasks", "first", "network"),
    "methods": ("methods", "projector", "preset", "seeds"),
    "training": ("lr", "epochs", "stage2_epochs", "batch_size"),
    "curvature": ("curvature_samples", "projector_samples", "path_points"),
    "where": ("backend", "device", "threads", "workers", "data_dir", "out"),
    "output": ("dry_run", "print_config", "quiet", "log"),
}


def described(help_text: str, **more: Any) -> Any:
    """Return what tyro is told of an option: its help as one paragraph, and no default where there is none."""
    return tyro.conf.arg(help=" ".join(help_text.split()), help_behavior_hint="", **more)


def one_of(*words: str) -> Any:
    """Return what tyro is told of an option that is one of some words: an unknown one is answered with the nearest.

    tyro itself would also offer None, where an option may be left out, and name no nearest word.
    """

    def chosen(words_given: Sequence[str]) -> Any:
        (word,) = words_given
        if word not in words:
            raise ValueError(f"there is no '{word}'{nearest(word, words)}.")
        return {"True": True, "False": False}.get(word, word)

    spec: tyro.constructors.PrimitiveConstructorSpec[Any] = tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(words)}}}",
        instance_from_str=chosen,
        is_instance=lambda value: value is None or str(value) in words,
        str_from_instance=lambda value: [] if value is None else [str(value)],
    )
    return spec


def number(kind: type[int] | type[float], *, several: bool = False) -> Any:
    """Return what tyro is told of an option that is a number, or several: another word is answered in one sentence."""
    what, metavar = ("whole number", "INT") if kind is int else ("number", "FLOAT")

    def one(word: str) -> int | float:
        try:
            return kind(word)
        except ValueError:
            raise ValueError(f"'{word}' is not a {what}.") from None

    spec: tyro.constructors.PrimitiveConstructorSpec[Any] = tyro.constructors.PrimitiveConstructorSpec(
        nargs="*" if several else 1,
        metavar=f"[{metavar} [{metavar} ...]]" if several else metavar,
        instance_from_str=lambda words: tuple(map(one, words)) if several else one(words[0]),
        is_instance=lambda value: value is None or isinstance(value, tuple if several else (int, float)),
        str_from_instance=lambda value: [],  # of the default, which is None and not shown
    )
    return spec


@dataclass(frozen=True)
class Output:
    """What a command shows."""

    quiet: Annotated[bool, described("Show only errors and results.")] = False
    log: Annotated[
        Literal["text", "json"],
        one_of("text", "json"),
        described(
            "What standard output has: text, or one JSON object a line for every event and result, and nothing else. "
            "(default: text)"
        ),
    ] = "text"
    log_level: Annotated[
        Level | None,
        one_of(*get_args(Level)),
        described(
            "What standard error has beside errors: messages of this level and of more serious ones. Without it: "
            "warnings; with --quiet: nothing."
        ),
    ] = None

    @property
    def level(self) -> Level:
        """The level of the log."""
        return self.log_level or ("error" if self.quiet else "warning")


Workers = Annotated[
    int | None,
    number(int),
    described(
        "Carry out this many runs at the same time, each in a process of this machine; they divide its cores among "
        "them. Without it the runs follow one another in one process."
    ),
]
Scheduler = Annotated[
    str | None,
    described(
        "Carry out the runs on a Dask cluster: the address of its scheduler, as tcp://10.0.0.1:8786, or its scheduler "
        "file. All its workers must see the folder of results. It needs the extra dask."
    ),
]


@dataclass(frozen=True)
class Request:
    """What a command asks for.

    Attributes:
        methods: the methods to run; None for those of the recorded configuration, or the usual ones.
        projector: the projector of all methods that name none.
        preset: the name of a preset; None for the benchmark's usual one, or for that of the recorded configuration.
        values: the options of the configuration that were given, by name.
    """

    backend: Annotated[
        BackendName | None,
        one_of(*BACKENDS),
        described(
            "The framework: torch, jax or tensorflow; without it the recorded one, or the first of these three that is "
            "installed."
        ),
    ] = None
    methods: tuple[str, ...] | None = None
    projector: str | None = None
    seeds: Annotated[
        tuple[int, ...] | None,
        number(int, several=True),
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
    print_config: Annotated[
        bool, described("Print the configuration as JSON, the value of every option in it; learn nothing.")
    ] = False
    resume: Annotated[
        bool,
        described(
            "Fail if the folder holds nothing to resume; and resume runs of another backend too, instead of refusing."
        ),
    ] = False
    workers: Workers = None
    scheduler: Scheduler = None
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
    words = sys.argv[1:] if arguments is None else list(arguments)
    return request_of(parse(kind, prog, with_short_help(kind, prog, words)))


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
            "where each is from. (default: demo for split-mnist, pretrained for split-imagenet-r, quick for all "
            "others)",
        ),
    }
    hints = get_type_hints(Request, include_extras=True)
    defaults = {
        each.name: field(default=each.default, default_factory=each.default_factory) for each in fields(Request)
    }
    groups: dict[str, list[tuple[str, Any, Any]]] = {
        group: [
            (name, registered.get(name, hints[name]), defaults[name])
            for name in _REQUESTED.get(group, ())
            if backend or name != "backend"
        ]
        for group in GROUPS
    }
    for option in options().values():
        groups[option.group].append(_member(option, completing=completing))
    members: list[tuple[str, Any, Any]] = []
    for group, options_of_group in groups.items():
        bases = (Output,) if group == "output" else ()
        of_group = make_dataclass(group, options_of_group, bases=bases, frozen=True)
        of_group.__doc__ = GROUPS[group]
        members.append((group, of_group, field(default_factory=of_group)))
    kind = make_dataclass("Run", members, frozen=True)
    kind.__doc__ = (
        "Learn a benchmark's tasks with one or more methods; compare them in a table.\n\n"
        f"Without options: Split-MNIST (embedded), {', '.join(METHODS_BY_DEFAULT)}, one seed.\n"
        "An option that shows no default has the preset's value if it is left out."
    )
    return kind


def _member(option: Option, *, completing: bool) -> tuple[str, Any, Any]:
    """Return the name, the type and the default of the field that gives tyro an option of a configuration."""
    kind: Any = option.type | None
    markers: list[Any] = [described(option.help)]
    if option.flag:
        kind = bool
    elif option.names:
        kind = _names_type(option.names if completing else None, several=False)
    elif set(get_args(kind)) == {bool, NoneType}:  # three values, which a flag does not have
        markers += [tyro.conf.FlagConversionOff, one_of("True", "False")]
    elif get_origin(option.type) is Literal:
        markers.append(one_of(*get_args(option.type)))
    else:
        numeric = {option.type, *get_args(option.type)} & {int, float}
        markers += [number(each, several=get_origin(option.type) is tuple) for each in numeric]
    return option.name, Annotated[kind, *markers], field(default=False if option.flag else None)


def with_short_help(kind: type, prog: str, words: Sequence[str]) -> Sequence[str]:
    """Return the words of a run's command as tyro knows them; if they ask for the short help, show it and end."""
    if not {"-h", "--help"}.isdisjoint(words):
        print(short_help(kind, prog))
        raise SystemExit(0)
    return ["--help" if word == "--help-all" else word for word in words]


def short_help(kind: type, prog: str) -> str:
    """Return what ``--help`` shows of a run: each group's most used options with their text, and all others by name."""
    wrapper = textwrap.TextWrapper(80, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    narrow = textwrap.TextWrapper(80, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    lines = [f"usage: {prog} [OPTIONS]", "", *(kind.__doc__ or "").splitlines()]
    lines += ["", f"The text of every option: {prog} --help-all"]
    for group in fields(kind):
        members: dict[str, Any] = get_type_hints(group.type, include_extras=True)
        lines += ["", f"{GROUPS[group.name]}:"]
        explained = [name for name in _EXPLAINED[group.name] if name in members]
        for name in explained:
            argument = next(marker for marker in members[name].__metadata__ if hasattr(marker, "help"))
            lines += [f"  --{name.replace('_', '-')}", *wrapper.wrap(argument.help)]
        others = " ".join(f"--{name.replace('_', '-')}" for name in members if name not in explained)
        lines += narrow.wrap(f"also: {others}") if others else []
    return "\n".join(lines)


def request_of(parsed: Any) -> Request:
    """Return the request that an instance of ``request_type`` holds."""
    known, given = options(), dict[str, Any]()
    for group in GROUPS:
        given |= vars(getattr(parsed, group))
    # A flag that is left out is False, and asks for nothing.
    values = {
        name: value
        for name, value in given.items()
        if name in known and value is not None and (value or not known[name].flag)
    }
    output = Output(**{each.name: given[each.name] for each in fields(Output)})
    own = {name: given[name] for names in _REQUESTED.values() for name in names if name in given}
    return Request(**own, output=output, values=values)


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
    # What is left out is None, and a flag that is left out is off: neither is shown in the help. All help is given by
    # `described` and by docstrings; to look for it in comments as well would take a quarter of the time.
    config = (
        *(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff),
        tyro.conf.HelptextFromCommentsOff,
    )
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not is_completing(words) or len(words) < 2:
        return tyro.cli(kind, prog=prog, args=words, description=description, config=config)
    script = io.StringIO()
    with suppress(SystemExit), redirect_stdout(script):
        tyro.cli(kind, prog=prog, args=["--tyro-write-completion", words[1], "-"], config=config)

    def corrected(spec: re.Match[str]) -> str:
        quoted = '\\"' in spec[1]  # fish has the whole of it between double quotes
        known = ast.literal_eval(spec[1].replace('\\"', '"') if quoted else spec[1])
        text = f"COMPLETION_SPEC = {mended(known)!r}"
        return text.replace('"', '\\"') if quoted else text

    pattern = r"^COMPLETION_SPEC = (\{.*?\})(?=\n+import )"  # on one line or on many
    text = re.sub(pattern, corrected, script.getvalue(), flags=re.MULTILINE | re.DOTALL)
    for by_tyro, by_us in _OFFERING_FILES.items():
        text = text.replace(by_tyro, by_us)
    if words[2:] in ([], ["-"]):
        print(text, end="")
        raise SystemExit(0)
    try:
        Path(words[2]).write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"error: cannot write {words[2]}: {error.strerror}.", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0)


# What changes in a completion script, so that a shell offers files as arguments without an option too. Where the script
# knows nothing of a word after a command's name, it answers with the word upon which a shell offers files. Bash then
# completes the last word, which tyro would join with the words before it, and goes on into a folder.
_OFFERING_FILES = {
    "    return completions\n\n\ndef main": (
        "    return completions or (['__TYRO_COMPLETE_FILES__'] if current_word_index else [])\n\n\ndef main"
    ),
    'COMPREPLY=($(compgen -f -- "$cur"))': (
        'compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "${COMP_WORDS[COMP_CWORD]}"))'
    ),
}


def mended(spec: dict[str, Any]) -> dict[str, Any]:
    """Return what a completion script knows of a command, where tyro guesses: words are choices, text is no file."""
    options = []
    for option in spec["options"]:
        metavar = option["description"].partition(" • ")[0]
        if re.fullmatch(r"\{[\w,]+\}", metavar):
            option = option | {"type": "choice", "choices": metavar[1:-1].split(",")}
        elif option["type"] == "path" and metavar != "PATH":
            option = option | {"type": "value"}
        options.append(option)
    commands = {name: mended(command) for name, command in spec["subcommands"].items()}
    return spec | {"options": options, "subcommands": commands}


def is_completing(arguments: Sequence[str] | None) -> bool:
    """Return whether the arguments ask tyro for a shell's completion."""
    words = sys.argv[1:] if arguments is None else arguments
    asking = ("--tyro-write-completion", "--tyro-print-completion")
    return bool(words) and words[0].replace("_", "-") in asking
