"""How the inputs of a merge are opened: what can be refused without reading weights is refused here.

Nothing has been written then.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.checkpoints.align import Leaf, align, tensor_or_tied
from adapters.checkpoints.fisher_files import check_comparable, open_fisher
from adapters.checkpoints.folders import Checkpoint, open_checkpoint
from adapters.checkpoints.job import Extra, Job
from adapters.checkpoints.lora import Adapter, adapter_of, dense
from adapters.checkpoints.plan import MergePlan, PlannedModel
from adapters.checkpoints.rule import Rule
from adapters.checkpoints.rules import rule_of
from adapters.checkpoints.tensors import StoredTensor, finite
from became_core import BecameError
from became_core.laplace import is_statistic

__all__ = ["open_job"]

# How many rows of a Gram matrix are compared with its columns at a time.
ROWS = 1024


def open_job(plan: MergePlan) -> Job:
    """Return the merge of a plan, with its inputs open.

    Raises:
        BecameError: if anything about them does not fit; nothing has been written then.
    """
    rule = rule_of(plan)
    for model in plan.models:
        _check_needed(model, rule, plan)
    if (rule.needs_fisher or rule.needs_gram) and all(model.weight.is_zero for model in plan.models):
        raise BecameError("all models have the weight 0, so that none counts; give one of them a weight above 0.")
    base = [] if plan.base_model is None else [open_checkpoint(plan.base_model)]
    checkpoints = [*base, *(open_checkpoint(model.model) for model in plan.models)]
    adapters = _adapters(checkpoints, plan, rule)
    checkpoints = dense(adapters) if adapters else checkpoints
    alignment = align(checkpoints, out_dtype=plan.out_dtype, pad_vocabulary=plan.pad_vocabulary)
    fishers = {
        k: open_fisher(model.fisher, None if adapters else checkpoints[k + len(base)])
        for k, model in enumerate(plan.models)
        if model.fisher is not None
    }
    gradients, means = (
        {
            k: Extra(f"{what} {k + 1}", open_checkpoint(getattr(model, what)))
            for k, model in enumerate(plan.models)
            if getattr(model, what) is not None
        }
        for what in ("gradient", "mean")
    )
    if fishers:
        check_comparable(list(fishers.values()))
        if not rule.takes_factors and fishers[0].factors == "kronecker":
            raise BecameError(
                f"{fishers[0].path} has Kronecker factors, and {plan.merge_method} merges weight by weight, for which "
                "a Fisher file must be diagonal; became per model, layer or leaf takes factors."
            )
    grams = {k: open_checkpoint(model.gram) for k, model in enumerate(plan.models) if model.gram is not None}
    for gram in grams.values():
        unknown = gram.tensors.keys() - {leaf.name for leaf in alignment.leaves if leaf.is_merged}
        if unknown:
            raise BecameError(
                f"{gram.path} has a Gram matrix of '{min(unknown)}', which is no merged weight; give it that name."
            )
    job = Job(plan, rule, checkpoints, alignment, fishers, gradients, means, grams, adapters)
    for leaf in alignment.leaves:
        _check_leaf(job, leaf)
    _ = job.factored  # factors that do not fit are refused now
    return job


def _adapters(checkpoints: Sequence[Checkpoint], plan: MergePlan, rule: Rule) -> list[Adapter]:
    """Return the LoRA adapters that the checkpoints are; none if they are whole models."""
    are_adapters = [checkpoint.adapter is not None for checkpoint in checkpoints]
    if not any(are_adapters):
        if plan.rank is not None:
            raise BecameError(f"a rank is for LoRA adapters, and {checkpoints[0].path} is none.")
        return []
    if not all(are_adapters):
        path = checkpoints[are_adapters.index(True)].path
        raise BecameError(f"{path} is a LoRA adapter and other models are not.")
    if rule.by_weight:
        raise BecameError("a merge of LoRA adapters has a coefficient per model, layer or leaf, not per weight.")
    if rule.needs_gram:
        raise BecameError(
            f"{plan.merge_method} solves for whole weights, and a merge of LoRA adapters has one number for each; "
            "choose another rule, or merge the models that the adapters make."
        )
    return [adapter_of(checkpoint) for checkpoint in checkpoints]


def _check_leaf(job: Job, leaf: Leaf) -> None:
    """Refuse weights by which a leaf cannot be merged, and Fisher files and others that do not fit it."""
    weights = [model.weight.at(leaf.name, leaf.depth) for model in job.plan.models]
    if leaf.is_merged:
        job.rule.check_weights(leaf.name, weights)
    if leaf.is_merged and not is_statistic(leaf.name):
        for k, fisher in job.fishers.items():
            own = tensor_or_tied(job.checkpoints[k + int(job.has_base)], leaf.name)
            fisher.tensor(leaf.name, own or leaf.tensors[0], leaf.shape)
        for extra in (*job.gradients.values(), *job.means.values()):
            extra.tensor(leaf)
    for grams in job.grams.values():
        gram = grams.tensors.get(leaf.name)
        if gram is None and not job.has_grams(leaf):
            continue
        if gram is None or len(leaf.shape) != 2 or gram.shape != (leaf.shape[1],) * 2 or not gram.is_float:
            shape = "none" if gram is None else list(gram.shape)
            raise BecameError(
                f"{grams.path} should have a Gram matrix of '{leaf.name}', whose weight has shape {list(leaf.shape)}, "
                f"but has {shape}."
            )
        _check_symmetric(finite(gram.whole(), gram), gram)


def _check_symmetric(values: NDArray[Any], gram: StoredTensor) -> None:
    """Refuse a square matrix that is not symmetric within the rounding of half precision."""
    allowed = 0.01 * float(np.max(np.abs(values), initial=0.0))
    for start in range(0, len(values), ROWS):  # a part at a time, so that little memory is needed beside the matrix
        part = values[start : start + ROWS, start:] - values[start:, start : start + ROWS].T
        if np.max(np.abs(part)) > allowed:
            raise BecameError(f"{gram} is not symmetric, as the Gram matrix of inputs, X^T X, is; save that.")


def _check_needed(model: PlannedModel, rule: Rule, plan: MergePlan) -> None:
    if rule.needs_fisher and model.fisher is None:
        raise BecameError(f"{plan.merge_method} needs a Fisher file for each model, and {model.model} has none.")
    if rule.needs_gram != (model.gram is not None):
        verb = "needs" if rule.needs_gram else "makes no use of"
        raise BecameError(f"{plan.merge_method} {verb} a file of Gram matrices for {model.model}.")
    if not rule.needs_fisher:
        for name in ("fisher", "gradient", "mean"):
            if getattr(model, name) is not None:
                raise BecameError(f"{plan.merge_method} makes no use of the {name} of {model.model}; leave it out.")
    if (rule.needs_fisher or rule.needs_gram) and model.weight.least < 0:
        raise BecameError(f"the weight of {model.model} is {model.weight}; for {plan.merge_method} it is at least 0.")
    if plan.merge_method != "became" and (model.gradient is not None or model.mean is not None):
        raise BecameError(f"{plan.merge_method} takes no gradient and no mean; became does.")
