"""Ten clients with unlike classes: ``python benchmarks/federated.py [--rounds 20] [--seeds 0 1 2] [--json]``.

The digits of MNIST that come with this package, 4,000 to train and 1,000 to test, are sorted by label and cut into 20
pieces; each client has two of them, which the seed draws, so that most have two digits of ten. With ``--data-dir``, the
images are CIFAR-100's, the first 100 to train and 20 to test of each class, so that each client has ten classes of a
hundred, and the network is a small CNN. Flower's own FedAvg and FedProx, and our strategy with several rules, train the
same network in equal rounds, from equal weights, with equal batches, in one process. It needs the extras flower and
torch, and for CIFAR-100 the extra run.

Convention: accuracy in percent on the test images, of the merged model, as mean ± standard deviation over seeds. The
Fisher information is the "true" one: where a client has two digits, it soon fits them, and the empirical one vanishes.
Of a hundred classes it is "sampled", whose expectation is the true one.
"""

import argparse
import json
import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the checkout is measured, installed or not

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedProx

from adapters.backend.batches import Reader
from adapters.benchmarks.cifar import load_cifar100
from adapters.benchmarks.mnist import load_mnist
from adapters.flower import LocalGrid, MergeStrategy, answer, record_of, weights_of
from adapters.torch.data_loss import DataLoss
from became_core import Became, FisherMerge
from became_core.continual import random_generator
from became_core.curvature import Categorical, FisherTargets
from became_core.laplace import NativeExpansion

CLIENTS, PIECES, EPOCHS, BATCH, RATE = 10, 2, 2, 20, 0.05
ALL: dict[str, Any] = {"fraction_evaluate": 0.0}
STRATEGIES: dict[str, Callable[[], Any]] = {
    "FedAvg": lambda: FedAvg(**ALL),
    "FedProx, mu 0.1": lambda: FedProx(proximal_mu=0.1, **ALL),
    "FedProx, mu 1": lambda: FedProx(proximal_mu=1.0, **ALL),
    "FisherMerge (= ModeIMM)": lambda: MergeStrategy(FisherMerge(), **ALL),
    "Became": lambda: MergeStrategy(Became(NativeExpansion()), **ALL),
    "FisherMerge, no cap": lambda: MergeStrategy(FisherMerge(), cap=None, **ALL),
}


class Problem(NamedTuple):
    """What the clients learn.

    Attributes:
        images: those for training and then those for testing.
        labels: their labels.
        train_size: how many are for training.
        network: the layers, made anew by each call.
        fisher: which Fisher information the clients measure.
    """

    images: Tensor
    labels: Tensor
    train_size: int
    network: Callable[[], nn.Sequential]
    fisher: FisherTargets

    def seeded_network(self, seed: int) -> nn.Sequential:
        """Return the network, with the weights that a seed gives it."""
        torch.manual_seed(seed)
        return self.network()


def digits() -> Problem:
    """Return the digits, and a perceptron with two hidden layers."""
    dataset = load_mnist()
    images = torch.from_numpy(np.asarray(dataset.images, np.float32) / 255)
    labels = torch.from_numpy(np.asarray(dataset.labels))
    return Problem((images - 0.13) / 0.31, labels, dataset.train_size, perceptron, "true")


def perceptron() -> nn.Sequential:
    """Return a perceptron with two hidden layers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def photographs(data_dir: Path) -> Problem:
    """Return images of CIFAR-100, and a CNN of two convolutions."""
    dataset = load_cifar100(data_dir)
    labels = np.asarray(dataset.labels)
    rows = [
        first + np.concatenate([np.flatnonzero(part == label)[:count] for label in range(100)])
        for first, part, count in (
            (0, labels[: dataset.train_size], 100),
            (dataset.train_size, labels[dataset.train_size :], 20),
        )
    ]
    taken = np.concatenate(rows)
    images = torch.from_numpy(np.asarray(dataset.images[taken], np.float32) / 255)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (dataset.mean, dataset.std))
    return Problem((images - mean) / std, torch.from_numpy(labels[taken]), len(rows[0]), small_cnn, "sampled")


def small_cnn() -> nn.Sequential:
    """Return a CNN of two convolutions and two linear layers, without batch norm."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 5, stride=2), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(64 * 6 * 6, 128), nn.ReLU(), nn.Linear(128, 100)),
    )


def parts(labels: Tensor, seed: int) -> list[Tensor]:
    """Return the rows of each client."""
    pieces = torch.argsort(labels, stable=True).chunk(CLIENTS * PIECES)
    drawn = random_generator(seed, "which pieces a client has").permutation(len(pieces)).reshape(CLIENTS, PIECES)
    return [torch.cat([pieces[piece] for piece in of_client]) for of_client in drawn]


def client_app(problem: Problem, rows: list[Tensor], seed: int) -> ClientApp:
    """Return what each client does: it trains, and answers with what the strategy can use."""
    app, images, labels = ClientApp(), problem.images, problem.labels

    def train(message: Message, context: Context) -> Message:
        part, config = int(context.node_config["partition-id"]), message.content["config"]
        model, mine = problem.seeded_network(seed), rows[part]
        sent = {name: torch.from_numpy(value) for name, value in weights_of(message).items()}
        model.load_state_dict(sent)
        optimizer = torch.optim.SGD(model.parameters(), RATE)
        for epoch in range(EPOCHS):
            draw = random_generator(seed, "batches of a client", int(config["server-round"]), part, epoch)
            for batch in torch.split(torch.from_numpy(draw.permutation(len(mine))), BATCH):
                loss = functional.cross_entropy(model(images[mine[batch]]), labels[mine[batch]])
                for name, value in model.named_parameters():
                    loss = loss + config.get("proximal-mu", 0.0) / 2 * (value - sent[name]).square().sum()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        if not config["fisher"]:
            metrics = MetricRecord({"num-examples": len(mine)})
            return Message(RecordDict({"arrays": record_of(model.state_dict()), "metrics": metrics}), reply_to=message)
        measured = DataLoss(model, Categorical(), Reader(None, None), checks=False, shows=False, fisher=problem.fisher)
        fisher, _ = measured.fisher([(images[mine], labels[mine])], with_memory=False)
        return answer(message, model.state_dict(), fisher, len(mine), **{"partition-id": part})

    app.train()(train)
    return app


def accuracies(problem: Problem, name: str, seed: int, rounds: int) -> list[float]:
    """Return the accuracy after each round."""
    tests = slice(problem.train_size, None)
    app = client_app(problem, parts(problem.labels[: problem.train_size], seed), seed)
    model, after = problem.seeded_network(seed), list[float]()

    def evaluate(server_round: int, arrays: ArrayRecord) -> None:
        model.load_state_dict({name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()})
        with torch.no_grad():
            guessed = model(problem.images[tests]).argmax(1)
        if server_round:
            after.append(100 * float((guessed == problem.labels[tests]).float().mean()))

    random.seed(seed)  # with which Flower's own strategies order their nodes
    strategy = STRATEGIES[name]()
    config = ConfigRecord({"fisher": isinstance(strategy, MergeStrategy)})
    initial = record_of(model.state_dict())
    strategy.start(LocalGrid(app, CLIENTS), initial, rounds, train_config=config, evaluate_fn=evaluate)
    for sentence in sorted({each for told in getattr(strategy, "left_out", {}).values() for each in told}):
        print(f"{name}, seed {seed}: {sentence}", file=sys.stderr)
    return after


def main() -> None:
    """Print a row for each strategy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data-dir", type=Path, help="learn CIFAR-100, which this folder holds, and not the digits")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    problem = digits() if options.data_dir is None else photographs(options.data_dir)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    shown = sorted({max(1, options.rounds // 4), max(1, options.rounds // 2), options.rounds})
    if not options.json:
        print("| strategy |" + "".join(f" round {each} |" for each in shown))
        print("| --- |" + " ---: |" * len(shown))
    table = {}
    for name in STRATEGIES:
        after = np.array([accuracies(problem, name, seed, options.rounds) for seed in options.seeds])
        means, deviations = after.mean(0), after.std(0, ddof=1) if len(after) > 1 else np.zeros(after.shape[1])
        table[name] = {f"round_{each}": [float(means[each - 1]), float(deviations[each - 1])] for each in shown}
        if not options.json:
            cells = "".join(f" {means[each - 1]:.1f} ± {deviations[each - 1]:.1f} |" for each in shown)
            print(f"| {name} |{cells}", flush=True)
    if options.json:
        print(json.dumps(table))


if __name__ == "__main__":
    main()
