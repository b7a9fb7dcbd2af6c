"""What a run's record says of its data: the digest is of the source, whatever views of it a seed has drawn."""

from adapters.runs.settings import describe, fingerprint, is_of
from became_core.continual import Annealed, Training, build_method, measured_on
from tests.streams import prototype_stream


def test_views_that_a_seed_has_drawn_are_no_other_data() -> None:
    stream = prototype_stream(channels=3, side=6)
    first, second = (measured_on(stream, "augmented", seed=seed) for seed in (0, 1))
    assert fingerprint(first.dataset) == fingerprint(second.dataset) == fingerprint(stream.dataset)
    training, method = Training(Annealed(0.1, 1), Annealed(0.1, 1)), build_method("became")
    earlier, other = (describe(each, method, training, 0)["data"] for each in (first, second))
    assert earlier != other  # a checkpoint goes on with the very views
    assert is_of(earlier, first.dataset)
    assert is_of(fingerprint(stream.dataset), first.dataset)
    assert not is_of(other, first.dataset)
    assert not is_of(fingerprint(prototype_stream(channels=3, side=6, seed=9).dataset), first.dataset)
