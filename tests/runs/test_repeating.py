"""The command that repeats runs gives their configuration back, or there is none."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.cli.jobs import requested_jobs
from adapters.cli.options import Request, parse_request
from adapters.runs.configuration import Configuration
from adapters.runs.repeating import repeating_command
from adapters.runs.results import RunResult
from adapters.torch.run import BACKEND
from tests.analysis.runs import run


def test_the_shortest_command_that_repeats_runs_is_found_from_their_record() -> None:
    values = {"epochs": 3, "lr": 0.02, "optimiser": "adam", "path_points": 5, "projector_samples": 0, "first": 3}
    values |= {"norm": "running", "head_rate": 20.0, "norm_penalty": 2.0}
    configuration = Configuration.of(values, "became")
    runs = [run(seed=seed, config=configuration.to_json()) for seed in (0, 4)]
    command = repeating_command(runs)
    assert command == (
        "became run --backend torch --methods became --seeds 0 4 --benchmark split-mnist --first 3 --norm running "
        "--lr 0.02 --epochs 3 --head-rate 20.0 --optimiser adam --projector-samples 0 --path-points 5 "
        "--norm-penalty 2.0"
    )
    request: Request = parse_request("run", shlex.split(command)[2:], backend=True)
    assert [(job.run.seed, job.configuration) for job in requested_jobs(request, lambda: BACKEND)] == [
        (0, configuration),
        (4, configuration),
    ]


@pytest.mark.parametrize(
    ("values", "method", "words"),
    [
        # --preset pretrained turns --pretrained on, which no word turns off.
        ({"benchmark": "split-cifar100"}, "became", "--benchmark split-cifar100"),
        ({"benchmark": "split-cifar100", "tasks": 20}, "gpm", "--benchmark split-cifar100 --tasks 20"),
        # --preset paper has a precision that the method refuses.
        ({"benchmark": "split-mnist"}, "became-curve", "--benchmark split-mnist"),
    ],
)
def test_a_preset_that_cannot_express_a_run_leaves_the_command_of_another(
    values: dict[str, Any], method: str, words: str
) -> None:
    configuration = Configuration.of(values, method)
    command = repeating_command([run(method, config=configuration.to_json())])
    assert command == f"became run --backend torch --methods {method} --seeds 0 {words}"
    (job,) = requested_jobs(parse_request("run", shlex.split(command)[2:], backend=True), lambda: BACKEND)
    assert job.configuration == configuration


def test_the_command_that_repeats_a_run_has_the_folder_of_its_data() -> None:
    config = Configuration.of({}, "became").to_json()
    there = replace(run(config=config), data_dir="/data/a b")
    assert RunResult.from_json(there.to_json()).data_dir == "/data/a b"
    command = repeating_command([there])
    assert command is not None
    (job,) = requested_jobs(parse_request("run", shlex.split(command)[2:], backend=True), lambda: BACKEND)
    assert job.configuration.data_dir == Path("/data/a b")


def test_no_command_is_given_that_would_run_something_else() -> None:
    config = Configuration.of({}, "became").to_json()
    assert repeating_command([run(config=config)])
    assert repeating_command([run(config=config | {"unknown": 1})]) is None
    assert repeating_command([run(config=config | {"benchmark": "unknown"})]) is None
    assert repeating_command([run("unknown", config=config)]) is None
    del config["lr"]
    assert repeating_command([run(config=config)]) is None
