"""What the processes of ``test_shared_model.py`` do: the user's own loop around a wrapped model.

Convention: a process writes what it finds into a file of its rank. All is compared with one process that has all data,
in double precision, to 1e-9.
"""

import json
import os
import traceback
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from adapters.backend.batches import drawn
from adapters.torch import Continual
from adapters.torch.shared_model import SharedModel
from became_core import BecameError
from became_core.projection import GPM
from tests.torch.modules import CLASSES, WIDTH
from tests.torch.shared_model_cases import (
    CASES,
    Case,
    Experts,
    batches,
    perceptron,
    plain,
    sharded,
    wrapped,
)

__all__ = ["page", "work"]


def learned(case: Case, how: str, file: str) -> dict[str, Any]:
    """What comes out of two tasks in a loop of the user's own; wrapped, each process has its own batches."""
    torch.manual_seed(0)
    model = wrapped(case.network().double(), how, case)
    rank, count = (0, 1) if how == "alone" else (distributed.get_rank(), 2)
    gaussian = case.settings.get("likelihood") == "gaussian"
    old, new = (batches(seed, gaussian)[rank::count] for seed in (1, 2))
    steps = [(x.chunk(count)[rank], y.chunk(count)[rank]) for x, y in batches(3, gaussian)]
    loss = nn.functional.mse_loss if gaussian else nn.functional.cross_entropy
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def train() -> None:
        for x, y in steps:
            optimizer.zero_grad()
            value: Any = loss(model(x), y)
            value.backward()
            optimizer.step()
        with torch.no_grad():
            model(x)  # leaves the outermost module's parameters whole

    learning = Continual(model, progress=False, **case.settings)
    train()
    found: dict[str, Any] = {}

    def note(when: str) -> None:
        weights = learning._data.weights()
        found.update({f"{when}, {name}": plain(value) for name, value in weights.items()})

    learning.remember(old)
    with learning.stable(optimizer):
        train()
    note("stable")
    with learning.plastic():
        train()
    note("plastic")
    report = learning.merge(new, trace=3)
    note("merged")
    found |= {"alpha": report.alpha, "slopes": report.slopes, "gain": report.gain, "trace": report.trace}
    found["curvature"] = plain(report.quadratic.curvature)
    learning.remember(new)
    train()
    note("trained on")
    learning.save(file)
    stored = load_file(file)
    found |= {name: plain(value) for name, value in stored.items() if not name.startswith("projector.")}
    for name, value in learning.projector.project(
        {name: torch.ones(value.shape, dtype=torch.float64) for name, value in learning._data.weights().items()}
        if not case.one_stored
        else {}
    ).items():
        found[f"projected, {name}"] = plain(value)
    found["coverage"] = [row.size * (row.treatment == "protected") + row.rank for row in learning.coverage.parameters]
    if how != "alone":
        folder = file.removesuffix(".safetensors")
        check_sharded(learning, folder)
        for written in (file, folder):
            check_loaded(case, how, written, stored)
    return found


def check_sharded(learning: Continual, folder: str) -> None:
    """A memory is saved sharded without being gathered: each process writes a part, and their parts are the whole."""
    never = mock.Mock(side_effect=AssertionError("a tensor was gathered"))
    with mock.patch.object(SharedModel, "gathered", never), mock.patch.object(DTensor, "full_tensor", never):
        learning.save(folder, sharded=True)
    arrays, rank = learning._stored()[0], distributed.get_rank()
    (own,) = Path(folder).glob(f"shards-*/shard-{rank + 1:05}-*.safetensors")
    parts = load_file(own)
    for name, value in arrays.items():
        if isinstance(value, DTensor):
            np.testing.assert_array_equal(parts[name].numpy(), plain(value.to_local()))
    written: list[Any] = [None, None]
    distributed.all_gather_object(written, sum(value.numel() for value in parts.values()))
    assert min(written) > 0
    assert sum(written) == sum(value.numel() for value in arrays.values())


def check_loaded(case: Case, how: str, file: str, stored: dict[str, Tensor]) -> None:
    """A memory loads into a model that is wrapped, and into one that is not, to the bit."""
    settings = {name: value for name, value in case.settings.items() if name in ("likelihood", "estimator")}
    if settings.get("likelihood") == "gaussian":
        del settings["likelihood"]
    for way in (how, "alone"):
        model = wrapped(case.network().double(), way, case)
        loaded = Continual.load(model, file, **settings)
        for name, value in loaded._stored()[0].items():
            if not name.startswith("projector."):
                np.testing.assert_array_equal(plain(value), stored[name].numpy())
                parameter = (model.module if way == "DDP" else model).get_parameter(name.partition(".")[2])
                assert getattr(value, "placements", ()) == getattr(parameter, "placements", ())
        for name, value in loaded.projector.to_arrays().items():
            np.testing.assert_array_equal(plain(value), stored[f"projector.{name}"].numpy())


def check_case(name: str, how: str, expected: dict[str, Any]) -> None:
    found = learned(CASES[name], how, f"{how}.safetensors")
    assert found.keys() == expected.keys()
    for what, value in expected.items():
        np.testing.assert_allclose(found[what], value, rtol=1e-9, atol=1e-9, err_msg=what)
    alphas: list[Any] = [None, None]
    distributed.all_gather_object(alphas, found["alpha"])
    assert alphas[0] == alphas[1]


def check_refusals() -> None:
    """One sentence says what cannot be done, in both processes, before anything is measured."""

    def refuses(words: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        with pytest.raises(BecameError, match=words):
            function(*arguments, **options)

    rank, data = distributed.get_rank(), batches(1, gaussian=False)
    refuses("inside, at '_orig_mod'", Continual, torch.compile(DistributedDataParallel(perceptron())))
    refuses("inside, at '_orig_mod'", Continual, torch.compile(sharded(perceptron())))
    half = sharded(perceptron().double(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    refuses("computes with '0.weight' as torch.bfloat16", Continual(half).remember, data)
    by_columns = sharded(
        nn.Sequential(nn.Linear(WIDTH, 4)).double(), shard_placement_fn=lambda value: Shard(value.ndim - 1)
    )
    learning = Continual(by_columns, projector=GPM(0.5))
    learning.remember(data)
    optimizer = torch.optim.SGD(by_columns.parameters(), lr=0.1)
    refuses(r"sharded along its inputs.*Shard\(0\)", learning.stable(optimizer).__enter__)
    learning = Continual(DistributedDataParallel(perceptron().double()))
    refuses(
        "process 2 has no batch|process 2 stopped: process 2 has no batch", learning.remember, data if rank == 0 else []
    )
    learning.remember(data)
    refuses("process 1 could not write", learning.save, "no-folder/file.safetensors")
    learning.save("own.safetensors")
    refuses("absent.safetensors is no memory", Continual.load, learning.model, ("own", "absent")[rank] + ".safetensors")
    check_refused_shards(learning, refuses)
    with learning.stable(torch.optim.SGD(learning.model.parameters(), lr=0.1)):
        pass
    refuses("statistics=", learning.merge, data, statistics=data)


def check_refused_shards(learning: Continual, refuses: Callable[..., None]) -> None:
    """Both processes say what one cannot write or read, and the memory that was saved before is still there."""
    rank, model = distributed.get_rank(), learning.model
    learning.save("kept", sharded=True)
    before = Continual.load(model, "kept")
    learning.penalty = 1.0
    if rank == 0:
        Path("file").touch()
    refuses("process 1 could not write file: Not a directory", partial(learning.save, sharded=True), "file")
    seen = mock.patch.object(Path, "is_dir", return_value=False) if rank == 1 else nullcontext()
    with seen:
        refuses("process 2 does not see kept/shards-.* share", partial(learning.save, sharded=True), "kept")
    full = mock.patch.object(HuggingFaceStorageWriter, "write_data", side_effect=OSError("No space left"))
    with full if rank == 1 else nullcontext():
        refuses(r"^process 2 could not write kept: No space left\.$", partial(learning.save, sharded=True), "kept")
    again = Continual.load(model, "kept")
    assert (again.penalty, before.penalty) == (100.0, 100.0)
    assert len(list(Path("kept").glob("shards-*"))) == 1
    unread = mock.patch.object(HuggingFaceStorageReader, "read_data", side_effect=OSError("Input/output error"))
    with unread if rank == 0 else nullcontext():
        refuses("^process 1 could not read kept: Input/output error", Continual.load, model, "kept")
    absent = "process 2 does not see absent; give a folder on a disk that all processes share"
    refuses(absent, Continual.load, model, "absent" if rank == 1 else "kept")
    closed = mock.patch.object(Path, "is_file", side_effect=PermissionError(13, "Permission denied"))
    with closed if rank == 1 else nullcontext():
        refuses(r"^process 2 could not read kept: Permission denied\.$", Continual.load, model, "kept")
    learning.save("kept", sharded=True)
    assert Continual.load(model, "kept").penalty == 1.0
    assert len(list(Path("kept").glob("shards-*"))) == 1


def check_state() -> None:
    """After a measurement, modules free their parameters as fully_shard has it, and a failed one changes nothing."""
    model: Any = perceptron().double()
    fully_shard(model[0])
    fully_shard(model)
    learning = Continual(model)
    learning.remember(batches(1, gaussian=False))
    assert all(isinstance(value, DTensor) for value in model.parameters())
    with torch.no_grad():
        model(torch.zeros(2, WIDTH, dtype=torch.float64))
    kinds = {name: isinstance(value, DTensor) for name, value in model.named_parameters()}
    assert kinds == {name: name.startswith("0.") for name in kinds}
    before = {name: plain(value) for name, value in learning._data.weights().items()}
    with pytest.raises(BecameError, match="label 7"):
        learning.remember([(torch.zeros(2, WIDTH, dtype=torch.float64), torch.tensor([7, 0]))])
    assert all(np.array_equal(before[name], plain(value)) for name, value in model.named_parameters())


def check_mesh_of_two_axes() -> None:
    """Replicated over one axis and sharded over the other, as for several machines."""
    torch.manual_seed(0)
    model, twin = (nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("machine", "shard")))
    learnings, data = (Continual(model), Continual(twin)), batches(1, gaussian=False)
    learnings[0].remember(data[distributed.get_rank() :: 2])
    learnings[1].remember(data)
    of_both = [learning.posterior.precision.diagonal() for learning in learnings if learning.posterior is not None]
    for name, value in of_both[1].items():
        np.testing.assert_allclose(plain(of_both[0][name]), plain(value), rtol=1e-9, atol=1e-12)


def check_unlike_layers() -> None:
    """The batches of each process use an expert that those of the other one do not."""
    rank, samples = distributed.get_rank(), batches(1, gaussian=False)
    of_both = [(x - 1, y) for x, y in samples[:2]]
    # Of three samples rows are kept, and of eight a sum.
    of_one, of_other = (samples[0][0].abs()[:3], samples[0][1][:3]), (-samples[4][0].abs(), samples[4][1])

    def remembered(how: str) -> dict[str, Any]:
        torch.manual_seed(0)
        model: Any = Experts().double()
        if how == "DDP":
            model = DistributedDataParallel(model, find_unused_parameters=True)
        elif how == "FSDP2":
            fully_shard(model)
        learning = Continual(model, progress=False)
        learning.remember(of_both if how == "alone" else of_both[rank : rank + 1])
        learning.remember([of_one, of_other] if how == "alone" else [(of_one, of_other)[rank]])
        assert learning.posterior is not None
        protected, turned = learning.projector.rank, learning._transposed
        shapes = {name: learning._data.shapes[name] for name in protected}
        ones = {name: torch.ones(shape[::-1] if name in turned else shape).double() for name, shape in shapes.items()}
        found = {f"projected, {name}": plain(value) for name, value in learning.projector.project(ones).items()}
        return found | {name: plain(value) for name, value in learning.posterior.precision.diagonal().items()}

    expected = remembered("alone")
    for how in ("DDP", "FSDP2"):
        found = remembered(how)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def check_late_layers() -> None:
    """The first batch of each process uses one expert, another one in each; a later batch uses the other expert."""
    rank, (first, second, *_) = distributed.get_rank(), batches(1, gaussian=False)
    signs = ((1, -1, -1), (-1, -1, 1))  # of what chooses an expert, by process and batch
    of_both = [[(sign * x.abs(), y) for sign, (x, y) in zip(row, (first, second, first), strict=True)] for row in signs]

    def remembered(model: Any, data: list[Any]) -> tuple[dict[str, Any], set[str], dict[str, Any]]:
        learning = Continual(model, progress=False)
        learning.remember(data)
        ones = {name: torch.ones(learning._data.shapes[name]).double() for name in learning.projector.rank}
        ones = {name: value.T if name in learning._transposed else value for name, value in ones.items()}
        projected = {name: plain(value) for name, value in learning.projector.project(ones).items()}
        protected = {row.name for row in learning.coverage.parameters if row.treatment == "protected"}
        return dict(learning.projector.rank), protected, projected

    found = []
    for shared in (False, True):
        torch.manual_seed(0)
        model: Any = Experts().double()
        model = DistributedDataParallel(model, find_unused_parameters=True) if shared else model
        found.append(remembered(model, of_both[rank] if shared else of_both[0] + of_both[1]))
    assert {f"layers.{k}.weight" for k in (0, 1)} < found[0][1]
    assert found[0][:2] == found[1][:2]
    for name, value in found[0][2].items():
        np.testing.assert_allclose(found[1][2][name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def check_half_precision() -> None:
    """Where a process uses no expert of a kind, its zeros have the precision of the other one's sums."""
    rank, samples = distributed.get_rank(), batches(1, gaussian=False)
    parts = [[(sign * x.abs().bfloat16(), y)] for sign, (x, y) in zip((1, -1), samples[:2], strict=True)]
    for used in (parts[0] + parts[1], parts[1] * 2):  # of the latter no process uses the first expert
        found = []
        for shared in (False, True):
            torch.manual_seed(0)
            model: Any = Experts().bfloat16()
            model = DistributedDataParallel(model, find_unused_parameters=True) if shared else model
            learning = Continual(model, progress=False, check=False)
            learning.remember(used[rank : rank + 1] if shared else used)
            assert learning.posterior is not None
            found.append(learning.posterior.precision.diagonal())
        for name, value in found[0].items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-9)


class Words(nn.Module):
    """Words, of which FSDP2 gives the first half to the first process."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.embedding(x))
        return outputs


def check_held_rows() -> None:
    """A parameter that old data hold by curvature is held, too, if only the second process has rows that they used."""
    torch.manual_seed(0)
    model = sharded(Words().double())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    words = torch.arange(5, 10)
    loss: Any = nn.functional.cross_entropy(model(words), words % CLASSES)
    loss.backward()
    optimizer.step()
    learning = Continual(model, progress=False)
    with pytest.warns(UserWarning, match="second moments"):
        learning.remember(optimizer=optimizer, samples=5)
    learning.remember([(torch.arange(10), torch.arange(10) % CLASSES)])
    treatments = {row.name: row.treatment for row in learning.coverage.parameters}
    assert treatments["embedding.weight"] == treatments["head.weight"] == "penalised"


def check_one_process_of_fsdp2() -> None:
    """A model that is sharded over one process learns on with a memory from a disk."""
    groups: list[Any] = [distributed.new_group([rank]) for rank in (0, 1)]
    mesh = DeviceMesh.from_group(groups[distributed.get_rank()], "cpu")
    torch.manual_seed(0)
    model, data = sharded(perceptron().double(), mesh=mesh), batches(1, gaussian=False)
    learning = Continual(model, progress=False)
    learning.remember(data)
    learning.save(f"one-{distributed.get_rank()}.safetensors")
    loaded = Continual.load(model, f"one-{distributed.get_rank()}.safetensors", progress=False)
    for each in (learning, loaded):
        each.remember(data)
    assert learning.posterior is not None
    assert loaded.posterior is not None
    again = loaded.posterior.precision.diagonal()
    for name, value in learning.posterior.precision.diagonal().items():
        parameter = model.get_parameter(name)
        assert value.placements == again[name].placements == parameter.placements
        np.testing.assert_array_equal(plain(again[name]), plain(value))


def check_share_of_many_batches() -> None:
    """What is drawn of many batches is the same share of each process's, whose numbers differ."""
    rank, generator = distributed.get_rank(), torch.Generator().manual_seed(4)
    of_both = [
        [(number + torch.randn(2, WIDTH, generator=generator), torch.tensor([0, 1])) for _ in range(count)]
        for number, count in enumerate((30, 60))
    ]

    def diagonal(shared: bool, own: Iterable[Any], share: float | None) -> dict[str, Any]:
        torch.manual_seed(0)
        model: Any = nn.Linear(WIDTH, CLASSES)
        learning = Continual(DistributedDataParallel(model) if shared else model, progress=False, check=False)
        learning.remember(own, share=share)
        assert learning.posterior is not None
        return learning.posterior.precision.diagonal()

    of_90 = [batch for own in of_both for batch in drawn(own, None, 90)]
    assert 48 < len(of_90) < 80
    all_known, one_unknown = of_both[rank], iter(of_both[rank]) if rank == 1 else of_both[rank]
    for own, measured in ((all_known, of_90), (one_unknown, of_both[0] + of_both[1])):
        expected = diagonal(False, measured, 1.0)
        for name, value in diagonal(True, own, None).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-8)


def page(code: str, port: int, rank: int) -> None:
    """Run a page's script as one of the processes that torchrun starts."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    with Path(f"out.{rank}").open("w", encoding="utf-8") as out, redirect_stdout(out):
        exec(compile(code, "docs/scale.md", "exec"), {"__name__": "__main__"})  # our own page


CHECKS = (
    *(check_refusals, check_state, check_mesh_of_two_axes, check_unlike_layers, check_late_layers),
    *(check_half_precision, check_held_rows, check_one_process_of_fsdp2, check_share_of_many_batches),
)


def work(rank: int, folder: str) -> None:
    """Run every check, and write what failed."""
    os.chdir(folder)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "taps do not know", UserWarning)
    warnings.filterwarnings("ignore", ".*nested tensors is in prototype", UserWarning)
    timeout = timedelta(seconds=60)
    distributed.init_process_group("gloo", f"file://{folder}/store", timeout, world_size=2, rank=rank)
    own = {
        name: learned(case, "alone", f"alone-{rank}.safetensors")
        for number, (name, case) in enumerate(CASES.items())
        if number % 2 == rank
    }
    of_both: list[Any] = [None, None]
    distributed.all_gather_object(of_both, own)
    expected: dict[str, Any] = of_both[0] | of_both[1]
    checks: dict[str, Callable[[], None]] = {
        f"{name}, {how}": partial(check_case, name, how, of_one)
        for name, of_one in expected.items()
        for how in ("DDP", "FSDP2")
    }
    checks |= {check.__name__: check for check in CHECKS}
    failures = {}
    for name, check in checks.items():
        try:
            check()
        except (Exception, pytest.fail.Exception):
            failures[name] = traceback.format_exc()
            break  # the other process may be ahead, and would wait for this one
    Path(f"{rank}.json").write_text(json.dumps([len(checks), failures]), encoding="utf-8")
    distributed.destroy_process_group()
