"""Steps of an optimiser of PyTorch that stay out of what must not change, whatever made them.

The weights are noted before a step, and what the step changed is projected after it. What a projector cannot protect is
pulled back by the proximal step of a quadratic penalty,

    theta <- (theta + s mean) / (1 + s)    with s = learning rate x penalty x precision

which is decoupled from the optimiser, as AdamW's weight decay is, and stable at any strength. Of an Adam, s is divided
by the root of its second moments, as its steps are.

A step may call a closure that computes its gradients: they are those at the weights from before the step, as always.

Of a sharded weight every process does this to the rows that it has, and nothing is sent: G - G M M^T, like every
projection here, acts on each row of G [d_out, d_in] by itself. So a protected weight must be sharded along d_out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adapters.backend.memory import Moments, pull_of
from adapters.backend.own_loop import say_changed
from adapters.torch.shared_model import beside, first_changed, lengths_of, own_part
from became_core import BecameError
from became_core.projection import Projector

__all__ = ["StepGuard", "Witness", "groups_of", "moments_of", "not_compiled", "unwrapped"]

# The model's parameters by name, and the optimiser's group that they are in.
Groups = list[tuple[dict[str, nn.Parameter], dict[str, Any]]]


def unwrapped(optimizer: Any) -> Optimizer:
    """Return the optimiser that takes the steps, of a wrapper such as accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise BecameError(f"a {type(optimizer).__name__} is no optimizer of PyTorch; give the one that takes steps.")
    return optimizer


def not_compiled(hook: Callable[..., None]) -> Callable[..., None]:
    """Return a hook that runs as it is written, also in a step that the user has compiled.

    What a hook remembers between steps are Python's objects, which a compiled step cannot follow.
    """

    def runs(*arguments: Any) -> None:
        # ``disable`` loads PyTorch's compiler, which takes seconds; while a step is compiled, it is loaded already.
        compiler: Any = torch.compiler
        run = compiler.disable(hook) if compiler.is_compiling() else hook
        run(*arguments)

    return runs


def groups_of(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> Groups:
    """Return an optimiser's groups with those of these parameters that are in them and need a gradient.

    Raises:
        BecameError: if there is none.
    """
    groups = _groups(optimizer, {value: name for name, value in parameters.items()})
    if not any(own for own, _ in groups):
        raise BecameError("the optimizer steps no parameter of the model; give the one that trains it.")
    return groups


def _groups(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> Groups:
    return [
        ({names[value]: value for value in group["params"] if value.requires_grad and value in names}, group)
        for group in optimizer.param_groups
    ]


def moments_of(optimizer: Optimizer, group: Mapping[str, Any], value: nn.Parameter) -> Moments | None:
    """Return what an Adam knows of the gradients of a parameter of one of its groups; None of another optimiser.

    Some count the steps of a parameter, and others, such as apex's, those of a group.
    """
    state = optimizer.state.get(value, {})
    step = state.get("step", group.get("step"))
    if "exp_avg_sq" not in state or "betas" not in group or step is None:
        return None
    # A number has double precision, where it need not be waited for.
    steps = step if isinstance(step, Tensor) and step.device.type != "cpu" else float(step)
    return Moments(state["exp_avg_sq"].detach(), steps, float(group["betas"][1]))


@dataclass
class StepGuard:
    """Projects what an optimiser's steps change, and pulls back what the projector cannot protect.

    Attributes:
        optimizer: takes the steps.
        parameters: all of the model, by name. Which of them are trained may change from one step to the next.
        check: is called if it has changed; it raises a BecameError if the memory says too little of what is trained.
        projector: the memory.
        transposed: the matrices that are stored as [d_in, d_out].
        standing: those that are protected as a whole.
        frozen: those that the projector does not protect, and that stand still.
        penalised: of those that are pulled back, the mean, and penalty x precision: what this process has of them.
        before: the weights before the step, likewise.
        still: weights that need no gradient now and have one from before, by which an optimiser would move them; each
            with its value before the step.
        inside: of weights that have a ``removed_factor``, what lay in the protected space before the first step.
        groups: what is trained in the present step, and the optimiser's group that it is in.
        guarded: the names of all that has been trained.

    Raises:
        BecameError: if a protected weight is sharded along d_in, or the optimiser is an LBFGS, changes weights outside
            of its steps, or has no rate.
    """

    optimizer: Optimizer
    parameters: Mapping[str, nn.Parameter]
    check: Callable[[], None]
    projector: Projector
    transposed: frozenset[str]
    standing: frozenset[str]
    frozen: frozenset[str]
    penalised: dict[str, tuple[Tensor, Tensor]]
    before: dict[str, Tensor] = field(default_factory=dict)
    still: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    inside: dict[str, Tensor] = field(default_factory=dict)
    groups: Groups = field(init=False)
    guarded: set[str] = field(init=False)
    _names: dict[nn.Parameter, str] = field(init=False, repr=False)
    _devices: dict[str, torch.device] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check how the weights are sharded, and what a step is."""
        self.groups = groups_of(self.optimizer, self.parameters)
        self.guarded = _names_in(self.groups)
        self._names = {value: name for name, value in self.parameters.items()}
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise BecameError(
                "a step of LBFGS is many steps, each to where the one before it has led, and only their sum could be "
                "projected; choose an optimizer that takes one."
            )
        # Those without a schedule average weights, and exchange them for the averages, by these methods.
        if all(callable(getattr(self.optimizer, method, None)) for method in ("train", "eval")):
            raise BecameError(
                f"{type(self.optimizer).__name__} exchanges the weights outside of its steps, by its train() and "
                "eval(), and only steps are projected; choose an optimizer that changes weights in its steps alone."
            )
        if self.penalised and any(group.get("lr") is None for group in self.optimizer.param_groups):
            raise BecameError(
                "the optimizer has no learning rate of its own (lr=None), by which parameters are pulled back; give it "
                "one, or let uncovered be 'frozen' or 'free'."
            )
        protected = self.projector.rank.keys() - self.standing
        for parameters, _group in self.groups:
            for name in parameters.keys() & protected:
                rows = 1 if name in self.transposed else 0
                if not all(each.is_replicate() or each.dim == rows for each in _placements(parameters[name])):
                    raise BecameError(
                        f"'{name}' is sharded along its inputs, and a step of it can be projected only by whole rows; "
                        f"give fully_shard a shard_placement_fn that returns Shard({rows}) for it."
                    )
        self._follow()

    @torch.no_grad()
    def before_step(self, *_: Any) -> None:
        """Note the weights that the step must not move as it likes."""
        self.groups = _groups(self.optimizer, self._names)
        idle = [it for group in self.optimizer.param_groups for it in group["params"] if not it.requires_grad]
        self.still = [(own_part(it), own_part(it).clone()) for it in idle if it in self._names and it.grad is not None]
        if not self.guarded.issuperset(names := _names_in(self.groups)):
            self.guarded |= names
            self.check()
        self._follow()
        protected = self.projector.rank.keys()
        for parameters, _group in self.groups:
            for name, value in parameters.items():
                if name in protected or name in self.frozen:
                    if name in self.before:
                        self.before[name].copy_(own_part(value))
                    else:
                        self.before[name] = own_part(value).clone()
                    factor = self.projector.removed_factor(name)
                    if factor is not None and name not in self.inside:
                        self.inside[name] = self._inside(name, own_part(value), factor)

    def _follow(self) -> None:
        """Let the memory be where the weights are, which the user's loop may have moved, as Lightning's does."""
        stepped = {name: value for own, _ in self.groups for name, value in own.items()}
        if all(self._devices.get(name) == value.device for name, value in stepped.items()):
            return
        self._devices |= {name: value.device for name, value in stepped.items()}
        self.before = {name: value for name, value in self.before.items() if value.device == self._devices.get(name)}
        self.projector, self.penalised = beside(self.projector, stepped), beside(self.penalised, stepped)

    @torch.no_grad()
    def after_step(self, *_: Any) -> None:
        """Take out of the step what it must not change; in full precision, even within autocast."""
        with ExitStack() as stack:
            for device in {value.device.type for own, _ in self.groups for value in own.values()}:
                stack.enter_context(torch.autocast(device, enabled=False))
            self._correct()

    def _correct(self) -> None:
        for value, before in self.still:
            value.copy_(before)
        protected = self.projector.rank.keys()
        for parameters, group in self.groups:
            for name, parameter in parameters.items():
                value = own_part(parameter)
                if not value.numel():
                    continue  # there are fewer rows than processes
                if name in protected and name not in self.standing:
                    self._project(name, value)
                elif name in self.before:
                    value.copy_(self.before[name])
                elif name in self.penalised:
                    mean, strength = self.penalised[name]
                    moments = moments_of(self.optimizer, group, parameter)
                    if moments is not None:
                        moments = moments._replace(second=own_part(moments.second))
                    pull = self._unless_skipped(pull_of(float(group["lr"]), strength, moments))
                    value.add_((mean - value) * (pull / (1 + pull)))  # at the mean it adds exactly 0

    def _unless_skipped(self, pull: Tensor) -> Tensor:
        """Return no pull where a fused optimiser takes no step, since a GradScaler found gradients that overflow."""
        overflow = getattr(self.optimizer, "found_inf", None)
        return pull if overflow is None else torch.where(overflow.to(pull.device) > 0, torch.zeros_like(pull), pull)

    def _project(self, name: str, value: Tensor) -> None:
        """Take a step's part in the protected space out of a weight, in place."""
        before, factor = self.before[name], self.projector.removed_factor(name)
        if factor is not None and value.dtype == factor.dtype and value.is_contiguous():
            # Two products and no further array of the weight's size; the weights from before the step are not needed.
            back = before.sub_(value)
            self._rows(name, value).addmm_(self._rows(name, back) @ factor, factor.T)
            return
        allowed = self.projector.project({name: self._rows(name, value - before)})[name]
        allowed = (allowed.T if name in self.transposed else allowed).reshape(value.shape)
        torch.add(before, allowed, out=value)

    def _rows(self, name: str, value: Tensor) -> Tensor:
        """Return the matrix [d_out, d_in] of a weight with any number of axes; a view if it is contiguous."""
        width = self.projector.rank[name][1]
        return value.reshape(width, -1).T if name in self.transposed else value.reshape(-1, width)

    def _inside(self, name: str, value: Tensor, factor: Tensor) -> Tensor:
        """Return a weight's part in its protected space, [d_out, k]."""
        return (self._rows(name, value).double() @ factor.double()).to(factor.dtype)

    @property
    def held(self) -> set[str]:
        """The names of all that no step has moved."""
        protected = self.projector.rank.keys()
        return {
            name for name in self.guarded if name in self.standing or (name in self.frozen and name not in protected)
        }

    @torch.no_grad()
    def first_moved(self, steps: int) -> str | None:
        """Return the first weight that has moved within its protected space, by more than these steps' rounding."""
        for name, before in self.inside.items():
            value, factor = own_part(self.parameters[name]), self.projector.removed_factor(name)
            if factor is None or not value.numel():
                continue
            epsilon = max(torch.finfo(value.dtype).eps, torch.finfo(factor.dtype).eps)
            wide = factor.double()
            identity = torch.eye(len(wide.T), dtype=wide.dtype, device=wide.device)
            if float(torch.linalg.vector_norm(wide.T @ wide - identity)) > 1e-4:
                continue  # directions of less importance may move in part
            now = self._inside(name, value.to(factor.device), factor)
            moved = torch.linalg.vector_norm(now.double() - before.to(now.device).double())
            # Each step rounds every entry of the weight once; 16 times as much is no rounding of any kernel.
            if float(moved) > 16 * steps * epsilon * float(torch.linalg.vector_norm(value.double())):
                return name
        return None


def _names_in(groups: Groups) -> set[str]:
    return {name for own, _ in groups for name in own}


def _placements(value: Any) -> tuple[Any, ...]:
    return tuple(getattr(value, "placements", ()))


@dataclass
class Witness:
    """Sees whether something else than the guarded steps changes weights, for then nothing holds them to old data.

    It looks twice, since that costs a pass over the weights: between the first round of steps and the next one, and at
    the end. Then weights that no guarded optimiser has, or that stand still, must be as they were, and so must be what
    GPM protects of the others, where that is no more than half of a weight's space. What is compared otherwise are the
    weights' lengths; their sums would not do, as a softmax has gradients that add up to zero.

    Attributes:
        weights: the model's trained parameters.
        guards: those of all optimisers that were given.
        steps: how many were taken.
        lengths: of the weights, when they were noted last.
    """

    weights: dict[str, nn.Parameter]
    guards: Sequence[StepGuard]
    steps: int = 0
    lengths: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Note the weights as they are."""
        self.lengths = lengths_of(self.weights)

    def before_step(self, *_: Any) -> None:
        """Look, if all optimisers have stepped once."""
        if self.steps == 0:
            self.lengths = lengths_of(self.weights)  # a checkpoint may have been loaded
        elif self.steps == len(self.guards):
            changed = self._first_changed(self.weights)
            if changed is not None:
                say_changed(changed, has_stepped=True)

    def after_step(self, *_: Any) -> None:
        """Count the step."""
        self.steps += 1
        if self.steps == len(self.guards):
            self.lengths = lengths_of(self.weights)

    def at_end(self) -> None:
        """Look at what no step has moved, or at all weights if none was taken; and at what lies in protected spaces."""
        moving = {name for guard in self.guards for name in guard.guarded - guard.held} if self.steps else ()
        changed = self._first_changed(name for name in self.weights if name not in moving)
        for guard in self.guards if changed is None else ():
            changed = changed or guard.first_moved(self.steps)
        if changed is not None:
            say_changed(changed, has_stepped=self.steps > 0)

    def _first_changed(self, names: Iterable[str]) -> str | None:
        return first_changed(self.lengths, lengths_of(self.weights), names)
