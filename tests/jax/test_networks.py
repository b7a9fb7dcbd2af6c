"""The backbones of the published protocol: shapes, names and sizes; what they compute is what PyTorch computes."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from adapters.jax.layers import Apply, BatchNorm, Conv, Dense, Flatten, MaxPool, Pass
from adapters.jax.learner import JaxLearner
from adapters.jax.networks import Sequential, build_backbone
from became_core import BecameError
from became_core.continual import SGD, Annealed, Batch, Constraint, Training
from became_core.continual.measurement import Measurement
from tests.streams import prototype_stream


def test_alexnet_has_the_published_layers_and_size() -> None:
    stream = prototype_stream(tasks=10, classes_per_task=10, per_class=4, channels=3, side=32)
    shapes = {
        name: value.shape
        for name, value in JaxLearner(build_backbone("alexnet", (3, 32, 32)), stream).parameters().items()
    }
    assert shapes["conv1.weight"] == (64, 3, 4, 4)
    assert shapes["conv2.weight"] == (128, 64, 3, 3)
    assert shapes["conv3.weight"] == (256, 128, 2, 2)
    assert shapes["fc1.weight"] == (2048, 1024)
    assert shapes["fc2.weight"] == (2048, 2048)
    assert shapes["heads.9.weight"] == (10, 2048)
    assert not any(name.endswith("bias") for name in shapes if not name.startswith("bn"))
    assert round(sum(int(np.prod(shape)) for shape in shapes.values()) / 1e6, 1) == 6.7


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("vgg", (3, 32, 32), "no network 'vgg'; choose from alexnet, mlp"), ("alexnet", (1, 21, 28), "at least 22x22")],
)
def test_unknown_networks_and_small_images_are_named(name: str, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(BecameError, match=message):
        build_backbone(name, shape)


def test_what_pooling_leaves_over_is_not_looked_at() -> None:
    images = np.arange(5 * 7, dtype=np.float64).reshape(1, 5, 7, 1)
    found = MaxPool(2)(Pass({}), jax.numpy.asarray(images))
    np.testing.assert_array_equal(np.asarray(found)[0, :, :, 0], [[8, 10, 12], [22, 24, 26]])


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1), (3, 2)])
def test_a_convolution_is_its_patches_times_its_weight(stride: int, padding: int) -> None:
    layer, draw = Conv("conv", 3, 5, kernel=2, stride=stride, padding=padding, bias=False), np.random.default_rng(0)
    weight = jax.numpy.asarray(draw.normal(size=(5, 3, 2, 2)))
    run = Pass({"conv.weight": weight}, taps=True)
    found = layer(run, jax.numpy.asarray(draw.normal(size=(2, 6, 7, 3))))
    expected = run.inputs["conv"] @ weight.reshape(5, -1).T
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-12)


def test_a_layer_that_runs_twice_is_refused_by_taps() -> None:
    layer = Dense("fc1", 36, 36)

    class Twice(Sequential):
        def __call__(self, run: Pass, images: Any) -> Any:
            return layer(run, layer(run, Flatten()(run, images)))

    stream = prototype_stream()
    learner = JaxLearner(Twice((Flatten(), layer)), stream)
    with pytest.raises(BecameError, match="the layer 'fc1' runs twice in one pass"):
        next(iter(learner.taps(0, stream.tasks[0].train[:4], 4, "empirical", np.random.default_rng(0))))


def test_alexnet_is_pytorchs() -> None:
    """Logits, curvature, and steps of training with dropout, by the same weights and the same stream."""
    torch: Any = pytest.importorskip("torch", reason="it is PyTorch that is agreed with")
    from adapters.torch.learner import TorchLearner
    from adapters.torch.networks import build_backbone as torch_backbone

    shape = (3, 22, 24)
    stream = prototype_stream(tasks=2, per_class=12, channels=3, side=24)
    # Wider than tall, so that axes cannot be confused.
    stream = replace(stream, dataset=replace(stream.dataset, images=stream.dataset.images[:, :, :22]))
    learner = JaxLearner(build_backbone("alexnet", shape), stream, dtype="float64")
    theirs = TorchLearner(torch_backbone("alexnet", shape).double(), stream, dtype=torch.float64)
    theirs.assign({name: torch.from_numpy(np.array(value)) for name, value in learner.parameters().items()})
    rows = stream.tasks[0].train
    expected = theirs.logits(rows, 9).numpy()
    np.testing.assert_allclose(np.asarray(learner.logits(rows, 9)), expected, rtol=1e-9, atol=1e-12)

    training = Training(Annealed(0.1, 1), Annealed(0.1, 1), batch_size=9, curvature_samples=18)
    for kind in ("empirical", "batch"):
        fishers = [
            Measurement(each, stream.tasks[0], training, kind, 0, "merge").diagonal().values
            for each in (learner, theirs)
        ]
        for name, value in fishers[1].items():
            scale = float(value.max())
            np.testing.assert_allclose(np.asarray(fishers[0][name]), value.numpy(), rtol=1e-6, atol=1e-9 * scale)

    losses = []
    for each in (learner, theirs):
        constraint = Constraint(frozenset(each.parameters()))
        batches, rates = [Batch(0, rows[:9]), Batch(1, stream.tasks[1].train[:8])], np.full(2, 0.1)
        losses.append(each.train(batches, rates, constraint, SGD(), np.random.default_rng(5)).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    theta = theirs.parameters()
    for name, value in learner.parameters().items():
        np.testing.assert_allclose(np.asarray(value), theta[name].numpy(), rtol=1e-7, atol=1e-9)


def test_a_pool_has_a_gradient_where_compiled_code_rounds_its_inputs_twice() -> None:
    """Forward and backward pass are compiled apart, as for taps: what is pooled may then not equal its maximum."""
    layers = BatchNorm("bn", 128), Apply(jax.nn.relu), MaxPool(2)
    weights = {
        "bn.weight": jnp.linspace(0.3, 1.7, 128, dtype="float32"),
        "bn.bias": jnp.linspace(-0.1, 0.2, 128, dtype="float32"),
    }
    images = jnp.asarray(np.random.default_rng(0).normal(size=(16, 12, 12, 128)), jnp.float32)

    def pooled(images: Any, weights: Any) -> Any:
        run = Pass(weights, constant_statistics=True)
        for layer in layers:
            images = layer(run, images)
        return images

    outputs, map_back = jax.jit(lambda *inputs: jax.vjp(pooled, *inputs))(images, weights)
    at_images, at_weights = jax.jit(lambda map_back, seed: map_back(seed))(map_back, jnp.ones_like(outputs))
    assert np.isfinite(at_images).all()
    # Each square that is not dark has one place for its gradient.
    np.testing.assert_allclose(at_weights["bn.bias"], (outputs > 0).sum((0, 1, 2)), rtol=1e-6)
