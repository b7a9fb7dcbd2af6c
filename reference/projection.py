"""Gradient projectors, each from its paper's formulas, by singular value decompositions of the data (not of Grams).

Convention: float64. R has a task's inputs (patches) as columns, [d_in, n]. G has a weight's gradients as rows,
[rows, d_in]. The columns of a basis are orthonormal. A projector P acts on rows from the right: rows P.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "clamped_gate_derivative",
    "dualgpm_complement",
    "effective_weight",
    "gpcns_bases",
    "gpcns_space",
    "gpm_basis",
    "inflora_rows",
    "low_rank_gradients",
    "nscl_null_space",
    "ogd_directions",
    "olora_overlap",
    "projection",
    "sgp_space",
    "trgp_bases",
    "trusted_tasks",
]

Array = NDArray[np.float64]


def projection(basis: Array, importance: Array | None = None) -> Array:
    """Return P = I - M diag(importance) M^T; without importances, all are 1."""
    weights = np.ones(basis.shape[1]) if importance is None else importance
    return np.eye(len(basis)) - basis @ np.diag(weights) @ basis.T


def gpm_basis(basis: Array | None, representation: Array, epsilon: float) -> Array:
    """Return GPM's basis after one more task (Saha 2021, equations 5, 8 and 9), by the SVD of the residual.

    Args:
        basis: the basis of the tasks so far, [d_in, k]; None before the first.
        representation: R of the task.
        epsilon: the share of the representation's energy that the basis must contain.
    """
    old = np.zeros((len(representation), 0)) if basis is None else basis
    residual = representation - old @ old.T @ representation
    total = np.sum(representation**2)
    captured = total - np.sum(residual**2)
    if captured >= epsilon * total:
        return old
    vectors, sigma, _ = np.linalg.svd(residual, full_matrices=False)
    count = 0
    while captured < epsilon * total and count < min(len(sigma), len(old) - old.shape[1]):
        captured += sigma[count] ** 2
        count += 1
    return np.hstack([old, vectors[:, :count]])


def _importances(sigma: NDArray[np.floating[Any]], scale: float) -> Array:
    return np.asarray((scale + 1) * sigma / (scale * sigma + sigma.max()))


def sgp_space(
    space: tuple[Array, Array] | None, representation: Array, epsilon: float, scale: float
) -> tuple[Array, Array]:
    """Return SGP's basis and importances after one more task (Saha 2023), by the SVDs of R' and M M^T R.

    Args:
        space: the basis and the importances of the tasks so far; None before the first.
        representation: R of the task.
        epsilon: GPM's threshold.
        scale: s in the formula of the importances.
    """
    old = None if space is None else space[0]
    basis = gpm_basis(old, representation, epsilon)
    if space is None or old is None:
        sigma = np.linalg.svd(representation, compute_uv=False)[: basis.shape[1]]
        return basis, _importances(sigma, scale)
    rank = old.shape[1]
    projected = old @ old.T @ representation
    u, s, _ = np.linalg.svd(projected, full_matrices=False)
    on_old = np.sqrt((old.T @ u) ** 2 @ s**2)
    new = np.linalg.svd(representation - projected, compute_uv=False)[: basis.shape[1] - rank]
    importance = _importances(np.concatenate([on_old, new]), scale)
    importance[:rank] = np.clip(importance[:rank] + space[1], 0, 1)
    return basis, importance


def gpcns_bases(gradients: Sequence[Array], epsilons: Sequence[float]) -> list[Array]:
    """Return V_1, V_2, … of GPCNS, the leading right singular vectors of the gradients of all tasks so far.

    Args:
        gradients: one array for each task, with the task's gradients as rows.
        epsilons: one threshold for each task.
    """
    bases = []
    for task, epsilon in enumerate(epsilons):
        _, sigma, vh = np.linalg.svd(np.vstack(gradients[: task + 1]), full_matrices=False)
        bases.append(vh[: int(np.sum(np.cumsum(sigma) <= epsilon * sigma.sum()))].T)
    return bases


def gpcns_space(gradients: Sequence[Array], epsilons: Sequence[float], scale: float) -> tuple[Array, Array]:
    """Return the basis and the importances of GPCNS after these tasks (Yang 2024), by the SVD of all V side by side.

    Args:
        gradients: one array for each task, with the task's gradients as rows.
        epsilons: one threshold for each task.
        scale: s in the formula of the importances.
    """
    bases = gpcns_bases(gradients, epsilons)
    if len(bases) == 1:
        return bases[0], np.ones(bases[0].shape[1])
    u, sigma, _ = np.linalg.svd(np.hstack(bases), full_matrices=False)
    count = int(np.sum(np.cumsum(sigma) <= epsilons[-1] * sigma.sum()))
    return u[:, :count], _importances(sigma[:count], scale) if count else sigma[:0]


def nscl_null_space(representations: Sequence[Array], ratio: float) -> Array:
    """Return V [d_in, j]: eigenvectors of the summed covariances with values <= ratio x the smallest (Wang 2021)."""
    covariance = np.sum([r @ r.T / r.shape[1] for r in representations], axis=0)
    vectors, values, _ = np.linalg.svd(covariance)
    return np.asarray(vectors[:, values <= ratio * values[-1]])


def trgp_bases(basis: Array | None, representation: Array, epsilon: float) -> tuple[Array, Array]:
    """Return the union of all tasks' bases and the basis of the task itself, after one more task (Lin 2022)."""
    old = np.zeros((len(representation), 0)) if basis is None else basis
    vectors, sigma, _ = np.linalg.svd(representation - old @ old.T @ representation, full_matrices=False)
    candidates = np.hstack([old, vectors])
    energy = np.concatenate([np.sum((old.T @ representation) ** 2, axis=1), sigma**2])
    chosen: list[int] = []
    for candidate in np.argsort(-energy, kind="stable").tolist():
        if np.sum(energy[chosen]) >= epsilon * np.sum(representation**2):
            break
        chosen.append(candidate)
    new = sorted(candidate for candidate in chosen if candidate >= old.shape[1])
    return np.hstack([old, candidates[:, new]]), candidates[:, chosen]


def trusted_tasks(gradient: Array, bases: Sequence[Array]) -> list[int]:
    """Return the tasks with the largest |G B B^T|, at most two, and only above |G| / 2; the largest first."""
    norms = [float(np.linalg.norm(gradient @ b @ b.T)) for b in bases]
    order = np.argsort([-norm for norm in norms], kind="stable")[:2]
    return [int(task) for task in order if norms[task] > 0.5 * np.linalg.norm(gradient)]


def effective_weight(weight: Array, bases: Sequence[Array], scales: Sequence[Array]) -> Array:
    """Return W + sum_j W B_j (Q_j - I) B_j^T."""
    total = weight.copy()
    for basis, scale in zip(bases, scales, strict=True):
        total += weight @ basis @ (scale - np.eye(len(scale))) @ basis.T
    return total


def clamped_gate_derivative(embedding: float, steepness: float, sharpness: float) -> float:
    """Return d gate / d e of the published code of HAT, with the factor of Serra 2018, eq. 4: clamped, and in float32.

    Args:
        embedding: e of one unit, at most 6 in magnitude.
        steepness: s of the batch.
        sharpness: s_max.
    """
    gate = np.float32(1 / (1 + np.exp(min(-steepness * embedding, 700.0))))
    derivative = steepness * float(gate * (np.float32(1) - gate))
    inner = min(max(steepness * embedding, -50.0), 50.0)
    return float(derivative * sharpness / steepness * (np.cosh(inner) + 1) / (np.cosh(embedding) + 1))


def ogd_directions(gradients: Sequence[Array], capacity: int, floor: float = 2.0**-26) -> Array:
    """Return OGD's directions as rows; every task has an equal share of the capacity.

    A task keeps the gradient with the longest part outside the span so far, again and again; a gradient whose energy is
    outside by no more than a share is in the span. The directions are those of Gram and Schmidt, in this order.

    Args:
        gradients: one array for each task, with its samples' gradients as rows, [samples, d].
        capacity: the largest number of directions in all.
        floor: that share.
    """
    kept: list[list[Array]] = []
    for index, rows in enumerate(gradients):
        shares = [capacity // (index + 1) + (task < capacity % (index + 1)) for task in range(index + 1)]
        kept = [block[:share] for block, share in zip(kept, shares, strict=False)]
        directions = _gram_schmidt([row for block in kept for row in block], rows.shape[1])
        chosen: list[Array] = []
        for _ in range(min(shares[-1], len(rows))):
            outside = rows - rows @ directions.T @ directions
            energies = np.sum(outside**2, axis=1)
            energies[energies <= floor * np.sum(rows**2, axis=1)] = 0.0
            best = int(np.argmax(energies))
            if energies[best] == 0.0:
                break
            chosen.append(rows[best])
            directions = np.vstack([directions, outside[best] / np.linalg.norm(outside[best])])
        kept.append(chosen)
    return _gram_schmidt([row for block in kept for row in block], gradients[0].shape[1])


def _gram_schmidt(rows: Sequence[Array], width: int) -> Array:
    directions = np.zeros((0, width))
    for row in rows:
        outside = row
        for _ in range(2):  # the second pass removes the first one's rounding
            outside = outside - directions.T @ (directions @ outside)
        directions = np.vstack([directions, outside / np.linalg.norm(outside)])
    return directions


def low_rank_gradients(gradient: Array, a: Array, b: Array, scale: float) -> tuple[Array, Array]:
    """Return the gradients by A [r, d_in] and B [d_out, r] of a loss of W + s B A, entry by entry (Hu 2022).

    Args:
        gradient: of the loss by the effective weight, [d_out, d_in].
        a: A.
        b: B.
        scale: s.
    """
    by_a, by_b = np.zeros_like(a), np.zeros_like(b)
    for i, j in np.ndindex(gradient.shape):
        for k in range(len(a)):  # the effective weight's entry i, j has the term s B_ik A_kj
            by_a[k, j] += scale * gradient[i, j] * b[i, k]
            by_b[i, k] += scale * gradient[i, j] * a[k, j]
    return by_a, by_b


def inflora_rows(gram: Array, basis: Array, rank: int) -> Array:
    """Return A of InfLoRA as its published code designs it (Liang & Li 2024), [rank, d_in], up to the signs of rows.

    Args:
        gram: C = R R^T / n of the new task, whose left singular vectors the code takes.
        basis: of the old tasks' inputs, [d_in, k].
        rank: of the adapters.
    """
    vectors = np.linalg.svd(gram - basis @ basis.T @ gram)[0]
    return np.asarray(vectors[:, :rank].T / np.sqrt(3))


def dualgpm_complement(complement: Array, gram: Array, epsilon: float) -> Array:
    """Return DualGPM's basis of what is free after one more task, where it stores that: the published code's "retain".

    Args:
        complement: N, a basis of what was free before, [d_in, j].
        gram: C of the task, in the place of R.
        epsilon: the share of C's energy that must not be free.
    """
    vectors, sigma, _ = np.linalg.svd(complement @ complement.T @ gram)
    free, total, taken = np.sum(sigma**2), np.sum(gram**2), 0
    while taken < complement.shape[1] and free > (1 - epsilon) * total:
        free -= sigma[taken] ** 2
        taken += 1
    rest = complement - vectors[:, :taken] @ vectors[:, :taken].T @ complement
    return np.asarray(np.linalg.svd(rest)[0][:, : complement.shape[1] - taken])


def olora_overlap(old: Sequence[Array], new: Array) -> float:
    """Return the published code's orthogonality loss of O-LoRA (Wang 2023): sum |A_i A^T| over all old A_i."""
    return float(sum(np.sum(np.abs(rows @ new.T)) for rows in old))
