"""Ten clients with unlike classes: ``python benchmarks/federated.py [--rounds 20] [--seeds 0 1 2] [--json]``.

The digits of MNIST that come with this package, 4,000 to train and 1,000 to test, are sorted by label and cut into 20
pieces; each client has two of them, which the seed draws, so that most have two digits of ten. Flower's own FedAvg and
FedProx, and our strategy with several rules, train the same perceptron in equal rounds, from equal weights, with equal
batches, in one process. It needs the extras flower and torch.

Convention: accuracy in percent on the test digits, of the merged model, as mean ± standard deviation over seeds. The
Fisher information is the "true" one: where a client has two digits, it soon fits them, and the empirical one vanishes.
"""

import argparse
import json
import logging
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the checkout is measured, installed or not

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedProx

from adapters.backend.batches import Reader
from adapters.benchmarks.mnist import load_mnist
from adapters.flower import LocalGrid, MergeStrategy, answer, record_of, weights_of
from adapters.torch.data_loss import DataLoss
from became_core import Became, FisherMerge
from became_core.continual import random_generator
from became_core.curvature import Categorical
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


def network(seed: int) -> nn.Sequential:
    """Return a perceptron with two hidden layers."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def digits() -> tuple[Tensor, Tensor, int]:
    """Return images, labels, and how many of them are for training; they come first."""
    dataset = load_mnist()
    images = torch.from_numpy(np.asarray(dataset.images, np.float32) / 255)
    return (images - 0.13) / 0.31, torch.from_numpy(np.asarray(dataset.labels)), dataset.train_size


def parts(labels: Tensor, seed: int) -> list[Tensor]:
    """Return the rows of each client."""
    pieces = torch.argsort(labels, stable=True).chunk(CLIENTS * PIECES)
    drawn = random_generator(seed, "which pieces a client has").permutation(len(pieces)).reshape(CLIENTS, PIECES)
    return [torch.cat([pieces[piece] for piece in of_client]) for of_client in drawn]


def client_app(images: Tensor, labels: Tensor, rows: list[Tensor], seed: int) -> ClientApp:
    """Return what each client does: it trains, and answers with what the strategy can use."""
    app = ClientApp()

    def train(message: Message, context: Context) -> Message:
        part, config = int(context.node_config["partition-id"]), message.content["config"]
        model, mine = network(seed), rows[part]
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
        measured = DataLoss(model, Categorical(), Reader(None, None), checks=False, shows=False, fisher="true")
        fisher, _ = measured.fisher([(images[mine], labels[mine])], with_memory=False)
        return answer(message, model.state_dict(), fisher, len(mine), **{"partition-id": part})

    app.train()(train)
    return app


def accuracies(name: str, seed: int, rounds: int) -> list[float]:
    """Return the accuracy after each round."""
    images, labels, train_size = digits()
    app = client_app(images, labels, parts(labels[:train_size], seed), seed)
    model, after = network(seed), list[float]()

    def evaluate(server_round: int, arrays: ArrayRecord) -> None:
        model.load_state_dict({name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()})
        with torch.no_grad():
            guessed = model(images[train_size:]).argmax(1)
        if server_round:
            after.append(100 * float((guessed == labels[train_size:]).float().mean()))

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
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    shown = sorted({max(1, options.rounds // 4), max(1, options.rounds // 2), options.rounds})
    if not options.json:
        print("| strategy |" + "".join(f" round {each} |" for each in shown))
        print("| --- |" + " ---: |" * len(shown))
    table = {}
    for name in STRATEGIES:
        after = np.array([accuracies(name, seed, options.rounds) for seed in options.seeds])
        means, deviations = after.mean(0), after.std(0, ddof=1) if len(after) > 1 else np.zeros(after.shape[1])
        table[name] = {f"round_{each}": [float(means[each - 1]), float(deviations[each - 1])] for each in shown}
        if not options.json:
            cells = "".join(f" {means[each - 1]:.1f} ± {deviations[each - 1]:.1f} |" for each in shown)
            print(f"| {name} |{cells}", flush=True)
    if options.json:
        print(json.dumps(table))


if __name__ == "__main__":
    main()
