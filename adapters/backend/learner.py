"""Learners of all frameworks, without their derivatives: the constructor, devices, chunks, heads, masks and outlines.

Convention: images lie on the device as the data set has them and are normalised there, batch by batch; parameters are
named arrays.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from adapters.backend.checking import NetworkView, check_network
from adapters.backend.heads import Heads
from adapters.backend.own_loop import NetworkCheck
from adapters.backend.pictures import picture_text, side_by_side
from adapters.networks import Architecture, DropoutMasks, checked_masks
from became_core import BecameError
from became_core.arrays import Array, Params, namespace, on_host
from became_core.continual import Learner, TapMode, Task, TaskStream
from became_core.continual.data import Indices, chunks
from became_core.curvature import Pushforward, Taps

__all__ = ["NetworkLearner"]

T = TypeVar("T")


class NetworkLearner(Learner):
    """A network on a device with a head for each task; ``became_core.continual.Learner`` says what methods promise.

    Attributes:
        device: where all arithmetic happens, as the framework has it.
        naming: the names of the heads.
        checked: what the look at a user's own network found; None if there was none.
    """

    naming: Heads
    checked: NetworkCheck | None = None
    _text: NDArray[np.uint8] | None = None
    _pictures: tuple[int, int] | None = None
    _encoding: str = ""
    _of_two: tuple[str, ...] = ()  # the parts of tasks that cannot have a single sample
    framework: ClassVar[str]  # as messages call it
    default_device: ClassVar[str] = "cpu"

    def __init__(
        self,
        backbone: Any,
        stream: TaskStream,
        *,
        device: Any = None,
        dtype: Any = "float32",
        mixed_precision: bool = False,
        dropout_masks: DropoutMasks = "numpy",
        compiled: bool = False,
        seed: int = 0,
        check: bool = True,
    ) -> None:
        """Place a backbone, with a fresh head for each task, and the stream's data on a device.

        Args:
            backbone: what maps images to features: a description of ``adapters.networks``, a value like one, or on
                PyTorch any module. JAX needs it hashable. It is trained in place, from the weights that it has, and
                what the user has frozen stays as it is. While the learner works, batch norms leave their running
                statistics alone: the core estimates these.
            stream: the tasks; its images and targets go to the device once.
            device: where all arithmetic happens, e.g. "cpu", "cuda", "cuda:1", or "auto" for the first accelerator
                there is, else the CPU. If it is not given, JAX takes "auto" and the others take "cpu".
            dtype: of the weights, by name or as the framework has it.
            mixed_precision: whether training steps multiply in bfloat16; weights, losses, normalisation, optimiser and
                all that is measured stay in the dtype of the weights.
            dropout_masks: what draws them: "numpy", the same ones for every framework, or the "framework" itself, where
                the network is; a function of the seeds either way.
            compiled: whether training steps are compiled as a whole. PyTorch captures them on a GPU, and compiles the
                network on the CPU; JAX makes whole epochs one program. TensorFlow compiles its steps in any case.
            seed: names the draw of the initial weights, which a module has already, but for its heads'.
            check: whether a network of the user's own is looked at once: outputs, per-sample gradients and derivatives
                are computed twice, in different ways, from a few samples. It takes seconds at most.

        Raises:
            BecameError: if the device, the dtype or the source of masks does not exist, compiled steps are to draw by
                NumPy, the backbone does not return [N, features], it normalises by statistics over samples of which a
                task has one alone, or the check finds a difference.
        """
        device = self.default_device if device is None else device
        try:
            self.device = self._find_device(device)
        except BecameError:
            raise
        except (AssertionError, IndexError, NotImplementedError, RuntimeError, ValueError):
            raise BecameError(
                f"{self.framework} has no device '{device}' here; try cpu, or cuda on a machine with a GPU."
            ) from None
        self._masks_by_framework = checked_masks(dropout_masks) == "framework"
        self._compiles = compiled
        self._dtype = self._find_dtype(dtype)
        self.likelihood, self.target_scale = stream.dataset.likelihood, stream.target_scale
        self.unit = stream.unit
        self._text = stream.dataset.images if stream.dataset.predicts_bytes else None
        self._pictures = stream.dataset.pictures
        self._encoding = backbone.encoding if isinstance(backbone, Architecture) else ""
        self._build(backbone, stream, mixed_precision, seed)
        if compiled and self._draws() and not self._masks_by_framework:
            raise BecameError(
                "compiled steps draw masks on the device; add --dropout-masks framework, or leave --compile out."
            )
        own = [frozenset({f"{self.naming.name(task.index)}.weight"}) for task in stream.tasks]
        self.heads = [frozenset() if stream.shared_head else head for head in own]
        self.shared_head = own[0] if stream.shared_head else frozenset()
        self._check_sizes(stream)
        if check and not self._is_shipped(backbone):
            rows = np.arange(min(3, len(stream.dataset.images)))
            (self.checked,) = self._measured(check_network(self._view(few)) for few in [rows])
            self.checked.assert_sound()

    # What a framework adds.

    @abstractmethod
    def _find_device(self, name: Any) -> Any:
        """Return the framework's device of a name; one of the errors above if there is none."""

    @abstractmethod
    def _find_dtype(self, name: Any) -> Any:
        """Return the dtype of a name as the framework has it."""

    @abstractmethod
    def _build(self, backbone: Any, stream: TaskStream, mixed_precision: bool, seed: int) -> None:
        """Make the network and place it and the data on the device; arguments as of the constructor.

        It sets all attributes but ``heads``.
        """

    @abstractmethod
    def _draws(self) -> bool:
        """Whether layers of ours draw at random in training."""

    @abstractmethod
    def _masks(self, rng: np.random.Generator) -> Callable[[int, int], Any]:
        """Return what gives the dropout masks of a batch, by its number and its samples; called in order."""

    @abstractmethod
    def _logits(self, rows: Indices, heads: slice) -> Array:
        """Return the logits of some heads [rows, heads, classes]."""

    @abstractmethod
    def _logits_of_text(self, text: NDArray[np.uint8]) -> Array:
        """Return the logits of all heads [samples, heads, length, classes] of text [samples, length]."""

    @abstractmethod
    def _taps(self, task: int, rows: Indices, mode: TapMode, rng: np.random.Generator, masks: Any) -> Iterator[Taps]:
        """Yield the taps of one batch; without masks for no dropout."""

    @abstractmethod
    def _tangents(self, task: int, rows: Indices, directions: Sequence[Params]) -> tuple[Array, Array]:
        """Return the logits and their derivatives along directions [directions, rows, classes]."""

    @abstractmethod
    def _batch_statistics(self, rows: Indices) -> Iterator[Params]:
        """Yield the statistics of one batch, once for every time that a layer runs."""

    def _draw_for_taps(self, task: int, rows: Indices, mode: TapMode, rng: np.random.Generator) -> None:
        """Draw what the taps of a batch draw; only of learners that several processes can share."""

    @abstractmethod
    def _view(self, rows: Indices) -> NetworkView:
        """Return the network with the first task's head, on these samples, as a check sees it."""

    def _is_shipped(self, backbone: Any) -> bool:
        """Whether a backbone is one that comes with this package, which its own tests have checked."""
        return isinstance(backbone, Architecture)

    def _measured(self, items: Iterator[T], training: bool = False) -> Iterator[T]:
        """Return an iterator that runs the network on the device, in evaluation or training mode, and changes nothing.

        It is for frameworks that have a current device, or networks that have modes and store what they see.
        """
        return items

    # What all share.

    def logits(self, indices: Indices, batch_size: int, heads: slice = slice(None)) -> Array:
        """Return the logits of all heads, or of some, [samples, heads, classes]."""
        batches = chunks(indices, batch_size)
        parts = list(self._measured(self._logits(rows, heads) for rows in self.share.own(batches)))
        logits = namespace(logits=parts[0]).concat(parts, axis=0)
        if not self.share.divides(len(batches)):
            return logits
        places = self.share.own(chunks(np.arange(len(indices)), batch_size))
        return self.share.joined(logits, np.concatenate(places))

    def written(self, task: Task, rng: np.random.Generator) -> str:
        """Return what the network writes after the first quarter of a task's first test sample, or what it draws."""
        if self._text is None:
            return "" if self._pictures is None else self._drawn(task, *self._pictures)
        text = self._text[task.test[:1]].copy()
        places = range(max(1, text.shape[1] // 4), text.shape[1])
        text[0, places.start :] = 0  # no position sees what comes after it
        logits = self._measured(self._logits_of_text(text) for _ in places)
        for place, of_text in zip(places, logits, strict=True):
            scores = np.asarray(on_host(of_text), np.float64)[0, 0 if self.shares_head else task.index, place - 1]
            p = np.exp(scores - scores.max())
            text[0, place] = rng.choice(len(p), p=p / p.sum())
        return text.tobytes().decode("utf-8", "replace")

    def _drawn(self, task: Task, height: int, width: int) -> str:
        """Return a picture of ten test samples of a task, what is made of them, and what their noise alone gives."""
        rows = task.test[:: max(1, len(task.test) // 10)][:10]

        def decoded() -> NDArray[Any]:
            outputs = np.asarray(on_host(self.logits(rows, len(rows))), np.float64)
            logits = outputs[:, 0 if self.shares_head else task.index, : height * width]
            return 0.5 + 0.5 * np.tanh(logits / 2)

        made = [np.asarray(on_host(self.targets(rows)), np.float64), decoded()]
        if self._encoding:  # without its weight means and log variances are those of the prior
            name = f"{self._encoding}.weight"
            with self.at({name: self.parameters()[name] * 0}):
                made.append(decoded())
        return picture_text(side_by_side(np.stack(made).reshape(len(made), len(rows), height, width)))

    def taps(
        self,
        task: int,
        indices: Indices,
        batch_size: int,
        mode: TapMode,
        rng: np.random.Generator,
        *,
        own: bool = False,
    ) -> Iterator[Taps]:
        """Yield each batch's taps."""
        parts = chunks(indices, batch_size)
        wanted = set(self.share.own(range(len(parts))) if own else range(len(parts)))

        def batches() -> Iterator[Taps]:
            masks_of = self._masks(rng) if mode == "published" else None
            for number, rows in enumerate(parts):
                masks = None if masks_of is None else masks_of(number, len(rows))
                if number in wanted:
                    yield from self._taps(task, rows, mode, rng, masks)
                else:
                    self._draw_for_taps(task, rows, mode, rng)

        return self._measured(batches(), training=mode == "published")

    def pushforward(
        self, task: int, indices: Indices, batch_size: int, directions: Sequence[Params]
    ) -> Iterator[Pushforward]:
        """Yield each own batch's logits and their derivatives along directions."""
        return self._measured(
            Pushforward(*self._tangents(task, rows, directions), self.targets(rows))
            for rows in self.share.own(chunks(indices, batch_size))
        )

    def batch_statistics(self, indices: Indices, batch_size: int) -> Iterator[tuple[int, Params]]:
        """Yield each batch's size and statistics, once for every time that a layer runs."""
        parts = chunks(indices, batch_size)
        own = self._measured(
            (len(rows), moments) for rows in self.share.own(parts) for moments in self._batch_statistics(rows)
        )
        return self._of_all_batches(own, parts) if self.share.divides(len(parts)) else own

    def _of_all_batches(
        self, own: Iterator[tuple[int, Params]], parts: Sequence[Indices]
    ) -> Iterator[tuple[int, Params]]:
        """Yield the statistics of all batches, given this process's; each of their layers runs once in a batch."""
        moments = [of_batch for _, of_batch in own]
        places, joined = np.asarray(self.share.own(range(len(parts)))), dict[str, Array]()
        for name in sorted(moments[0]):
            xp = namespace(first=moments[0][name])
            joined[name] = self.share.joined(xp.stack([of_batch[name] for of_batch in moments]), places)
        for number, rows in enumerate(parts):
            yield len(rows), {name: joined[name][number, ...] for name in moments[0]}

    @staticmethod
    def _parts_of(device: str) -> tuple[str, int]:
        """Return the kind and the number of a device, of "gpu:1" for one; ValueError if that is no number."""
        kind, _, number = device.partition(":")
        if not (number or "0").isdecimal():
            raise ValueError(device)
        return kind, int(number or 0)

    def _normalises_over_samples(self, running: bool) -> None:
        """Note that a layer normalises by statistics over samples alone, or has running ones besides."""
        self.least_batch = 2
        if not running or not self._of_two:
            self._of_two = ("train",) if running else ("train", "validation", "test")

    def _check_sizes(self, stream: TaskStream) -> None:
        """Raise an error if a task has a single sample, and the network statistics over samples alone."""
        for task in stream.tasks:
            for part in self._of_two:
                if len(getattr(task, part)) == 1:
                    raise BecameError(
                        f"the network normalises by statistics over samples, and task {task.index + 1} has a single "
                        f"{part} sample; give it two, or the network another normalisation."
                    )

    @staticmethod
    def _check_features(shape: Sequence[int] | None, by_token: bool = False) -> int:
        """Return the width of a backbone's features, given the shape of what it returns for two samples.

        Raises:
            BecameError: if they are not [N, features], or [N, L, features] where each token has a target.
        """
        if shape is None or len(shape) != (3 if by_token else 2):
            returned = "no array" if shape is None else list(shape)
            features = "tokens to features [N, L, features]" if by_token else "samples to features [N, features]"
            raise BecameError(f"the backbone must map {features}; of 2 images it made {returned}.")
        return int(shape[-1])
