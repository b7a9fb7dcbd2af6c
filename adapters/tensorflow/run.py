"""``python -m adapters.tensorflow.run``: continual learning on TensorFlow from the command line."""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # else it reports on the processor before anything is asked of it

try:
    import tensorflow as tf

    from adapters.cli.main import Backend, main
    from adapters.tensorflow.learner import TensorFlowLearner
except ModuleNotFoundError as error:
    print(f"error: the package '{error.name}' is missing; pip install 'became[tensorflow]'.", file=sys.stderr)
    sys.exit(2)

from adapters.networks import DropoutMasks, Norm, build_network
from became_core.continual import TaskStream

__all__ = ["BACKEND", "build_learner", "prepare", "repeat_exactly"]


def build_learner(
    network: str,
    stream: TaskStream,
    device: str,
    seed: int,
    *,
    norm: Norm = "batch",
    mixed_precision: bool = False,
    dropout_masks: DropoutMasks = "numpy",
) -> TensorFlowLearner:
    """Return a fresh learner with a backbone known by name.

    Args:
        network: the backbone, as in ``adapters.networks.NETWORKS``.
        stream: what it will learn.
        device: a TensorFlow device, or "auto" for the first GPU if there is one, else the CPU.
        seed: names the draw of the initial weights.
        norm: the backbone's kind of normalisation, likewise.
        mixed_precision: whether training steps multiply in bfloat16.
        dropout_masks: what draws them.

    Raises:
        BecameError: if there is no such network or device.
    """
    if device == "auto":
        device = "gpu" if tf.config.list_logical_devices("GPU") else "cpu"
    channels, height, width = stream.dataset.images.shape[1:]
    backbone = build_network(network, (channels, height, width), norm)
    return TensorFlowLearner(
        backbone, stream, device=device, mixed_precision=mixed_precision, dropout_masks=dropout_masks, seed=seed
    )


def repeat_exactly() -> None:
    """Let TensorFlow use deterministic operations alone; it refuses those that have no such form, by name."""
    tf.config.experimental.enable_op_determinism()


def prepare() -> None:
    """Let TensorFlow multiply float32 as such."""
    # On a GPU it would by default round to TF32's ten bits, which leaks past a projector.
    tf.config.experimental.enable_tensor_float_32_execution(False)


BACKEND = Backend("tensorflow", build_learner, repeat_exactly, prepare)

if __name__ == "__main__":
    prepare()
    sys.exit(main(BACKEND))
