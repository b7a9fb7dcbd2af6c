"""``Continual`` on PyTorch and the functions on JAX: the same memory, steps, merge and file, in double precision."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

from adapters.jax import memory as memories  # noqa: E402
from adapters.jax import own_loop  # noqa: E402
from adapters.torch import Continual  # noqa: E402
from became_core.arrays import named_leaves  # noqa: E402
from became_core.projection import GPM, SGP  # noqa: E402
from tests.backends import load  # noqa: E402

RATE = 0.3


class _Perceptron(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        return self.last(torch.tanh(self.first(x)))


def _apply(params: Any, x: Any) -> Any:
    first, last = params["first"], params["last"]
    hidden = jax.numpy.tanh(x @ first["weight"].T + first["bias"])
    return hidden @ last["weight"].T + last["bias"]


def _data(seed: int, batches: int = 2) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(8, 6)), rng.integers(0, 3, size=8)) for _ in range(batches)]


def _as_tree(module: Any) -> Any:
    tree: dict[str, Any] = {"first": {}, "last": {}}
    for name, value in module.named_parameters():
        layer, _, part = name.partition(".")
        tree[layer][part] = jax.numpy.asarray(value.detach().numpy().copy())
    return tree


def _assert_alike(tree: Any, module: Any) -> None:
    leaves = named_leaves(tree)
    for name, value in module.named_parameters():
        np.testing.assert_allclose(leaves[name], value.detach(), rtol=1e-9, atol=1e-12, err_msg=name)


def test_both_remember_step_merge_and_save_the_same(tmp_path: Path) -> None:
    load("jax", "cpu")
    torch.manual_seed(0)
    module, old, new = _Perceptron().double(), _data(1, 6), _data(2)
    old_torch, new_torch = ([tuple(map(torch.from_numpy, batch)) for batch in data] for data in (old, new))
    params = _as_tree(module)
    learning = Continual(module, projector=SGP(0.9), penalty=30.0, check=False)
    learning.remember(old_torch, share=0.5)  # both draw the same batches
    memory = memories.remember(_apply, params, old, projector=SGP(0.9), penalty=30.0, check=False, share=0.5)
    assert learning.posterior is not None
    for name, value in learning.posterior.precision.diagonal().items():
        np.testing.assert_allclose(memory.posterior.precision.diagonal()[name], value, rtol=1e-9, atol=1e-14)
    assert str(memories.coverage(memory)) == str(learning.coverage)
    # Each goes on with the memory that the other has written.
    files = tmp_path / "jax.safetensors", tmp_path / "torch.safetensors"
    memories.save(memory, files[0])
    learning.save(files[1])
    learning, memory = Continual.load(module, files[0], check=False), memories.load(params, files[1])
    assert (memory.penalty, learning.penalty) == (30.0, 30.0)
    assert str(memories.coverage(memory)) == str(learning.coverage)

    def train_torch(optimizer: Any) -> None:
        for x, y in new_torch * 3:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()

    def train_jax(params: Any, optimizer: Any) -> Any:
        def loss(params: Any, x: Any, y: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(_apply(params, x), y).mean()

        @jax.jit  # type: ignore[untyped-decorator, unused-ignore] # JAX is taken as untyped
        def step(params: Any, state: Any, x: Any, y: Any) -> Any:
            updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
            return optax.apply_updates(params, updates), state

        state = jax.jit(optimizer.init)(params)
        for x, y in new * 3:
            params, state = step(params, state, x, y)
        return params

    sgd = torch.optim.SGD(module.parameters(), RATE, momentum=0.9)
    with learning.stable(sgd):
        train_torch(sgd)
    theta_gp = train_jax(params, optax.chain(optax.sgd(RATE, momentum=0.9), own_loop.projected(memory, RATE)))
    _assert_alike(theta_gp, module)
    with learning.plastic():
        train_torch(torch.optim.SGD(module.parameters(), RATE))
    theta_hat = train_jax(theta_gp, optax.sgd(RATE))
    _assert_alike(theta_hat, module)
    expected = learning.merge(new_torch, trace=3)
    report = own_loop.merge(_apply, memory, theta_gp, theta_hat, new, trace=3)
    assert 0 < report.alpha < 1
    assert report.alpha == pytest.approx(expected.alpha, rel=1e-8)
    assert report.slopes == pytest.approx(expected.slopes, rel=1e-8)
    assert report.gain == pytest.approx(expected.gain, rel=1e-8)
    assert report.promised == expected.promised
    np.testing.assert_allclose(report.trace, expected.trace, rtol=1e-8)
    _assert_alike(report.params, module)


def test_both_remember_the_same_of_an_adams_second_moments() -> None:
    load("jax", "cpu")
    torch.manual_seed(0)
    module, data = _Perceptron().double(), _data(1)
    params = _as_tree(module)
    of_torch = torch.optim.Adam(module.parameters(), RATE, betas=(0.9, 0.99))
    # Each part of the parameters has an optimiser, and another comes before it.
    adams = {"first": optax.adam(RATE, b2=0.99), "last": optax.adam(RATE, b2=0.99)}
    of_jax = optax.chain(optax.identity(), optax.multi_transform(adams, {"first": "first", "last": "last"}))
    state = of_jax.init(params)

    def loss(params: Any, x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(_apply(params, x), y).mean()

    for x, y in data:
        of_torch.zero_grad()
        torch.nn.functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        of_torch.step()
        updates, state = of_jax.update(jax.grad(loss)(params, x, y), state, params)
        params = optax.apply_updates(params, updates)
    learning = Continual(module)
    with pytest.warns(UserWarning, match="unfit after clipping"):
        learning.remember(optimizer=of_torch, samples=8)
    with pytest.warns(UserWarning, match="unfit after clipping"):
        memory = memories.remember(_apply, params, state=state, samples=8, b2=0.99)
    assert learning.posterior is not None
    for name, value in learning.posterior.precision.diagonal().items():
        np.testing.assert_allclose(memory.posterior.precision.diagonal()[name], value, rtol=1e-9)
        assert float(value.abs().max()) > 0
    assert memories.coverage(memory).share("penalised") == 1


def test_both_take_the_same_steps_of_an_adam() -> None:
    """What is penalised is pulled back in the Adam's own metric."""
    load("jax", "cpu")
    torch.manual_seed(0)
    module, old, new = _Perceptron().double(), _data(1), _data(2)
    params = _as_tree(module)
    learning = Continual(module, projector=GPM(0.7), check=False)
    learning.remember([tuple(map(torch.from_numpy, batch)) for batch in old])
    memory = memories.remember(_apply, params, old, projector=GPM(0.7), check=False)
    of_torch = torch.optim.AdamW(module.parameters(), 0.05, betas=(0.9, 0.99), weight_decay=0.01)
    adam = optax.chain(optax.identity(), optax.adamw(0.05, b2=0.99, weight_decay=0.01))
    of_jax = own_loop.projected(memory, 0.05, adam, b2=0.99)

    def loss(params: Any, x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(_apply(params, x), y).mean()

    state, update, gradient = of_jax.init(params), jax.jit(of_jax.update), jax.jit(jax.grad(loss))
    with learning.stable(of_torch):
        for x, y in new * 2:
            of_torch.zero_grad()
            torch.nn.functional.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(y)).backward()
            of_torch.step()
            updates, state = update(gradient(params, x, y), state, params)
            params = optax.apply_updates(params, updates)
    _assert_alike(params, module)


def test_rows_of_an_embedding_that_old_data_look_up_stand_still() -> None:
    load("jax", "cpu")
    rng, old, new = np.random.default_rng(3), np.array([[1, 2, 1, 5], [5, 1, 7, 1]]), np.array([[0, 1, 2, 3]])
    params = {"words": jax.numpy.asarray(rng.normal(size=(9, 2))), "last": jax.numpy.asarray(rng.normal(size=(8, 3)))}

    def apply(params: Any, keys: Any) -> Any:
        return jax.numpy.tanh(params["words"][keys]).reshape(len(keys), -1) @ params["last"]

    def loss(params: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, new), np.array([1])).mean()

    memory = memories.remember(apply, params, [(old, np.array([0, 2]))], projector=GPM(1.0))
    assert memory.projector.rank["words"] == (4, 9)
    assert memories.coverage(memory).share("protected") == 1
    optimizer = optax.chain(optax.sgd(0.5), own_loop.projected(memory, 0.5))
    updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(apply(moved, old), apply(params, old), rtol=0, atol=1e-12)
    assert np.asarray(moved["words"] != params["words"]).any(1).tolist() == [True, *[False] * 2, True, *[False] * 5]


def test_both_calibrate_across_tasks_alike(tmp_path: Path) -> None:
    """Three tasks, whose weights are set; after each merge each goes on with the other's file."""
    load("jax", "cpu")
    torch.manual_seed(0)
    module = _Perceptron().double()
    base = {name: value.detach().clone() for name, value in module.named_parameters()}

    def place(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        moved = {n: v + 0.2 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for n, v in base.items()}
        module.load_state_dict(moved if seed else base)
        return _as_tree(module)

    begin, learning = place(0), Continual(module, calibration="across", check=False)
    params, old = place(1), _data(1)
    memory = memories.remember(_apply, params, old, calibration="across", begin=begin, check=False)
    learning.remember([tuple(map(torch.from_numpy, batch)) for batch in old])
    for task in (2, 3):
        new = _data(task, 4)
        of_torch = [tuple(map(torch.from_numpy, batch)) for batch in new]
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        with pytest.warns(UserWarning, match="have taken no step"), learning.stable(optimizer):
            theta_gp = place(2 * task)
        with learning.plastic():
            theta_hat = place(2 * task + 1)
        merged, report = own_loop.merge(_apply, memory, theta_gp, theta_hat, new), learning.merge(of_torch)
        assert merged.alpha == pytest.approx(report.alpha, rel=1e-8)
        assert merged.slopes == pytest.approx(report.slopes, rel=1e-8)
        files = tmp_path / "jax.safetensors", tmp_path / "torch.safetensors"
        memories.save(merged.memory, files[0])
        learning.save(files[1])
        learning, memory = Continual.load(module, files[0], check=False), memories.load(params, files[1])
        memory = memories.remember(_apply, merged.params, new, memory=memory, share=0.1, check=False)
        learning.remember(of_torch, share=0.1)
        assert learning.posterior is not None
        for name, value in learning.posterior.precision.diagonal().items():
            np.testing.assert_allclose(memory.posterior.precision.diagonal()[name], value, rtol=1e-8, atol=1e-14)
