"""How near the time that ``--dry-run`` names comes to that of the run: ``python benchmarks/dry_run.py [--json]``.

Both are processor seconds of this process, on PyTorch: of the perceptron on Split-MNIST, for few epochs. The ratio is
the median over rounds of the estimate over the run's seconds.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from unittest.mock import patch

# So that this checkout is measured, whether or not the package is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from adapters.benchmarks.mnist import load_mnist
from adapters.cli.dryrun import estimated
from adapters.runs.configuration import Configuration
from adapters.torch.run import BACKEND
from became_core.continual import Learner, learn


def ratio(name: str, epochs: int) -> float:
    """Return the estimated time of a run over the time that it takes."""
    values = {"benchmark": "split-mnist", "network": "mlp", "epochs": epochs, "stage2_epochs": epochs // 2}
    configuration = Configuration.of(values, name, "quick")
    method, training = configuration.method(name), configuration.training()
    stream = configuration.stream(load_mnist(), 0)

    def learner() -> Learner:
        return BACKEND.learner("mlp", stream, "cpu", 0)

    estimate = estimated(learner, stream, method, training)
    return sum(estimate.values()) / learn(learner(), stream, method, training).seconds["total"]


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--methods", nargs="+", default=["gpm", "became", "ewc", "trgp", "hat", "packnet"])
    parser.add_argument("--epochs", type=int, default=12, help="of stage 1; stage 2 has half of them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one object of ratios")
    options = parser.parse_args()
    with patch("time.perf_counter", time.process_time):  # other processes have no part in it
        results = {
            name: statistics.median(ratio(name, options.epochs) for _ in range(options.rounds))
            for name in options.methods
        }
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print("| method | estimate over run |\n| --- | ---: |")
    for name, value in results.items():
        print(f"| `{name}` | {value:.2f} |")


if __name__ == "__main__":
    main()
