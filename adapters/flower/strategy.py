"""A strategy of Flower that merges clients by a rule of this library: by their curvature, not by their counts alone.

    strategy = MergeStrategy(FisherMerge())
    strategy.start(grid, initial_arrays=record_of(weights), num_rounds=20)

Clients answer with ``answer``. One that fails, does not answer or sends what cannot be is left out, and a sentence says
so. A round repeats to the bit: nodes are drawn by the seed and the round, and answers are merged in an order that does
not depend on when they came.

What it guards against, and what not: an answer is checked before it is used, nothing in it is executed, no client has
more than ``cap`` times the median curvature, and no round is merged of fewer than ``min_clients`` clients, whose models
could be read off the result. A client that sends plausible weights that harm is not recognised. Encryption and
authentication are Flower's: give its SuperLink certificates, and start it insecurely in tests alone.
"""

import logging
import math
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from adapters.flower.contributions import Arrays, Contribution, limited, merged, why_not
from adapters.flower.messages import COUNT, METRICS, WEIGHTS, record_of, what_came
from became_core import Became, BecameError
from became_core.continual import random_generator
from became_core.laplace import MergeRule, NativeExpansion

__all__ = ["MergeStrategy"]

LOGGER = logging.getLogger("flwr")  # which Flower shows
PARTITION = "partition-id"


class MergeStrategy(FedAvg):  # type: ignore[misc] # Flower is as if absent to the type checker
    """Federated rounds, each of which ends with a merge by a rule.

    Attributes:
        rule: how clients are merged.
        left_out: by round, a sentence on each client that was left out or limited.
    """

    def __init__(
        self,
        rule: MergeRule | None = None,
        *,
        seed: int = 0,
        cap: float | None = 10.0,
        min_clients: int = 2,
        without_fisher: Collection[str] = (),
        **options: Any,
    ) -> None:
        """Prepare the rounds.

        Args:
            rule: ``Became(NativeExpansion())`` if not given; ``FisherMerge()``, ``ModeIMM()``, or another. All clients
                are models, and each one's loss is its Laplace posterior: Fisher information times its share of samples.
            seed: draws which nodes take part, where not all do.
            cap: how many times the median curvature a client may claim; None for no limit.
            min_clients: the number of clients below which a round is not merged and the weights stay.
            without_fisher: the names for which clients send no Fisher information; they are averaged by samples.
            **options: of Flower's ``FedAvg``: ``fraction_train``, ``min_train_nodes`` and others.

        Raises:
            BecameError: if a number cannot be used.
        """
        super().__init__(weighted_by_key=COUNT, arrayrecord_key=WEIGHTS, **options)
        if cap is not None and not cap >= 1:
            raise BecameError(f"cap is {cap}; it must be at least 1, or None for no limit.")
        if min_clients < 1:
            raise BecameError(f"min_clients is {min_clients}; it must be at least 1.")
        self.rule: MergeRule = Became(NativeExpansion()) if rule is None else rule
        self.left_out: dict[int, list[str]] = {}
        self._seed, self._cap, self._min_clients = seed, cap, min_clients
        self._without_fisher = frozenset(without_fisher)
        self._sent: Arrays = {}
        self._asked: frozenset[int] = frozenset()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return a message for each node that is to train."""
        nodes = self._nodes(grid, "train", server_round, self.fraction_train, self.min_train_nodes)
        self._sent = {name: array.numpy() for name, array in arrays.items()}
        self._asked = frozenset(nodes)
        return self._messages(nodes, MessageType.TRAIN, server_round, arrays, config)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return a message for each node that is to evaluate."""
        nodes = self._nodes(grid, "evaluate", server_round, self.fraction_evaluate, self.min_evaluate_nodes)
        return self._messages(nodes, MessageType.EVALUATE, server_round, arrays, config)

    def _nodes(self, grid: Grid, purpose: str, server_round: int, fraction: float, min_clients: int) -> list[int]:
        """Return the nodes that take part, in order; wait until there are enough."""
        if not fraction:
            return []
        while len(nodes := sorted(grid.get_node_ids())) < max(self.min_available_nodes, min_clients):
            time.sleep(1)
        count = min(max(int(len(nodes) * fraction), min_clients), len(nodes))
        drawn = random_generator(self._seed, f"nodes that {purpose}", server_round).permutation(len(nodes))[:count]
        return [nodes[index] for index in sorted(drawn)]

    def _messages(
        self, nodes: Sequence[int], kind: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> list[Message]:
        config = ConfigRecord({**config, "server-round": server_round})
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return [Message(content, dst_node_id=node, message_type=kind) for node in nodes]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the merged weights and the mean of the metrics; None for both if too few clients are left."""
        sentences: list[str] = []
        contributions: list[Contribution] = []
        messages: list[Message] = []
        answers = list(replies)
        for message in self._in_order(answers, sentences, self._asked):
            try:
                contribution = what_came(message, self._sent)
                reason = why_not(contribution, self._sent, self._without_fisher)
            except BecameError as error:
                reason = str(error)
            if reason is None:
                contributions.append(contribution)
                messages.append(message)
            else:
                sentences.append(f"node {message.metadata.src_node_id} is left out: {reason}.")
        absent = self._asked - {message.metadata.src_node_id for message in answers}
        sentences += [f"node {node} is left out: it has not answered." for node in sorted(absent)]
        result: tuple[ArrayRecord | None, MetricRecord | None] = None, None
        if len(contributions) < self._min_clients:
            sentences.append(
                f"round {server_round} is not merged: {len(contributions)} clients are left of at least "
                f"{self._min_clients}."
            )
        else:
            within, changes = limited(contributions, self._cap)
            sentences += changes
            result = record_of(merged(within, self.rule)), _mean_metrics(messages)
        self.left_out[server_round] = sentences
        for sentence in sentences:
            LOGGER.warning("%s", sentence)
        return result

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the mean of the metrics, by samples; None if there are none."""
        sentences: list[str] = []
        messages = [message for message in self._in_order(replies, sentences) if METRICS in message.content]
        for sentence in sentences:
            LOGGER.warning("%s", sentence)
        return _mean_metrics(messages)

    def _in_order(
        self, replies: Iterable[Message], sentences: list[str], asked: frozenset[int] | None = None
    ) -> list[Message]:
        """Return the answers that are no errors, one of each node, in an order that does not depend on time.

        Args:
            replies: the answers.
            sentences: takes in one on each node that is left out.
            asked: the nodes that were; None if that does not matter.
        """
        by_node: dict[int, list[Message]] = {}
        for message in replies:
            by_node.setdefault(message.metadata.src_node_id, []).append(message)
        good = []
        for node, messages in sorted(by_node.items()):
            if asked is not None and node not in asked:
                sentences.append(f"node {node} is left out: it was not asked.")
            elif len(messages) > 1:
                sentences.append(f"node {node} is left out: it has answered {len(messages)} times.")
            elif messages[0].has_error():
                sentences.append(f"node {node} is left out: it failed ({messages[0].error.reason}).")
            else:
                good.append(messages[0])
        # Flower may give nodes other numbers in every run; what a client calls its part of the data stays.
        parts: list[Any] = [message.content.get(METRICS, {}).get(PARTITION) for message in good]
        if all(type(part) is int for part in parts):
            return [good[index] for index in sorted(range(len(good)), key=parts.__getitem__)]
        return good


def _mean_metrics(messages: Sequence[Message]) -> MetricRecord | None:
    """Return the means over samples of the numbers that all answers have and that are finite."""
    records = [message.content[METRICS] for message in messages]
    counts = [record.get(COUNT) for record in records]
    good = [
        (record, count) for record, count in zip(records, counts, strict=True) if isinstance(count, int) and count > 0
    ]
    if not good:
        return None
    total = sum(count for _, count in good)
    means = MetricRecord()
    for name in good[0][0]:
        values = [record.get(name) for record, _ in good]
        if name != COUNT and all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            means[name] = sum(value * (count / total) for value, (_, count) in zip(values, good, strict=True))
    return means
