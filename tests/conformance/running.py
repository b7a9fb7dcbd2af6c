"""What every learner must do in a whole run, of any method and of tasks of any size."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from became_core import BecameError
from became_core.continual import Annealed, Learner, Task, TaskStream, Training, build_method, learn, method_names
from tests.backends import to_numpy
from tests.conformance.learners import STREAM, Make, fresh_rng, listened, numbers, unit_graph_of
from tests.listening import Listening
from tests.streams import drifting_stream


def check_regression_is_learned_and_protected(make: Make, names: Sequence[str] = ("became", "gpm", "finetune")) -> None:
    """Losses fall, and projection forgets less than plain training; the matrices are root mean squared errors."""
    stream, records = drifting_stream(rows=80), {}
    for method in names:
        learner = make(stream, 0)
        schedule = Annealed(0.05, 6)
        training = Training(stage1=schedule, stage2=schedule, batch_size=12, projector_samples=None)
        settings = {"threshold": 0.999} if method != "finetune" else {}
        records[method] = learn(learner, stream, build_method(method, settings), training)
        (test,) = (task.test for task in stream.tasks[-1:])
        outputs = to_numpy(learner.logits(test, 12))[:, 0]
        rmse = stream.target_scale * np.sqrt(((outputs - stream.targets[test]) ** 2).mean())
        np.testing.assert_allclose(records[method].loss[-1, -1], rmse, rtol=1e-9)
        of_each = [np.corrcoef(outputs[:, j], stream.targets[test][:, j])[0, 1] for j in range(2)]
        np.testing.assert_allclose(records[method].correlation[-1, -1], np.mean(of_each), rtol=1e-9)
    for record in records.values():
        assert record.unit == "RMSE"
        assert np.isnan(record.accuracy).all()
        np.testing.assert_array_equal(np.isnan(record.correlation), [[False, True], [False, False]])
        assert record.curves[0][-1].loss < 0.9 * record.curves[0][0].loss
    forgotten = {method: record.loss[1, 0] - record.loss[0, 0] for method, record in records.items()}
    assert forgotten["gpm"] < max(forgotten["finetune"], 0.05 * stream.target_scale)


def can_be_gated(learner: Learner) -> bool:
    """Whether HAT takes the network."""
    try:
        unit_graph_of(learner, STREAM.tasks[0])
    except BecameError:
        return False
    return True


def check_masks_keep_what_an_old_task_says_to_the_bit(make: Make) -> None:
    training = Training(Annealed(0.05, 2), Annealed(0.05, 1), batch_size=12)
    kept, masks = {}, ["packnet", *(["hat"] if can_be_gated(make(STREAM, 0)) else [])]
    for name in (*masks, "finetune"):
        learner = make(STREAM, 0)
        said, observe = listened(learner, STREAM)
        learn(learner, STREAM, build_method(name), training, callbacks=[Listening(observe)])
        kept[name] = any(np.array_equal(said[0][0][-1], now) for now in said[1][0])
    assert kept == dict.fromkeys(masks, True) | {"finetune": False}


def check_every_method_runs_and_repeats(make: Make, names: Sequence[str] = ()) -> None:
    """The whole loop; some of them twice with one seed: equal records; alpha is a fraction where two were merged.

    Paths are traced where a method is run twice: the report of a path is the same for all that merge.

    Args:
        make: a learner.
        names: of the methods; all if there are none.
    """
    plain = Training(Annealed(0.05, 2), Annealed(0.05, 1), batch_size=12)
    for name in names or method_names():
        if name == "hat" and not can_be_gated(make(STREAM, 0)):
            continue
        records, twice = [], name in ("became", "ewc", "trgp")
        training = replace(plain, path_alphas=(0.0, 1.0) if twice else ())
        for _ in range(1 + twice):
            method = build_method(name, {"ewc_strength": 1.0})
            records.append(learn(make(STREAM, 0), STREAM, method, training, seed=5))
        first, second = records[0], records[-1]
        np.testing.assert_array_equal(first.accuracy, second.accuracy)
        assert first.alpha == second.alpha
        assert first.alpha[0] is None
        merges = method.rule is not None
        assert (first.alpha[1] is not None) == (merges and name != "imm-mode")
        assert first.alpha[1] is None or 0 <= first.alpha[1] <= 1
        assert bool(first.paths) == (merges and twice)


def unequal(first: int) -> TaskStream:
    """A stream of six classes, of which the first task has so many, and the second all others."""
    labels, count = STREAM.dataset.labels, STREAM.dataset.train_size
    tasks = []
    for index, classes in enumerate((range(first), range(first, 6))):
        rows = np.flatnonzero(np.isin(labels, classes))
        tasks.append(Task(index, tuple(classes), rows[rows < count], rows[:0], rows[rows >= count]))
    return TaskStream(STREAM.dataset, tuple(tasks), np.where(labels < first, labels, labels - first))


def check_tasks_may_differ_in_their_classes(make: Make, classes: Sequence[int] = (2, 4)) -> None:
    """In either order: a head is as wide as its task, and no class that a task has not is ever its answer.

    Args:
        make: a learner.
        classes: the numbers of classes, of six, that first tasks have.
    """
    training = Training(Annealed(0.05, 2), Annealed(0.05, 1), batch_size=12)
    for first in classes:
        stream = unequal(first)
        learner = make(stream, 0)
        record = learn(learner, stream, build_method("became"), training)
        assert record.alpha[1] is not None
        assert 0 <= record.alpha[1] <= 1
        theta = learner.parameters()
        widths = [theta[name].shape[0] for head in learner.heads for name in head]
        assert widths == [first, 6 - first]
        logits = to_numpy(learner.logits(stream.tasks[0].test, 12))
        assert logits.shape == (len(stream.tasks[0].test), 2, 4)
        for task, width in enumerate(widths):
            assert np.isfinite(logits[:, task, :width]).all()
            assert (logits[:, task, width:] == -np.inf).all()
        for mode, sets in (("true", widths[0]), ("sampled", 1), ("empirical", 1)):
            taps = list(learner.taps(0, stream.tasks[0].train[:4], 4, mode, fresh_rng()))  # type: ignore[arg-type]
            assert len(taps) == sets


def check_a_batch_may_have_one_sample(make: Make) -> None:
    learner = make(STREAM, 0)
    before = numbers(learner.parameters())
    training = Training(Annealed(0.01, 1), Annealed(0.01, 1), batch_size=1)
    one_task = replace(STREAM, tasks=(replace(STREAM.tasks[0], train=STREAM.tasks[0].train[:5]),))
    record = learn(learner, one_task, build_method("finetune"), training)
    assert np.isfinite(record.accuracy).all()
    after = numbers(learner.parameters())
    assert all(np.any(after[name] != before[name]) for name in learner.heads[0] | learner.projectable)
