"""The method around a training loop that is not ours: any model, batch, loss, optimiser, scheduler and precision.

What is projected is the step of the user's optimiser (``adapters/torch/steps.py``), and what is measured is the loss on
the user's batches (``adapters/torch/data_loss.py``).

Convention: losses and Fisher information are means over samples or over tokens, as the likelihood says, and tasks count
alike, each with its mean. Parameters go by PyTorch's own names; those that need no gradient are never touched.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from adapters.backend.own_loop import Coverage, Covered, MergeReport, NetworkCheck, Uncovered, first_difference
from adapters.torch.batches import Apply, Reader, Targets, repeatable
from adapters.torch.data_loss import Batches, DataLoss, Kind, Loss, NewTask
from adapters.torch.layers import estimate_statistics
from adapters.torch.steps import StepGuard, groups_of, unwrapped
from became_core import BecameError, Diagonal, LaplacePosterior, Secant, merge
from became_core.arrays import Params, difference
from became_core.curvature import LIKELIHOODS, Likelihood, likelihood_named
from became_core.laplace import Estimator, MergeSubspace
from became_core.projection import GPM, PROJECTORS, Projector, full

__all__ = ["Continual"]

FORMAT = 1


class Continual:
    """A model that learns tasks one after the other, in a training loop of the user's own.

    Attributes:
        model: the user's own; between calls nothing of ours is left in it.
        posterior: the old tasks' loss, to second order; None before anything is remembered.
        projector: the memory of the spaces that old tasks use.

    Examples:
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <...>
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> old, new = ([(torch.randn(32, 8), torch.randint(0, 4, (32,)))] * 4 for _ in range(2))
        >>> def train(optimizer, batches):
        ...     for inputs, targets in batches:
        ...         optimizer.zero_grad()
        ...         nn.functional.cross_entropy(model(inputs), targets).backward()
        ...         optimizer.step()
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> train(optimizer, old)
        >>> learning = Continual(model, likelihood="categorical")
        >>> learning.remember(old)
        >>> with learning.stable(optimizer):
        ...     train(optimizer, new)
        >>> with learning.plastic():
        ...     train(optimizer, new)
        >>> 0 <= learning.merge(new).alpha <= 1
        True
        >>> learning.remember(new)
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str | Likelihood | Loss = "categorical",
        *,
        projector: Projector | None = None,
        uncovered: Uncovered = "penalised",
        penalty: float = 100.0,
        fisher: Kind = "empirical",
        decay: float = 1.0,
        estimator: Estimator | None = None,
        apply: Apply | None = None,
        targets: Targets | None = None,
        check: bool = True,
        progress: bool = True,
    ) -> None:
        """Keep the model, and what is to be done with it.

        Args:
            model: any module.
            likelihood: "categorical", "gaussian" or "bernoulli", a value of ``became_core.curvature``, or any loss:
                (outputs, targets) -> the mean over the samples of the batch, of which Fisher information is the
                empirical one, and curvature along a direction a difference of slopes.
            projector: what protects matrices: an empty ``GPM()``, ``SGP()`` or ``NSCL()``, or another that needs only
                what layers read; ``GPM()`` if not given.
            uncovered: what is done with parameters that it cannot protect: they are "penalised" for leaving the old
                tasks' posterior, "frozen" or "free".
            penalty: the strength of that penalty; 100, as in NSCL's published runs.
            fisher: the Fisher information of "empirical" targets, those given; or of the model's own, as the "true"
                expectation (a backward pass for each class or output) or "sampled". Where a network fits its data
                well, the empirical one vanishes, and the others do not.
            decay: the share of the old tasks' precision that each new task leaves, the paper's gamma.
            estimator: how losses along the way between two models are estimated; ``Secant()`` if not given.
            apply: (model, batch) -> outputs, for batches of a kind that ``adapters/torch/batches.py`` does not know.
            targets: batch -> targets, likewise.
            check: whether the network is looked at once, in the first ``remember`` or ``merge``.
            progress: whether a terminal shows how far a pass is.

        Raises:
            BecameError: if something of these cannot be used.
        """
        self.model = model
        self.projector: Projector = GPM() if projector is None else projector
        self.uncovered, self.penalty, self.decay, self.fisher = uncovered, penalty, decay, fisher
        self.estimator: Estimator = Secant() if estimator is None else estimator
        self.posterior: LaplacePosterior | None = None
        _check_settings(self.projector, uncovered, penalty, decay, fisher)
        known = likelihood_named(likelihood) if isinstance(likelihood, str) else likelihood
        self._data = DataLoss(model, known, Reader(apply, targets), checks=check, shows=progress, fisher=fisher)
        self._theta_gp: Params | None = None
        if not self._data.trained:
            raise BecameError("no parameter of the model needs a gradient; there is nothing to learn.")

    @property
    def likelihood(self) -> Likelihood | Loss:
        """How probable targets are, or the loss that was given; a Gaussian one's noise is fitted to the first data."""
        return self._data.likelihood

    @property
    def checked(self) -> NetworkCheck | None:
        """What the first look at the network found; None before it, or if there is none."""
        return self._data.checked

    # What must not be lost.

    def remember(
        self, batches: Batches | None = None, *, optimizer: Optimizer | None = None, samples: int | None = None
    ) -> None:
        """Remember the data that the model has learned, at the weights as they are.

        One pass over the batches, in evaluation mode, gives the memory of the spaces that they use and the exact
        diagonal of the empirical Fisher information. Without old data there may be an optimiser: the second moments of
        Adam, without their bias and times the samples of a step, stand for the Fisher information; then there is no
        memory of spaces, and nothing is protected but penalised.

        Args:
            batches: of the old data.
            optimizer: an Adam that has just trained the model on them, instead of batches.
            samples: with an optimiser, how many samples (or tokens) a step had.

        Raises:
            BecameError: if there is no batch, or a batch or an optimiser cannot be used.
        """
        if (batches is None) == (optimizer is None):
            raise BecameError("remember needs either batches or an optimizer; give one of them.")
        if optimizer is not None:
            fisher = _second_moments(optimizer, self._data.trained, samples)
        else:
            assert batches is not None
            fisher, finished = self._data.fisher(batches, "remembering", with_memory=True)
            self.projector = self.projector.remember(finished)
        # A parameter that was frozen then has no curvature from that time.
        old = {} if self.posterior is None else self.posterior.precision.diagonal()
        total = {name: value + self.decay * old[name] if name in old else value for name, value in fisher.items()}
        self.posterior = LaplacePosterior(self._data.weights(), Diagonal(total))
        self._theta_gp = None

    @property
    def coverage(self) -> Coverage:
        """What happens to every parameter while training is stable.

        Raises:
            BecameError: before anything is remembered.
        """
        self._check_remembered("coverage")
        matrices, ranks = self._data.matrices or {}, self.projector.rank
        rows = []
        for name, value in self.model.named_parameters():
            use = "matrix, transposed" if matrices.get(name) else "matrix" if name in matrices else "other"
            if not value.requires_grad:
                rows.append(Covered(name, use, "not trained", value.numel()))
            elif name in ranks:
                rows.append(Covered(name, use, "protected", value.numel(), *ranks[name]))
            else:
                rows.append(Covered(name, use, self.uncovered, value.numel()))
        return Coverage(rows)

    # Training.

    @contextmanager
    def stable(self, *optimizers: Optimizer) -> Iterator[None]:
        """Keep every ``step()`` of these optimisers out of the spaces that old data use, for the time of this context.

        Args:
            optimizers: all that step the model; those of a wrapper are found in it.

        Raises:
            BecameError: before anything is remembered, or if an optimiser has no parameter of the model.
        """
        self._check_remembered("stable training")
        with ExitStack() as stack:
            for optimizer in map(unwrapped, optimizers):
                guard = self._guard(optimizer)
                stack.callback(optimizer.register_step_pre_hook(guard.before_step).remove)
                stack.callback(optimizer.register_step_post_hook(guard.after_step).remove)
            try:
                yield
            finally:
                self._theta_gp = self._data.weights()

    @contextmanager
    def plastic(self) -> Iterator[None]:
        """Mark the time in which the model is trained freely; it must come after a stable one."""
        if self._theta_gp is None:
            raise BecameError("plastic training comes after stable training; train in learning.stable(...) first.")
        yield

    def merge(self, batches: Batches, *, trace: int = 0, statistics: Batches | None = None) -> MergeReport:
        """Merge the stable and the present, plastic weights; the model then has the merged ones, theta*.

        Args:
            batches: of the new data; a part of them will do.
            trace: at how many alphas the true loss of the new data is measured, both ends among them; 0 for none.
            statistics: batches that the running statistics of batch norms are estimated from, at the merged weights;
                they stay those of the plastic model if not given.

        Raises:
            BecameError: if there was no stable training since the last memory.
        """
        if self._theta_gp is None or self.posterior is None:
            raise BecameError(
                "a merge is of two models; train in learning.stable(...), and then in learning.plastic()."
            )
        theta_hat = self._data.weights()
        if self._theta_gp.keys() != theta_hat.keys():
            raise BecameError("other parameters need a gradient than in stable training; let the same ones be trained.")
        new = NewTask(self._data, repeatable(batches), theta_hat)
        subspace = MergeSubspace(self._theta_gp, [difference(theta_hat, self._theta_gp)], [1.0])
        precision = {n: value for n, value in self.posterior.precision.diagonal().items() if n in theta_hat}
        mean = {name: self.posterior.mean.get(name, value) for name, value in self._theta_gp.items()}
        quadratic = self.estimator.quadratic(subspace, (LaplacePosterior(mean, Diagonal(precision)), new))
        alpha = float(quadratic.minimiser("box")[0])
        points = [index / (trace - 1) for index in range(trace)] if trace > 1 else [alpha] * trace
        traced = [(point, new.loss(merge(self._theta_gp, theta_hat, point))) for point in points]
        self._data.assign(merge(self._theta_gp, theta_hat, alpha))
        self._theta_gp = None
        if statistics is not None:
            estimate_statistics(self.model, (partial(self._data.run, batch) for batch in statistics))
        return MergeReport(
            alpha=alpha,
            slopes=(float(quadratic.slope_at(0.0)[0]), float(quadratic.slope_at(1.0)[0])),
            gain=float(quadratic.predicted_gain("box")),
            is_convex=bool(quadratic.is_convex),
            promised=bool(quadratic.has_interior_optimum),
            curvature=new.way,
            quadratic=quadratic,
            trace=traced,
        )

    # On disk.

    def save(self, file: str | Path) -> None:
        """Write the memory, without the model, as safetensors with metadata in JSON.

        Raises:
            BecameError: before anything is remembered, or if the projector has no registered name.
        """
        self._check_remembered("a file")
        assert self.posterior is not None
        names = [name for name in PROJECTORS.names if PROJECTORS[name] is type(self.projector)]
        if not names:
            raise BecameError(
                f"the projector {type(self.projector).__name__} has no name in PROJECTORS; register it, so that a file "
                "can say which one it is."
            )
        arrays = {f"mean.{name}": value for name, value in self.posterior.mean.items()}
        arrays |= {f"fisher.{name}": value for name, value in self.posterior.precision.diagonal().items()}
        arrays |= {f"projector.{name}": torch.as_tensor(value) for name, value in self.projector.to_arrays().items()}
        known = isinstance(self.likelihood, Likelihood)
        description = {
            "format": FORMAT,
            "parameters": {name: list(value.shape) for name, value in self.model.named_parameters()},
            "matrices": self._data.matrices or {},
            "projector": [names[0], _plain_fields(self.projector)],
            "likelihood": [type(self.likelihood).__name__, _plain_fields(self.likelihood)] if known else None,
            "uncovered": self.uncovered,
            "penalty": self.penalty,
            "decay": self.decay,
            "fisher": self.fisher,
        }
        tensors = {name: value.detach().contiguous().cpu() for name, value in arrays.items()}
        save_file(tensors, str(file), {"became": json.dumps(description)})

    @classmethod
    def load(cls, model: nn.Module, file: str | Path, **settings: Any) -> Self:
        """Return what ``save`` wrote, around a model of the same architecture.

        Args:
            model: its weights are left as they are.
            file: the memory.
            settings: arguments of the constructor that a file does not hold (``apply``, ``targets``, a loss), or that
                are to be others.

        Raises:
            BecameError: if the file is no memory, or is one of another architecture.
        """
        try:
            with safe_open(str(file), "pt") as opened:
                description = json.loads((opened.metadata() or {})["became"])
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise BecameError(f"{file} is no memory that Continual.save wrote ({error}).") from None
        shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
        differs = first_difference(shapes, description["parameters"])
        if differs:
            raise BecameError(f"{file} is the memory of another architecture: {differs}.")
        if description["likelihood"] is not None:
            kinds = {kind.__name__: kind for kind in LIKELIHOODS.values()}
            name, values = description["likelihood"]
            values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            settings.setdefault("likelihood", kinds[name](**values))
        elif "likelihood" not in settings:
            raise BecameError(f"{file} was made with a loss of your own; give it as likelihood=.")
        kept = {key: description[key] for key in ("uncovered", "penalty", "decay", "fisher")}
        name, values = description["projector"]
        learning = cls(model, **(kept | {"projector": PROJECTORS[name](**values)} | settings))
        learning._restore(arrays, description["matrices"])
        return learning

    def _restore(self, arrays: Mapping[str, Tensor], matrices: dict[str, bool]) -> None:
        place = {name: value.device for name, value in self.model.named_parameters()}
        parts: dict[str, Params] = {"mean": {}, "fisher": {}, "projector": {}}
        for key, value in arrays.items():
            part, _, name = key.partition(".")
            owner = name.partition(".")[2] if part == "projector" else name
            parts[part][name] = value.to(place.get(owner, value.device))
        self.posterior = LaplacePosterior(parts["mean"], Diagonal(parts["fisher"]))
        self.projector = self.projector.with_arrays(parts["projector"])
        self._data.matrices = matrices

    def _guard(self, optimizer: Optimizer) -> StepGuard:
        assert self.posterior is not None
        precision, matrices = self.posterior.precision.diagonal(), self._data.matrices or {}
        return StepGuard(
            groups=groups_of(optimizer, self._data.trained),
            projector=self.projector,
            transposed=frozenset(name for name, is_transposed in matrices.items() if is_transposed),
            standing=full(self.projector),
            uncovered=self.uncovered,
            penalised={name: (self.posterior.mean[name], self.penalty * value) for name, value in precision.items()},
        )

    def _check_remembered(self, what: str) -> None:
        if self.posterior is None:
            raise BecameError(f"{what} needs a memory of old data; call learning.remember(old_batches) first.")


def _check_settings(projector: Projector, uncovered: str, penalty: float, decay: float, fisher: str) -> None:
    if fisher not in ("empirical", "true", "sampled"):
        raise BecameError(f"the Fisher information is '{fisher}'; choose empirical, true or sampled.")
    if uncovered not in ("penalised", "frozen", "free"):
        raise BecameError(f"uncovered is '{uncovered}'; choose penalised, frozen or free.")
    if not 0 <= penalty < float("inf"):
        raise BecameError(f"the penalty is {penalty}; it must be at least 0 and finite.")
    if not 0 <= decay <= 1:
        raise BecameError(f"the decay is {decay}; it must be in [0, 1].")
    own = type(projector)
    steps_alone = own.begin_task is Projector.begin_task and own.stages == 1 and not own.protects_all
    if not steps_alone:
        raise BecameError(
            f"{own.__name__} does more than to project steps, which a loop of your own cannot do for it; choose GPM, "
            "SGP or NSCL."
        )


def _second_moments(optimizer: Optimizer, trained: Mapping[str, nn.Parameter], samples: int | None) -> Params:
    """Return Fisher information from an Adam's second moments, without their bias, times the samples of a step."""
    if samples is None or samples < 1:
        raise BecameError("remembering an optimizer needs samples=, how many samples or tokens a step had, at least 1.")
    fisher: Params = {}
    names = {parameter: name for name, parameter in trained.items()}
    for group in unwrapped(optimizer).param_groups:
        betas = group.get("betas")
        for value in group["params"]:
            name = names.get(value)
            state = optimizer.state.get(value, {})
            if name is None or "exp_avg_sq" not in state or betas is None:
                continue
            steps = float(state["step"])
            fisher[name] = state["exp_avg_sq"].detach() / (1 - betas[1] ** steps) * samples
    if not fisher:
        raise BecameError(
            "the optimizer has no second moments of the model's parameters; give an Adam that has stepped."
        )
    warnings.warn(
        "second moments of an optimizer stand for the Fisher information of old data: they are those of batches, at "
        "the weights of the last steps, and are unfit after clipping, a scaled loss, weight decay in the gradient "
        "(Adam's, not AdamW's), or few steps; batches of old data are better.",
        stacklevel=3,
    )
    return {name: fisher.get(name, torch.zeros_like(value.detach())) for name, value in trained.items()}


def _plain_fields(value: Any) -> dict[str, Any]:
    """Return the settings of a dataclass: its fields that JSON can hold."""
    if not is_dataclass(value):
        return {}
    values = {part.name: getattr(value, part.name) for part in fields(value) if part.init}
    return {
        name: part
        for name, part in values.items()
        if isinstance(part, int | float | str | tuple | None) and name != "tasks"
    }
