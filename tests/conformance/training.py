"""What every learner must do in a step: constraints, penalties, regions, rates and views."""

from dataclasses import replace
from typing import Any

import numpy as np

from became_core.arrays import Params
from became_core.continual import (
    SGD,
    Adam,
    Annealed,
    Augmentation,
    Batch,
    Constraint,
    Penalty,
    Training,
    Views,
    build_method,
    learn,
)
from became_core.continual.learner import heads_of
from became_core.curvature import batch_gradient
from became_core.laplace import Diagonal, LaplacePosterior
from became_core.projection import GPM, TRGP, LowRankRegion
from reference.learner import cropped
from tests.backends import to_numpy
from tests.conformance.learners import (
    RATE,
    STEP,
    STREAM,
    Make,
    direction_of,
    everything,
    fresh_rng,
    in_the_framework_of,
    input_grams_of,
    loss_at,
    moved,
    numbers,
    step,
)
from tests.projections import Finished


def check_what_is_not_trainable_keeps_its_bits(make: Make) -> None:
    learner = make(STREAM, 0)
    for trainable in (learner.projectable, learner.heads[0], learner.projectable | learner.heads[0]):
        before = numbers(learner.parameters())
        step(learner, Constraint(trainable=frozenset(trainable)))
        for name, value in numbers(learner.parameters()).items():
            assert np.array_equal(value, before[name]) == (name not in trainable), name
    before = numbers(learner.parameters())
    step(learner, everything(learner))  # and freezing is not for ever
    untouched = {name for name, value in numbers(learner.parameters()).items() if np.array_equal(value, before[name])}
    assert untouched == set(learner.heads[1])


def check_a_projector_keeps_the_outputs_on_what_it_remembers(make: Make) -> None:
    learner = make(STREAM, 0)
    memory = GPM(0.9).remember(Finished(input_grams_of(learner), {}))
    before = numbers(learner.parameters())
    step(learner, Constraint(frozenset(learner.parameters()), projector=memory))
    change = {name: value - before[name] for name, value in numbers(learner.parameters()).items()}
    for name in learner.projectable:
        basis = to_numpy(memory.bases[name])
        assert np.abs(change[name]).max() > 0
        np.testing.assert_allclose(change[name].reshape(len(change[name]), -1) @ basis, 0, atol=1e-12)


def check_momentum_goes_on_from_one_call_to_the_next(make: Make) -> None:
    """Two steps in one call, and one step in each of two calls that hand the optimiser on, are the same."""
    together, apart = make(STREAM, 0), make(STREAM, 0)
    for kind in (SGD(momentum=0.5), Adam(weight_decay=0.1)):
        step(together, everything(together), optimiser=kind, steps=2)
        batch, rate = Batch(0, STREAM.tasks[0].train[:12]), np.asarray([RATE])
        optimiser = kind.initial(apart.parameters())
        for _ in range(2):
            optimiser = apart.train([batch], rate, everything(apart), optimiser, fresh_rng()).optimiser
        expected = numbers(together.parameters())
        for name, value in numbers(apart.parameters()).items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-12, atol=1e-12)


def check_nothing_leaks_into_the_protected_space(make: Make) -> None:
    """Momentum, weight decay, Adam's rescaling, a penalty: whatever moves a weight, the projector has the last word."""
    learner = make(STREAM, 0)
    memory = GPM(0.9).remember(Finished(input_grams_of(learner), {}))
    theta = learner.parameters()
    posterior = LaplacePosterior(
        {name: value - 0.25 for name, value in theta.items()},
        Diagonal({name: value * value + 0.1 for name, value in theta.items()}),
    )
    for penalty in (None, Penalty(posterior, strength=2.0)):
        for optimiser in (
            SGD(),
            SGD(momentum=0.9),
            SGD(momentum=0.5, weight_decay=0.1),
            Adam(),
            Adam(weight_decay=0.1),
        ):
            before = numbers(learner.parameters())
            constraint = Constraint(frozenset(before), projector=memory, penalty=penalty)
            step(learner, constraint, optimiser=optimiser, steps=3)
            after = numbers(learner.parameters())
            for name in learner.projectable:
                change = (after[name] - before[name]).reshape(len(after[name]), -1)
                assert np.abs(change).max() > 0
                np.testing.assert_allclose(change @ to_numpy(memory.bases[name]), 0, atol=1e-12)


def check_a_trust_region_is_trained_beneath_the_network(make: Make) -> None:
    """One step moves W and the scales along the loss's derivatives by each, and the network is left with W."""
    learner = make(STREAM, 0)
    theta = learner.parameters()
    (taps,) = learner.taps(0, STREAM.tasks[0].train[:12], 12, "empirical", fresh_rng())
    gradients = batch_gradient(taps)  # which lie in the span of the inputs
    memory = TRGP(0.95).remember(Finished(input_grams_of(learner), {}))
    region = memory.trust_region({name: gradients[name] for name in learner.projectable})
    region = region.with_scales({key: 1.25 * scale for key, scale in region.scales.items()})
    assert region.weights
    batch, rate = Batch(0, STREAM.tasks[0].train[:12]), np.asarray([RATE])
    free = Constraint(frozenset(theta), region=region, trains_scales=True)
    loss, _, trained = learner.train([batch], rate, free, SGD(), fresh_rng())
    assert trained is not None
    np.testing.assert_allclose(loss, loss_at(learner, region.effective(theta)), rtol=1e-10)
    after = numbers(learner.parameters())

    def slope(at_weights: Params, at_scales: Params) -> float:
        """The loss's derivative along a change of weights and scales."""
        ends = []
        for by in (-STEP, STEP):
            weights = moved(theta, at_weights, by)
            scales = {key: scale + by * at_scales[key] for key, scale in region.scales.items()}
            ends.append(loss_at(learner, region.with_scales(scales).effective(weights)))
        return (ends[1] - ends[0]) / (2 * STEP)

    direction = direction_of(learner)
    still = {key: scale * 0 for key, scale in region.scales.items()}
    moves = {name: (numbers(theta)[name] - after[name]) / RATE for name in after}
    expected = sum(float(np.sum(moves[name] * to_numpy(direction[name]))) for name in moves)
    np.testing.assert_allclose(slope(direction, still), expected, rtol=1e-5, atol=1e-8)
    steps = {key: (to_numpy(region.scales[key]) - to_numpy(trained.scales[key])) / RATE for key in still}
    along = {key: scale * scale + 0.1 for key, scale in region.scales.items()}
    expected = sum(float(np.sum(steps[key] * to_numpy(along[key]))) for key in steps)
    nowhere = {name: value * 0 for name, value in theta.items()}
    np.testing.assert_allclose(slope(nowhere, along), expected, rtol=1e-5, atol=1e-8)

    held = learner.train([batch], rate, replace(free, trains_scales=False), SGD(), fresh_rng()).region
    assert held is not None
    assert all(np.array_equal(to_numpy(held.scales[key]), to_numpy(scale)) for key, scale in region.scales.items())


def check_low_rank_adapters_are_trained_beneath_the_network(make: Make) -> None:
    """Steps move A and B along the loss's derivatives, A off old inputs, and the network is left with W as it was."""
    learner, draw = make(STREAM, 0), np.random.default_rng(0)
    theta = learner.parameters()
    memory = GPM(0.9).remember(Finished(input_grams_of(learner), {}))
    rows, ups = dict[str, Any](), dict[str, Any]()
    for name in learner.projectable:
        flat = to_numpy(theta[name]).reshape(theta[name].shape[0], -1)
        rows[name] = in_the_framework_of(theta[name], draw.normal(size=(2, flat.shape[1])) / 4)
        ups[f"{name}@B"] = in_the_framework_of(theta[name], draw.normal(size=(flat.shape[0], 2)) / 4)
    region = LowRankRegion.initial(rows, theta, scale=0.5)
    region = region.with_scales({**region.scales, **ups})
    batch, rate = Batch(0, STREAM.tasks[0].train[:12]), np.asarray([RATE])
    constraint = Constraint(region.weights, region=region, trains_scales=True)
    loss, _, free = learner.train([batch], rate, constraint, SGD(), fresh_rng())
    np.testing.assert_allclose(loss, loss_at(learner, region.effective(theta)), rtol=1e-10)
    projected = learner.train([batch], rate, replace(constraint, projector=memory), SGD(), fresh_rng()).region
    for name, value in numbers(learner.parameters()).items():
        np.testing.assert_array_equal(value, to_numpy(theta[name]))
    assert free is not None
    assert projected is not None
    steps = {key: (to_numpy(scale) - to_numpy(free.scales[key])) / RATE for key, scale in region.scales.items()}
    along = {key: scale * scale + 0.1 for key, scale in region.scales.items()}
    ends = [
        loss_at(learner, region.with_scales(moved(region.scales, along, by)).effective(theta)) for by in (-STEP, STEP)
    ]
    expected = sum(float(np.sum(steps[key] * to_numpy(along[key]))) for key in steps)
    np.testing.assert_allclose((ends[1] - ends[0]) / (2 * STEP), expected, rtol=1e-5, atol=1e-8)
    for name in learner.projectable:
        change = to_numpy(projected.scales[f"{name}@A"]) - to_numpy(rows[name])
        assert np.abs(change).max() > 0
        np.testing.assert_allclose(change @ to_numpy(memory.bases[name]), 0, atol=1e-12)
        np.testing.assert_array_equal(to_numpy(projected.scales[f"{name}@B"]), to_numpy(free.scales[f"{name}@B"]))


def check_a_penalty_pulls_towards_its_mean(make: Make) -> None:
    """theta - rate (g + S (theta - mean)) / (1 + rate S): the loss explicitly, the penalty implicitly."""
    plain, pulled = make(STREAM, 0), make(STREAM, 0)
    theta = pulled.parameters()
    mean = {name: value - 0.25 for name, value in theta.items()}
    posterior = LaplacePosterior(mean, Diagonal({name: value * 0 + 2 for name, value in theta.items()}))
    before = numbers(theta)
    step(plain, everything(plain))
    step(pulled, Constraint(frozenset(theta), penalty=Penalty(posterior, strength=3.0)))
    without, with_penalty, stiffness = numbers(plain.parameters()), numbers(pulled.parameters()), 3 * 2
    for name in set(theta) - pulled.heads[1]:
        rate_times_g = before[name] - without[name]
        expected = before[name] - (rate_times_g + RATE * stiffness * 0.25) / (1 + RATE * stiffness)
        np.testing.assert_allclose(with_penalty[name], expected, atol=1e-12)


def check_each_group_of_parameters_has_its_rate(make: Make) -> None:
    """Three times as far along what is multiplied by 3, and with a penalty on some of it, as far as at that rate."""
    plain, faster = make(STREAM, 0), make(STREAM, 0)
    theta = plain.parameters()
    before, shared = numbers(theta), sorted(set(theta) - heads_of(plain))
    tripled = {shared[0], *plain.heads[0]}
    held = {name: theta[name] - 0.25 for name in shared[:1]}
    penalty = Penalty(LaplacePosterior(held, Diagonal({name: value * 0 + 2 for name, value in held.items()})), 3.0)
    for optimiser in (SGD(momentum=0.5), Adam()):
        begun = optimiser.initial(theta)
        batch = Batch(0, STREAM.tasks[0].train[:12])
        for limit in (None, penalty):
            constraint = Constraint(frozenset(theta), penalty=limit)
            for learner, relative, rate in ((plain, {}, 3 * RATE), (faster, dict.fromkeys(sorted(tripled), 3.0), RATE)):
                learner.assign(theta)
                respected = replace(constraint, relative=relative)
                learner.train([batch], np.asarray([rate]), respected, begun, fresh_rng())
            at_three, by_three = numbers(plain.parameters()), numbers(faster.parameters())
            for name in set(theta) - plain.heads[1]:
                expected = at_three[name] - before[name]
                np.testing.assert_allclose(
                    by_three[name] - before[name], expected if name in tripled else expected / 3, rtol=1e-9, atol=1e-12
                )


def check_training_sees_images_as_views_show_them(make: Make) -> None:
    """As if the data set had held them so; what is not trained on is seen as it is."""
    rows = STREAM.tasks[0].train[:12]
    draw = np.random.default_rng(4)
    views = Views(draw.integers(-3, 4, (12, 2)), draw.integers(0, 2, 12).astype(bool))
    images = STREAM.dataset.images.copy()
    images[rows] = cropped(images[rows], views)
    found, plain = make(STREAM, 0), make(STREAM, 0)
    expected = make(replace(STREAM, dataset=replace(STREAM.dataset, images=images)), 0)
    fewer = Views(views.offsets[:8], views.flips[:8])  # as in a last batch: what is compiled serves any size
    for learner, seen in ((found, (views, fewer)), (expected, (None, None)), (plain, (None, None))):
        batches = [Batch(0, rows, seen[0]), Batch(0, rows[:8], seen[1])]
        begun = SGD().initial(learner.parameters())
        learner.train(batches, np.full(2, RATE), everything(learner), begun, fresh_rng())
    changed, wanted, without = (numbers(each.parameters()) for each in (found, expected, plain))
    for name, value in wanted.items():
        np.testing.assert_allclose(changed[name], value, rtol=1e-12, atol=1e-14)
    assert any(not np.allclose(without[name], value) for name, value in wanted.items())
    found.assign(plain.parameters())
    np.testing.assert_array_equal(to_numpy(found.logits(rows, 12)), to_numpy(plain.logits(rows, 12)))


def check_images_in_floating_point_are_normalised_as_they_are(make: Make) -> None:
    dataset = STREAM.dataset
    scaled = replace(dataset, images=(dataset.images / 255).astype(np.float64))
    learners = make(STREAM, 0), make(replace(STREAM, dataset=scaled), 0)
    training = Training(Annealed(0.05, 1), Annealed(0.05, 1), batch_size=12, augmentation=Augmentation(1))
    for learner in learners:
        learn(learner, STREAM, build_method("finetune"), training)
    for name, value in numbers(learners[0].parameters()).items():
        np.testing.assert_allclose(to_numpy(learners[1].parameters()[name]), value, rtol=1e-9, atol=1e-12)
