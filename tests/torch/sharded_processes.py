"""What two processes check of arrays that they share: the work of ``test_sharded.py``, for real processes.

Convention: every check compares with the same function of whole arrays, in float64, and counts the collectives.
"""

import json
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from became_core import BecameError, merge, optimal_alpha, path_quadratic
from became_core.laplace import Became, LaplacePosterior
from became_core.laplace.estimators import Calibrated, DiagonalFisher, NativeExpansion, PaperClosedForm, Secant
from became_core.precision import Dense, Diagonal, Isotropic, Kronecker, LowRank, Precision

# Not all divide by two, and one row leaves nothing for the second process.
SHAPES = {"fc.weight": (5, 3), "fc.bias": (3,), "out.weight": (4, 7), "one.weight": (1, 2)}
Trees = dict[str, Any]
Placements = dict[str, Any]  # by parameter, a placement for each dimension of the mesh


def drawn(seed: int, positive: bool = False) -> Trees:
    """The same arrays in both processes."""
    generator = torch.Generator().manual_seed(seed)
    values = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}
    return {n: v.abs() for n, v in values.items()} if positive else values


def placed(tree: Trees, mesh: DeviceMesh, placements: Placements) -> Trees:
    """A tree of distributed arrays."""
    return {name: distribute_tensor(value, mesh, placements[name]) for name, value in tree.items()}


def counted(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, dict[str, int]]:
    """What a function returns, and how often each collective was called."""
    with CommDebugMode() as mode:  # type: ignore[no-untyped-call]
        result = function(*arguments, **options)
    return result, {str(name).rpartition(".")[2]: count for name, count in mode.get_comm_counts().items()}


def check_close(left: Any, right: Any) -> None:
    left = left.full_tensor() if isinstance(left, DTensor) else left
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)


def check_collectives(counts: dict[str, int], most: int = 2) -> None:
    assert set(counts) <= {"all_reduce"}, counts
    assert sum(counts.values()) <= most, counts


def layouts(mesh: DeviceMesh) -> dict[str, Placements]:
    """All arrays cut alike, or each in its own way; the mesh's last dimension has both processes."""
    rest = [Replicate()] * (mesh.ndim - 1)
    columns = {name: [*rest, Shard(len(shape) - 1)] for name, shape in SHAPES.items()}
    mixed = {"fc.weight": [*rest, Shard(0)], "fc.bias": [*rest, Replicate()], "out.weight": [*rest, Replicate()]}
    return {"rows": {name: [*rest, Shard(0)] for name in SHAPES}, "mixed": columns | mixed}


def precisions(share: Callable[[str, Tensor], Tensor]) -> Iterator[Precision]:
    """A precision of each structure, whose arrays are shared as the directions are."""
    positive = {name: share(name, value) for name, value in drawn(9, positive=True).items()}
    diagonal = Diagonal(positive)
    isotropic = Isotropic({name: torch.tensor(0.5, dtype=torch.float64) for name in SHAPES}, SHAPES)
    columns = {n: torch.stack([drawn(20)[n], drawn(21)[n]], dim=-1) for n in ("fc.weight", "out.weight")}
    low_rank = LowRank(
        {name: share(name, value) for name, value in columns.items()},
        torch.tensor([2.0, 0.5], dtype=torch.float64),
        diagonal,
    )
    factors = {}
    for name in ("fc.weight", "out.weight"):
        inputs, outputs = drawn(30)[name], drawn(31)[name]
        factors[name] = (inputs.T @ inputs, outputs @ outputs.T)
    kronecker = Kronecker(factors)
    vector = torch.cat([value.reshape(-1) for _, value in sorted(drawn(40).items())])
    dense = Dense(torch.outer(vector, vector) + torch.eye(len(vector), dtype=torch.float64), SHAPES)
    rest = Diagonal({name: value for name, value in positive.items() if name.endswith("bias")})
    yield from (diagonal, isotropic, low_rank, kronecker, dense, kronecker + rest, low_rank + kronecker)


def check_alpha(mesh: DeviceMesh, placements: Placements) -> None:
    trees = {"theta_gp": drawn(1), "theta_hat": drawn(2), "fisher_old": drawn(3, True), "fisher_new": drawn(4, True)}
    more = {"gradient": drawn(5), "mean": drawn(6)}
    shared = {role: placed(tree, mesh, placements) for role, tree in (trees | more).items()}
    for options in dict[str, Any](), more:
        own, own_more = ({role: shared[role] for role in part} for part in (trees, options))
        alpha, counts = counted(optimal_alpha, *own.values(), **own_more)
        check_collectives(counts)
        assert not isinstance(alpha, DTensor)
        check_close(alpha, optimal_alpha(*trees.values(), **dict[str, Any](options)))
    by_layer, counts = counted(optimal_alpha, *(shared[role] for role in trees), per="layer")
    check_collectives(counts)
    for name, alpha in optimal_alpha(*trees.values(), per="layer").items():
        check_close(by_layer[name], alpha)
    for alpha in (by_layer, torch.tensor(0.3, dtype=torch.float64), 0.3):
        merged, counts = counted(merge, shared["theta_gp"], shared["theta_hat"], alpha)
        assert counts == {}
        for name, value in merge(trees["theta_gp"], trees["theta_hat"], alpha).items():
            assert merged[name].placements == shared["theta_gp"][name].placements
            check_close(merged[name], value)


def check_precisions(mesh: DeviceMesh, placements: Placements) -> None:
    trees = [drawn(seed) for seed in (1, 2, 3)]
    shared = [placed(tree, mesh, placements) for tree in trees]

    def share(name: str, value: Tensor) -> Tensor:
        return distribute_tensor(value, mesh, placements[name])

    for own, whole in zip(precisions(share), precisions(lambda name, value: value), strict=True):
        gram, counts = counted(own.gram, shared)
        check_collectives(counts, most=1)
        check_close(gram, whole.gram(trees))
        check_close(own.gram(shared[:2], shared[2:]), whole.gram(trees[:2], trees[2:]))
        posterior = LaplacePosterior(shared[0], own)
        quadratic, counts = counted(posterior.quadratic, shared[1], shared[2:])
        check_collectives(counts, most=1)
        check_close(quadratic.slope, LaplacePosterior(trees[0], whole).quadratic(trees[1], trees[2:]).slope)
        arguments = (own, Diagonal(placed(drawn(4, True), mesh, placements)))
        found, counts = counted(path_quadratic, shared[0], shared[1], *arguments, gradient=shared[2])
        check_collectives(counts)
        expected = path_quadratic(trees[0], trees[1], whole, Diagonal(drawn(4, True)), gradient=trees[2])
        check_close(found.slope, expected.slope)
        check_close(found.curvature, expected.curvature)
        if not isinstance(own, Isotropic):
            updated, counts = counted(posterior.update, shared[1], own, weight=3.0, decay=0.5)
            check_collectives(counts)
            check_close(updated.precision.gram(shared), 3.5 * whole.gram(trees))


def check_became(mesh: DeviceMesh, placements: Placements) -> None:
    models, fishers = [drawn(seed) for seed in (1, 2, 3)], [drawn(seed, True) for seed in (4, 5, 6)]
    shared = [placed(tree, mesh, placements) for tree in models]
    losses = [LaplacePosterior(m, Diagonal(f)) for m, f in zip(models, fishers, strict=True)]
    own = [LaplacePosterior(m, Diagonal(placed(f, mesh, placements))) for m, f in zip(shared, fishers, strict=True)]
    for estimator in (Secant(), Calibrated(), DiagonalFisher(), NativeExpansion(), PaperClosedForm()):
        for count in (2, 3):
            rule = Became(estimator)
            expected = rule.merge(models[:count], losses[:count])
            found, counts = counted(rule.merge, shared[:count], own[:count])
            check_collectives(counts)
            check_close(found.alpha, expected.alpha)
            for name, value in expected.theta.items():
                assert found.theta[name].placements == shared[0][name].placements
                check_close(found.theta[name], value)


def check_partial(mesh: DeviceMesh) -> None:
    """A gradient that is still a sum over processes is the sum, and parts of unlike sharding meet."""
    trees = [drawn(1), drawn(2), drawn(3, True), drawn(4, True)]
    sharded = [placed(tree, mesh, {name: [Shard(0)] for name in SHAPES}) for tree in trees]
    share = distributed.get_rank() + 1.0  # 1/3 and 2/3 of it
    gradient = {n: DTensor.from_local(v * share / 3, mesh, [Partial()]) for n, v in drawn(5).items()}
    check_close(optimal_alpha(*sharded, gradient=gradient), optimal_alpha(*trees, gradient=drawn(5)))
    rows_and_columns = placed(trees[1], mesh, {name: [Shard(len(shape) - 1)] for name, shape in SHAPES.items()})
    alpha = optimal_alpha(sharded[0], rows_and_columns, *sharded[2:])
    check_close(alpha, optimal_alpha(*trees))
    check_close(optimal_alpha(sharded[0], trees[1], sharded[2], trees[3]), optimal_alpha(*trees))


def check_messages(mesh: DeviceMesh, other: DeviceMesh) -> None:
    """Both processes say what is wrong in one's part."""
    rows = {name: [Shard(0)] for name in SHAPES}
    trees = [placed(drawn(seed, True), mesh, rows) for seed in (1, 2, 3, 4)]
    for index, entry, words in ((3, -1.0, "negative"), (2, torch.nan, "negative or NaN"), (1, torch.inf, "infinite")):
        whole = drawn(index + 1, True)
        whole["out.weight"][-1, -1] = entry
        bad = [*trees]
        bad[index] = placed(whole, mesh, rows)
        check_raises(f"out.weight.*{words}", optimal_alpha, *bad)
        if index > 1:
            check_raises(f"out.weight.*{words}", Diagonal, bad[index])
    elsewhere = placed(drawn(2), other, {name: [Replicate(), Shard(0)] for name in SHAPES})
    check_raises("two meshes", optimal_alpha, trees[0], elsewhere, *trees[2:])
    size = sum(value.numel() for value in drawn(1).values())
    matrix = distribute_tensor(torch.eye(size, dtype=torch.float64), mesh, [Shard(0)])
    check_raises("needs it whole", Dense(matrix, SHAPES).gram, [trees[0]])


def check_raises(words: str, function: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(BecameError, match=words):
        function(*arguments)


def work(rank: int, folder: str) -> None:
    """Run every check, and write what failed."""
    torch.set_num_threads(1)
    failures: dict[str, str] = {}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    line, plane = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [[0, 1]])
    checks: dict[str, Callable[[], None]] = {
        "partial": partial(check_partial, line),
        "messages": partial(check_messages, line, plane),
    }
    rows, mixed = layouts(line).values()
    in_plane = layouts(plane)["mixed"]
    for kind, mesh, placements in (("rows", line, rows), ("mixed", line, mixed), ("plane", plane, in_plane)):
        for of_kind in (check_alpha, check_precisions, check_became):
            checks[f"{of_kind.__name__}, {kind}"] = partial(of_kind, mesh, placements)
    for name, check in checks.items():
        try:
            check()
        except Exception:
            failures[name] = traceback.format_exc()
            break  # the other process may be ahead, and would wait for this one
    Path(folder, f"{rank}.json").write_text(json.dumps([len(checks), failures]), encoding="utf-8")
    distributed.destroy_process_group()
