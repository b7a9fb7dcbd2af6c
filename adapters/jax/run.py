"""``python -m adapters.jax.run``: continual learning on JAX from the command line."""

import os
import sys

try:
    import jax

    from adapters.cli.main import Backend, main
    from adapters.jax.learner import JaxLearner
except ModuleNotFoundError as error:
    print(f"error: the package '{error.name}' is missing; pip install 'became[jax]'.", file=sys.stderr)
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
) -> JaxLearner:
    """Return a fresh learner with a backbone known by name.

    Args:
        network: the backbone, as in ``adapters.networks.NETWORKS``.
        stream: what it will learn.
        device: a device as JAX calls it, or "auto" for JAX's default: the first accelerator there is, else the CPU.
        seed: names the draw of the initial weights.
        norm: the backbone's kind of normalisation, likewise.
        mixed_precision: whether training steps multiply in bfloat16.
        dropout_masks: what draws them.

    Raises:
        BecameError: if there is no such network or device.
    """
    channels, height, width = stream.dataset.images.shape[1:]
    backbone = build_network(network, (channels, height, width), norm)
    chosen = None if device == "auto" else device
    return JaxLearner(
        backbone, stream, device=chosen, mixed_precision=mixed_precision, dropout_masks=dropout_masks, seed=seed
    )


def repeat_exactly() -> None:
    """Let XLA use deterministic operations alone; to be asked for before JAX looks at its devices."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()


def prepare() -> None:
    """Let JAX compute in float64 where it is asked to, and multiply float32 as such."""
    # Weights stay float32, but memories and curvature are summed and decomposed in float64: without it the coefficients
    # of merging are visibly off, which on Split-MNIST can turn 0.2 into 0.8.
    jax.config.update("jax_enable_x64", True)
    # On accelerators JAX multiplies float32 in half precision by default, which would leak past a projector.
    jax.config.update("jax_default_matmul_precision", "float32")


BACKEND = Backend("jax", build_learner, repeat_exactly, prepare)

if __name__ == "__main__":
    prepare()
    sys.exit(main(BACKEND))
