"""What ``Continual`` refuses in a sentence, and what its first look at a model and its data finds."""

import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.torch import Continual
from became_core import BecameError
from became_core.curvature import Categorical
from became_core.projection import TRGP, InfLoRA, OLoRA
from tests.torch.modules import CLASSES, WIDTH
from tests.torch.own_loop import new_data, new_network, train
from tests.torch.own_models import Of


def test_a_model_of_which_the_memory_says_too_little_is_refused() -> None:
    model = new_network("perceptron")
    model[0].requires_grad_(False)
    learning, optimizer = Continual(model), torch.optim.SGD(model.parameters(), 0.1)
    learning.remember(new_data(1))
    model[0].requires_grad_(True)
    with (
        pytest.raises(BecameError, match=r"'0\.weight' is trained now, and was not when old data were remembered"),
        learning.stable(optimizer),
    ):
        pass
    frozen = Continual(model, uncovered="frozen")
    model[0].requires_grad_(False)
    frozen.remember(new_data(1))
    model[0].requires_grad_(True)
    before = model[0].weight.detach().clone()
    with frozen.stable(optimizer):
        train(model, optimizer, new_data(2))
    assert torch.equal(model[0].weight, before)
    model[2] = nn.Linear(8, CLASSES + 2).double()
    message = r"'2\.weight' is \[5, 8\] now, and was \[3, 8\] when old data were remembered; leave it as it is"
    with pytest.raises(BecameError, match=message), frozen.stable(torch.optim.SGD(model.parameters(), 0.1)):
        pass
    with pytest.raises(BecameError, match=message):
        frozen.remember(new_data(2))
    square = nn.Linear(WIDTH, WIDTH, bias=False).double()
    turned = [False]
    sides = Continual(
        square,
        apply=lambda net, batch: batch[0] @ (net.weight if turned[0] else net.weight.T),
        targets=lambda batch: batch[1],
    )
    sides.remember(new_data(1))
    turned[0] = True
    with pytest.raises(BecameError, match="'weight' was multiplied from its other side in the memory"):
        sides.remember(new_data(2))


class _Merging(nn.Linear):
    """A frozen layer with a low-rank adapter that it adds to its weight in evaluation mode, as loralib's do."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.ones(2, WIDTH)), nn.Parameter(torch.zeros(WIDTH, 2))
        self.is_merged = False

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode == self.is_merged:
            self.weight.data += (-1 if mode else 1) * self.up @ self.down
            self.is_merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.is_merged else super().forward(x) + x @ self.down.T @ self.up.T


def test_a_layer_that_changes_a_weight_in_evaluation_mode_is_refused() -> None:
    layer = _Merging().double()
    model = nn.Sequential(layer, nn.Linear(WIDTH, CLASSES).double())
    learning = Continual(model, check=False)
    learning.remember(new_data(1))
    assert (layer.is_merged, layer.training) == (False, True)  # it merged nothing, as ``up`` is zero
    nn.init.ones_(layer.up)
    before = layer.weight.detach().clone()
    with pytest.raises(BecameError, match=r"changes '0\.weight' when it goes into evaluation mode"):
        learning.remember(new_data(2))
    torch.testing.assert_close(layer.weight, before)


class _Directed(nn.Module):
    """A layer that divides by the norm of its weight, through which no gradient goes, as DoRA does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.inner(x) / self.inner.weight.detach().norm()
        return outputs


def test_a_matrix_that_acts_where_no_gradient_shows_it_is_not_called_protected() -> None:
    with pytest.raises(BecameError, match=r"outputs if 'inner\.weight' moves where the sample reads nothing"):
        Continual(_Directed().double()).remember(new_data(1))


class _Placed(nn.Module):
    """Words with positions that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(9, 4), nn.Embedding(6, 4), nn.Linear(4, CLASSES)

    def forward(self, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = (self.words(keys) + self.places(torch.arange(keys.shape[1]))).tanh()
        outputs: Tensor = self.head(hidden.mean(1) if mask is None else (mask.double() @ hidden + hidden).mean(1))
        return outputs


@pytest.mark.parametrize("sizes", [(1, 4), (4, 1), (1, 1)])
def test_positions_are_no_samples_inputs_in_a_batch_of_one_either(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = _Placed().double()
    batches = [(torch.randint(9, (n, 6)), torch.randint(CLASSES, (n,))) for n in sizes]
    learning = Continual(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "taps do not know", UserWarning)
        learning.remember(batches)
    assert "places.weight" not in learning.projector.rank
    gradients = [
        torch.autograd.grad(functional.cross_entropy(model(x[at]), y[at]), model.places.weight)[0]
        for x, y in batches
        for at in (slice(n, n + 1) for n in range(len(x)))
    ]
    assert learning.posterior is not None
    found = learning.posterior.precision.diagonal()["places.weight"]
    torch.testing.assert_close(found, torch.stack(gradients).square().mean(0))


def test_a_batch_as_long_as_an_input_that_all_samples_share_is_refused_in_a_sentence() -> None:
    batch = {"keys": torch.randint(9, (6, 6)), "mask": torch.eye(6), "labels": torch.randint(CLASSES, (6,))}
    with pytest.raises(BecameError, match=r"takes 6 samples and not a few of them .* batch of another length"):
        Continual(_Placed().double()).remember([batch])


def _read_texts(net: Any, texts: Any) -> Tensor:
    rows = [net.words(torch.tensor([ord(letter) % 21 for letter in text])) for text in texts]
    outputs: Tensor = net.head(torch.stack([net.body(row).tanh().mean(0) for row in rows]))
    return outputs


def _read_images(net: Any, images: Any) -> Tensor:
    outputs: Tensor = net.head(torch.cat([net.body(image[None]).tanh().mean((2, 3)) for image in images]))
    return outputs


def _texts(size: int) -> Any:
    return ["hello", "big world", "abc", "de", "fghij"][:size], torch.arange(size) % CLASSES


def _images(size: int) -> Any:
    drawn = torch.Generator().manual_seed(size)
    images = [torch.randn(3, 5 + index, 6, dtype=torch.float64, generator=drawn) for index in range(size)]
    return images, torch.arange(size) % CLASSES


@pytest.mark.parametrize("sizes", [(4, 5), (2, 4), (5, 3)])
@pytest.mark.parametrize("kind", ["texts", "images"])
def test_a_list_with_an_entry_for_each_sample_is_cut(kind: str, sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    if kind == "texts":
        make, network = (
            _texts,
            Of(_read_texts, words=nn.Embedding(21, 4), body=nn.Linear(4, 4), head=nn.Linear(4, CLASSES)),
        )
    else:
        make, network = _images, Of(_read_images, body=nn.Conv2d(3, 4, 2), head=nn.Linear(4, CLASSES))
    network.double()
    batches = [make(size) for size in sizes]
    learning = Continual(network, apply=lambda net, batch: net(batch[0]), targets=lambda batch: batch[1])
    learning.remember(batches)
    assert learning.checked is not None
    assert learning.posterior is not None
    squares: dict[str, Any] = {name: 0.0 for name, _ in network.named_parameters()}
    for samples, targets in batches:
        for sample, target in zip(samples, targets, strict=True):
            network.zero_grad()
            functional.cross_entropy(network([sample]), target[None]).backward()  # type: ignore[no-untyped-call]
            for name, value in network.named_parameters():
                assert value.grad is not None
                squares[name] = squares[name] + value.grad.square() / sum(sizes)
    for name, found in learning.posterior.precision.diagonal().items():
        torch.testing.assert_close(found, squares[name], rtol=1e-9, atol=1e-20)


def test_images_in_a_list_as_long_as_their_channels_are_refused_in_a_sentence() -> None:
    network = Of(_read_images, body=nn.Conv2d(3, 4, 2), head=nn.Linear(4, CLASSES)).double()
    learning = Continual(network, apply=lambda net, batch: net(batch[0]), targets=lambda batch: batch[1])
    with pytest.raises(BecameError, match=r"takes 3 samples and not a few of them .* a list of tensors is, begin with"):
        learning.remember([_images(3)])
    learning.remember([_images(4)])


def test_a_loss_that_is_no_single_number_is_refused_in_a_sentence_in_a_stream_too() -> None:
    learning = Continual(new_network("perceptron"), nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(BecameError, match=r"the loss has shape \[2\]; it must return one number, the batch's mean"):
        learning.observe(new_data(1)[0])


def test_data_that_use_a_protected_matrix_otherwise_are_refused() -> None:
    """No projection of steps stands for a use as anything else, so the matrix may not go on to be called protected."""

    def learning() -> Continual:
        layer = nn.Linear(WIDTH, CLASSES, bias=False).double()

        def apply(_: nn.Module, batch: Any) -> Tensor:
            x = batch[0]
            outputs: Tensor = layer(x) if x.ndim == 2 else layer(x[:, 0]) + layer.weight[:, 0] ** 2
            return outputs

        return Continual(layer, apply=apply, targets=lambda batch: batch[1], check=False)

    whole: Any = new_data(1)[0]
    part = whole[0][:, None], whole[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "taps do not know", UserWarning)
        memory = learning()
        memory.remember([whole])
        with pytest.raises(BecameError, match="'weight' is protected as a matrix that is multiplied as a whole, and"):
            memory.remember([part])
        with pytest.raises(BecameError, match="'weight' is multiplied as a whole in one batch and used in another way"):
            learning().remember([whole, part])
        mixed = learning()
        mixed.remember([part, whole])
    assert dict(mixed.projector.rank) == {}


def test_a_matrix_that_a_later_batch_multiplies_from_its_other_side_is_refused() -> None:
    square = nn.Linear(WIDTH, WIDTH, bias=False).double()
    learning = Continual(
        square,
        apply=lambda net, batch: batch[0] @ (net.weight if batch[2] else net.weight.T),
        targets=lambda batch: batch[1],
    )
    ahead, back = ((*pair, turned) for pair, turned in zip(new_data(1), (False, True), strict=True))
    with pytest.raises(BecameError, match="'weight' is multiplied as a whole in one batch and used in another way"):
        learning.remember([ahead, back])
    assert learning.posterior is None


class _Random(nn.Module):
    def __init__(self, across: bool) -> None:
        super().__init__()
        self.fc, self.across = nn.Linear(WIDTH, CLASSES), across

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.fc(x)
        return outputs + outputs.mean(0) if self.across else functional.dropout(outputs, 0.5, training=True)


@pytest.mark.filterwarnings("ignore:taps do not know:UserWarning")
@pytest.mark.parametrize(("across", "what"), [(True, "outputs of a sample alone"), (False, "outputs, computed twice")])
def test_the_first_look_finds_what_makes_measurements_meaningless(across: bool, what: str) -> None:
    batches = new_data(1, size=5)
    with pytest.raises(BecameError, match=rf"fails its first look: {what}"):
        Continual(_Random(across).double()).remember(batches)
    Continual(_Random(across).double(), check=False).remember(batches)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.full((4,), CLASSES), rf"has the label {CLASSES}; the model has {CLASSES} outputs, so labels go from 0"),
        (torch.full((4,), -1), "has the label -1"),
        (torch.zeros(4), "the targets are torch.float32; the categorical likelihood needs labels, which are integers"),
    ],
)
def test_targets_that_are_no_labels_are_refused(targets: Tensor, message: str) -> None:
    with pytest.raises(BecameError, match=message):
        Continual(nn.Linear(3, CLASSES)).remember([(torch.randn(4, 3), targets)])


def test_inputs_that_are_no_numbers_are_named_as_the_cause() -> None:
    with pytest.raises(BecameError, match="are not finite for the first samples; look at the inputs"):
        Continual(nn.Linear(3, CLASSES)).remember([(torch.full((4, 3), torch.nan), torch.zeros(4, dtype=torch.long))])


def test_the_first_look_accepts_a_network_with_more_kinks_than_a_difference_can_avoid() -> None:
    """A dozen layers with batch norm and ReLU6: no step is so short that a difference of outputs meets no kink."""
    torch.manual_seed(0)
    layers = [(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU6()) for _ in range(12)]
    model = nn.Sequential(*(layer for triple in layers for layer in triple), nn.Linear(16, CLASSES))
    model(torch.randn(64, 16))
    learning = Continual(model)
    learning.remember([(torch.randn(4, 16), torch.arange(4) % CLASSES)])
    assert learning.checked is not None
    assert learning.checked.findings[-1].what == "a derivative, by forward mode"
    assert learning.checked.findings[-1].difference < 1e-4


class _WrongTangent(torch.autograd.Function):
    """A sine whose derivative is right backwards, and half of it forwards."""

    @staticmethod
    def forward(inputs: Tensor) -> Tensor:
        return inputs.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, *_: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        result: Tensor = gradients[0] * ctx.saved_tensors[0].cos()
        return result

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        result: Tensor = tangents[0] * ctx.saved_tensors[0].cos() / 2
        return result


class _WrongForwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = _WrongTangent.apply(self.fc(x))  # type: ignore[no-untyped-call]
        return outputs


def test_the_first_look_refuses_a_derivative_that_is_wrong_forwards() -> None:
    with pytest.raises(BecameError, match="fails its first look: a derivative, by forward mode"):
        Continual(_WrongForwards().double()).remember(new_data(1))


def test_what_cannot_be_done_is_said_in_a_sentence() -> None:
    model, batches = new_network("perceptron"), new_data(1)
    learning, optimizer = Continual(model), torch.optim.SGD(model.parameters(), 0.1)
    with (
        pytest.raises(BecameError, match="stable training needs a memory of old data; call"),
        learning.stable(optimizer),
    ):
        pass
    with pytest.raises(BecameError, match="coverage needs a memory"):
        _ = learning.coverage
    with pytest.raises(BecameError, match="plastic training comes after stable"), learning.plastic():
        pass
    with pytest.raises(BecameError, match="there are no samples"):
        learning.remember([])
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(BecameError, match=f"the share of the batches is {share}; it must be above 0 and at most 1"):
            learning.remember(batches, share=share)
    with pytest.raises(
        BecameError, match=r"outputs of shape \[0, 3\] for a batch; they must be \[samples, ...\], of one"
    ):
        learning.remember([*batches, (batches[0][0][:0], batches[0][1][:0])])
    learning.remember(batches)
    acts: dict[str, Callable[[], object]] = {
        "remembering": lambda: learning.remember(batches),
        "a merge": lambda: learning.merge(batches),
        "plastic training": lambda: learning.plastic().__enter__(),
        "stable training": lambda: learning.stable(optimizer).__enter__(),
    }
    for what, act in acts.items():
        message = rf"{what} was asked for within learning\.stable"
        with pytest.raises(BecameError, match=message), learning.stable(optimizer):
            act()
    other = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
    with pytest.raises(BecameError, match="steps no parameter of the model"), learning.stable(other):
        pass
    for projector in (TRGP(), OLoRA(), InfLoRA()):
        with pytest.raises(BecameError, match=f"{type(projector).__name__} does more than to project steps"):
            Continual(model, projector=projector)
    with pytest.raises(BecameError, match="there is no likelihood 'poisson'"):
        Continual(model, "poisson")
    with pytest.raises(BecameError, match="the penalty is nan"):
        Continual(model, penalty=math.nan)
    with pytest.raises(BecameError, match="uncovered is 'thawed'"):
        Continual(model, uncovered="thawed")  # type: ignore[arg-type]
    with pytest.raises(BecameError, match="nothing to learn"):
        Continual(nn.Flatten())
    with pytest.raises(BecameError, match="the loss is a sum over samples"):
        Continual(model, nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(BecameError, match=r"'0\.weight' has no shape yet; run the model on a batch"):
        Continual(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(BecameError, match=r"'0\.weight' is on the device meta and has no numbers; load the model's"):
        Continual(nn.Sequential(nn.Linear(3, 3, device="meta")))
    another = new_network("perceptron")
    with pytest.raises(BecameError, match="the outputs depend on none of the parameters that are trained"):
        Continual(model, apply=lambda _, batch: another(batch[0]), targets=lambda batch: batch[1]).remember(batches)


def test_tied_words_with_padding_pass_the_first_look() -> None:
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 9, bias=False)
            self.head.weight = self.words.weight

        def forward(self, words: Tensor) -> Tensor:
            return cast(Tensor, self.head(self.words(words).tanh()))

    learning = Continual(Tied().double(), Categorical(by="token"))
    learning.remember([(torch.randint(0, 9, (3, 4)), torch.randint(0, 9, (3, 4)))])
    assert learning.checked


class _Bag(nn.Module):
    """A network that reads texts of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.head = nn.Embedding(128, 4), nn.Linear(4, CLASSES)

    def forward(self, texts: Any) -> Tensor:
        rows = [self.letters(torch.tensor([ord(letter) for letter in text])).mean(0) for text in texts]
        outputs: Tensor = self.head(torch.stack(rows))
        return outputs


@pytest.mark.filterwarnings("ignore:taps do not know:UserWarning")
@pytest.mark.parametrize("kind", [list, tuple])
def test_texts_are_one_input_and_tensors_of_other_sizes_are_refused_in_a_sentence(kind: Any) -> None:
    learning = Continual(_Bag().double())
    learning.remember([(kind(["ab", "cde", "f"]), torch.tensor([0, 1, 2]))])
    assert learning.posterior is not None
    assert float(learning.posterior.precision.diagonal()["letters.weight"][ord("e")].sum()) > 0
    images = kind([torch.randn(1, 4), torch.randn(1, 5)])
    with pytest.raises(BecameError, match=r"the model cannot be called with the inputs of a batch \(.*\); give apply="):
        Continual(_Bag().double()).remember([(images, torch.tensor([0, 1]))])
