"""LoRA adapters: what a merge of them is, and how it is written.

An adapter changes a module's weight by s B A, s being alpha / r, or alpha / sqrt(r) where it is rank-stabilised. The
merge acts on these differences: sum_k c_k s_k B_k A_k is exactly what the concatenated factors [c_1 s_1 B_1, ...] and
[A_1; ...] give, with rank r_1 + ... + r_K and scale 1. The mean of the factors themselves would be another model. A
smaller rank is the best one by the singular values of the difference, and its error is reported.

Curvature is of the module's weight, so that Fisher files have the base model's names. The differences are computed row
by row where a slab asks for them, and are never in memory whole.

Convention: a *down* factor A is [r, d_in ...], an *up* factor B is [d_out, r ...].
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.checkpoints.align import EMBEDDINGS, HEADS
from adapters.checkpoints.folders import Checkpoint
from adapters.checkpoints.tensors import StoredTensor, equal, finite
from became_core import BecameError

__all__ = ["Adapter", "Factors", "adapter_config", "adapter_of", "combined", "compressed", "dense", "frozen_of"]

PREFIX = "base_model.model."
FACTORS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_embedding_A": "down",
    ".lora_embedding_B": "up",
}
# Weights of the base model that peft saves beside the factors, as it does of embeddings that are changed or resized.
FROZEN = (".base_layer.weight", *EMBEDDINGS, *HEADS)
# What peft's configuration says that does not change which difference an adapter is.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "lora_dropout", "megatron_core", "peft_type", "peft_version", "revision"),
    *("target_modules", "task_type", "qalora_group_size", "runtime_config", "loftq_config", "eva_config"),
}
# A group that is repeated: in a stranger's pattern the search for it may never end.
UNBOUNDED = re.compile(r"\)[*+?{]")
# What of it says which modules an adapter changes.
CHOOSING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
UNDERSTOOD = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    *("bias", "lora_bias", "use_dora", "init_lora_weights"),
}
# Initial values of the factors that leave the base model's weights as they are.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Factors:
    """The difference of one module.

    Attributes:
        down: A.
        up: B.
        scale: s.
        transposed: whether the module's weight is [d_in, d_out], so that the difference is (B A)^T.
    """

    down: StoredTensor
    up: StoredTensor
    scale: float
    transposed: bool

    @property
    def rank(self) -> int:
        """The rank."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the module's weight."""
        if self.transposed:
            return (self.down.shape[1], self.up.shape[0])
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def size(self) -> int:
        """The number of elements of both."""
        return self.down.size + self.up.size

    @property
    def nbytes(self) -> int:
        """The bytes of both."""
        return self.down.nbytes + self.up.nbytes

    def matrices(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return A [r, d_in] and B [d_out, r] in float32 or wider; raise a BecameError if an entry is not finite."""
        down = finite(self.down.whole(), self.down).reshape(self.rank, -1)
        return down, finite(self.up.whole(), self.up).reshape(-1, self.rank)

    def difference(self, name: str) -> StoredTensor:
        """Return s B A as a tensor that is computed where it is read.

        Each read takes the factors from the file anew. That costs little beside their product, and memory does not grow
        with the adapter.
        """
        shape, width = self.shape, prod(self.shape[1:])

        def read(first: int, last: int) -> NDArray[np.uint8]:
            start, stop = first // 4, last // 4
            top, bottom = start // width, -(-stop // width)
            down = finite(self.down.whole(), self.down).reshape(self.rank, -1)
            if self.transposed:
                rows, columns = down[:, top:bottom].T, finite(self.up.whole(), self.up).reshape(-1, self.rank).T
            else:
                part = self.up.slab(top * self.rank, bottom * self.rank)
                rows, columns = finite(part, self.up).reshape(-1, self.rank), down
            product = (self.scale * (rows @ columns)).astype(np.float32).reshape(-1)
            content: NDArray[np.uint8] = product[start - top * width : stop - top * width].view(np.uint8)
            return content

        return StoredTensor(name, "F32", shape, self.down.file, read)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        checkpoint: its files.
        modules: the factors by the module's name in the base model.
        suffixes: of each module's two factors, as peft names them.
        frozen: weights of the base model that stand beside the factors, by their names in the file.
    """

    checkpoint: Checkpoint
    modules: Mapping[str, Factors]
    suffixes: Mapping[str, tuple[str, str]]
    frozen: Mapping[str, StoredTensor] = field(default_factory=dict)


def adapter_of(checkpoint: Checkpoint) -> Adapter:
    """Return what an adapter's configuration and tensors say.

    Raises:
        BecameError: if it is no plain LoRA adapter; the message names what is not understood.
    """
    _check_understood(checkpoint)
    config, path = checkpoint.adapter or {}, checkpoint.path
    halves: dict[str, dict[str, tuple[str, StoredTensor]]] = {}
    frozen = {}
    for name, tensor in checkpoint.tensors.items():
        suffix = next((suffix for suffix in FACTORS if name.endswith(suffix)), None)
        if suffix is None and name.startswith(PREFIX) and name.endswith(FROZEN):
            frozen[name] = tensor
            continue
        if suffix is None or not name.startswith(PREFIX) or not tensor.is_float or len(tensor.shape) < 2:
            raise BecameError(f"{tensor} is no factor of a LoRA adapter, and is not understood.")
        module = name.removeprefix(PREFIX).removesuffix(suffix)
        halves.setdefault(module, {})[FACTORS[suffix]] = (suffix, tensor)
    modules, suffixes = {}, {}
    for module, pair in halves.items():
        if len(pair) < 2:
            (_, tensor), *_ = pair.values()
            raise BecameError(f"{tensor} has no other factor beside it.")
        (down_suffix, down), (up_suffix, up) = pair["down"], pair["up"]
        asked = _of_pattern(config, "rank_pattern", module, config.get("r", 8), path)
        rank = int(asked)
        if rank < 1 or rank != asked or down.shape[0] != rank or up.shape[1:] != (rank,) + (1,) * (len(up.shape) - 2):
            shapes = f"{list(down.shape)} and {list(up.shape)}"
            raise BecameError(f"{down} and its other factor have shapes {shapes}, which is not rank {asked:g}.")
        alpha = _of_pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8), path)
        scale = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
        transposed = bool(config.get("fan_in_fan_out")) or "embedding" in down_suffix
        modules[module], suffixes[module] = Factors(down, up, scale, transposed), (down_suffix, up_suffix)
    if not modules:
        raise BecameError(f"{path} has no factors.")
    return Adapter(checkpoint, modules, suffixes, frozen)


def _check_understood(checkpoint: Checkpoint) -> None:
    """Refuse by its name whatever makes an adapter more than a difference s B A."""
    config, path = checkpoint.adapter or {}, checkpoint.path
    if config.get("peft_type", "LORA") != "LORA":
        raise BecameError(f"{path} is a '{str(config['peft_type'])[:40]}' adapter; only LORA is understood.")
    if config.get("use_dora"):
        raise BecameError(f"{path} has use_dora: DoRA's magnitudes cannot be merged with the differences.")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise BecameError(f"{path} has trained biases (bias, lora_bias), which are not understood.")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise BecameError(f"{path} began with '{str(start)[:40]}', which changes the base model's weights as well.")
    for word, value in config.items():
        if value and word not in HARMLESS | UNDERSTOOD:
            raise BecameError(f"{path} has '{word[:40]}' in its configuration, which is not understood.")


def _of_pattern(config: Mapping[str, Any], name: str, module: str, usual: Any, path: Any) -> float:
    """Return a number that may differ from module to module, as peft finds it."""
    patterns = config.get(name) or {}
    value = usual
    try:
        for key, number in patterns.items():
            if UNBOUNDED.search(key):
                raise BecameError(f"{path} has a {name} with a repeated group, which is not understood.")
            if re.match(rf"(.*\.)?({key})$", module):
                value = number
                break
    except (re.error, AttributeError, TypeError, RecursionError, OverflowError):
        raise BecameError(f"{path} has a {name} that is not understood.") from None
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e9:
        raise BecameError(f"{path} gives '{module}' a value in {name} or its usual one that is no number.")
    return float(value)


def dense(adapters: Sequence[Adapter]) -> list[Checkpoint]:
    """Return the adapters' differences as models of one structure; a module that one lacks is zero there.

    Raises:
        BecameError: if two have a module in different shapes, or different weights of the base model.
    """
    frozen = frozen_of(adapters)
    for adapter in adapters:
        for name, tensor in adapter.frozen.items():
            if tensor is not frozen[name] and not equal(tensor, frozen[name]):
                raise BecameError(
                    f"{tensor} is a weight of the base model and differs from that of {frozen[name].file}; merge "
                    "adapters of one base model that left it as it was."
                )
    shapes: dict[str, tuple[tuple[int, ...], Adapter]] = {}
    for adapter in adapters:
        for module, factors in adapter.modules.items():
            shape, owner = shapes.setdefault(module, (factors.shape, adapter))
            if shape != factors.shape or owner.suffixes[module] != adapter.suffixes[module]:
                raise BecameError(
                    f"the module '{module}' has shape {list(factors.shape)} in {adapter.checkpoint.path}, but "
                    f"{list(shape)} in {owner.checkpoint.path}."
                )
    models = []
    for adapter in adapters:
        tensors = {}
        for module, (shape, _) in shapes.items():
            name = f"{module}.weight"
            own = adapter.modules.get(module)
            tensors[name] = own.difference(name) if own else _zero(name, shape, adapter)
        models.append(Checkpoint(adapter.checkpoint.path, "LoRA adapter", tensors))
    return models


def _zero(name: str, shape: tuple[int, ...], adapter: Adapter) -> StoredTensor:
    file = adapter.checkpoint.files[0]
    return StoredTensor(name, "F32", shape, file, lambda first, last: np.zeros(last - first, dtype=np.uint8))


def frozen_of(adapters: Sequence[Adapter]) -> dict[str, StoredTensor]:
    """Return the base model's weights that adapters hold, which the merged one keeps; the first adapter's of each."""
    return {name: tensor for adapter in reversed(adapters) for name, tensor in adapter.frozen.items()}


def combined(
    adapters: Sequence[Adapter], module: str, coefficients: Sequence[float]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the factors of sum_k c_k s_k B_k A_k, of rank R = sum_k r_k and scale 1: A [R, d_in] and B [d_out, R]."""
    downs, ups = [], []
    for adapter, coefficient in zip(adapters, coefficients, strict=True):
        if module in adapter.modules:
            factors = adapter.modules[module]
            down, up = factors.matrices()
            downs.append(down)
            ups.append(up * up.dtype.type(coefficient * factors.scale))
    return np.concatenate(downs, axis=0), np.concatenate(ups, axis=1)


def compressed(down: NDArray[Any], up: NDArray[Any], rank: int) -> tuple[NDArray[Any], NDArray[Any], float]:
    """Return the best factors of a smaller rank, and the relative error of their product in the Frobenius norm.

    Example:
        >>> down, up, error = compressed(np.eye(2), np.diag([3.0, 4.0]), 1)
        >>> (up @ down).round(6).tolist(), round(error, 6)
        ([[0.0, 0.0], [0.0, 4.0]], 0.6)
    """
    # The singular values of B A are those of the small product of the two triangles.
    up_basis, up_triangle = np.linalg.qr(up.astype(np.float64))
    down_basis, down_triangle = np.linalg.qr(down.astype(np.float64).T)
    left, values, right = np.linalg.svd(up_triangle @ down_triangle.T)
    total = float(np.linalg.norm(values))
    error = float(np.linalg.norm(values[rank:])) / total if total else 0.0
    # Half of each value on each side, so that both factors have numbers of one size.
    halves = np.sqrt(values[:rank])
    return halves[:, None] * (right[:rank] @ down_basis.T), (up_basis @ left[:, :rank]) * halves, error


def adapter_config(adapters: Sequence[Adapter], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the configuration of the merged adapter, whose every module has scale 1.

    Args:
        adapters: the merged ones; the first is the base.
        ranks: of each module of the merged adapter.
    """
    config = dict(adapters[0].checkpoint.adapter or {})
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # "^", because peft looks for a pattern at the end of a name, and one module's name may be the end of another's.
    others = {f"^{module}": rank for module, rank in ranks.items() if rank != usual}
    config |= {"r": usual, "lora_alpha": usual, "use_rslora": False}
    config |= {"rank_pattern": others, "alpha_pattern": others, "init_lora_weights": True}
    chosen = [{word: (adapter.checkpoint.adapter or {}).get(word) for word in CHOOSING} for adapter in adapters]
    if any(words != chosen[0] for words in chosen):
        config |= {word: None for word in CHOOSING if word in config} | {"target_modules": sorted(ranks)}
    return config
