"""The loss of a model on a user's batches: its Fisher information, slopes and curvature, and what its layers read.

A likelihood gives all of it. Any other loss, (outputs, targets) -> the mean over the samples of a batch, has the
empirical Fisher information, and curvature along a direction as the difference of slopes at its two sides.

Processes that train the model together (``adapters/torch/shared_model.py``) each give their own batches: what is summed
here over batches is then summed over processes.

Convention: means over samples or over tokens, as the likelihood says; the model is in evaluation mode for the time of a
measurement. Parameters go by PyTorch's own names, and are those that need a gradient.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapters.backend.batches import (
    Reader,
    counted,
    drawn,
    gradient_by_outputs,
    length_of,
    mean_loss,
    units_of,
    with_progress,
)
from adapters.backend.checking import check_network
from adapters.backend.memory import InputGrams
from adapters.backend.merging import by_slopes
from adapters.backend.own_loop import NetworkCheck
from adapters.backend.own_loss import OwnLoss
from adapters.torch.batches import Applied, few_samples, in_evaluation, not_a_few, to_device
from adapters.torch.checking import RowsKept, TorchView
from adapters.torch.derivatives import Derivatives
from adapters.torch.layers import estimate_statistics, gradients_of, outputs_at
from adapters.torch.matrices import Matrices
from adapters.torch.shared_model import SharedModel, own_part
from adapters.torch.tapping import Layouts, as_written, collect_taps
from became_core import BecameError, Quadratic
from became_core.arrays import Params
from became_core.curvature import FisherTargets, Likelihood, Taps, square_sums
from became_core.errors import first_line

__all__ = ["Batches", "DataLoss", "Loss"]

Loss = Callable[[Tensor, Any], Tensor]
Batches = Iterable[Any]


class TorchLoss(OwnLoss):
    """A loss of the user's own, of PyTorch's tensors."""

    def gradient(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return the gradient of the sum of all samples' losses by the outputs."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.value(leaf, targets) * len(outputs), leaf)
        return gradient


class DataLoss:
    """A model's loss on batches, as a function of its weights.

    Attributes:
        loss: a likelihood, or a loss of the user's own as one.
        checked: what the first look at the network found; None before it, or if there is none.
        matrices: the parameters that are used as matrices alone, and whether they are stored as [d_in, d_out]; None
            before the first look.
        shared: the model, and the processes that train it together.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | Loss,
        reader: Reader[nn.Module],
        *,
        checks: bool,
        shows: bool,
        fisher: FisherTargets = "empirical",
    ) -> None:
        """Keep what is needed.

        Args:
            model: the model.
            likelihood: or a loss.
            reader: how batches are read.
            checks: whether the network is checked at the first look.
            shows: whether a terminal shows how far a pass is.
            fisher: of which targets the Fisher information is: those given, or the model's own, exactly or drawn.
        """
        self.loss = likelihood if isinstance(likelihood, Likelihood) else TorchLoss(likelihood)
        self.checked: NetworkCheck | None = None
        self.matrices: dict[str, bool] | None = None
        self.shared = SharedModel(model)
        self._model, self._reader = self.shared.model, reader
        self._applied = Applied(self._model, reader)
        self._checks, self._shows, self._kind = checks, shows, fisher
        self._derivatives, self._layouts = Derivatives(), Layouts()
        self._finding: Matrices | None = None  # in a pass over data that are to be remembered
        self._is_fitted = isinstance(self.loss, OwnLoss)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters."""
        self.shared.shard()
        return self.shared.parameters

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that need a gradient."""
        return {name: value for name, value in self.parameters.items() if value.requires_grad}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters."""
        return {name: tuple(value.shape) for name, value in self.parameters.items()}

    def weights(self) -> Params:
        """Return copies of the parameters that need a gradient."""
        return {name: value.detach().clone() for name, value in self.trained.items()}

    @torch.no_grad()
    def assign(self, theta: Params) -> None:
        """Copy these values into the parameters that need a gradient."""
        for name, value in self.trained.items():
            value.copy_(theta[name])

    @contextmanager
    def kept_on_error(self) -> Iterator[None]:
        """Give back what was known of the data before this context, if it ends in an error."""
        before = self.loss, self.matrices, self._is_fitted
        try:
            yield
        except BaseException:
            self.loss, self.matrices, self._is_fitted = before
            raise

    @contextmanager
    def at(self, theta: Params) -> Iterator[None]:
        """Set the weights inside the context, and restore the own ones after it."""
        before = self.weights()
        self.assign(theta)
        try:
            yield
        finally:
            self.assign(before)

    def run(self, batch: Any) -> tuple[Tensor, Any]:
        """Return the outputs of a batch, and its targets."""
        inputs, targets = self._split(batch)
        return self._applied(inputs), targets

    def _split(self, batch: Any) -> tuple[Any, Any]:
        return self._reader.split(to_device(batch, next(iter(self._model.parameters())).device))

    def _inputs_of(self, batch: Any) -> Any:
        return self._split(batch)[0]

    def _first_outputs(self, inputs: Any) -> Tensor:
        """Return the outputs of a whole batch, as ``_watched`` does; a pass that fails is refused in one sentence."""
        try:
            return self._watched(inputs)
        except BecameError:
            raise
        except Exception as error:
            if self._reader.apply is not None:
                raise
            raise BecameError(
                f"the model cannot be called with the inputs of a batch ({first_line(error)}); give apply= and "
                "targets=, of which apply calls the model with what a batch has and returns the outputs."
            ) from error

    def _watched(self, inputs: Any) -> Tensor:
        """Return the outputs of a pass that is refused if it changes trained weights."""
        with torch.no_grad(), as_written(compiled=self._layouts.compiled), RowsKept(self.trained):
            outputs: Tensor = self._applied(inputs)
        return outputs

    def _look(self, inputs: Any, outputs: Tensor, targets: Any) -> None:
        """Look at the network once: which parameters are matrices, and whether we compute what it computes."""
        self._fit(outputs, targets)
        names = self.shared.names
        few = few_samples((inputs,), len(outputs))
        try:
            self._watched(*few)
        except BecameError:
            raise
        except Exception as error:
            raise not_a_few(len(outputs), error) from None
        if self._checks and self.checked is None:
            self.checked = check_network(TorchView(self._applied, names, few, self._derivatives))
            self.checked.assert_sound()
        if self._finding is not None:
            self._finding.look(self._applied, names, few)

    def _fit(self, outputs: Tensor, targets: Any) -> None:
        """Let the likelihood know what it must of the data's noise."""
        self.loss = self.loss.fitted(outputs, targets)
        self._is_fitted = True

    def _fitted_by_all(self, batches: Batches) -> Iterator[Any]:
        """Return batches, to the first of which the likelihood is fitted, at the weights as they are, unless it was.

        All processes go on with what the first one that has a batch found.
        """
        if self._is_fitted:
            return iter(batches)
        batches, found = iter(batches), None
        first = list(islice(batches, 1))
        with self.shared.whole(), in_evaluation(self._model), torch.no_grad():
            for outputs, targets in map(self.run, first):
                self._fit(outputs, targets)
                found = self.loss
        known = [each for each in self.shared.of_all(found) if each is not None]
        if known:
            self.loss, self._is_fitted = known[0], True
        return chain(first, batches)

    def _looked_at_by_all(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Look at the network in every process, go on with the noise that the first one found; return the batches.

        Raises:
            BecameError: in every process, if one has no batch, or its look failed.
        """
        first, failure = next(batches, None), None
        if first is None:
            failure = f"process {self.shared.rank + 1} has no batch; each process needs at least one"
        else:
            inputs, targets = self._split(first)
            try:
                self._look(inputs, self._first_outputs(inputs), targets)
            except BecameError as error:
                failure = str(error).removesuffix(".")
        known = None if isinstance(self.loss, OwnLoss) else self.loss  # a function may not travel
        answers = self.shared.of_all((failure, known))
        for number, (reason, _) in enumerate(answers, 1):
            if reason is not None:
                raise BecameError(f"{reason}." if reason == failure else f"process {number} stopped: {reason}.")
        self.loss = self.loss if known is None else answers[0][1]
        return chain([first], batches)

    def passes(self, batch: Any, rng: np.random.Generator, *, windows: bool = False) -> Iterator[tuple[Taps, float]]:
        """Run a batch, and yield the taps of every backward pass that its Fisher information needs.

        The model must be in evaluation mode.

        Args:
            batch: of a kind that the reader knows.
            rng: what targets of the model's own are drawn from, one number for each output, in the samples' order.
            windows: whether taps of convolutions have their images too.

        Yields:
            The taps, and the samples or tokens that they add to those of a mean: 0 after the first pass.
        """
        inputs, targets = self._split(batch)
        names, finds = self.shared.names, self._finding is not None and not self._finding.is_begun
        if finds or not self._is_fitted or (self._checks and self.checked is None):
            self._look(inputs, self._first_outputs(inputs), targets)
        units = 0.0

        def cotangents(outputs: Tensor) -> Iterator[Tensor]:
            nonlocal units
            units = units_of(self.loss, outputs, targets)
            yield from self.loss.cotangents(outputs, targets, self._kind, rng)

        for taps in collect_taps(self._applied, names, (inputs,), cotangents, layouts=self._layouts, windows=windows):
            yield taps, units
            units = 0.0

    def fisher(
        self,
        batches: Batches,
        *,
        with_memory: bool,
        held: frozenset[str] = frozenset(),
        share: float | None = 1.0,
    ) -> tuple[Params, InputGrams]:
        """Return the diagonal Fisher information at the weights as they are, and what a projector remembers.

        Args:
            batches: of the data.
            with_memory: whether a projector shall remember them; what is a matrix is then found anew, as other data
                may use other parts of the model.
            held: the parameters that old data hold otherwise than by the spaces of a projector, which they go on to do.
            share: of the batches, drawn at random, that is measured; None for one that suits their number in all
                processes.
        """
        # What is not to be remembered need not say which matrices can be protected.
        finding = self._finding = Matrices(self.matrices or {}, held, self._layouts) if with_memory else None
        what = "remembering" if with_memory else "measuring"
        finished = InputGrams()
        units, rng = 0.0, np.random.default_rng(self.shared.rank)
        total, names = self._length(batches), self.shared.names

        def taps_of_batches() -> Iterator[Taps]:
            nonlocal units
            shows = self._shows and self.shared.rank == 0
            todo = drawn(with_progress(batches, what, shows, length_of(batches)), share, total)
            for batch in todo if self.shared.count == 1 else self._looked_at_by_all(todo):
                for index, (taps, more) in enumerate(self.passes(batch, rng, windows=with_memory)):
                    units += more
                    if finding is not None and index == 0:  # the inputs are the same for all targets
                        finding.look_at_new(self._applied, names, partial(self._inputs_of, batch), taps)
                        finished.add(taps, frozenset(finding.ways))
                    yield taps

        with self.shared.whole(), in_evaluation(self._model):
            squares = square_sums(taps_of_batches())
            sums = {
                name: self.in_dtype(
                    squares[name].reshape(value.shape) if name in squares else torch.zeros_like(value), value
                )
                for name, value in ((name, value.detach()) for name, value in self.trained.items())
            }
        units = float(self.shared.total(_numbers(units)))
        sums = self.shared.total_like(sums, self.trained)
        if finding is not None and self.shared.count > 1:
            finding.agree(self.shared.of_all(finding.verdicts))
            finished.keep(finding.ways)
            here = {name: own_part(value) for name, value in self.trained.items()}
            finished.agree(self.shared.of_all(finished.layouts()), here)
            finished.exchange = self.shared.exchange
        counted(units)
        self.matrices = self.matrices if finding is None else finding.ways
        return {name: value / units for name, value in sums.items()}, finished

    def _length(self, batches: Batches) -> int | None:
        """Return how many batches all processes have; None if one does not know its own number."""
        lengths = [length for length in self.shared.of_all(length_of(batches)) if length is not None]
        return sum(lengths) if len(lengths) == self.shared.count else None

    def _drawn(self, batches: Batches, share: float | None) -> Batches:
        """Return a share of batches; the processes need not ask each other for their numbers where it is all."""
        return batches if share == 1 else drawn(batches, share, self._length(batches))

    def slopes(
        self, batches: Batches, theta: Params, directions: Sequence[Params], places: Sequence[Sequence[float]]
    ) -> Tensor:
        """Return the slopes of the mean loss along K directions at M places, [M, K], in float64."""
        batches = self._fitted_by_all(batches)
        units, total = 0.0, _numbers([[0.0] * len(directions)] * len(places))
        origin, *moves = (self.shared.gathered(tree) for tree in (theta, *directions))
        with self.at(theta), self.shared.whole(), in_evaluation(self._model), torch.enable_grad():
            trained = self.trained
            for batch in batches:
                for index, place in enumerate(places):
                    _move(trained, origin, moves, place)
                    outputs, targets = self.run(batch)
                    seed = gradient_by_outputs(self.loss, outputs.detach(), targets)
                    gradients = gradients_of(outputs, list(trained.values()), seed)
                    known = {name: it for name, it in zip(trained, gradients, strict=True) if it is not None}
                    if known:
                        total[index] += torch.stack([_product(known, direction) for direction in moves]).cpu()
                units += units_of(self.loss, outputs, targets)
        sums = self.shared.total(torch.cat([total.flatten(), total.new_tensor([units])]))
        return sums[:-1].reshape(total.shape) / counted(float(sums[-1]))

    def along(
        self, batches: Batches, theta: Params, directions: Sequence[Params], share: float | None = 1.0
    ) -> tuple[Quadratic, str]:
        """Return the mean loss along directions from theta, and how its curvature was measured."""
        batches, count = self._drawn(batches, share), len(directions)
        if isinstance(self.loss, OwnLoss):
            return by_slopes(partial(self.slopes, batches, theta, directions), theta, count), "a difference of slopes"
        slope, curvature = _numbers([0.0] * count), _numbers([[0.0] * count] * count)
        batches, units = self._fitted_by_all(batches), 0.0
        raw = self.shared.raw_names
        own, *moves = (
            {f"model.{raw[name]}": value for name, value in self.shared.gathered(tree).items()}
            for tree in ({name: theta[name] for name in self.trained}, *directions)
        )
        with self.shared.whole(), in_evaluation(self._model):
            for batch in batches:
                inputs, targets = self._split(batch)

                def function(moved: Mapping[str, Tensor], inputs: Any = inputs) -> Tensor:
                    return outputs_at(self._applied, moved, (inputs,))

                outputs, tangents = self._derivatives.along(function, own, moves)
                units += units_of(self.loss, outputs, targets)
                first, second = self.loss.derivatives(outputs, tangents, targets)
                slope, curvature = slope + first.cpu().double(), curvature + second.cpu().double()
        sums = self.shared.total(torch.cat([slope, curvature.flatten(), slope.new_tensor([units])]))
        units = counted(float(sums[-1]))
        return (
            Quadratic(sums[:count] / units, sums[count:-1].reshape(count, count) / units),
            self._derivatives.way,
        )

    def mean(self, batches: Batches, theta: Params | None = None) -> float:
        """Return the mean loss at these weights, or at the weights as they are."""
        batches = self._fitted_by_all(batches)
        place = nullcontext() if theta is None else self.at(theta)
        with place, self.shared.whole(), in_evaluation(self._model), torch.no_grad():
            return mean_loss(self.loss, map(self.run, batches), summed=self._summed)

    def estimate_statistics(self, batches: Batches) -> None:
        """Estimate the running statistics of batch norms anew, at the weights as they are; an error leaves them."""
        estimate_statistics(self._model, (partial(self.run, batch) for batch in batches))

    def _summed(self, *numbers: float) -> list[float]:
        return [float(number) for number in self.shared.total(_numbers(numbers))]

    @staticmethod
    def in_dtype(numbers: Tensor, like: Tensor) -> Tensor:
        """Return numbers where an array is, in its dtype and in at least float32."""
        return numbers.to(like.device, torch.promote_types(like.dtype, torch.float32))


def _numbers(values: Any) -> Tensor:
    """Return a number, or several, in float64 on the CPU, whatever the user's default device is."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


@torch.no_grad()
def _move(
    weights: Mapping[str, Tensor], origin: Params, directions: Sequence[Params], coefficients: Sequence[float]
) -> None:
    """Set weights to an origin plus directions times coefficients."""
    for name, value in weights.items():
        value.copy_(origin[name])
        for direction, coefficient in zip(directions, coefficients, strict=True):
            if coefficient:
                value.add_(direction[name].to(value.device), alpha=coefficient)


def _product(gradients: Mapping[str, Tensor], direction: Params) -> Tensor:
    """Return the inner product of gradients with a direction, in float64."""
    parts = [(gradient.double() * direction[name]).sum() for name, gradient in gradients.items()]
    # A device is waited for once for each direction, and not for each parameter.
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()
