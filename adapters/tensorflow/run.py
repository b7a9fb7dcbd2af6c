"""``python -m adapters.tensorflow.run``: continual learning on TensorFlow from the command line."""

import os
from contextlib import suppress

from adapters.backend import Backend, available_threads, learner_builder, needs_package, run_command

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


def _use_threads(threads: int | None) -> int:
    """Tell TensorFlow how many threads it may have, of both kinds; it refuses once it has computed anything."""
    with suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(threads or 0)
        tf.config.threading.set_inter_op_parallelism_threads(threads or 0)
    return tf.config.threading.get_intra_op_parallelism_threads() or available_threads()


build_learner = learner_builder(TensorFlowLearner)
BACKEND = Backend("tensorflow", build_learner, _repeat_exactly, _prepare, _use_threads)

if __name__ == "__main__":
    run_command(BACKEND)
