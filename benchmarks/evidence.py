"""Could the evidence choose the scale rho of the old posterior? What it would choose, at every merge of ``became``.

    python benchmarks/evidence.py --seeds 0 1 2
    python benchmarks/evidence.py --benchmark split-cifar100 --first 3 --epochs 4 --stage2-epochs 2 --data-dir DATA

docs/mathematics.md has the formulas and says why the answer is no. A line of the table is a merge:

- the samples n and the weights d that both sides have curvature for, and n o.F.o, which d would have to be below;
- the mean over weights of n F o^2, weighed by F / Lambda: above 1, the exact evidence falls where rho is large;
- rho at the maximum of the evidence with the weights held at theta_hat, and of the exact one ("inf": it has none);
- the alpha of the run, that with the old side four times as strong, which is the bound of ``--temper``, and the best of
  eleven traced alphas; and how far the first two are below the best, in points of test accuracy.

Convention: F and Lambda are diagonals, means over samples, summed over tasks; o = theta_hat - mu.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the checkout is measured, installed or not

from adapters.cli.jobs import load_data
from adapters.runs.configuration import Configuration
from adapters.torch.run import BACKEND
from became_core.arrays import Params, difference
from became_core.continual import learn
from became_core.laplace import LaplacePosterior, LocalLoss, Merged, MergeRule

STRONGER = 4.0
COLUMNS = "seed task n d n_oFo weighted rho_held rho_exact alpha alpha_at_4 best regret regret_at_4"


@dataclass(frozen=True)
class Observed(MergeRule):
    """A rule whose models and losses are observed; it merges as the rule does.

    Attributes:
        rule: the rule.
        lines: what is observed is added to this list, merge by merge.
    """

    rule: MergeRule
    lines: list[dict[str, float]]

    def merge(self, models: Sequence[Params], losses: Sequence[LocalLoss]) -> Merged:
        """Return what the rule returns."""
        merged = self.rule.merge(models, losses)
        old, new = losses
        stronger = LaplacePosterior(old.mean, old.diagonal() * STRONGER)
        line = scales(old, new, len(new.task.train))  # type: ignore[attr-defined]  # of a run, it is a Measurement
        alphas: list[Any] = [merged.alpha, self.rule.merge(models, (stronger, new)).alpha]
        self.lines.append(line | {"alpha": float(alphas[0]), "alpha_at_4": float(alphas[1])})
        return merged


def scales(old: LocalLoss, new: LocalLoss, samples: int) -> dict[str, float]:
    """Return what the evidence of a task depends on, and the scales of the old posterior at its maximum."""
    sides: list[Any] = [old.diagonal().values, new.diagonal().values, difference(new.mean, old.mean)]
    names = sorted(sides[0].keys() & sides[1].keys())
    p, h, offset = (np.concatenate([np.asarray(side[it], np.float64).ravel() for it in names]) for side in sides)
    both = (p > 0) & (h > 0)  # where one side is flat, its scale changes nothing
    p, h, square = samples * p[both], samples * h[both], offset[both] ** 2

    def held(rho: float) -> float:
        return float(np.sum(h / (rho * p + h)) - rho * p @ square)

    def exact(rho: float) -> float:
        share = h / (rho * p + h)
        return float(share @ (1 - rho * p * square * share))

    return {
        **{"n": samples, "d": len(h), "n_oFo": float(h @ square)},
        "weighted": float(np.average(h * square, weights=h / p)),
        **{"rho_held": maximum(held), "rho_exact": maximum(exact)},
    }


def maximum(slope: Callable[[float], float], low: float = 1e-8, high: float = 1e12) -> float:
    """Return where a slope by log rho falls through zero, in [low, high]; infinity if it is positive to the end."""
    if slope(high) > 0:
        return math.inf
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.sqrt(low * high)


def observed_run(configuration: Configuration, data_dir: Path | None, seed: int) -> list[dict[str, float]]:
    """Return a line for each merge of a run of ``became``."""
    settings = tuple(configuration.data_settings.items())
    stream = configuration.stream(load_data(configuration.benchmark, data_dir, settings), seed)
    learner = BACKEND.learner(configuration.network, stream, "auto", seed, norm=configuration.norm)
    method, lines = configuration.method("became"), list[dict[str, float]]()
    assert method.rule is not None
    method = replace(method, rule=Observed(method.rule, lines))
    record = learn(learner, stream, method, configuration.training(), seed=seed)
    for number, (line, path) in enumerate(zip(lines, record.paths, strict=True)):
        alphas: NDArray[np.float64] = np.array([point.alpha for point in path.points])
        accuracy = np.array([point.accuracy for point in path.points])
        regrets = [accuracy.max() - np.interp(line[name], alphas, accuracy) for name in ("alpha", "alpha_at_4")]
        line |= {"seed": seed, "task": number + 2, "best": float(alphas[accuracy.argmax()])}
        line |= {"regret": float(regrets[0]), "regret_at_4": float(regrets[1])}
    return lines


def main() -> None:
    """Print a line for each merge, and the means of both regrets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", default="split-mnist")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    for name in ("first", "epochs", "stage2-epochs"):
        parser.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS)
    values = vars(parser.parse_args())
    data_dir, seeds = values.pop("data_dir"), values.pop("seeds")
    configuration = Configuration.of({**values, "path_points": 11}, "became")
    BACKEND.prepare()
    print(COLUMNS)
    regrets = []
    for seed in seeds:
        for line in observed_run(configuration, data_dir, seed):
            print(" ".join(f"{line[name]:.4g}" for name in COLUMNS.split()), flush=True)
            regrets.append((line["regret"], line["regret_at_4"]))
    print("mean regrets {:.2f} {:.2f}".format(*np.mean(regrets, axis=0)))


if __name__ == "__main__":
    main()
