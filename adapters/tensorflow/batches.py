"""Batches of a user's own: what a Keras model takes, what it returns, and what is known of the targets.

| batch | the model is called as | outputs | targets |
| --- | --- | --- | --- |
| a pair ``(inputs, targets)``, as ``model.fit`` has it | ``model(inputs, training=False)`` | a tensor | the second |
| anything else | as ``apply`` does | what ``apply`` returns | what ``targets`` returns |

Convention: outputs are [samples, ...]; inputs may be a tensor, or a list, tuple or dict of tensors with samples first.
Targets have the shape that the likelihood or the loss takes: labels are [samples], and no [samples, 1] as in ``fit``.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

from adapters.backend import batches as backend
from became_core import BecameError
from became_core.arrays import Array

__all__ = ["Reader", "batches_of"]

Apply = Callable[[keras.Model, Any], Array]
Targets = Callable[[Any], Any]


class Reader(backend.Reader[keras.Model]):
    """How batches of the kinds above are read."""

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Return what the model takes and the targets, as tensors; raises as the reader of all frameworks does."""
        inputs, targets = map(_as_tensors, super().split(batch))
        if self.apply is None and tf.is_tensor(targets) and targets.shape.rank == 0:
            raise BecameError(
                "a batch has one number for its targets, and no axis of samples; give batches, of a tf.data.Dataset "
                "those of dataset.batch(32)."
            )
        if any(leaf.shape.rank and not leaf.shape[0] for leaf in tf.nest.flatten(targets if self.apply else inputs)):
            raise BecameError("a batch has no sample; leave empty batches out.")
        return inputs, targets

    def known(self, batch: Any) -> tuple[Any, Any]:
        """Return the parts of a pair, as ``model.fit`` takes it.

        Raises:
            BecameError: if the batch is no pair.
        """
        if isinstance(batch, tuple | list) and len(batch) == 2:
            return batch[0], batch[1]
        if isinstance(batch, tuple | list) and len(batch) == 3:
            raise BecameError(
                "a batch has three parts; weights of samples are not known here: give pairs of inputs and targets, "
                "or apply= and targets=."
            )
        raise BecameError(
            f"a batch is a {type(batch).__name__}; give pairs of inputs and targets, as model.fit takes them, or "
            "apply= and targets=, which say what to do with it."
        )

    def outputs(self, model: keras.Model, inputs: Any) -> Array:
        """Return the model's outputs, [samples, ...].

        Raises:
            BecameError: if they are no tensor.
        """
        outputs: Any = self.apply(model, inputs) if self.apply is not None else model(inputs, training=False)
        if not isinstance(outputs, tf.Tensor):
            raise BecameError(
                f"the model returned a {type(outputs).__name__}, and no tensor; give apply= and targets=, of which "
                "apply calls the model and returns the outputs that the loss is of."
            )
        return outputs


def _as_tensors(tree: Any) -> Any:
    return tf.nest.map_structure(tf.convert_to_tensor, tree)


def batches_of(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches of any iterable, of a ``tf.data.Dataset`` or of a ``keras.utils.PyDataset``.

    Raises:
        BecameError: if a data set has no end.
    """
    if isinstance(batches, tf.data.Dataset) and int(batches.cardinality()) == tf.data.INFINITE_CARDINALITY:
        raise BecameError("the data set has no end, as after repeat(); give one that ends, as dataset.take(100) does.")
    if isinstance(batches, keras.utils.PyDataset):
        yield from (batches[index] for index in range(batches.num_batches or 0))
    else:
        yield from batches
