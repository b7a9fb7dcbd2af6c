"""A Fisher file from Adam's second moments, which a training leaves beside its weights.

Adam keeps v, a moving average of the squared gradient of its batches. v / (1 - beta_2^t) estimates the mean of that
square. For a batch of B samples near a minimum that is the diagonal Fisher information over B, in the mean over
samples. The factor is the same for all weights, so that it leaves a merge by two such files as it is if their batches
had one size.

What a state cannot say, the caller is told: whether gradients were clipped, accumulated or scaled. States of 8-bit
optimisers and of Adafactor, which keep no second moment of each weight, are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.checkpoints.digest import digest_of
from adapters.checkpoints.fisher_files import write_fisher
from adapters.checkpoints.folders import Checkpoint, is_dense, load_torch, open_checkpoint
from adapters.checkpoints.tensors import StoredTensor
from adapters.runs.files import check_free
from became_core import BecameError

__all__ = ["WARNINGS", "fisher_from_optimizer"]

WARNINGS = (
    "Adam's state does not say whether gradients were clipped, accumulated or scaled for mixed precision; if they "
    "were, the values are those of the changed gradients.",
    "Its values are squares of batch means, a batch's size smaller than the Fisher information over samples; merge "
    "them with files of the same optimiser and batch size.",
)
FOREIGN = {
    "qmap1": "an 8-bit optimiser",
    "state1": "an 8-bit optimiser",
    "exp_avg_sq_row": "Adafactor",
    "exp_avg_sq_col": "Adafactor",
    "momentum_buffer": "SGD",
}


@dataclass(frozen=True)
class Moment:
    """What Adam knows of one parameter.

    Attributes:
        second: v, a PyTorch tensor.
        step: t.
        beta2: the decay of v.
    """

    second: Any
    step: int
    beta2: float


def fisher_from_optimizer(optimizer: Path, model: Path, out: Path, names: Sequence[str] | None = None) -> list[str]:
    """Write the Fisher file of a training from its optimiser's state.

    Args:
        optimizer: what ``torch.save(optimizer.state_dict(), …)`` wrote, as ``transformers`` does in ``optimizer.pt``.
        model: the weights at the end of the same training.
        out: the Fisher file; nothing may be there.
        names: the parameters' names in the optimiser's order; without them the names in the state itself, or the order
            of the model's own file if that fits.

    Returns:
        What cannot be known, in sentences.

    Raises:
        BecameError: if the state is none of Adam's, or its parameters are not those of the model.
    """
    check_free(out)
    checkpoint = open_checkpoint(model)
    groups = _groups(load_torch(optimizer), optimizer)
    moments: dict[str, Moment] = {}
    for name, moment in zip(
        _names(groups, checkpoint, optimizer, names), (m for g in groups for m in g[1]), strict=True
    ):
        tensor = checkpoint.tensors.get(checkpoint.tied.get(name, name))
        if tensor is None:
            raise BecameError(f"{optimizer} has a parameter '{name}', which {model} does not have.")
        if moment is None:  # it has had no gradient, so that no step has moved it
            continue
        if tuple(moment.second.shape) != tensor.shape:
            shape = list(moment.second.shape)
            raise BecameError(f"{optimizer} has '{name}' with shape {shape}, but {tensor} has {list(tensor.shape)}.")
        moments[tensor.name] = moment

    def slabs(name: str, start: int, stop: int) -> NDArray[Any]:
        moment = moments[name]
        values = moment.second.reshape(-1)[start:stop].double().numpy()
        if values.size and not (values.min() >= 0 and values.max() < np.inf):
            raise BecameError(
                f"{optimizer} has an 'exp_avg_sq' of '{name}' that is negative, infinite or not a number."
            )
        return np.asarray(values / (1.0 - moment.beta2**moment.step))

    first = next(iter(moments.values()))
    order = [(name, tensor.shape) for name, tensor in checkpoint.tensors.items() if name in moments]
    write_fisher(
        out,
        order,
        slabs,
        kind="adam",
        unit="mean",
        per="step",
        counts={"steps": first.step},
        model=digest_of(checkpoint),
        remarks={"beta2": repr(first.beta2)},
    )
    missing = [t.name for t in checkpoint.tensors.values() if t.is_float and t.name not in moments]
    others = f" and {len(missing) - 1} other tensors" if len(missing) > 1 else ""
    return [*WARNINGS, *([f"The optimiser has no state of '{missing[0]}'{others}."] if missing else [])]


Group = tuple[list[str] | None, list[Moment | None]]


def _groups(state: Any, path: Path) -> list[Group]:
    """Return for each of the optimiser's groups the parameters' names, if it says them, and what Adam knows of them.

    Of a parameter that has had no gradient it knows nothing: None.
    """
    try:
        groups = _read_groups(state, path)
    except BecameError:
        raise
    except (TypeError, KeyError, IndexError, ValueError, AttributeError, OverflowError):  # anything may be anywhere
        raise BecameError(f"{path} is no optimiser's state; save optimizer.state_dict().") from None
    if not any(moments for _, moments in groups):
        raise BecameError(f"{path} has no parameters.")
    if all(moment is None for _, moments in groups for moment in moments):
        raise BecameError(f"{path} has no state of any parameter; save it after a step.")
    return groups


def _read_groups(state: Mapping[str, Any], path: Path) -> list[Group]:
    groups: list[Group] = []
    for group in state["param_groups"]:
        moments: list[Moment | None] = []
        for index in group["params"]:
            known = state["state"].get(index)
            moments.append(None if known is None else _moment(known, group, index, path))
        names = group.get("param_names")
        if names is not None and not (len(names) == len(moments) and all(isinstance(name, str) for name in names)):
            raise BecameError(f"{path} has 'param_names' that are not a name for each of {len(moments)} parameters.")
        groups.append((list(names) if names is not None else None, moments))
    return groups


def _moment(known: Mapping[str, Any], group: Mapping[str, Any], index: Any, path: Path) -> Moment:
    for word, owner in FOREIGN.items():
        if word in known:
            raise BecameError(f"{path} is the state of {owner} ('{word}'), which has no second moment of each weight.")
    if "exp_avg_sq" not in known or "betas" not in group:
        raise BecameError(f"{path} has no 'exp_avg_sq' of parameter {index}; it is no state of Adam.")
    second, step, beta2 = known["exp_avg_sq"], int(known.get("step", 0)), float(group["betas"][1])
    if not is_dense(second):
        raise BecameError(f"{path} has an 'exp_avg_sq' of parameter {index} that is no dense tensor in memory.")
    if not second.dtype.is_floating_point:
        raise BecameError(f"{path} has 'exp_avg_sq' of parameter {index} in {second.dtype}; an 8-bit state is no use.")
    if not 1 <= step < 2**63 or not 0 <= beta2 < 1:
        raise BecameError(
            f"{path} has step {str(step)[:20]} and beta_2 {beta2} of parameter {index}; no moment is known then."
        )
    return Moment(second, step, beta2)


def _names(groups: Sequence[Group], model: Checkpoint, path: Path, names: Sequence[str] | None) -> list[str]:
    """Return the names of all parameters in the order of the groups."""
    count = sum(len(moments) for _, moments in groups)
    if names is not None:
        if len(names) != count or len(set(names)) != count:
            raise BecameError(f"{path} has {count} parameters, and {len(set(names))} different names were given.")
        return list(names)
    if all(known is not None for known, _ in groups):
        return [name for known, _ in groups for name in known or []]
    ask = "give --names, a file with the parameters' names in the optimiser's order, one a line"
    if not model.ordered:
        raise BecameError(f"{path} does not name its parameters, and {model.path} has lost their order; {ask}.")
    parameters = [tensor for tensor in model.tensors.values() if tensor.is_float]
    # One group has all; two are those of transformers' Trainer: first what is decayed, then biases and norms.
    vectors = [tensor for tensor in parameters if len(tensor.shape) < 2]
    matrices = [tensor for tensor in parameters if len(tensor.shape) >= 2]
    for order in ([parameters], [matrices, vectors]):
        pairs = zip(order, groups, strict=False)
        if len(order) == len(groups) and all(_are_alike(part, moments) for part, (_, moments) in pairs):
            return [tensor.name for part in order for tensor in part]
    raise BecameError(f"{path} does not name its parameters, and their shapes are not those of {model.path}; {ask}.")


def _are_alike(tensors: Sequence[StoredTensor], moments: Sequence[Moment | None]) -> bool:
    """Return whether moments have the shapes of these tensors, one by one, as far as they are known."""
    return len(tensors) == len(moments) and all(
        moment is None or tuple(moment.second.shape) == tensor.shape
        for tensor, moment in zip(tensors, moments, strict=True)
    )
