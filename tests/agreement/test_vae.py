"""The autoencoder on all frameworks in float64: the bound, taps, curvature, new noise in training, and pictures."""

import base64
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters.networks import Architecture, Branches, Flatten, Latent, Linear, Tanh
from became_core.continual import SGD, Batch, Constraint, Dataset, Learner, split_domains
from became_core.curvature import ELBO, batch_gradient, diagonal_fisher
from tests.agreement.frameworks import FRAMEWORKS, measured_by_all, rng
from tests.backends import to_numpy

PIXELS, LATENT = 6, 2
ENCODER = Linear("encoder.fc1", 5), Tanh(), Linear("encoder.fc2", 2 * LATENT)
DECODER = Latent(), Linear("decoder.fc1", 4), Tanh()
NETWORK = Architecture(
    (
        Flatten(),
        Branches(((0, PIXELS, ENCODER), (PIXELS, PIXELS + LATENT, ()))),
        Branches(((0, 3 * LATENT, DECODER), (0, 2 * LATENT, ()))),
    ),
    (PIXELS + LATENT, 1, 1),
    beside=2 * LATENT,
    encoding="encoder.fc2",
)
DRAW = np.random.default_rng(0)
PICTURES = (DRAW.uniform(size=(40, PIXELS)) < 0.4).astype(np.float64)
SAMPLES = np.concatenate([PICTURES, DRAW.normal(size=(40, LATENT))], axis=1)
STREAM = split_domains(
    Dataset(
        "pictures",
        SAMPLES[:, :, None, None],
        np.asarray(PICTURES, dtype=Any),
        30,
        (0.0,) * SAMPLES.shape[1],
        (1.0,) * SAMPLES.shape[1],
        likelihood=ELBO(),
        domains=np.arange(40) % 2,
        pictures=(2, 3),
    ),
    validation=0.0,
)
ROWS = STREAM.tasks[0].train[:5]


def pixels_of(address: str) -> NDArray[Any]:
    """A grey picture's pixels; the file is one that any reader takes: signature, checksums, unfiltered lines."""
    file = base64.b64decode(address.removeprefix("data:image/png;base64,"), validate=True)
    assert file[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", file[16:24])
    start, lines = 8, b""
    while start < len(file):
        (length,), kind = struct.unpack(">I", file[start : start + 4]), file[start + 4 : start + 8]
        content, checksum = file[start + 8 : start + 8 + length], file[start + 8 + length : start + 12 + length]
        assert struct.unpack(">I", checksum) == (zlib.crc32(kind + content),)
        lines += content if kind == b"IDAT" else b""
        start += 12 + length
    rows = np.frombuffer(zlib.decompress(lines), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:].astype(np.float64)


def measured(learner: Learner) -> dict[str, NDArray[Any]]:
    theta = learner.parameters()
    outcome: dict[str, Any] = {"outputs": learner.logits(ROWS, 3)}
    for mode in ("empirical", "sampled"):
        fisher = diagonal_fisher(learner.taps(0, ROWS, 5, mode, rng()), theta, "empirical", samples=5)
        outcome |= {f"{mode} Fisher of {name}": value for name, value in fisher.items()}
    (taps,) = learner.taps(0, ROWS, 5, "empirical", rng())
    gradient = batch_gradient(taps)
    outcome |= {f"gradient of {n}": np.asarray(to_numpy(gradient[n])).reshape(theta[n].shape) for n in gradient}
    outcome |= measured_by_all(learner, STREAM, ROWS)
    outcome["picture"] = pixels_of(learner.written(STREAM.tasks[0], rng()))
    constraint, batches = Constraint(frozenset(theta)), [Batch(0, ROWS), Batch(0, ROWS)]
    outcome["loss"] = np.array(learner.train(batches, np.array([0.1, 0.1]), constraint, SGD(), rng()).loss)
    outcome |= {f"{name} after two steps": value for name, value in learner.parameters().items()}
    return {name: np.array(to_numpy(value)) for name, value in outcome.items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, NDArray[Any]]:
    return measured(FRAMEWORKS["torch"].learner(NETWORK, STREAM, 3))


@pytest.mark.parametrize("name", ["jax", "tensorflow"])
def test_the_autoencoder_agrees(name: str, expected: dict[str, NDArray[Any]]) -> None:
    learner = FRAMEWORKS[name].learner(NETWORK, STREAM, 3)
    assert learner.projectable == {"encoder.fc1.weight", "encoder.fc2.weight", "decoder.fc1.weight", "head.weight"}
    ours = measured(learner)
    assert set(ours) == set(expected)
    for key, value in expected.items():
        scale = float(np.max(np.abs(value), initial=0))
        atol = 1 if key == "picture" else 1e-9 * scale + 1e-26  # a grey level may be rounded the other way
        np.testing.assert_allclose(ours[key], value, rtol=1e-9, atol=atol, err_msg=key)


def test_the_outputs_are_those_of_the_definition(expected: dict[str, NDArray[Any]]) -> None:
    """Logits of mean + deviation x the sample's noise, and the means and log variances after them."""
    theta = {n: np.array(to_numpy(v)) for n, v in FRAMEWORKS["torch"].learner(NETWORK, STREAM, 3).parameters().items()}
    pixels, noise = SAMPLES[ROWS, :PIXELS], SAMPLES[ROWS, PIXELS:]
    encoded = np.tanh(pixels @ theta["encoder.fc1.weight"].T) @ theta["encoder.fc2.weight"].T
    mean, log_variance = encoded[:, :LATENT], encoded[:, LATENT:]
    drawn = mean + np.exp(log_variance / 2) * noise
    logits = np.tanh(drawn @ theta["decoder.fc1.weight"].T) @ theta["head.weight"].T
    np.testing.assert_allclose(expected["outputs"][:, 0], np.concatenate([logits, encoded], axis=1), rtol=1e-12)


@pytest.mark.parametrize("masks", ["numpy", "framework"])
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_noise_is_new_in_training_and_a_function_of_the_generator(name: str, masks: str) -> None:
    """Without a rate nothing is learned, so losses differ by the noise alone; what is measured has the samples' own."""
    kind: Any = type(FRAMEWORKS[name].learner(NETWORK, STREAM, 3))
    learner = kind(NETWORK, STREAM, dtype="float64", seed=3, dropout_masks=masks)
    constraint, rates = Constraint(frozenset(learner.parameters())), np.zeros(1)

    def loss(seed: int) -> float:
        return float(learner.train([Batch(0, ROWS)], rates, constraint, SGD(), np.random.default_rng(seed)).loss)

    assert loss(1) == loss(1)
    assert loss(1) != loss(2)
    before = np.array(to_numpy(learner.logits(ROWS, 5)))
    np.testing.assert_array_equal(np.array(to_numpy(learner.logits(ROWS, 5))), before)


def test_a_picture_has_samples_reconstructions_and_draws(expected: dict[str, NDArray[Any]]) -> None:
    """Three rows of pictures of two by three pixels, black on white, a blank pixel apart."""
    rows = STREAM.tasks[0].test
    assert expected["picture"].shape == (3 * 3 - 1, 4 * len(rows) - 1)
    given = np.pad(PICTURES[rows].reshape(-1, 2, 3), ((0, 0), (0, 0), (0, 1))).transpose(1, 0, 2).reshape(2, -1)[:, :-1]
    np.testing.assert_array_equal(expected["picture"][:2], 255 * (1 - given))
    reconstructed, drawn = expected["picture"][3:5], expected["picture"][6:8]
    assert not np.array_equal(reconstructed, drawn)
