"""``python -m adapters.tensorflow.run``: continual learning on TensorFlow from the command line."""

import os

from adapters.backend import Backend, learner_builder, needs_package, run_command

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # else it reports on the processor before anything is asked of it

with needs_package("tensorflow"):
    import tensorflow as tf

    from adapters.tensorflow.learner import TensorFlowLearner

__all__ = ["BACKEND", "build_learner"]


def _repeat_exactly() -> None:
    """Let TensorFlow use deterministic operations alone; it refuses those that have no such form, by name."""
    tf.config.experimental.enable_op_determinism()


def _prepare() -> None:
    """Let TensorFlow multiply float32 as such."""
    # On a GPU it would by default round to TF32's ten bits, which leaks past a projector.
    tf.config.experimental.enable_tensor_float_32_execution(False)


build_learner = learner_builder(TensorFlowLearner)
BACKEND = Backend("tensorflow", build_learner, _repeat_exactly, _prepare)

if __name__ == "__main__":
    run_command(BACKEND)
