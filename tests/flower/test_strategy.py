"""Rounds with Flower's own messages: they repeat to the bit, and whoever fails or lies is left out with a sentence."""

import io
import os
import random
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed; the extra flower has it: nox -s federation")

from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from adapters.flower import LocalGrid, MergeStrategy, answer, record_of, weights_of
from became_core import BecameError, FisherMerge

START = {"w": np.zeros(4, np.float32)}
KILLS = int(os.environ.get("BECAME_KILLS", "3"))


def app_of(change: Any = lambda part, answered, message: answered) -> ClientApp:
    """Clients that each move the weights towards their own part; one of them is changed."""
    app = ClientApp()

    def train(message: Message, context: Any) -> Message:
        part = int(context.node_config["partition-id"])
        weights = {"w": (weights_of(message)["w"] * 0.5 + part / 3).astype(np.float32)}
        fisher = {"w": np.full(4, 1 / (1 + part), np.float32)}
        return change(part, answer(message, weights, fisher, 10 + part, loss=float(part)), message)

    def evaluate(message: Message, context: Any) -> Message:
        metrics = MetricRecord({"num-examples": 10, "accuracy": 0.5 if context.node_id > 1 else float("nan")})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    app.train()(train)
    app.evaluate()(evaluate)
    return app


class Shuffled(LocalGrid):
    """Its nodes answer in any order."""

    order = random.Random(0)

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        answers = list(super().send_and_receive(messages, timeout=timeout))
        self.order.shuffle(answers)
        return answers


def test_a_record_keeps_the_shapes_of_arrays() -> None:
    """A count of batches has no axis, and an array that was transposed lies in the order of its axes."""
    arrays = {"steps": np.asarray(4), "turned": np.arange(6.0).reshape(2, 3).T}
    record = record_of(arrays)
    for name, value in arrays.items():
        assert record[name].numpy().shape == tuple(record[name].shape) == value.shape
        np.testing.assert_array_equal(record[name].numpy(), value)


def test_rounds_repeat_to_the_bit_in_whatever_order_answers_come() -> None:
    final = []
    for _ in range(3):
        strategy = MergeStrategy(fraction_train=0.5, seed=1)
        result = strategy.start(Shuffled(app_of(), 8), record_of(START), num_rounds=3)
        final.append(result.arrays["w"].numpy().tobytes())
        assert strategy.left_out == {1: [], 2: [], 3: []}
        assert set(result.train_metrics_clientapp[3]) == {"loss"}
        assert 3 in result.evaluate_metrics_clientapp
    assert len(set(final)) == 1


def with_array(answered: Message, array: Array) -> Message:
    answered.content["arrays"] = ArrayRecord({"w": array})
    return answered


def pickled() -> Array:
    stream = io.BytesIO()
    np.save(stream, np.array([object()] * 4), allow_pickle=True)
    return Array("float32", (4,), "numpy.ndarray", stream.getvalue())


def huge() -> Array:
    """A header that claims more than there is memory for."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (2**50,)})
    return Array("float32", (2**50,), "numpy.ndarray", stream.getvalue())


def failed() -> Message:
    raise MemoryError("no room")


@pytest.mark.parametrize(
    ("lie", "sentence"),
    [
        (lambda answered, message: failed(), "it failed (MemoryError: no room)."),
        (
            lambda answered, message: answer(message, weights_of(message), {"w": np.full(4, -1.0)}, 10),
            "its Fisher of 'w' is negative, which no Fisher information is.",
        ),
        (
            lambda answered, message: answer(message, {"w": np.full(4, np.nan, np.float32)}, {"w": np.ones(4)}, 10),
            "its weights of 'w' are not all finite numbers.",
        ),
        (
            lambda answered, message: Message(RecordDict({}), reply_to=message),
            "its answer has no ArrayRecord 'arrays'.",
        ),
        (lambda answered, message: with_array(answered, pickled()), "'w' of its answer is no array: objects."),
        (
            lambda answered, message: with_array(answered, huge()),
            "'w' of its answer is no array: cannot reshape array of size 0 into shape",
        ),
        (
            lambda answered, message: with_array(answered, Array(np.zeros(10**4, np.float32))),
            "'w' of its answer is no array of 4 numbers.",
        ),
    ],
)
def test_a_client_that_fails_or_lies_is_left_out(lie: Any, sentence: str) -> None:
    strategy = MergeStrategy(FisherMerge())
    liars = app_of(lambda part, answered, message: lie(answered, message) if part == 2 else answered)
    result = strategy.start(LocalGrid(liars, 4), record_of(START), num_rounds=1)
    (told,) = strategy.left_out[1]
    assert told.startswith(f"node 3 is left out: {sentence}")
    # The others are merged as if there were no node 3: parts 0, 1 and 3 by information times samples.
    shares = np.array([(10 + part) / (1 + part) for part in (0, 1, 3)])
    expected = shares @ np.array([0, 1 / 3, 1]) / shares.sum()
    np.testing.assert_allclose(result.arrays["w"].numpy(), expected, rtol=1e-6)


class Dying(LocalGrid):
    """Some of its nodes are killed while they train: they never answer."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.draw, self.killed = random.Random(KILLS), list[int]()

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        answers = list(super().send_and_receive(messages, timeout=timeout))
        victim = self.draw.randrange(len(answers))
        self.killed.append(answers[victim].metadata.src_node_id)
        return answers[:victim] + answers[victim + 1 :]


def test_a_killed_client_is_left_out_and_the_round_is_merged() -> None:
    strategy = MergeStrategy(fraction_evaluate=0.0)
    grid = Dying(app_of(), 5)
    weights = record_of(START)
    for server_round in range(1, KILLS + 1):
        messages = strategy.configure_train(server_round, weights, {}, grid)
        merged, metrics = strategy.aggregate_train(server_round, grid.send_and_receive(messages))
        assert merged is not None
        assert metrics is not None
        weights = merged
        told = f"node {grid.killed[-1]} is left out: it has not answered."
        assert strategy.left_out[server_round] == [told]


def test_too_few_clients_leave_the_weights_as_they_are() -> None:
    strategy = MergeStrategy()
    honest = app_of(lambda part, answered, message: answered if part == 0 else failed())
    result = strategy.start(LocalGrid(honest, 3), record_of(START), num_rounds=1)
    assert strategy.left_out[1][-1] == "round 1 is not merged: 1 clients are left of at least 2."
    assert len(result.arrays or {}) == 0


class Few(LocalGrid):
    """One of its nodes is not known."""

    def get_node_ids(self) -> list[int]:
        return [1, 2, 4]


def test_a_node_that_answers_twice_or_unasked_is_left_out() -> None:
    app, other, strategy = app_of(), MergeStrategy(), MergeStrategy()
    to_all = list(other.configure_train(1, record_of(START), {}, LocalGrid(app, 4)))
    grid = Few(app, 4)
    asked = list(strategy.configure_train(1, record_of(START), {}, grid))
    assert [message.metadata.dst_node_id for message in asked] == [1, 2, 4]
    strategy.aggregate_train(1, [*grid.send_and_receive(to_all), *grid.send_and_receive(asked[:1])])
    assert strategy.left_out[1] == [
        "node 1 is left out: it has answered 2 times.",
        "node 3 is left out: it was not asked.",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap": 0.5}, "cap is 0.5; it must be at least 1"),
        ({"min_clients": 0}, "min_clients is 0; it must be at least 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BecameError, match=message):
        MergeStrategy(**options)
