"""Which tensors of several models belong together, or one sentence on why they do not.

Tied tensors stand once: a head that shares its memory with the embedding, or that a configuration ties to it, is not
merged a second time; where one model has tied its head and another has not, the head is merged as its own tensor, and
read from the embedding where it is tied. Tensors of integers must be equal in all models. Vocabularies of different
sizes are refused, unless they are to be padded: then a model that lacks rows is given those of the model that has most.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.checkpoints.folders import Checkpoint
from adapters.checkpoints.plan import layer_number
from adapters.checkpoints.tensors import FLOATS, StoredTensor, equal
from became_core import BecameError

__all__ = [
    "EMBEDDINGS",
    "HEADS",
    "Alignment",
    "Leaf",
    "align",
    "padded",
    "tensor_or_tied",
    "with_vocabulary",
    "without_tie",
]

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "predictions.decoder.weight", "lm_head.decoder.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "shared.weight",
)
# Where the configuration of a model of several kinds of data has that of its language model.
LANGUAGE = ("text_config", "llm_config", "language_config")
# Counters of batch norm, which no forward pass reads, may differ: the base's are taken.
COUNTERS = ("num_batches_tracked",)


@dataclass(frozen=True)
class Leaf:
    """A tensor of the merged model.

    Attributes:
        name: its name.
        shape: its axes.
        dtype: in which it is written.
        tensors: where each model has it, in the order of the models.
        depth: 0 for the first layer of the model, 1 for the last.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    tensors: tuple[StoredTensor, ...]
    depth: float

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.tensors[0].size

    @property
    def is_merged(self) -> bool:
        """Whether it is merged; if not, it is copied from the first of the models."""
        return self.tensors[0].is_float


@dataclass(frozen=True)
class Alignment:
    """The tensors of the merged model in the order of the base's, and what the user should know about them.

    Attributes:
        leaves: the tensors.
        notes: sentences.
        untied: whether the head is written although the base's configuration may tie it.
        vocabulary: the number of rows that embeddings were padded to; None where nothing was.
    """

    leaves: tuple[Leaf, ...]
    notes: tuple[str, ...] = ()
    untied: bool = False
    vocabulary: int | None = None


def align(models: Sequence[Checkpoint], *, out_dtype: str | None = None, pad_vocabulary: bool = False) -> Alignment:
    """Return which tensors belong together; the first of the models is the base.

    Args:
        models: at least one.
        out_dtype: the dtype of all merged tensors; None for that of the base.
        pad_vocabulary: whether missing rows of embeddings are taken from the models that have them.

    Raises:
        BecameError: if names, shapes, integers or vocabularies differ, or a model is quantised.
    """
    base = models[0]
    for model in models:
        _check_not_quantised(model)
    once = _written_once(models)
    names = dict.fromkeys(name for model in models for name in model.tensors)
    layers = [number for number in map(layer_number, names) if number is not None]
    leaves, notes, rows = [], list[str](), set[int]()
    for name in names:
        if name in once:
            continue
        tensors = [tensor_or_tied(model, name) for model in models]
        for model, tensor in zip(models, tensors, strict=True):
            if tensor is None:
                owner = next(other.path for other in models if name in other.tensors)
                raise BecameError(f"'{name}' is in {owner} but not in {model.path}; both must have the same tensors.")
        aligned, padded_rows = _same_shape(models, [tensor for tensor in tensors if tensor], pad_vocabulary)
        rows |= {padded_rows} if padded_rows else set()
        first = aligned[0]
        _check_same_kind(aligned)
        if not first.is_float:
            notes += _agreement(aligned)
        word = out_dtype if out_dtype is not None and first.is_float else first.dtype
        leaves.append(Leaf(name, first.shape, word, aligned, _depth(name, max(layers, default=0))))
    if not leaves:
        raise BecameError(f"{base.path} has no tensors.")
    written = {leaf.name for leaf in leaves}
    tied = {name: owner for name, owner in {**base.tied, **once}.items() if name not in written}
    notes += [f"'{name}' is tied to '{owner}', and written once, under that name." for name, owner in tied.items()]
    untied = [leaf.name for leaf in leaves if any(leaf.name not in model.tensors for model in models)]
    notes += [
        f"'{name}' is tied to another tensor in some of the models, and a tensor of its own in the merged one; load it "
        "as a model that does not tie the two."
        for name in untied
    ]
    notes += _padded_notes(models, leaves)
    if len(rows) > 1:
        raise BecameError(f"embeddings would be padded to {' and '.join(map(str, sorted(rows)))} rows; pad them alike.")
    return Alignment(tuple(leaves), tuple(notes), any(map(_is_head, untied)), max(rows, default=None))


def _padded_notes(models: Sequence[Checkpoint], leaves: Sequence[Leaf]) -> list[str]:
    """Return a note if the base, whose tokenizer is copied, has fewer tokens than the merged model."""
    for leaf in leaves:
        own = tensor_or_tied(models[0], leaf.name)
        if own is not None and own.shape != leaf.shape:
            longest = next(
                m for m in models if (t := tensor_or_tied(m, leaf.name)) is not None and t.shape == leaf.shape
            )
            return [
                f"The merged model has {leaf.shape[0]} tokens, and {models[0].path}, from which a tokenizer is copied, "
                f"{own.shape[0]}; copy that of {longest.path} in its place."
            ]
    return []


def tensor_or_tied(model: Checkpoint, name: str) -> StoredTensor | None:
    """Return a model's tensor of a name, if need be the one that it is tied to; None if it has neither."""
    name = model.tied.get(name, name)
    if name in model.tensors:
        return model.tensors[name]
    if _is_head(name) and _says_tied(model.config) is not False:
        embeddings = [other for other in model.tensors if other.endswith(EMBEDDINGS)]
        if len(embeddings) == 1:
            return model.tensors[embeddings[0]]
    return None


def _is_head(name: str) -> bool:
    """Whether a tensor is a head: within a layer, such a name is that of another matrix."""
    return name.endswith(HEADS) and layer_number(name) is None


def padded(tensor: StoredTensor, longer: StoredTensor | None, shape: tuple[int, ...]) -> StoredTensor:
    """Return a tensor with more rows: those that it lacks are another one's, or zero without one."""

    def read(first: int, last: int) -> NDArray[np.uint8]:
        own = tensor.read_bytes(first, min(last, tensor.nbytes)) if first < tensor.nbytes else np.empty(0, np.uint8)
        begin = max(first, tensor.nbytes)
        if begin >= last:
            return own
        item = tensor.nbytes // max(tensor.size, 1)
        if longer is None:
            rest = np.zeros(last - begin, dtype=np.uint8)
        else:
            rest = longer.slab(begin // item, last // item).astype(FLOATS[tensor.dtype]).view(np.uint8)
        return np.concatenate([own, rest])

    return StoredTensor(tensor.name, tensor.dtype, shape, tensor.file, read)


def _depth(name: str, last: int) -> float:
    """Return how deep in the model a tensor lies: by its layer's number; without one, embeddings first, heads last."""
    number = layer_number(name)
    if number is not None:
        return number / last if last else 0.0
    return 0.0 if "embed" in name or ".wte." in name or ".wpe." in name or name.startswith(("wte", "wpe")) else 1.0


def _written_once(models: Sequence[Checkpoint]) -> dict[str, str]:
    """Return the heads that all models tie to their embedding although some files hold both, and the embeddings."""
    once = {}
    for name in dict.fromkeys(name for model in models for name in model.tensors if _is_head(name)):
        pairs = []
        for model in models:
            embeddings = [other for other in model.tensors if other.endswith(EMBEDDINGS)]
            said = _says_tied(model.config)
            # A model that holds both and does not say that they are tied may be loaded by what expects both.
            if said is False or (said is None and name in model.tensors) or len(embeddings) != 1:
                break
            pairs.append((model.tensors.get(name), model.tensors[embeddings[0]]))
        else:
            if all(head is None or equal(head, embedding) for head, embedding in pairs):
                once[name] = pairs[0][1].name
    return once


def _same_shape(
    models: Sequence[Checkpoint], tensors: Sequence[StoredTensor], pad: bool
) -> tuple[tuple[StoredTensor, ...], int | None]:
    """Return the tensors in one shape, and the number of rows if some were padded."""
    first = tensors[0]
    for tensor in tensors:
        if tensor.shape == first.shape:
            continue
        if not _is_vocabulary(models, tensors) or tensor.shape[1:] != first.shape[1:]:
            raise BecameError(f"{tensor} has shape {list(tensor.shape)}, but that of {first.file} {list(first.shape)}.")
        if not pad:
            raise BecameError(
                f"the vocabularies differ: {tensor} has {tensor.shape[0]} rows, that of {first.file} has "
                f"{first.shape[0]}; --pad-vocabulary takes missing rows from the models that have them."
            )
    if all(tensor.shape == first.shape for tensor in tensors):
        return tuple(tensors), None
    longest = max(tensors, key=lambda tensor: tensor.shape[0])
    aligned = [t if t.shape == longest.shape else padded(t, longest, longest.shape) for t in tensors]
    return tuple(aligned), longest.shape[0]


def _is_vocabulary(models: Sequence[Checkpoint], tensors: Sequence[StoredTensor]) -> bool:
    if not tensors[0].is_float or not all(tensor.shape for tensor in tensors):
        return False
    sizes = [_vocabulary_size(model.config) for model in models]
    rows = [tensor.shape[0] for tensor in tensors]
    return _is_head(tensors[0].name) or tensors[0].name.endswith(EMBEDDINGS) or (None not in sizes and sizes == rows)


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a configuration, and those of the language models in it."""
    return [config, *(config[name] for name in LANGUAGE if isinstance(config.get(name), dict))]


def _vocabulary_size(config: Mapping[str, Any]) -> Any:
    return next((part["vocab_size"] for part in _parts(config) if "vocab_size" in part), None)


def _says_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether a configuration ties the head to the embedding; None if it does not say, or contradicts itself."""
    said = {part["tie_word_embeddings"] for part in _parts(config) if part.get("tie_word_embeddings") in (True, False)}
    return said.pop() if len(said) == 1 else None


def without_tie(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that says in every part that the head is not tied, because a library may read any part.

    Example:
        >>> without_tie({"text_config": {"hidden_size": 8}})
        {'text_config': {'hidden_size': 8, 'tie_word_embeddings': False}, 'tie_word_embeddings': False}
    """
    inner = {name: without_tie(config[name]) for name in LANGUAGE if isinstance(config.get(name), dict)}
    return {**config, **inner, "tie_word_embeddings": False}


def with_vocabulary(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return a model's configuration with another size of the vocabulary, wherever it has one.

    Example:
        >>> with_vocabulary({"text_config": {"vocab_size": 4, "hidden_size": 8}}, 6)
        {'text_config': {'vocab_size': 6, 'hidden_size': 8}}
    """
    changed = dict(config)
    if "vocab_size" in changed:
        changed["vocab_size"] = rows
    for name in LANGUAGE:
        if isinstance(changed.get(name), dict):
            changed[name] = with_vocabulary(changed[name], rows)
    return changed


def _check_same_kind(tensors: Sequence[StoredTensor]) -> None:
    for tensor in tensors:
        if tensor.is_float != tensors[0].is_float or (not tensor.is_float and tensor.dtype != tensors[0].dtype):
            raise BecameError(f"{tensor} has dtype {tensor.dtype}, but that of {tensors[0].file} {tensors[0].dtype}.")


def _agreement(tensors: Sequence[StoredTensor]) -> list[str]:
    """Return a note on a counter that differs.

    Raises:
        BecameError: if another tensor of integers differs.
    """
    first = tensors[0]
    for tensor in tensors[1:]:
        if not equal(tensor, first):
            if first.name.endswith(COUNTERS):
                return [f"The counter '{first.name}' differs; that of {first.file} is kept."]
            raise BecameError(
                f"{tensor} holds integers ({tensor.dtype}) that differ from those of {first.file}; integers cannot be "
                "merged, so they must be equal."
            )
    return []


def _check_not_quantised(model: Checkpoint) -> None:
    if model.config.get("quantization_config") is not None:
        raise BecameError(f"{model.path} is quantised (quantization_config); merge the models before quantising.")
    small = [tensor for tensor in model.tensors.values() if tensor.dtype.startswith("F8")]
    scales = [name for name in model.tensors if name.endswith(("_scale", "_scale_inv", ".scale", ".scales"))]
    if small and scales:
        raise BecameError(f"{small[0]} is quantised with a scale ('{scales[0]}'); merge the models before quantising.")
