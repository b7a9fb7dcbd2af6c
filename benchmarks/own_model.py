"""A CNN with real weights, fine-tuned on ten classes of CIFAR-100 and then on ten others, by ``Continual`` and others.

EfficientNet-Lite0 first learns a group of ten classes; all methods start from there, and learn a second group. Each has
the same images, epochs, optimiser and rate (``real_models.py``), which was not tuned. EWC alone has a setting that was:
its strength is the best of two by the mean accuracy on validation images of both groups. Every result is written when
it is there, and a run that was stopped goes on.

| method | epochs on the second group |
| --- | --- |
| ``before`` | none |
| ``plain`` | all |
| ``ewc`` | all, with the penalty lambda / 2 sum F (theta - theta_old)^2 |
| ``mean of before and plain`` | the mean of these two models' weights |
| ``stable`` | all, in ``learning.stable(...)`` |
| ``stable, its half`` | half of them, in ``learning.stable(...)``: theta_gp |
| ``plastic`` | from there the other half, in ``learning.plastic()``: theta_hat |
| ``half`` | the mean of theta_gp and theta_hat |
| ``merged`` | what ``learning.merge`` gives: theta* |
| ``merged, sampled Fisher`` | likewise, where the old Fisher information is of labels drawn from the model itself |
| ``grid`` | the best of eleven alphas by accuracy on validation images of both groups, which no method may see |

Convention: accuracies in percent; "of ten" among the classes of the image's own group, "of twenty" among all.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from adapters.torch import Continual
from became_core import merge
from benchmarks.real_models import (
    GROUPS,
    GroupedClassifier,
    Part,
    Pictures,
    finetune,
    lite0,
    mean_and_spread,
    remembered_result,
)

METHODS = (
    "before",
    "plain",
    "ewc",
    "mean of before and plain",
    "stable",
    "stable, its half",
    "plastic",
    "half",
    "merged",
    "merged, sampled Fisher",
    "grid",
)
RATE, STRENGTHS = 5e-4, (1e3, 1e4)
BATCH = 25
MEASURED = 200  # images of the second group that a merge looks at

Weights = dict[str, Tensor]


class Experiment:
    """One seed.

    Attributes:
        pictures: its classes and images.
        model: takes all weights in turn.
    """

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        """Learn the first group, or read the weights of an earlier run."""
        self.options, self.seed = options, seed
        self.pictures = Pictures(options.data_dir, seed, a_class=options.images, side=options.side)
        self.model = lite0(seed, self.pictures.others)
        file = options.out / f"seed{seed}" / "before.safetensors"
        if not file.exists():
            self.train(0, options.first_epochs)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(self.weights(), file)
        self.before = load_file(file)
        self.fisher: Weights | None = None

    def train(self, group: int, epochs: int, stage: int = 0, **settings: Any) -> None:
        """Train on the images of a group."""
        self.model.group = GROUPS[group]
        settings |= {"rate": RATE, "epochs": epochs, "size": BATCH, "flips": True}
        finetune(self.model, self.pictures.train[group], seed=self.seed, stage=stage + 10 * group, **settings)

    def weights(self) -> Weights:
        """Return copies of the model's weights."""
        return {name: value.detach().clone().contiguous() for name, value in self.model.named_parameters()}

    @torch.no_grad()
    def place(self, weights: Weights) -> GroupedClassifier:
        """Give the model these weights."""
        for name, value in self.model.named_parameters():
            value.copy_(weights[name])
        return self.model

    def accuracies(self, weights: Weights, parts: list[Part]) -> dict[str, float]:
        """Return the accuracies of weights on both groups, of ten and of twenty classes."""
        model, found = self.place(weights), {}
        model.group = slice(None)
        for name, group, part in zip(("old", "new"), GROUPS, parts, strict=True):
            with torch.no_grad():
                logits = torch.cat([model(inputs) for inputs in torch.split(part.inputs, BATCH)])
            for of, classes, first in (("", group, 0), (" of twenty", slice(None), group.start)):
                right = logits[:, classes].argmax(1) == part.targets + first
                found[name + of] = 100 * float(right.float().mean())
        return found

    def plain(self) -> Weights:
        """Return the weights after plain fine-tuning."""
        self.place(self.before)
        self.train(1, self.options.epochs)
        return self.weights()

    def remembering(self, fisher: Literal["empirical", "sampled"] = "empirical") -> Continual:
        """Return the method around the model, which remembers the first group."""
        self.place(self.before)
        learning = Continual(self.model, "categorical", fisher=fisher, progress=False)
        self.model.group = GROUPS[0]
        learning.remember(self.pictures.train[0].batches(BATCH))
        return learning

    def ewc(self, strength: float) -> Weights:
        """Return the weights after fine-tuning with the penalty of EWC (Kirkpatrick et al., 2017)."""
        if self.fisher is None:
            posterior = self.remembering().posterior
            assert posterior is not None
            self.fisher = dict(posterior.precision.diagonal())
        fisher, old = self.fisher, self.before
        self.place(old)

        def penalty() -> Tensor:
            terms = [(fisher[n] * (value - old[n]).square()).sum() for n, value in self.model.named_parameters()]
            return strength / 2 * torch.stack(terms).sum()

        self.train(1, self.options.epochs, extra=penalty)
        return self.weights()

    def stable(self, learning: Continual, epochs: int) -> Weights:
        """Return the weights after stable training on the second group."""
        self.place(self.before)
        optimizer = torch.optim.Adam(self.model.parameters(), RATE)
        with learning.stable(optimizer):
            self.train(1, epochs, optimizer=optimizer)
        return self.weights()

    def merging(self) -> dict[str, Any]:
        """Return the results of the two stages and of their merges, and of stable training alone."""
        learning, half = self.remembering(), self.options.epochs // 2
        results: dict[str, Any] = {"coverage": learning.coverage.summary, "check": str(learning.checked)}
        results["stable"] = self.accuracies(self.stable(learning, self.options.epochs), self.pictures.test)
        theta_gp = self.stable(learning, half)
        with learning.plastic():
            self.train(1, self.options.epochs - half, stage=1)
        theta_hat, new = self.weights(), self.pictures.train[1].batches(BATCH)[: MEASURED // BATCH]
        reports = {"merged": learning.merge(new)}
        learning = self.remembering("sampled")
        self.place(theta_gp)
        with learning.stable(torch.optim.SGD(self.model.parameters())):
            pass  # what stable training has led to is there
        self.place(theta_hat)
        self.model.group = GROUPS[1]
        reports["merged, sampled Fisher"] = learning.merge(new)
        results["reports"] = {name: str(report) for name, report in reports.items()}
        curve = {}
        for alpha in (k / 10 for k in range(11)):
            found = self.accuracies(_mixed(theta_gp, theta_hat, alpha), self.pictures.validation)
            curve[alpha] = (found["old"], found["new"])
        best = max(curve, key=lambda alpha: sum(curve[alpha]))
        results["curve"] = {f"{alpha:.1f}": values for alpha, values in curve.items()}
        alphas = {"stable, its half": 0.0, "plastic": 1.0, "half": 0.5, "grid": best}
        alphas |= {name: report.alpha for name, report in reports.items()}
        for name, alpha in alphas.items():
            mixed = _mixed(theta_gp, theta_hat, alpha)
            results[name] = {**self.accuracies(mixed, self.pictures.test), "alpha": alpha}
        return results


def _mixed(theta_gp: Weights, theta_hat: Weights, alpha: float) -> Weights:
    return dict(merge(theta_gp, theta_hat, alpha))


def run_seed(options: argparse.Namespace, seed: int) -> None:
    """Measure what is not there yet."""
    folder = options.out / f"seed{seed}"
    if all((folder / f"{name}.json").exists() for name in ("before", "plain", "ewc", "merging")):
        return
    experiment = Experiment(options, seed)
    test = experiment.pictures.test
    remembered_result(folder / "before.json", lambda: {"before": experiment.accuracies(experiment.before, test)})

    def plain() -> Mapping[str, Any]:
        after = experiment.plain()
        mean = _mixed(experiment.before, after, 0.5)
        models = {"plain": after, "mean of before and plain": mean}
        return {name: experiment.accuracies(weights, test) for name, weights in models.items()}

    remembered_result(folder / "plain.json", plain)
    remembered_result(folder / "merging.json", experiment.merging)

    def ewc() -> Mapping[str, Any]:
        models = {strength: experiment.ewc(strength) for strength in STRENGTHS}
        found = {k: experiment.accuracies(weights, experiment.pictures.validation) for k, weights in models.items()}
        best = max(STRENGTHS, key=lambda strength: found[strength]["old"] + found[strength]["new"])
        return {"ewc": experiment.accuracies(models[best], test), "strength": best, "validation": found}

    remembered_result(folder / "ewc.json", ewc)


def print_table(options: argparse.Namespace) -> None:
    """Print what is there, mean and standard deviation over seeds."""
    results: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        for name in ("before", "plain", "ewc", "merging"):
            file = options.out / f"seed{seed}" / f"{name}.json"
            if file.exists():
                for method, values in remembered_result(file, dict).items():
                    if isinstance(values, dict) and "old" in values:
                        results.setdefault(method, []).append(values)
    print("| method | seeds | old | new | mean | old, of twenty | new, of twenty | alpha |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for method in METHODS:
        if method in results:
            rows = results[method]
            cells = [[row[key] for row in rows] for key in ("old", "new")]
            cells.append([(row["old"] + row["new"]) / 2 for row in rows])
            cells += [[row[key] for row in rows] for key in ("old of twenty", "new of twenty")]
            alphas = " ".join(f"{row['alpha']:.2f}" for row in rows if "alpha" in row)
            texts = [mean_and_spread(cell, 1) for cell in cells]
            print(f"| {method} | {len(rows)} | {' | '.join(texts)} | {alphas} |")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder of CIFAR-100, as became run takes it")
    parser.add_argument("--out", type=Path, default=Path("runs/own_model"), help="where results are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=40, help="training images a class")
    parser.add_argument("--side", type=int, default=64, help="pixels that images are enlarged to")
    parser.add_argument("--first-epochs", type=int, default=5, help="on the first group")
    parser.add_argument("--epochs", type=int, default=6, help="on the second group")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        for seed in options.seeds:
            run_seed(options, seed)
    print_table(options)


if __name__ == "__main__":
    main()
