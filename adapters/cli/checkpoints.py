"""``became inspect``, ``became fisher`` and ``became merge``: models that lie on a disk.

No framework is loaded for a merge; PyTorch is for its own files, and for curvature from data.
"""

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from adapters.cli.display import Display
from adapters.cli.main import execute
from adapters.cli.options import Output, described
from became_core import BecameError

__all__ = ["Fisher", "Inspect", "Merge"]

SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    unit: 2 ** (10 * (k + 1)) for k, unit in enumerate(("KIB", "MIB", "GIB", "TIB"))
}

# Which extra brings a package that these commands import; what a function of the user's own imports is the user's.
EXTRAS = dict.fromkeys(("filelock", "ml_dtypes", "safetensors", "yaml"), "merge") | {
    "distributed": "dask",
    "torch": "torch",
    "transformers": "transformers",
}


@dataclass(frozen=True)
class Inspect:
    """Show what checkpoints are, and whether and how they can be merged; weights are only read to compare tied ones."""

    models: Annotated[
        tuple[Path, ...], tyro.conf.Positional, described("Files or folders of models.", metavar="MODEL…")
    ]
    pad_vocabulary: Annotated[
        bool, described("Take vocabularies of different sizes as became merge would pad them.")
    ] = False
    output: Output = field(default_factory=Output)

    def run(self) -> int:
        """Print the lines."""

        def command(display: Display) -> None:
            from adapters.checkpoints.inspection import inspect_checkpoints

            if not self.models:
                raise BecameError("there is nothing to inspect; give at least one file or folder of a model.")
            lines = inspect_checkpoints(self.models, pad_vocabulary=self.pad_vocabulary)
            display.outcome("inspection", lines, lines=lines)

        return _executed(command, self.output)


@dataclass(frozen=True)
class Fisher:
    """Write a Fisher file, the curvature of a model's loss: from data, from Adam's state, or as a sum.

    From data: became fisher MODEL --data FILE --out F.safetensors

    From Adam: became fisher --from optimizer.pt --model MODEL --out F.safetensors

    A sum: became fisher --add F1.safetensors F2.safetensors --out F.safetensors
    """

    models: Annotated[
        tuple[Path, ...], tyro.conf.Positional, described("The model whose loss is measured.", metavar="MODEL")
    ] = ()
    out: Annotated[Path | None, described("The Fisher file to write.")] = None
    data: Annotated[
        str | None,
        described(
            "Samples: .npz with inputs and targets or with tokens, .txt with a sample a line for a model with a "
            "tokenizer, or random:SAMPLESxLENGTHxVOCABULARY."
        ),
    ] = None
    load: Annotated[
        str | None,
        described("module:function, from the model's path to a torch.nn.Module; without it transformers loads it."),
    ] = None
    kind: Annotated[
        Literal["empirical", "sampled", "true"],
        described("Whose labels: the data's, drawn from the model's prediction, or all of them. (default: empirical)"),
    ] = "empirical"
    per: Annotated[Literal["sample", "token"], described("What has a gradient of its own. (default: sample)")] = (
        "sample"
    )
    factors: Annotated[
        Literal["diagonal", "kronecker"],
        described(
            "What the file has of a matrix: its diagonal, or two Kronecker factors, which became uses per model, layer "
            "or leaf. (default: diagonal)"
        ),
    ] = "diagonal"
    samples: Annotated[int | None, described("How many samples at most; all without it.")] = None
    chunk: Annotated[int, described("How many samples' gradients are in memory at a time. (default: 8)")] = 8
    seed: Annotated[int, described("Of drawn labels and random tokens. (default: 0)")] = 0
    from_: Annotated[
        Path | None,
        tyro.conf.arg(name="from", help="The state of Adam, as torch.save wrote it.", help_behavior_hint=""),
    ] = None
    model: Annotated[Path | None, described("The weights that the optimiser's state belongs to.")] = None
    names: Annotated[
        Path | None, described("The parameters' names in the optimiser's order, one a line, if the state has none.")
    ] = None
    add: Annotated[tuple[Path, ...], described("Fisher files of disjoint data to add up.", metavar="F…")] = ()
    output: Output = field(default_factory=Output)

    def run(self) -> int:
        """Write the file."""

        def command(display: Display) -> None:
            if self.out is None:
                raise BecameError("say with --out which file to write.")
            if self.out.suffix != ".safetensors":
                raise BecameError(
                    f"a Fisher file is safetensors; give --out a name such as {self.out.stem}.safetensors."
                )
            ways = {"--data": self.data, "--from": self.from_, "--add": self.add or None}
            chosen = [name for name, value in ways.items() if value is not None]
            if len(chosen) != 1:
                raise BecameError(f"give one of --data, --from and --add, not {' and '.join(chosen) or 'none'}.")
            self._check_used(chosen[0])
            {"--data": self._measure, "--from": self._convert, "--add": self._add}[chosen[0]](display, self.out)
            display.outcome("fisher", [] if self.output.quiet else [f"written: {self.out}"], out=str(self.out))

        return _executed(command, self.output)

    def _check_used(self, way: str) -> None:
        """Refuse an option that the way to make the file has no use for."""
        used = {
            "--data": ("models", "data", "load", "kind", "per", "factors", "samples", "chunk", "seed"),
            "--from": ("from_", "model", "names"),
            "--add": ("add",),
        }
        for part in fields(self):
            if part.name not in ("out", "output", *used[way]) and getattr(self, part.name) != part.default:
                name = "a model before the options" if part.name == "models" else f"--{part.name}"
                raise BecameError(f"{way} makes no use of {name}; leave it out.")

    def _measure(self, display: Display, out: Path) -> None:
        from adapters.checkpoints.fisher_data import FisherRequest, fisher_from_data
        from adapters.checkpoints.fisher_inputs import IGNORED, load_model, read_samples

        if len(self.models) != 1:
            raise BecameError(f"--data measures one model, and {len(self.models)} were given before the options.")
        if self.chunk < 1 or (self.samples is not None and self.samples < 1):
            raise BecameError("--chunk and --samples are at least 1.")
        if self.seed < 0:
            raise BecameError(f"--seed is {self.seed}; it must be at least 0.")
        request = FisherRequest(self.kind, self.per, self.samples, self.chunk, self.seed, self.factors)
        network, tokenizer = load_model(self.models[0], self.load)
        samples = read_samples(str(self.data), tokenizer, self.seed)
        for note in samples.notes:
            display.note(f"warning: {note}")
        if self.factors == "kronecker" and (samples.targets == IGNORED).any():
            display.note(
                "warning: positions without a label, such as those that fill up short lines, count in the factors of "
                "the inputs; give samples of one length to be exact."
            )
        with _progress(self.output) as tell:
            told = lambda done, whole: tell("samples", done, whole)  # noqa: E731
            notes = fisher_from_data(self.models[0], samples, out, request, network, told)
        for note in notes:
            display.note(f"warning: {note}")

    def _convert(self, display: Display, out: Path) -> None:
        from adapters.checkpoints.fisher_adam import fisher_from_optimizer

        if self.model is None or self.from_ is None:
            raise BecameError("--from needs --model, the weights that the optimiser's state belongs to.")
        names = None
        if self.names is not None:
            try:
                names = self.names.read_text(encoding="utf-8").split()
            except (OSError, UnicodeDecodeError):
                raise BecameError(f"cannot read {self.names} as text.") from None
        for note in fisher_from_optimizer(self.from_, self.model, out, names):
            display.note(f"warning: {note}")

    def _add(self, display: Display, out: Path) -> None:
        from adapters.checkpoints.fisher_files import add_fisher_files

        add_fisher_files(self.add, out)


@dataclass(frozen=True)
class Merge:
    """Merge models that lie on a disk, in bounded memory.

    By a plan: became merge PLAN.yaml OUT

    By options: became merge A B --fisher FA FB --rule became --out OUT
    """

    paths: Annotated[
        tuple[Path, ...], tyro.conf.Positional, described("A plan and a folder to write, or models.", metavar="PATH…")
    ]
    out: Annotated[Path | None, described("The folder to write; it must not exist.")] = None
    fisher: Annotated[tuple[Path, ...], described("A Fisher file for each model.", metavar="F…")] = ()
    weight: Annotated[tuple[float, ...], described("A weight for each model. (default: 1 each)", metavar="W…")] = ()
    rule: Annotated[
        str | None,
        described("became, linear, fisher, imm-mode, regmean, slerp or task_arithmetic. (default: became)"),
    ] = None
    per: Annotated[
        Literal["model", "layer", "leaf", "weight"] | None,
        described("Of became: what has a coefficient of its own. (default: model)"),
    ] = None
    gram: Annotated[tuple[Path, ...], described("Of regmean: a file of Gram matrices for each.", metavar="G…")] = ()
    base_model: Annotated[Path | None, described("The model that differences are taken from.")] = None
    out_dtype: Annotated[str | None, described("The dtype of the merged tensors; without it that of the base.")] = None
    pad_vocabulary: Annotated[bool, described("Take missing rows of embeddings from models that have them.")] = False
    rank: Annotated[int | None, described("Of LoRA adapters: the rank to compress to; exact without it.")] = None
    shard_size: Annotated[str | None, described("The most bytes of a file. (default: 5GB, or the plan's)")] = None
    memory: Annotated[str, described("What may be held beside the page cache. (default: 512MiB)")] = "512MiB"
    workers: Annotated[int | None, described("How many threads; without it as many as cores, at most 4.")] = None
    scheduler: Annotated[
        str | None,
        described(
            "Merge on a Dask cluster: the address of its scheduler, as tcp://10.0.0.1:8786, or its scheduler file. All "
            "its workers must see the models and the folder to write; --memory is of each. It needs the extra dask."
        ),
    ] = None
    dry_run: Annotated[bool, described("Say what would be read, written and needed; write nothing.")] = False
    trace: Annotated[
        int | None, described("Measure the true loss at this many points of the path too, by --evaluate.")
    ] = None
    evaluate: Annotated[
        str | None, described("module:function, from the folder of a model to its loss; for --trace.")
    ] = None
    output: Output = field(default_factory=Output)

    def run(self) -> int:
        """Merge, and print what came of it."""
        return _executed(self._merge, self.output)

    def _merge(self, display: Display) -> None:
        from adapters.checkpoints.merge import merge_checkpoints, preview
        from adapters.checkpoints.trace import check_traceable, is_merged, trace_merge

        plan, out = self._plan()
        memory = size_of(self.memory, "--memory")
        self._check()
        evaluate = _function(self.evaluate) if self.evaluate else None
        if self.trace is not None:
            check_traceable(plan, self.trace)
        has_merge = self.trace is not None and is_merged(plan, out)
        if self.dry_run:
            found = preview(plan, None if has_merge else out, memory=memory, workers=self.workers)
            display.outcome("preview", _preview_lines(plan, found), plan=plan.as_words(), **asdict(found))
            return
        command = shlex.join(["became", *sys.argv[1:]])
        use: dict[str, Any] = {"memory": memory, "workers": self.workers, "scheduler": self.scheduler}
        if has_merge:
            text = f"{out} has this merge already; it is traced."
            display.outcome("note", [text], text=text)
        else:
            with _progress(self.output) as tell:
                report = merge_checkpoints(plan, out, **use, command=command, progress=tell)
            shown = ("files", "coefficients", "gain", "slopes", "convex", "errors", "notes", "seconds")
            values = {name: getattr(report, name) for name in shown}
            display.outcome("merge", _report_lines(report), out=str(report.out), plan=plan.as_words(), **values)
        if evaluate is not None and self.trace is not None:
            with _progress(self.output) as tell:
                told = lambda done, whole: tell("evaluations", done, whole)  # noqa: E731
                trace = trace_merge(plan, out, self.trace, evaluate, **use, progress=told)
            pairs = zip(trace.alphas, trace.losses, strict=True)
            lines = [f"loss at alpha {alpha:.3f}: {loss:.6g}" for alpha, loss in pairs]
            of_merge = f"loss of the merge: {trace.merged:.6g}"
            lines.append(f"{of_merge}; regret {trace.regret:.6g} to the best, alpha {trace.best:g}")
            display.outcome("trace", lines, **asdict(trace), regret=trace.regret, best=trace.best)

    def _check(self) -> None:
        """Refuse options that do not go together."""
        if self.workers is not None and self.workers < 1:
            raise BecameError(f"--workers is {self.workers}; give at least 1.")
        if (self.trace is None) != (self.evaluate is None):
            raise BecameError("--trace and --evaluate go together.")
        if self.dry_run and self.scheduler is not None:
            raise BecameError("--dry-run measures this machine, and --scheduler merges on others; leave one out.")

    def _plan(self) -> tuple[Any, Path]:
        """Return the plan, from its file or from the options, and the folder to write."""
        from adapters.checkpoints.plan import MergePlan, PlannedModel
        from adapters.checkpoints.plan_file import read_plan

        paths, out = list(self.paths), self.out
        if paths and paths[0].suffix in {".yaml", ".yml"}:
            if out is None and len(paths) == 2:
                out = paths.pop()
            if out is None or len(paths) != 1:
                raise BecameError("with a plan, give it and the folder to write: became merge PLAN.yaml OUT.")
            in_plan = ("rule", "per", "fisher", "weight", "gram", "base_model", "out_dtype", "pad_vocabulary", "rank")
            usual = {part.name: part.default for part in fields(self)}
            doubled = [name for name in in_plan if getattr(self, name) != usual[name]]
            if doubled:
                raise BecameError(f"--{doubled[0].replace('_', '-')} belongs into the plan {paths[0]}.")
            plan = read_plan(paths[0])
            return plan.replaced(**self._shards()), out
        if out is None:
            raise BecameError("say with --out which folder to write, or give a plan: became merge PLAN.yaml OUT.")
        for name, values in (("fisher", self.fisher), ("weight", self.weight), ("gram", self.gram)):
            if values and len(values) != len(paths):
                raise BecameError(f"--{name} has {len(values)} values for {len(paths)} models; give one for each.")
        models = tuple(
            PlannedModel(
                path,
                weight=self.weight[k] if self.weight else 1.0,
                fisher=self.fisher[k] if self.fisher else None,
                gram=self.gram[k] if self.gram else None,
            )
            for k, path in enumerate(paths)
        )
        return MergePlan(
            models,
            merge_method=self.rule or "became",
            base_model=self.base_model,
            per=self.per or "model",
            out_dtype=self.out_dtype,
            pad_vocabulary=self.pad_vocabulary,
            rank=self.rank,
        ).replaced(**self._shards()), out

    def _shards(self) -> dict[str, int]:
        """The size of shards if it is given, as a value of a plan."""
        return {} if self.shard_size is None else {"shard_size": size_of(self.shard_size, "--shard-size")}


def size_of(text: str, option: str) -> int:
    """Return the bytes that a size such as ``512MiB`` or ``5GB`` says.

    Raises:
        BecameError: if it is none.

    Example:
        >>> size_of("1.5KiB", "--memory")
        1536
    """
    parts = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([a-zA-Z]*?)[bB]?", text.strip())
    unit = "" if parts is None or not parts[2] else f"{parts[2].upper()}B"
    if parts is None or unit not in SIZES:
        raise BecameError(f"{option} is '{text[:40]}'; give a size such as 512MiB or 5GB.")
    return int(float(parts[1]) * SIZES[unit])


def _function(name: str) -> Callable[[Path], float]:
    from adapters.checkpoints.fisher_inputs import called

    return called(name)


def _executed(command: Callable[[Display], None], output: Output) -> int:
    """Carry out a command; the sentence when a package is missing is its error."""

    def complete(display: Display) -> None:
        try:
            command(display)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            extra = EXTRAS.get(package)
            what = f"pip install 'became[{extra}]'" if extra else "install it"
            raise BecameError(f"the package '{package}' is missing; {what}.") from None

    return execute(complete, output)


def _preview_lines(plan: Any, preview: Any) -> Iterator[str]:
    from adapters.checkpoints.card import yaml_lines
    from adapters.checkpoints.tensors import size_text

    yield from yaml_lines(plan)
    yield ""
    yield f"{size_text(preview.bytes_to_read)} to read in {preview.passes} passes"
    yield f"{size_text(preview.bytes_to_write)} to write"
    yield f"{size_text(preview.memory)} of memory at most"
    yield f"about {preview.seconds:.0f} seconds"
    yield from preview.notes


def _report_lines(report: Any) -> Iterator[str]:
    for group, numbers in report.coefficients.items():
        yield f"{group or 'coefficients'}: {', '.join(f'{number:.6f}' for number in numbers)}"
    if report.gain is not None:
        shape = "convex" if report.convex else "not convex"
        yield f"predicted gain: {report.gain:.6g}; the sum of the losses is {shape} between the models"
    if report.slopes is not None:
        yield f"slopes at the ends: {report.slopes[0]:.6g} and {report.slopes[1]:.6g}"
    for module, error in report.errors.items():
        yield f"{module}: relative error {error:.4f} of the smaller rank"
    yield from report.notes
    yield f"written: {report.out} ({', '.join(report.files)}) in {report.seconds:.1f} seconds"


@contextmanager
def _progress(output: Output) -> Iterator[Callable[[str, int, int], None]]:
    """Yield what shows on a terminal how far a command is; it says nothing where there is none."""
    console = Console(stderr=True)
    if output.quiet or output.log == "json" or not console.is_terminal:
        yield lambda *_: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, whole: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=whole)
            bar.update(tasks[what], completed=done)

        yield tell
