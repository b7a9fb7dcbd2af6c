"""Steps of a model in its own loop, between ``remember`` and ``merge``: what is projected, penalised and frozen."""

import copy
import importlib
import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.torch import Continual
from became_core import BecameError
from became_core.curvature import Categorical
from became_core.projection import GPM, NSCL, SGP
from tests.torch.modules import CLASSES, WIDTH
from tests.torch.oracle import autograd_gradients
from tests.torch.own_loop import NETWORKS, GroupedAdam, follows_new_data, new_data, new_network, train, whole

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.05),
    "Adam": lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.02, momentum=0.5),
}


@follows_new_data
@pytest.mark.filterwarnings("ignore:taps do not know:UserWarning")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_old_outputs_stand_still_in_stable_training(name: str, optimizer: str) -> None:
    """All directions of the old data are protected, and what cannot be protected is frozen; then all is free."""
    model, old, new = new_network(name), new_data(1, batches=1), new_data(2, batches=2, size=5)
    learning = Continual(model, projector=GPM(1.0), uncovered="frozen", check=False)
    learning.remember(old)
    stepper = OPTIMIZERS[optimizer](model.parameters())
    with torch.no_grad():
        before, theta = model.eval()(old[0][0]), {key: value.clone() for key, value in model.named_parameters()}
    with learning.stable(stepper):
        scheduler = torch.optim.lr_scheduler.StepLR(stepper, 1)
        train(model, stepper, new)
        scheduler.step()
    if name == "convolutional":  # whose running statistics the user's own training changes
        model[2].reset_running_stats()
    torch.testing.assert_close(model.eval()(old[0][0]), before, rtol=0, atol=1e-9)
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, theta[key])}
    assert moved
    assert moved <= {p.name for p in learning.coverage.parameters if p.treatment == "protected"}
    with learning.plastic():
        train(model, stepper, new)
    assert float((model.eval()(old[0][0]) - before).detach().abs().max()) > 1e-4


def test_steps_under_autocast_with_a_scaler_and_accumulation_are_projected() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    old, new = ([(x.float(), y) for x, y in new_data(seed)] for seed in (1, 2))
    learning = Continual(model, projector=GPM(1.0), uncovered="frozen")
    learning.remember(old[:1])
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 0.05), torch.amp.GradScaler("cpu")
    before, weight = model(old[0][0]).detach(), model[0].weight.detach().clone()
    with learning.stable(optimizer):
        for _ in range(5):
            for inputs, targets in new:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = functional.cross_entropy(model(inputs), targets) / len(new)
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert not torch.equal(model[0].weight, weight)
    torch.testing.assert_close(model(old[0][0]), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, GroupedAdam])
def test_what_is_not_covered_takes_a_proximal_step_to_the_old_mean(kind: Any) -> None:
    """Of an Adam the step is in its own metric, the root of its second moments."""
    model, old, new = new_network("perceptron"), new_data(1), new_data(2)
    learning = Continual(model, penalty=30.0)
    learning.remember(old)
    assert learning.posterior is not None
    optimizer = kind(model.parameters(), 0.5)
    mean, precision = learning.posterior.mean["0.bias"], learning.posterior.precision.diagonal()["0.bias"]
    functional.cross_entropy(model(new[0][0]), new[0][1]).backward()  # type: ignore[no-untyped-call]
    bias: Any = model[0].bias
    # The first step of an Adam is as long everywhere, and its second moment is the gradient's square.
    scale = 1.0 if kind is torch.optim.SGD else bias.grad.abs() + 1e-8
    free = bias.detach() - 0.5 * bias.grad / scale
    with learning.stable(optimizer):
        optimizer.step()
    pull = 0.5 * 30.0 * precision / scale
    torch.testing.assert_close(bias.detach(), (free + pull * mean) / (1 + pull))
    stiff = Continual(model, penalty=1e12)
    stiff.remember(old)
    at = bias.detach().clone()
    with stiff.stable(optimizer):
        train(model, optimizer, new)
    torch.testing.assert_close(bias.detach(), at, rtol=0, atol=1e-6)


@follows_new_data
def test_what_the_user_froze_is_never_touched() -> None:
    model = new_network("convolutional")
    model[1].requires_grad_(False)
    kernel = model[1].weight.clone()
    learning = Continual(model)
    learning.remember(new_data(1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with learning.stable(optimizer):
        train(model, optimizer, new_data(2))
    with learning.plastic():
        train(model, optimizer, new_data(2))
    learning.merge(new_data(2))
    assert torch.equal(model[1].weight, kernel)
    assert not model[1].weight.requires_grad
    treatments = {p.name: p.treatment for p in learning.coverage.parameters}
    assert treatments["1.weight"] == treatments["1.bias"] == "not trained"
    assert treatments["5.weight"] == "protected"
    assert treatments["2.weight"] == treatments["5.bias"] == "penalised"


@pytest.mark.parametrize("projector", [GPM(0.9), SGP(0.9), NSCL()])
def test_coverage_says_what_happens_to_every_parameter(projector: Any) -> None:
    model = new_network("encoder")
    learning = Continual(model, projector=projector)
    learning.remember(new_data(1))
    coverage = learning.coverage
    assert [p.name for p in coverage.parameters] == [name for name, _ in model.named_parameters()]
    by_name = {p.name: p for p in coverage.parameters}
    attention = by_name["layer.self_attn.in_proj_weight"]
    assert (attention.treatment, attention.use, attention.width) == ("protected", "matrix", WIDTH)
    assert by_name["layer.norm1.weight"].treatment == "penalised"
    assert by_name["layer.norm1.weight"].use == "other"
    assert coverage.share("protected") + coverage.share("penalised") == pytest.approx(1)
    text = str(coverage)
    assert "layer.norm1.weight" in text
    assert f"{100 * coverage.share('protected'):.1f} % protected" in text


@pytest.mark.parametrize("share", [0.25, 0.75])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_is_projected_alike_in_place_and_not(share: float, layout: Any) -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, CLASSES)).double()
    model.to(memory_format=layout)
    learning = Continual(model, uncovered="free", check=False)
    images = torch.randn(8, 4, 4, 4, dtype=torch.float64)
    learning.remember([(images, torch.arange(8) % CLASSES)])
    ranks, arrays = learning.projector.rank, {"tasks": torch.tensor(1)}
    for name, (_, width) in ranks.items():
        basis = torch.randn(width, int(share * width), dtype=torch.float64)
        arrays[f"bases.{name}"] = torch.linalg.qr(basis)[0]
    learning.projector = GPM().with_arrays(arrays)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with learning.stable(optimizer):
        functional.cross_entropy(model(images), torch.arange(8) % CLASSES).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for name, value in model.named_parameters():
        step = -0.1 * (torch.zeros_like(value) if value.grad is None else value.grad)
        expected = before[name] + learning.projector.project({name: step})[name]
        torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=1e-14)


def test_few_rows_of_several_batches_have_the_spaces_of_all_rows_together() -> None:
    model, batches = nn.Linear(40, CLASSES).double(), [(torch.randn(3, 40).double(), torch.arange(3))]
    batches += [(torch.randn(2, 40).double(), torch.arange(2))]
    learning = Continual(model, projector=GPM(1.0))
    learning.remember(batches)
    assert learning.projector.rank == {"weight": (5, 40)}
    rows = torch.cat([x for x, _ in batches])
    assert float(learning.projector.project({"weight": rows})["weight"].abs().max()) < 1e-12


def test_of_an_embedding_the_rows_that_are_looked_up_most_are_protected() -> None:
    model: Any = nn.Sequential(nn.Embedding(6, 2, padding_idx=0), nn.Flatten(), nn.Linear(8, CLASSES)).double()
    keys = torch.tensor([[1, 2, 1, 0], [1, 2, 0, 0], [3, 0, 0, 0]])  # 0 is padding, which has no gradient
    learning = Continual(model, projector=GPM(0.8), uncovered="free")
    learning.remember([(keys, torch.tensor([0, 1, 2]))])
    assert learning.projector.rank["0.weight"] == (2, 6)
    before, optimizer = model[0].weight.detach().clone(), torch.optim.SGD(model.parameters(), 0.1)
    with learning.stable(optimizer):
        loss = functional.cross_entropy(model(torch.tensor([[1, 2, 3, 4]])), torch.tensor([0]))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    moved = (model[0].weight.detach() != before).any(1)
    assert moved.tolist() == [False, False, False, True, True, False]


class _Heads(nn.Module):
    """A body with several heads, of which one is used."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.body, self.heads, self.used = nn.Linear(WIDTH, 8), nn.ModuleList(), 0
        for _ in range(count):
            self.heads.append(nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.heads[self.used](self.body(x).tanh())
        return outputs


@pytest.mark.parametrize("is_new", [False, True])
def test_a_head_that_a_later_task_uses_is_free_and_then_protected(is_new: bool) -> None:
    model: Any = _Heads(1 if is_new else 2).double()
    learning = Continual(model, uncovered="frozen")
    learning.remember(new_data(1))
    if is_new:
        model.heads.append(nn.Linear(8, CLASSES).double())
    model.used = 1
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    treatments = {p.name: p.treatment for p in learning.coverage.parameters}
    assert treatments["heads.1.weight"] == ("free" if is_new else "frozen")
    with learning.stable(optimizer):
        train(model, optimizer, new_data(2))
    assert torch.equal(model.heads[1].weight, before["heads.1.weight"]) == (not is_new)
    learning.remember(new_data(2))
    rank = learning.projector.rank
    assert rank["heads.1.weight"][1] == rank["heads.0.weight"][1] == 8
    assert learning.posterior is not None
    expected = autograd_gradients(model.eval(), *whole(new_data(2)))["heads.1.weight"].square().mean(0)
    torch.testing.assert_close(learning.posterior.precision.diagonal()["heads.1.weight"], expected)


def _with_head(model: Any, batch: Any) -> Tensor:
    """Run the head whose number a batch has beside its samples; -1 - n stands for a function of the head n."""
    model.used = max(batch[2], -1 - batch[2])
    if batch[2] >= 0:
        return cast(Tensor, model(batch[0]))
    hidden, head = model.body(batch[0]).tanh(), model.heads[model.used]
    return functional.linear(hidden, head.weight.softmax(0), head.bias)


def test_a_matrix_that_only_later_batches_use_is_protected() -> None:
    torch.manual_seed(0)
    model: Any = _Heads(2).double()
    learning = Continual(
        model, projector=GPM(1.0), uncovered="frozen", apply=_with_head, targets=lambda batch: batch[1]
    )
    *old, new = [(*pair, head) for pair, head in zip(new_data(1, 4), (0, 1, 1, 1), strict=True)]
    learning.remember(old)
    treatments = {p.name: p.treatment for p in learning.coverage.parameters}
    assert treatments["heads.0.weight"] == treatments["heads.1.weight"] == "protected"
    # All that the batches read, which is two samples each.
    assert [learning.projector.rank[f"heads.{number}.weight"][0] for number in (0, 1)] == [2, 4]
    before = [_with_head(model, batch).detach() for batch in old]
    weight, optimizer = model.heads[1].weight.detach().clone(), torch.optim.SGD(model.parameters(), 0.1)
    with learning.stable(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            functional.cross_entropy(_with_head(model, new), new[1]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert not torch.equal(model.heads[1].weight, weight)
    for batch, outputs in zip(old, before, strict=True):
        torch.testing.assert_close(_with_head(model, batch).detach(), outputs, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:taps do not know:UserWarning")
def test_a_matrix_that_an_earlier_batch_uses_otherwise_is_none() -> None:
    model: Any = _Heads(2).double()

    def batches(*heads: int) -> list[Any]:
        return [(*pair, head) for pair, head in zip(new_data(1, len(heads)), heads, strict=True)]

    def learning() -> Continual:
        return Continual(model, apply=_with_head, targets=lambda batch: batch[1])

    memory = learning()
    memory.remember(batches(0, -2, 1))
    assert {"heads.0.weight"} == {name for name in memory.projector.rank if name.startswith("heads")}
    with pytest.raises(
        BecameError, match=r"'heads\.1\.weight' is multiplied as a whole in one batch and used in another"
    ):
        learning().remember(batches(0, 1, -2))
    memory = learning()
    memory.remember(batches(0, 1))
    with pytest.raises(BecameError, match=r"'heads\.1\.weight' is protected as a matrix that is multiplied as a whole"):
        memory.remember(batches(0, -2))


@pytest.mark.filterwarnings("ignore:taps do not know:UserWarning")
def test_a_parameter_that_old_data_hold_by_curvature_alone_goes_on_to_be_penalised() -> None:
    """A weight that was computed with is a matrix in the second task, whose space says nothing of the first."""
    model = nn.Linear(WIDTH, CLASSES).double()
    is_computed = [True]

    def run(net: Any, batch: Any) -> Tensor:
        return functional.linear(batch[0], net.weight.softmax(0) if is_computed[0] else net.weight, net.bias)

    learning = Continual(model, apply=run, targets=lambda batch: batch[1])
    learning.remember(new_data(1))
    is_computed[0] = False
    learning.remember(new_data(2))
    assert "weight" not in learning.projector.rank
    assert {p.treatment for p in learning.coverage.parameters} == {"penalised"}
    alone = Continual(model, apply=run, targets=lambda batch: batch[1])
    alone.remember(new_data(2))
    assert "weight" in alone.projector.rank


def test_a_penalised_parameter_that_gets_no_gradient_stays_exactly_at_its_mean() -> None:
    model = nn.Linear(WIDTH, 200)
    learning, optimizer = Continual(model, check=False), torch.optim.SGD(model.parameters(), 0.1)
    learning.remember([(torch.randn(8, WIDTH), torch.randint(0, 200, (8,)))])
    before = model.bias.detach().clone()
    with learning.stable(optimizer):
        for _ in range(3):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
    assert torch.equal(model.bias.detach(), before)


def test_an_optimizer_without_a_rate_pulls_nothing_back() -> None:
    model = new_network("perceptron")
    learning, optimizer = Continual(model, check=False), torch.optim.SGD(model.parameters(), 0.1)
    learning.remember(new_data(1))
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(BecameError, match="has no learning rate of its own"), learning.stable(optimizer):
        pass
    learning.uncovered = "frozen"
    with learning.stable(optimizer):
        pass


def test_a_copy_that_is_made_in_stable_training_is_in_none() -> None:
    model, batches = new_network("perceptron"), new_data(1)
    learning, optimizer = Continual(model), torch.optim.SGD(model.parameters(), 0.1)
    learning.remember(batches)
    with learning.stable(optimizer):
        copies = [pickle.loads(pickle.dumps(learning)), copy.deepcopy(learning)]
    for again in copies:
        again.remember(batches)
        optimizer = torch.optim.SGD(again.model.parameters(), 0.1)
        with again.stable(optimizer):
            train(again.model, optimizer, batches)


def test_no_two_memories_project_the_steps_of_one_parameter() -> None:
    """The second projection of a step could lead back into what the first one keeps it out of."""
    model, batches = new_network("perceptron"), new_data(1)
    optimizer, both = torch.optim.SGD(model.parameters(), 0.1), [Continual(model) for _ in range(2)]
    for learning in both:
        learning.remember(batches)
    with (
        both[0].stable(optimizer),
        pytest.raises(BecameError, match=r"'0\.weight' is in stable training of another Continual; let one of them"),
    ):
        both[1].stable(optimizer).__enter__()
    with pytest.raises(BecameError, match="plastic training comes after stable"), both[1].plastic():
        pass
    for learning in both:  # one after the other
        with learning.stable(optimizer):
            train(model, optimizer, batches)


def test_hooks_are_gone_after_training_whatever_happens() -> None:
    model, batches = new_network("perceptron"), new_data(1)
    learning, optimizer = Continual(model, uncovered="frozen"), torch.optim.SGD(model.parameters(), 0.1)
    learning.remember(batches)
    with pytest.raises(ZeroDivisionError), learning.stable(optimizer):
        raise ZeroDivisionError
    bias = model[0].bias.detach().clone()
    train(model, optimizer, batches)
    assert not torch.equal(model[0].bias, bias)


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
def test_models_of_transformers_are_exact_and_covered() -> None:
    """GPT-2's matrices are stored as [d_in, d_out]; Llama has rotations and grouped heads; BERT is a classifier."""
    hf: Any = importlib.import_module("transformers")

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 32,
    }
    tokens, causal = torch.randint(0, 32, (4, 6)), Categorical(by="token", shift=True)
    cases: list[tuple[Any, Any, Any, float]] = [
        (
            hf.GPT2LMHeadModel(
                hf.GPT2Config(
                    vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
                )
            ),
            causal,
            tokens,
            0.7,
        ),
        (hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=1)), causal, tokens, 0.8),
        (hf.BertForSequenceClassification(hf.BertConfig(**sizes)), "categorical", tokens[:, 0] % 2, 0.15),
    ]
    for model, likelihood, labels, share in cases:
        learning = Continual(model.double(), likelihood)
        learning.remember([{"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}])
        assert learning.checked is not None  # per-sample gradients against a loop, among others
        assert learning.coverage.share("protected") > share
        other = {p.name for p in learning.coverage.parameters if p.treatment != "protected" and p.use != "other"}
        assert not other


class _Pooled(nn.Module):
    """Words, of which a maximum over positions passes a gradient to few."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(60, 8), nn.Conv1d(8, 4, 3, padding=1), nn.Linear(4, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        mixed: Tensor = self.mix(self.words(words).transpose(1, 2)).relu().amax(2)
        return cast(Tensor, self.head(mixed))


def test_words_that_are_looked_up_are_protected_whether_or_not_they_have_a_gradient() -> None:
    torch.manual_seed(0)
    model = _Pooled().double()
    old, new = torch.randint(0, 30, (4, 12)), torch.randint(0, 60, (16, 12))
    learning = Continual(model, projector=GPM(1.0), uncovered="frozen")
    learning.remember([(old, torch.arange(4) % CLASSES)])
    assert learning.projector.rank["words.weight"] == (len(set(old.flatten().tolist())), 60)
    before, optimizer = model(old).detach(), torch.optim.AdamW(model.parameters(), 0.01)
    with learning.stable(optimizer):
        train(model, optimizer, [(new, torch.arange(16) % CLASSES)])
    torch.testing.assert_close(model(old).detach(), before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("uncovered", ["frozen", "penalised"])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_layer_that_a_task_froze_is_thawed_only_once_that_task_is_remembered_with_it(
    tmp_path: Path, uncovered: Any, loaded: bool
) -> None:
    model, first, second = new_network("perceptron").double(), new_data(1), new_data(2)
    first, second = ([(x.double(), y) for x, y in batches] for batches in (first, second))
    learning = Continual(model, uncovered=uncovered)
    learning.remember(first)
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    name = next(name for name, value in model.named_parameters() if value is layer.bias)
    assert learning.posterior is not None
    before = learning.posterior.precision.diagonal()[name].clone()
    layer.requires_grad_(False)
    learning.remember(second)
    assert torch.equal(learning.posterior.precision.diagonal()[name], before)  # what the first task knows is kept
    if loaded:
        learning.save(tmp_path / "memory")
        learning = Continual.load(model, tmp_path / "memory")
    layer.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(BecameError, match="is trained now, and was not when"), learning.stable(optimizer):
        pass
    learning.remember(second)
    assert learning.posterior is not None
    assert bool(torch.all(learning.posterior.precision.diagonal()[name] >= before))
    with learning.stable(optimizer):
        pass
