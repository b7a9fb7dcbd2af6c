"""Merges of real checkpoints by the rules of ``became merge``: a CNN on classes, and a transformer of bytes on domains.

Two models are fine-tuned from one base, saved as safetensors with the state of their Adam, and merged by the Python
functions of ``became merge``, which need no data but Fisher files. Each merged file is measured on the test data of
both models.

| problem | base | first model | second model |
| --- | --- | --- | --- |
| ``cnn`` | EfficientNet-Lite0, ImageNet | ten classes of CIFAR-100, drawn by the seed | ten others |
| ``text`` | a transformer of 0.3 million weights, trained on four domains | Milton's epics | reviews of movies |

Where all weights are 1, ``fisher``, ``imm-mode`` and ``became`` per weight are one formula; they are measured apart.
Every result is written when it is there, and a run that was stopped goes on.

Convention: losses are means over samples, or over bytes, in nats; accuracies are in percent. "grid" is the point of
eleven between the two models at which the sum of the losses on validation data is least: an answer that needs data.
"""

import argparse
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from adapters.benchmarks.text import load_text
from adapters.checkpoints import MergePlan, PlannedModel, merge_checkpoints
from adapters.checkpoints.fisher_adam import fisher_from_optimizer
from adapters.checkpoints.fisher_data import FisherRequest, fisher_from_data
from adapters.checkpoints.fisher_inputs import Samples
from adapters.networks import gpt
from became_core.continual.rng import random_generator
from benchmarks.real_models import (
    GROUPS,
    GroupedClassifier,
    NextByte,
    Part,
    Pictures,
    finetune,
    lite0,
    mean_and_spread,
    measured,
    remembered_result,
)

SIDES = ("first", "second")
GRID = [k / 10 for k in range(11)]
FISHER_SAMPLES = {"cnn": 400, "text": 200}


class Problem(ABC):
    """Two models of one base, and their data.

    Attributes:
        folder: where its files are.
        model: takes all weights in turn.
        test: the data of each model.
        validation: other data of each.
    """

    folder: Path
    model: nn.Module
    train: list[Part]
    validation: list[Part]
    test: list[Part]

    @abstractmethod
    def base(self) -> None:
        """Give the model the base's weights."""

    @abstractmethod
    def finetune(self, side: int) -> torch.optim.Optimizer:
        """Train the model on the data of a side."""

    @abstractmethod
    def request(self) -> FisherRequest:
        """Return how Fisher information is measured from data."""

    def look(self, side: int) -> nn.Module:
        """Return the model with the outputs of a side."""
        return self.model

    def file(self, side: int, kind: str = "") -> Path:
        """Return where a model is, or its Fisher file of a kind."""
        return self.folder / f"{SIDES[side]}{kind and '-'}{kind}.safetensors"

    def prepare(self) -> None:
        """Train and measure what is not there yet."""
        for side, name in enumerate(SIDES):
            state = self.folder / f"{name}.optimizer.pt"
            if not self.file(side).exists():
                self.base()
                optimizer = self.finetune(side)
                torch.save(optimizer.state_dict(), state)
                weights = {key: value.contiguous() for key, value in self.model.state_dict().items()}
                save_file(weights, self.file(side))
            if not self.file(side, "adam").exists():
                names = [name for name, _ in self.model.named_parameters()]
                fisher_from_optimizer(state, self.file(side), self.file(side, "adam"), names)
            if not self.file(side, "data").exists():
                self.load(self.file(side))
                samples = Samples(self.train[side].inputs.contiguous().numpy(), self.train[side].targets.numpy())
                fisher_from_data(self.file(side), samples, self.file(side, "data"), self.request(), self.look(side))

    def load(self, file: Path) -> None:
        """Give the model the weights of a file."""
        self.model.load_state_dict(load_file(file))

    def losses(self, parts: list[Part]) -> dict[str, float]:
        """Return the loss and the accuracy of the model on the data of both sides."""
        found = {}
        for side, name in enumerate(SIDES):
            found[f"{name} loss"], found[f"{name} accuracy"] = measured(self.look(side), parts[side])
        return found

    def merged(self, plan: MergePlan, on: list[Part] | None = None) -> dict[str, Any]:
        """Return what a plan's merge is worth on test data, or on others, and its coefficients."""
        out = self.folder / "merged"
        shutil.rmtree(out, ignore_errors=True)
        report = merge_checkpoints(plan, out, workers=1)
        self.load(out / "model.safetensors")
        shutil.rmtree(out)
        return {**self.losses(on or self.test), "coefficients": report.coefficients, "gain": report.gain}

    def linear(self, alpha: float) -> MergePlan:
        """Return the plan of a point between the two models."""
        return MergePlan((PlannedModel(self.file(0), 1.0 - alpha), PlannedModel(self.file(1), alpha)), "linear")


class Pictured(Problem):
    """EfficientNet-Lite0 on two groups of classes of CIFAR-100."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        """Draw the classes and load the weights."""
        self.options, self.seed = options, seed
        self.folder = options.out / "cnn" / f"seed{seed}"
        pictures = Pictures(options.data_dir, seed, a_class=options.images, side=options.side)
        self.train, self.validation, self.test = pictures.train, pictures.validation, pictures.test
        self.model: GroupedClassifier = lite0(seed, pictures.others)
        self._base = {name: value.clone() for name, value in self.model.state_dict().items()}

    def base(self) -> None:
        """Give the model ImageNet's weights."""
        self.model.load_state_dict(self._base)

    def look(self, side: int) -> nn.Module:
        """Return the model with the outputs of a group."""
        self.model.group = GROUPS[side]
        return self.model

    def finetune(self, side: int) -> torch.optim.Optimizer:
        """Train the model on a group."""
        rate, epochs = self.options.rate, self.options.epochs
        settings: dict[str, Any] = {"rate": rate, "epochs": epochs, "size": 25, "flips": True}
        return finetune(self.look(side), self.train[side], seed=self.seed, stage=10 * side, **settings)

    def request(self) -> FisherRequest:
        """Return that it is measured by image."""
        return FisherRequest(per="sample", samples=FISHER_SAMPLES["cnn"], chunk=25)


class Written(Problem):
    """A transformer of bytes on two domains of text."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        """Draw samples of each domain; the order of domains is that of the files."""
        self.options, self.seed = options, seed
        self.folder = options.out / "text" / f"seed{seed}"
        data = load_text(options.data_dir, context=128)
        assert data.domains is not None
        rng = random_generator(seed, "samples of text")

        def part(domain: Any, test: bool, count: int) -> Part:
            rows = ((data.domains == domain) & (data.labels.min(1) >= 0)).nonzero()[0]
            chosen = rng.permutation(rows[(rows >= data.train_size) == test])[:count]
            return Part(torch.from_numpy(data.images[chosen]).long(), torch.from_numpy(data.labels[chosen]))

        whole = [part(domain, test=False, count=1000) for domain in (1, 3)]
        self.train = [Part(each.inputs[:-200], each.targets[:-200]) for each in whole]
        self.validation = [Part(each.inputs[-200:], each.targets[-200:]) for each in whole]
        self.test = [part(domain, test=True, count=250) for domain in (1, 3)]
        self._others = [part(domain, test=False, count=600) for domain in (0, 2, 4, 5)]
        self.model = NextByte(gpt(128), 96, seed)

    def base(self) -> None:
        """Give the model the weights that it has after the other four domains."""
        file = self.folder / "base.safetensors"
        if not file.exists():
            others = Part(*(torch.cat([getattr(p, name) for p in self._others]) for name in ("inputs", "targets")))
            finetune(self.model, others, rate=2e-3, epochs=2, size=32, seed=self.seed, stage=20)
            save_file(self.model.state_dict(), file)
        self.load(file)

    def finetune(self, side: int) -> torch.optim.Optimizer:
        """Train the model on a domain."""
        return finetune(self.model, self.train[side], rate=1e-3, epochs=2, size=32, seed=self.seed, stage=10 * side)

    def request(self) -> FisherRequest:
        """Return that it is measured by byte."""
        return FisherRequest(per="token", samples=FISHER_SAMPLES["text"], chunk=25)


PROBLEMS = {"cnn": Pictured, "text": Written}


def plans(problem: Problem, kind: str) -> Iterator[tuple[str, MergePlan]]:
    """Yield the plans that need Fisher files of a kind, by name."""
    models = tuple(PlannedModel(problem.file(side), fisher=problem.file(side, kind)) for side in (0, 1))
    halves = tuple(PlannedModel(problem.file(side), 0.5, problem.file(side, kind)) for side in (0, 1))
    yield "fisher", MergePlan(models, "fisher")
    yield "imm-mode", MergePlan(halves, "imm-mode")
    for per in ("weight", "layer", "model"):
        yield f"became, by {per}", MergePlan(models, "became", per=per)


def measure(options: argparse.Namespace, name: str, seed: int) -> None:
    """Measure what is not there yet."""
    folder = options.out / name / f"seed{seed}"
    if all((folder / f"{part}.json").exists() for part in ("grid", "data", "adam")):
        return
    folder.mkdir(parents=True, exist_ok=True)
    problem: Problem = PROBLEMS[name](options, seed)
    problem.prepare()

    def grid() -> Mapping[str, Any]:
        ends = [load_file(problem.file(side)) for side in (0, 1)]
        curve = {}
        for alpha in GRID:
            mixed = {
                k: v if not v.is_floating_point() else torch.lerp(v, ends[1][k], alpha) for k, v in ends[0].items()
            }
            problem.model.load_state_dict(mixed)
            curve[alpha] = problem.losses(problem.validation)
        best = min(GRID, key=lambda alpha: curve[alpha]["first loss"] + curve[alpha]["second loss"])
        alphas = {"alpha = 0, the first model": 0.0, "alpha = 1, the second model": 1.0, "linear": 0.5, "grid": best}
        found = {label: {**problem.merged(problem.linear(alpha)), "alpha": alpha} for label, alpha in alphas.items()}
        return {**found, "curve": {f"{alpha:.1f}": values for alpha, values in curve.items()}}

    remembered_result(folder / "grid.json", grid)

    def by_rules(kind: str) -> Mapping[str, Any]:
        return {f"{label}, {kind}": problem.merged(plan) for label, plan in plans(problem, kind)}

    for kind in ("data", "adam"):
        remembered_result(folder / f"{kind}.json", partial(by_rules, kind))


def print_table(options: argparse.Namespace, name: str) -> None:
    """Print what is there, mean and standard deviation over seeds."""
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in options.seeds:
        for part in ("grid", "data", "adam"):
            file = options.out / name / f"seed{seed}" / f"{part}.json"
            if file.exists():
                for label, values in remembered_result(file, dict).items():
                    if label != "curve":
                        results.setdefault(label, []).append(values)
    print(f"\n{name}\n\n| merge | seeds | loss, first | loss, second | sum | accuracy, first | second | mean | alpha |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for label, rows in results.items():
        cells = []
        for what, digits in (("loss", 3), ("accuracy", 1)):
            pairs = [[row[f"{side} {what}"] for side in SIDES] for row in rows]
            totals = [sum(pair) if what == "loss" else sum(pair) / 2 for pair in pairs]
            columns = [*zip(*pairs, strict=True), totals]
            cells += [mean_and_spread(list(column), digits) for column in columns]
        alphas = [row.get("alpha", (row["coefficients"].get("") or [0, None])[1]) for row in rows]
        shown = " ".join(f"{alpha:.2f}" for alpha in alphas if alpha is not None)
        print(f"| {label} | {len(rows)} | {' | '.join(cells)} | {shown} |")


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder of CIFAR-100 and of text by domain")
    parser.add_argument("--out", type=Path, default=Path("runs/merging"), help="where models and results are kept")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=40, help="training images a class")
    parser.add_argument("--side", type=int, default=64, help="pixels that images are enlarged to")
    parser.add_argument("--rate", type=float, default=5e-4, help="Adam's, for the CNN")
    parser.add_argument("--epochs", type=int, default=5, help="of fine-tuning the CNN")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.problems:
        if not options.table:
            for seed in options.seeds:
                measure(options, name, seed)
        print_table(options, name)


if __name__ == "__main__":
    main()
