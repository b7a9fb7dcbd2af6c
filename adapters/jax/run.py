"""``python -m adapters.jax.run``: continual learning on JAX from the command line.

Several processes share each step's batch, if the environment of each has ``JAX_COORDINATOR_ADDRESS``: ``processes.py``.
"""

import os

from adapters.backend import Backend, available_threads, learner_builder, needs_package, run_command

with needs_package("jax"):
    import jax

    from adapters.jax.learner import JaxLearner
    from adapters.jax.mesh import THREADS, pool_threads, waiting_threads
    from adapters.jax.processes import is_one_of_several, run_as_one_of_several

__all__ = ["BACKEND", "build_learner"]


def _repeat_exactly() -> None:
    """Let XLA use deterministic operations alone; to be asked for before JAX looks at its devices."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()


def _prepare() -> None:
    """Let JAX compute in float64 where it is asked to, and multiply float32 as such."""
    # Weights stay float32, but memories and curvature are summed and decomposed in float64: without it the coefficients
    # of merging are visibly off, which on Split-MNIST can turn 0.2 into 0.8.
    jax.config.update("jax_enable_x64", True)
    # On accelerators JAX multiplies float32 in half precision by default, which would leak past a projector.
    jax.config.update("jax_default_matmul_precision", "float32")


def _use_threads(threads: int | None) -> int:
    """Tell XLA how many threads its pool may have; it looks when JAX first looks at its devices, and never again.

    If JAX makes several devices of the processor, the pool has more threads, for devices that wait for each other.
    The result is how many threads there are to compute with.
    """
    waiting = waiting_threads()
    if threads is not None or waiting:
        for name in THREADS:
            os.environ.setdefault(name, str((threads or available_threads()) + waiting))
    return max(1, pool_threads() - waiting)


build_learner = learner_builder(JaxLearner)
BACKEND = Backend("jax", build_learner, _repeat_exactly, _prepare, _use_threads)

if __name__ == "__main__":
    if not is_one_of_several():
        run_command(BACKEND)
    BACKEND.prepare()
    run_as_one_of_several(BACKEND)
