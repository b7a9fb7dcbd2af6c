"""A round's messages of Flower: what a client answers, and how an answer is read without trusting it.

Convention: an answer has three records: ``arrays``, the weights; ``fisher``, the diagonal of the Fisher information, a
mean over samples; ``metrics``, numbers, ``num-examples`` among them.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.flower.contributions import Arrays, Contribution
from became_core import BecameError
from became_core.arrays import on_host

try:
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
except ModuleNotFoundError as error:
    raise BecameError(f"the package '{error.name}' is missing; pip install 'became[flower]'.") from None

__all__ = ["answer", "record_of", "weights_of", "what_came"]

WEIGHTS, FISHER, METRICS, COUNT = "arrays", "fisher", "metrics", "num-examples"
HEADER = 1024  # bytes, more than the header of any array of ours


def record_of(arrays: Mapping[str, Any]) -> ArrayRecord:
    """Return arrays of any framework, by name, as a record."""
    return ArrayRecord({name: Array(np.asarray(on_host(value), order="C")) for name, value in arrays.items()})


def weights_of(message: Message) -> dict[str, NDArray[Any]]:
    """Return the weights that a client was sent, by name, as NumPy arrays of its own."""
    return {name: np.array(array.numpy()) for name, array in message.content[WEIGHTS].items()}


def answer(
    message: Message, weights: Mapping[str, Any], fisher: Mapping[str, Any], count: int, **metrics: float
) -> Message:
    """Return a client's answer to a message that had it train.

    Args:
        message: what it was sent.
        weights: after training, arrays of any framework, with the names and shapes of those it was sent.
        fisher: the diagonal of the Fisher information there, a mean over samples, by the same names.
        count: the number of samples.
        **metrics: more numbers, which are averaged by samples.
    """
    records = {
        WEIGHTS: record_of(weights),
        FISHER: record_of(fisher),
        METRICS: MetricRecord({COUNT: count, **metrics}),
    }
    return Message(RecordDict(records), reply_to=message)


def what_came(message: Message, sent: Arrays) -> Contribution:
    """Return what a client has answered. Nothing is unpickled, and no more memory is taken than was sent.

    Args:
        message: the answer, which is no error.
        sent: the weights that the client was sent.

    Raises:
        BecameError: if it has not the records that it should have; the message is a clause.
    """
    content = message.content
    for name, kind in ((WEIGHTS, ArrayRecord), (FISHER, ArrayRecord), (METRICS, MetricRecord)):
        if not isinstance(content.get(name), kind):
            raise BecameError(f"its answer has no {kind.__name__} '{name}'")
    weights, fisher = (
        {name: _loaded(name, array, sent) for name, array in content[record].items()} for record in (WEIGHTS, FISHER)
    )
    return Contribution(message.metadata.src_node_id, weights, fisher, content[METRICS].get(COUNT))


def _loaded(name: str, array: Array, sent: Arrays) -> NDArray[Any]:
    """Return an array of an answer; its header is not believed, since it could claim any size."""
    if name not in sent:
        raise BecameError(f"its answer has an unknown array '{name}'")
    stream = io.BytesIO(array.data)
    most = sent[name].size * 8
    if array.stype != "numpy.ndarray" or len(array.data) > most + HEADER:
        raise BecameError(f"'{name}' of its answer is no array of {sent[name].size} numbers")
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("another format")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.hasobject:
            raise ValueError("objects")
        values = np.frombuffer(stream.read(), dtype)
        return values.reshape(shape, order="F" if by_columns else "C")
    except Exception as error:  # NumPy's reader of headers raises whatever a crafted one leads to
        raise BecameError(f"'{name}' of its answer is no array: {error}") from None
