"""Float64 references that the tests trust because they are short, slow and written from the papers.

Nothing here imports llmprune, and nothing here shares an idea with its fast paths: columns are
eliminated one at a time and N:M groups are sorted by Python. Shape suffixes as in `llmprune.types`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np


@dataclass(frozen=True)
class Reference:
    """What the textbook answers: weights, mask, Σe², and how clear its choices were.

    `gap` is the smallest distance, over all selections, between the last weight that was pruned and
    the first that was kept, in |w|/U_jj over the root mean square of |w|/U_jj in that selection: an
    implementation whose compensated weights err by less than half of it must choose the same mask.
    """

    weight_OI: np.ndarray
    pruned_OI: np.ndarray
    loss: float
    gap: float


def damped(gram_II: np.ndarray, damping: float) -> np.ndarray:
    """H = G + damping * mean(diag G) * I."""
    gram_II = np.asarray(gram_II, dtype=np.float64)
    return gram_II + damping * np.mean(np.diag(gram_II)) * np.eye(len(gram_II))


def sparsegpt(
    weight_OI: np.ndarray,
    gram_II: np.ndarray,
    *,
    sparsity: float = 0.0,
    keep: int = 0,
    group: int = 0,
    damping: float = 0.01,
    block: int = 128,
) -> Reference:
    """SparseGPT (Frantar and Alistarh, 2023, algorithm 1), one column at a time, right-looking.

    H⁻¹ = UᵀU by Cholesky, inverse, upper Cholesky. Unstructured: at the start of each block the lowest
    floor(sparsity * rows * columns + 0.5) of (w/U_jj)². N:M: in each row, just before each group.
    """
    w_OI = np.array(weight_OI, dtype=np.float64)
    outputs, inputs = w_OI.shape
    factor_II = np.linalg.cholesky(damped(gram_II, damping))
    half_II = np.linalg.solve(factor_II, np.eye(inputs))
    u_II = np.linalg.cholesky(half_II.T @ half_II).T
    pruned_OI = np.zeros((outputs, inputs), dtype=bool)
    loss, gap = 0.0, math.inf

    def choose(rows: range, columns: range, count: int) -> float:
        """Prune the `count` lowest of these entries, the first at a tie; returns how clear that was."""
        scores = [((w_OI[i, columns] / np.diag(u_II)[columns]) ** 2).tolist() for i in rows]
        ranked = sorted((scores[a][b], i, j) for a, i in enumerate(rows) for b, j in enumerate(columns))
        for _, i, j in ranked[:count]:
            pruned_OI[i, j] = True
        if count in (0, len(ranked)):
            return math.inf
        scale = math.sqrt(sum(score for score, _, _ in ranked) / len(ranked))
        return (math.sqrt(ranked[count][0]) - math.sqrt(ranked[count - 1][0])) / scale if scale else 0.0

    for start in range(0, inputs, block):
        columns = range(start, min(start + block, inputs))
        if not group:
            count = math.floor(sparsity * (outputs * len(columns)) + 0.5)
            gap = min(gap, choose(range(outputs), columns, count))
        for j in columns:
            if group and j % group == 0:
                for i in range(outputs):
                    gap = min(gap, choose(range(i, i + 1), range(j, j + group), group - keep))
            e_O = np.where(pruned_OI[:, j], w_OI[:, j], 0) / u_II[j, j]
            w_OI[:, j:] -= np.outer(e_O, u_II[j, j:])
            w_OI[pruned_OI[:, j], j] = 0
            loss += float(e_O @ e_O)
    return Reference(w_OI, pruned_OI, loss, gap)


def quadratic(before_OI: np.ndarray, after_OI: np.ndarray, h_II: np.ndarray) -> float:
    """‖W - Ŵ‖²_H = tr((W - Ŵ) H (W - Ŵ)ᵀ)."""
    change_OI = np.asarray(before_OI, dtype=np.float64) - np.asarray(after_OI, dtype=np.float64)
    return float(np.sum((change_OI @ h_II) * change_OI))


def masked_least_squares(weight_OI: np.ndarray, h_II: np.ndarray, pruned_OI: np.ndarray) -> np.ndarray:
    """The best weights under a mask: each row solves H_KK ŵ_K = (H w)_K for its kept inputs K."""
    weight_OI = np.asarray(weight_OI, dtype=np.float64)
    best_OI = np.zeros_like(weight_OI)
    for i, kept_I in enumerate(~np.asarray(pruned_OI)):
        if kept_I.any():
            best_OI[i, kept_I] = np.linalg.solve(h_II[np.ix_(kept_I, kept_I)], (h_II @ weight_OI[i])[kept_I])
    return best_OI


def obs(weight_I: np.ndarray, h_II: np.ndarray, pruned_I: np.ndarray) -> tuple[np.ndarray, float]:
    """Optimal brain surgeon: w - H⁻¹[:,P] (H⁻¹[P,P])⁻¹ w_P and its loss w_Pᵀ (H⁻¹[P,P])⁻¹ w_P."""
    inverse_II = np.linalg.inv(h_II)
    p = np.flatnonzero(pruned_I)
    multiplier_P = np.linalg.solve(inverse_II[np.ix_(p, p)], weight_I[p])
    return weight_I - inverse_II[:, p] @ multiplier_P, float(weight_I[p] @ multiplier_P)


def least_squares_on_inputs(weight_I: np.ndarray, x_TI: np.ndarray, ridge: float, pruned_I: np.ndarray) -> np.ndarray:
    """The same optimum without any Gram matrix: min ‖X(w - ŵ)‖² + ridge ‖w - ŵ‖² on the kept inputs."""
    rows_TI = np.vstack([x_TI, math.sqrt(ridge) * np.eye(len(weight_I))])
    best_I = np.zeros_like(weight_I)
    best_I[~pruned_I] = np.linalg.lstsq(rows_TI[:, ~pruned_I], rows_TI @ weight_I, rcond=None)[0]
    return best_I


def best_loss(weight_I: np.ndarray, h_II: np.ndarray, count: int) -> float:
    """The lowest ‖w - ŵ‖²_H of one row over every mask with `count` zeros: all of them are tried."""
    losses = []
    for chosen in combinations(range(len(weight_I)), count):
        pruned_I = np.isin(np.arange(len(weight_I)), chosen)
        losses.append(obs(weight_I, h_II, pruned_I)[1])
    return min(losses)


def lowest_of_rows(scores_GN: np.ndarray, count: int) -> np.ndarray:
    """The `count` lowest of every row by a stable sort: ties to the lowest index."""
    pruned_GN = np.zeros(scores_GN.shape, dtype=bool)
    np.put_along_axis(pruned_GN, np.argsort(scores_GN, axis=1, kind="stable")[:, :count], True, axis=1)
    return pruned_GN


def lowest_of_groups(scores_OI: np.ndarray, keep: int, group: int) -> np.ndarray:
    """N:M by the same stable sort inside every `group` consecutive inputs."""
    outputs, inputs = scores_OI.shape
    return lowest_of_rows(scores_OI.reshape(-1, group), group - keep).reshape(outputs, inputs)


def mask_losses(weight_I: np.ndarray, h_II: np.ndarray, group: int = 0, keep: int = 0) -> dict[int, float]:
    """For one row, the lowest ‖w - ŵ‖²_H over every mask with each number of zeros; valid N:M masks if `group`."""
    best: dict[int, float] = {}
    for bits in range(2 ** len(weight_I)):
        pruned_I = np.array([bits >> j & 1 for j in range(len(weight_I))], dtype=bool)
        if group and (pruned_I.reshape(-1, group).sum(1) != group - keep).any():
            continue
        loss = obs(weight_I, h_II, pruned_I)[1]
        best[int(pruned_I.sum())] = min(best.get(int(pruned_I.sum()), math.inf), loss)
    return best


def best_matrix_loss(weight_OI: np.ndarray, h_II: np.ndarray, count: int, group: int = 0, keep: int = 0) -> float:
    """The lowest loss of a matrix over every mask with `count` zeros in all, however they are spread over the rows."""
    reached = {0: 0.0}
    for weight_I in weight_OI:
        row = mask_losses(weight_I, h_II, group, keep)
        sums: dict[int, float] = {}
        for before, loss in reached.items():
            for more, extra in row.items():
                sums[before + more] = min(sums.get(before + more, math.inf), loss + extra)
        reached = sums
    return reached[count]


def exact_obs(weight_I: np.ndarray, h_II: np.ndarray, steps: int, group: int = 0, keep: int = 0) -> list[int]:
    """ExactOBS by the closed form alone: at each step the input whose removal leaves the lowest total loss.

    Every candidate is tried by solving the whole problem anew, so that nothing is carried from step to step.
    """
    gone: list[int] = []
    weight = np.array(weight_I, dtype=np.float64)
    for _ in range(steps):
        scores = []
        for j in range(len(weight)):
            full = group and sum(i // group == j // group for i in gone) == group - keep
            if j not in gone and not full:
                pruned_I = np.isin(np.arange(len(weight)), [*gone, j])
                scores.append((obs(weight, h_II, pruned_I)[1], j))
        gone.append(min(scores)[1])
    return gone
