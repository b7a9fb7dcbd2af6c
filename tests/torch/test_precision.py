"""Mixed precision on PyTorch."""

from adapters.torch.learner import TorchLearner
from adapters.torch.networks import Described
from tests.precision import check_mixed_precision


def test_mixed_precision_rounds_the_products_of_steps_alone() -> None:
    check_mixed_precision(
        lambda network, stream, mixed: TorchLearner(Described(network), stream, mixed_precision=mixed)
    )
