"""The method around a training loop that is not ours: any model, batch, loss, optimiser, scheduler and precision.

What is projected is the step of the user's optimiser (``adapters/torch/steps.py``), and what is measured is the loss on
the user's batches (``adapters/torch/data_loss.py``).

Convention: losses and Fisher information are means over samples or over tokens, as the likelihood says, and tasks count
alike, each with its mean. Parameters go by PyTorch's own names; those that need no gradient are never touched.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from adapters.backend.batches import Reader
from adapters.backend.calibration import Calibration
from adapters.backend.continual import ContinualModel
from adapters.backend.memory import Moments
from adapters.backend.memory_file import read_memory, restored, written
from adapters.backend.own_loop import MergeReport, Uncovered, known_likelihood, warn_of_statistics
from adapters.torch.batches import Apply, Targets
from adapters.torch.data_loss import Batches, DataLoss, Loss
from adapters.torch.layers import running_means
from adapters.torch.sharded_memory import all_agree, read_shards, write_shards
from adapters.torch.shared_model import SharedModel, beside, own_part
from adapters.torch.steps import StepGuard, Witness, groups_of, moments_of, not_compiled, unwrapped
from became_core import BecameError
from became_core.arrays import Array
from became_core.curvature import FisherTargets, Likelihood
from became_core.laplace import Estimator
from became_core.projection import Projector, full

__all__ = ["Continual"]


class Continual(ContinualModel):
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
        fisher: FisherTargets = "empirical",
        decay: float = 1.0,
        estimator: Estimator | None = None,
        calibration: Calibration | None = None,
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
            penalty: the strength of that penalty; 100, as in NSCL's published runs. Of an Adam it acts in the metric of
                the steps, as a penalty in the loss would.
            fisher: the Fisher information of "empirical" targets, those given; or of the model's own, as the "true"
                expectation (a backward pass for each class or output) or "sampled". Where a network fits its data
                well, the empirical one vanishes, and the others do not.
            decay: the share of the old tasks' precision that each new task leaves, the paper's gamma.
            estimator: how losses along the way between two models are estimated; the paper's closed form,
                ``PaperClosedForm()``, if not given. ``Secant()`` is what ``became run --precision exact`` has.
            calibration: "across" tasks: the curvature of each is calibrated when it is remembered, along the movement
                of the task before, and a merge has an estimator of its own. Then this object must be made before the
                first task is trained. None, as in the paper, if not given.
            apply: (model, batch) -> outputs, for batches of a kind that ``adapters/torch/batches.py`` does not know.
            targets: batch -> targets, likewise.
            check: whether the network is looked at once, in the first ``remember`` or ``merge``.
            progress: whether a terminal shows how far a pass is.

        Raises:
            BecameError: if something of these cannot be used.
        """
        super().__init__(
            model,
            projector=projector,
            uncovered=uncovered,
            penalty=penalty,
            fisher=fisher,
            decay=decay,
            estimator=estimator,
            calibration=calibration,
        )
        known = known_likelihood(likelihood)
        self._data: DataLoss = DataLoss(
            model, known, Reader(apply, targets), checks=check, shows=progress, fisher=fisher
        )
        if not self._data.trained:
            raise BecameError("no parameter of the model needs a gradient; there is nothing to learn.")
        for name, value in self._data.trained.items():
            _check_parameter(name, value)
        for name, layer in self._data.shared.model.named_modules():
            if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.max_norm and layer.weight.requires_grad:
                raise BecameError(
                    f"the layer '{name}' shortens its rows whenever it runs (max_norm={layer.max_norm:g}), beside the "
                    "steps of any optimizer; make it without max_norm, and shorten rows in a post-hook of the step."
                )
        self._begin_calibration()

    # What must not be lost.

    def remember(
        self,
        batches: Batches | None = None,
        *,
        optimizer: Optimizer | None = None,
        samples: int | None = None,
        share: float | None = None,
    ) -> None:
        """Remember the data that the model has learned, at the weights as they are.

        One pass over the batches, in evaluation mode, gives the memory of the spaces that they use and the exact
        diagonal of the Fisher information. Both are means. So of many batches a random share is measured, which tells
        nearly the same in a part of the time; but what no drawn batch uses, such as the embedding of a rare word, is
        then taken for unused.

        Without old data there may be an optimiser: the second moments of Adam, without their bias and times the samples
        of a step, stand for the Fisher information; then there is no memory of spaces, and nothing is protected but
        penalised.

        Args:
            batches: of the old data.
            optimizer: an Adam that has just trained the model on them, instead of batches.
            samples: with an optimiser, how many samples (or tokens) a step had.
            share: of the batches, drawn at random, that is measured: 1 for all. If not given, all of up to 64 batches,
                64 of up to 256, and a quarter of more; all, if their number is not known. It is the number of all
                processes' batches, of which each draws this share of its own.

        Raises:
            BecameError: if there is no batch, or a batch or an optimiser cannot be used.
        """
        if (batches is None) == (optimizer is None):
            raise BecameError("remember needs either batches or an optimizer; give one of them.")
        self._check_not_stable("remembering")
        self._check_shapes()
        self._follow()
        moments = None if optimizer is None else self._moments_of(optimizer)
        self._remember(batches, share, moments, samples, self._data.trained)

    def _moments_of(self, optimizer: Optimizer) -> dict[str, Moments | None]:
        """Return what an Adam knows of the parameters' gradients."""
        stepper = unwrapped(optimizer)
        return {
            name: moments_of(stepper, group, value)
            for own, group in groups_of(stepper, self._data.trained)
            for name, value in own.items()
        }

    # Training.

    @contextmanager
    def stable(self, *optimizers: Optimizer) -> Iterator[None]:
        """Keep every ``step()`` of these optimisers out of the spaces that old data use, for the time of this context.

        Args:
            optimizers: all that step the model; those of a wrapper are found in it, and one that is named twice counts
                once.

        Raises:
            BecameError: before anything is remembered; if there is no optimiser, or one has no parameter of the model;
                if a parameter has another shape than then, or was frozen then, or is in stable training of another
                object; if anything beside the steps of these optimisers is seen to change weights, before the second
                step or at the end.
        """
        self._check_not_stable("stable training")
        self._check_as_remembered()
        if not optimizers:
            raise BecameError("stable training projects the steps of an optimizer; give stable() all that train.")
        guards = [self._guard(optimizer) for optimizer in dict.fromkeys(map(unwrapped, optimizers))]
        witness, means = Witness(self._data.trained, guards), running_means(self.model)
        self._warn_of_replaced(self._data.trained, self._is_as_remembered)
        with ExitStack() as stack:
            stack.enter_context(self._stable(self._data.trained))
            for guard in guards:
                for before in (witness.before_step, guard.before_step):
                    stack.callback(guard.optimizer.register_step_pre_hook(not_compiled(before)).remove)
                for after in (guard.after_step, witness.after_step):
                    stack.callback(guard.optimizer.register_step_post_hook(not_compiled(after)).remove)
            try:
                yield
            finally:
                self._end_stable()
            witness.at_end()
            warn_of_statistics(means, running_means(self.model))

    def merge(self, batches: Batches, *, trace: int = 0, statistics: Batches | None = None) -> MergeReport:
        """Merge the stable and the present, plastic weights; the model then has the merged ones, theta*.

        Args:
            batches: of the new data; a part of them will do.
            trace: at how many alphas the true loss of the new data is measured, both ends among them; 0 for none.
            statistics: batches that the running statistics of batch norms are estimated from, at the merged weights;
                they stay those of the plastic model if not given.

        Raises:
            BecameError: if there was no stable training since the last memory, one point alone is to be traced, or
                batches cannot be used; the model is as it was then, and can be merged again.
        """
        if statistics is not None and self._data.shared.count > 1:
            raise BecameError(
                "statistics= estimates batch norms from one process's batches; leave it out where several train."
            )
        self._follow()
        return self._merge(batches, trace, statistics, "other parameters need a gradient")

    # On disk.

    def save(self, file: str | Path, *, sharded: bool = False) -> None:
        """Write the memory, without the model, as safetensors with metadata in JSON; all frameworks' are alike.

        Args:
            file: the file, or the folder if it is sharded; what was saved there before is replaced at the end.
            sharded: whether each process writes its own part into a folder, by ``torch.distributed.checkpoint``. Then
                nothing is gathered, and any number of processes can load it, with PyTorch alone.

        Raises:
            BecameError: before anything is remembered, or if the projector has no registered name, or processes cannot
                write what they share.
        """
        if sharded:
            write_shards(Path(file), *self._stored(), self._data.shared)
        else:
            super().save(file)

    def _write(self, arrays: dict[str, Array], file: str | Path, metadata: dict[str, str]) -> None:
        tensors, shared, failure = {}, self._data.shared, None
        for name, value in arrays.items():
            whole = shared.gathered({name: value})[name]
            if shared.rank == 0:
                tensors[name] = torch.as_tensor(whole, device="cpu").detach().contiguous()
        if shared.rank == 0:
            try:
                with written(file) as temporary:
                    save_file(tensors, temporary, metadata)
            except BecameError as error:
                failure = str(error)
        # The others wait until the file is there.
        failure = shared.of_all(failure)[0]
        if failure is not None:
            raise BecameError(failure if shared.count == 1 else f"process 1 {failure}")

    @classmethod
    def load(cls, model: nn.Module, file: str | Path, **settings: Any) -> Self:
        """Return what ``save`` wrote, around a model of the same architecture, or one that has new heads beside it.

        Args:
            model: its weights are left as they are.
            file: the memory; a folder if it was saved sharded.
            settings: arguments of the constructor that a file does not hold (``estimator``, ``apply``, ``targets``,
                ``check``, ``progress``, a loss), or that are to be others.

        Raises:
            BecameError: if the file is no memory, or is one of another architecture; in all processes, if one of
                several cannot read it.
        """
        shared = SharedModel(model)
        parameters: dict[str, Any] = dict(shared.parameters)
        # A disk may not be shared; then all say so.
        if any(shared.of_all(os.path.isdir(file))):  # noqa: PTH112 - that of Path may raise
            description, arrays = read_shards(Path(file), parameters, shared)
        else:
            problem = None
            try:
                description, arrays = read_memory(file, "pt")
            except BecameError as error:
                problem = str(error)
            all_agree(shared, problem)
            for key, value in arrays.items():
                part, _, name = key.partition(".")
                owner: Any = parameters.get(name.partition(".")[2] if part == "projector" else name, value)
                arrays[key] = value.to(owner.device) if part == "projector" else shared.placed(value, owner)
        shapes = {name: tuple(value.shape) for name, value in parameters.items()}
        stored = restored(file, description, arrays, shapes, settings, may_have_grown=True)
        learning = cls(model, **stored.settings)
        learning._restore(stored)
        return learning

    def _follow(self) -> None:
        """Let the memory be where the model is, which may have been moved since data were remembered."""
        owners = self._data.parameters
        self.projector = beside(self.projector, owners)
        self.posterior = beside(self.posterior, owners)
        self._theta_gp = beside(self._theta_gp, owners)
        self._across = beside(self._across, owners)
        if self._begin is not None:  # the model may have been sharded since
            placed = self._data.shared.placed
            self._begin = {name: placed(value, owners[name]) for name, value in self._begin.items() if name in owners}

    def _is_as_remembered(self, name: str) -> bool:
        assert self.posterior is not None
        now, then = own_part(self._data.trained[name]), own_part(self.posterior.mean[name])
        return torch.equal(now, then.to(now.device))

    def _guard(self, optimizer: Optimizer) -> StepGuard:
        return StepGuard(
            optimizer=optimizer,
            parameters=self._data.parameters,
            check=self._check_as_remembered,
            projector=self.projector,
            transposed=self._transposed,
            standing=full(self.projector),
            frozen=self._held if self.uncovered == "frozen" else frozenset(),
            penalised={
                name: (own_part(mean), own_part(strength)) for name, (mean, strength) in self._penalised.items()
            },
        )


def _check_parameter(name: str, value: nn.Parameter) -> None:
    """Raise a BecameError if a parameter is not of real numbers that are there."""
    if isinstance(value, nn.UninitializedParameter):
        raise BecameError(f"'{name}' has no shape yet; run the model on a batch before it is handed over.")
    if value.is_complex():
        raise BecameError(f"'{name}' is complex; let torch.view_as_complex make it of a real parameter.")
    if value.is_meta:
        raise BecameError(
            f"'{name}' is on the device meta and has no numbers; load the model's weights before it is handed over."
        )
