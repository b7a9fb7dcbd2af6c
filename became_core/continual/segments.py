"""A stream of batches without announced tasks, cut into segments where it changes; a segment is learned as a task.

A network of its own, the watcher, sees every batch once, as it arrives: its loss on a new batch, compared with that on
a reservoir of the segment's batches, is what a detector watches (``changes.py``). The reservoir's batches are never
trained on, so both losses are of unseen data by the same weights, and their difference stays where it is while the
watcher learns. Then the watcher takes one step on the batch. When the detector announces a change, the segment ends
where the change began.

The watcher soon forgets. A second set of its weights, the keeper, takes a step on a batch of an earlier segment's
reservoir after each of its own, so that it keeps knowing what came before. A segment is known if the keeper's loss on
its first batches is that on batches of an earlier segment that it was not trained on; then it is not learned again.
``learn`` gets the other segments as tasks. It trains on their batches, and computes curvature, merges and the
projector's memory from their reservoirs alone.

Convention: places in the stream are numbers of batches, from 0. Test and validation rows do not arrive. A segment that
has a share of a task's training rows is tested on the same share of the task's test rows; only the scores use them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from became_core.arrays import Params
from became_core.continual.changes import BayesianDetector, Detector, Reservoir, standardised
from became_core.continual.data import Indices, Task, TaskStream
from became_core.continual.learner import Batch, Learner, weights_of
from became_core.continual.rng import random_generator
from became_core.continual.schedule import Training
from became_core.continual.step import Constraint, Optimiser
from became_core.errors import BecameError

__all__ = ["Segment", "Segments", "Watch", "arrivals", "check_watchable", "find_segments"]

# With fewer batches their mean and deviation say too little.
FEWEST = 8
# In standard deviations: how near a loss is to that of known data, and how far known data is from what it was at first.
NEAR = 3.0
# Where losses are nearly 0 their deviation says little: how much of the way back to what it was at first a loss may be.
SHARE = 0.1


@dataclass(frozen=True)
class Watch:
    """How a stream is watched.

    Attributes:
        detector: what decides that it has changed, before its first value.
        reservoir: how many samples of a segment are stored.
        gradual: over how many samples one task goes over into the next; 0 for at once.

    Raises:
        BecameError: if the reservoir can hold nothing, or the number for gradual changes is negative.
    """

    detector: Detector = field(default_factory=BayesianDetector)
    reservoir: int = 200
    gradual: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.reservoir < 1:
            raise BecameError(f"a reservoir of {self.reservoir} samples holds nothing; let it hold at least 1.")
        if self.gradual < 0:
            raise BecameError(f"tasks change over {self.gradual} samples; give at least 0.")


@dataclass(frozen=True)
class Segment:
    """A part of a stream between two changes.

    Attributes:
        start: its first batch.
        end: the batch after its last.
        announced: the batch at which the change to it was announced; None for the first segment.
        known: the number of the learned segment whose data it has again; None if it is learned.
    """

    start: int
    end: int
    announced: int | None = None
    known: int | None = None


@dataclass(frozen=True)
class Segments:
    """What was found in a stream, and what its true tasks were.

    Attributes:
        stream: the segments that are learned, as tasks.
        segments: all of them, in order.
        changes: the true changes, each as the first batch that has, or may have, samples of the next task.
    """

    stream: TaskStream
    segments: tuple[Segment, ...]
    changes: tuple[int, ...]

    @property
    def delays(self) -> list[int | None]:
        """For each true change, after how many batches it was announced; None if it was not, before the next one."""
        ends = [*self.changes, self.segments[-1].end][1:]
        announced = [segment.announced for segment in self.segments if segment.announced is not None]
        within = [
            [place - start + 1 for place in announced if start <= place < end]
            for start, end in zip(self.changes, ends, strict=True)
        ]
        return [delays[0] if delays else None for delays in within]

    @property
    def false_alarms(self) -> int:
        """How many announced changes were not the first after a true one."""
        announced = sum(segment.announced is not None for segment in self.segments)
        return announced - sum(delay is not None for delay in self.delays)


def arrivals(stream: TaskStream, seed: int, gradual: int = 0) -> Indices:
    """Return the training rows of a stream in the order in which they arrive, each once.

    Args:
        stream: the tasks, one after the other, each in an order that the seed draws.
        seed: of the run.
        gradual: over how many rows one task goes over into the next: every row is moved by at most half of that.
    """
    parts = [random_generator(seed, "arrivals", task.index).permutation(task.train) for task in stream.tasks]
    rows = np.concatenate(parts)
    moved = random_generator(seed, "gradual").uniform(-gradual / 2, gradual / 2, len(rows))
    return np.asarray(rows[np.argsort(np.arange(len(rows)) + moved, kind="stable")])


def find_segments(learner: Learner, stream: TaskStream, training: Training, watch: Watch, seed: int = 0) -> Segments:
    """Watch a stream go by, and return the segments that it falls into.

    Args:
        learner: the watcher, a new network with one head; it is trained, and of no more use then.
        stream: the tasks, whose boundaries tell how the detector did, and serve the scores alone.
        training: the batch size, the optimiser and the learning rate at which stage 1 begins.
        watch: how the stream is watched.
        seed: of the run.

    Raises:
        BecameError: if ``check_watchable`` does, or a loss is no longer finite.
    """
    check_watchable(learner, stream, training, watch)
    size = training.batch_size
    capacity, rows = watch.reservoir // size, arrivals(stream, seed, watch.gradual)
    batches = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
    watcher = _Watcher(learner, training, watch, seed, capacity)
    for batch in batches:
        watcher.observe(batch)
    watcher.end_segment(len(batches))
    segments = tuple(watcher.segments)
    lengths = [len(task.train) for task in stream.tasks]
    changes = tuple(max(int(row - watch.gradual / 2), 0) // size for row in np.cumsum(lengths)[:-1])
    reservoirs = [np.sort(np.concatenate(watcher.at(places))) for places in watcher.reservoirs]
    return Segments(_tasks(stream, rows, size, segments, reservoirs, seed), segments, changes)


def check_watchable(learner: Learner, stream: TaskStream, training: Training, watch: Watch) -> None:
    """Raise a BecameError if a stream cannot be watched: arguments as of ``find_segments``.

    Tasks may not have heads of their own, nor the network running statistics; the reservoir must hold some batches, and
    the stream must have more.
    """
    size, name = training.batch_size, stream.dataset.name
    if not stream.shared_head:
        raise BecameError(
            f"{name} has a head for each task, and without boundaries nothing says which head a sample is for; let all "
            "tasks share one (--single-head)."
        )
    if learner.running_statistics:
        raise BecameError(
            "the network has running statistics, which are estimated on whole tasks; without boundaries, take one "
            "without them, or with group norm."
        )
    capacity, batches = watch.reservoir // size, sum(len(task.train) for task in stream.tasks) // size
    if capacity < FEWEST:
        raise BecameError(
            f"a reservoir of {watch.reservoir} samples holds {capacity} batches of {size}; let it hold at least "
            f"{FEWEST * size} samples."
        )
    if batches <= capacity:
        raise BecameError(
            f"the stream of {name} has {batches} batches, and the first {capacity} fill the reservoir before a change "
            "can be told; give a longer stream, or a smaller reservoir or batch size."
        )


@dataclass
class _Known:
    """An earlier segment, as the watcher remembers it: its number, its reservoir, and its loss when it was new."""

    number: int
    rehearsed: list[Indices]
    unseen: list[Indices]
    arrival: float


@dataclass
class _Watcher:
    """The network that watches, and what it has found so far; the only value of this module that changes.

    The learner has the watcher's weights; ``keeper`` are the keeper's, and None as long as both are the same.
    """

    learner: Learner
    training: Training
    watch: Watch
    seed: int
    capacity: int
    losses: list[float] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    reservoirs: list[list[int]] = field(default_factory=list)
    known: list[_Known] = field(default_factory=list)
    arrived: list[Indices] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin the first segment."""
        self.trainable = frozenset(weights_of(self.learner))
        theta = self.learner.parameters()
        self.optimiser: Optimiser = self.training.optimiser.initial({n: theta[n] for n in sorted(self.trainable)})
        self.keeper: tuple[Params, Optimiser] | None = None
        self.left = -1  # the number of the last learned segment
        self.arrival = math.inf  # the loss of the present one
        self.detector, self.reservoir = self.watch.detector, Reservoir(self.capacity, self.seed)
        self.present = Segment(0, 0)

    def observe(self, batch: Indices) -> None:
        """Watch one batch; then learn from it, unless it is stored or suspected to be of something new."""
        place = len(self.losses)
        self.losses += self.batch_losses([batch])
        self.arrived.append(batch)
        if self.reservoir.full:
            value = standardised(self.losses[-1], self.batch_losses(self.at(self.reservoir.batches)))
            self.detector = self.detector.observe(value)
            if self.detector.changed:
                self.begin_segment(place)
                return
            if self.detector.suspects:
                return
        offered = self.reservoir.offer(place)
        if offered.batches is self.reservoir.batches:
            self.train(batch, place)
        self.reservoir = offered

    def at(self, places: Iterable[int]) -> list[Indices]:
        """Return the batches at places of the stream."""
        return [self.arrived[place] for place in places]

    def batch_losses(self, batches: Sequence[Indices]) -> list[float]:
        """Return the mean loss of each batch, in nats."""
        rows, likelihood = np.concatenate(batches), self.learner.likelihood
        size = self.training.batch_size if self.learner.mixes_samples else len(rows)
        outputs, targets = self.learner.logits(rows, size)[:, 0, ...], self.learner.targets(rows)
        ends = np.cumsum([len(batch) for batch in batches])
        parts = [slice(int(end) - len(batch), int(end)) for end, batch in zip(ends, batches, strict=True)]
        return [float(likelihood.mean_loss(outputs[part], targets[part])) for part in parts]

    def train(self, batch: Indices, place: int) -> None:
        """Take a step on a batch; the keeper takes another one, on a batch of an earlier segment."""
        self.optimiser = self.after_steps([batch], self.optimiser, place)
        if self.keeper is not None:
            past = [rows for earlier in self.known for rows in earlier.rehearsed]
            chosen = past[int(random_generator(self.seed, "rehearsal", place).integers(len(past)))]
            theta, optimiser = self.keeper
            with self.learner.at(theta):
                optimiser = self.after_steps([batch, chosen], optimiser, place)
                self.keeper = self.learner.parameters(), optimiser

    def after_steps(self, batches: Sequence[Indices], optimiser: Optimiser, place: int) -> Optimiser:
        """Take a step of the learner on each batch, and return the optimiser after them."""
        rates = np.full(len(batches), float(self.training.stage1.rates(1)[0]))
        constraint, rng = Constraint(trainable=self.trainable), random_generator(self.seed, "watching", place)
        return self.learner.train([Batch(0, rows) for rows in batches], rates, constraint, optimiser, rng).optimiser

    def begin_segment(self, place: int) -> None:
        """End the present segment and begin the next, which the last batches are of already."""
        start = max(place - self.detector.length + 1, self.present.start + 1)
        fresh = range(start, place + 1)
        self.end_segment(start)
        assert self.keeper is not None  # It is there since the end of the first segment.
        with self.learner.at(self.keeper[0]):
            losses = self.batch_losses(self.at(fresh))
            known = self.recognised(losses)
        self.present, self.arrival = Segment(start, start, announced=place, known=known), float(np.mean(losses))
        self.detector = self.watch.detector
        self.reservoir = Reservoir(self.capacity, self.seed, len(self.segments))
        for earlier in fresh:
            self.reservoir = self.reservoir.offer(earlier)

    def end_segment(self, end: int) -> None:
        """Remember the present segment."""
        # A batch that is of the next segment already may have been stored before it was suspected.
        segment, stored = replace(self.present, end=end), [place for place in self.reservoir.batches if place < end]
        if segment.known is None:
            rehearsed, unseen = self.at(stored[::2]), self.at(stored[1::2])
            arrival = float(np.mean(self.losses[:3])) if self.keeper is None else self.arrival
            self.known.append(_Known(len(self.known), rehearsed, unseen, arrival))
        self.left = len(self.known) - 1 if segment.known is None else segment.known
        if self.keeper is None:
            self.keeper = self.learner.parameters(), self.optimiser
        self.segments.append(segment)
        self.reservoirs.append(stored)

    def recognised(self, losses: Sequence[float]) -> int | None:
        """Return the number of the learned segment whose losses these are; None if they are no one's.

        It is not the segment that has just ended, because the change was one from it. A segment that the keeper has
        forgotten is not recognised: its loss is nearly what it was when it arrived.
        """
        nearest: tuple[float, int | None] = math.inf, None
        for earlier in self.known:
            if earlier.number == self.left or len(earlier.unseen) < FEWEST // 2:
                continue
            now = self.batch_losses(earlier.unseen)
            mean, deviation = float(np.mean(now)), float(np.std(now, ddof=1))
            distance, gap = float(np.mean(losses)) - mean, earlier.arrival - mean
            near = max(NEAR * deviation * math.sqrt(1 / len(losses) + 1 / len(now)), SHARE * gap)
            if distance < near and gap > NEAR * deviation and abs(distance) < nearest[0]:
                nearest = abs(distance), earlier.number
        return nearest[1]


def _tasks(
    stream: TaskStream,
    rows: Indices,
    size: int,
    segments: Sequence[Segment],
    reservoirs: Sequence[Indices],
    seed: int,
) -> TaskStream:
    """Return the segments that are learned as tasks; rows after the last whole batch belong to the last one."""
    learned = [number for number, segment in enumerate(segments) if segment.known is None]
    ends = [segment.end * size for segment in segments[:-1]] + [len(rows)]
    parts = [rows[segment.start * size : end] for segment, end in zip(segments, ends, strict=True)]
    owners = np.concatenate(
        [
            np.full(len(part), learned.index(number) if segment.known is None else segment.known)
            for number, (segment, part) in enumerate(zip(segments, parts, strict=True))
        ]
    )
    held_out = {part: _shares(stream, part, rows, owners, len(learned), seed) for part in ("validation", "test")}
    tasks = tuple(
        Task(
            index=index,
            classes=stream.tasks[0].classes,
            train=np.sort(parts[number]),
            validation=held_out["validation"][index],
            test=held_out["test"][index],
            reservoir=reservoirs[number],
        )
        for index, number in enumerate(learned)
    )
    return replace(stream, tasks=tasks)


def _shares(
    stream: TaskStream, part: str, rows: Indices, owners: NDArray[np.int64], count: int, seed: int
) -> list[Indices]:
    """Return the rows that each learned segment is tested or validated on; at least one if it is to be tested."""
    shares: list[list[Indices]] = [[] for _ in range(count)]
    for task in stream.tasks:
        held_out = random_generator(seed, f"shares of {part}", task.index).permutation(getattr(task, part))
        arrived = np.bincount(owners[np.isin(rows, task.train)], minlength=count)
        bounds = np.round(np.cumsum(arrived) / len(task.train) * len(held_out)).astype(int)
        for index, (start, end) in enumerate(zip([0, *bounds], bounds, strict=False)):
            least = int(part == "test" and arrived[index] > 0 and not any(map(len, shares[index])))
            shares[index].append(held_out[start : max(end, min(start, len(held_out) - 1) + least)])
    return [np.sort(np.concatenate(parts)) for parts in shares]
