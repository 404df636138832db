"""Input columns taken out of a matrix in groups, and what the columns that stay can make up for.

All in float64 and in the order of the columns: `gram_II` is the full matrix X'X of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmprune.linalg import inverse64


@dataclass(frozen=True)
class Trace:
    """Units in the order in which they go, and by how much each raises the squared output error."""

    order: list[int]
    losses: list[float]


def damped(gram_II: torch.Tensor, damping: float) -> torch.Tensor:
    """X'X + damping * mean(diag) * I. An input that was never active gets a diagonal of 1."""
    found_II = gram_II.double()
    diagonal_I = found_II.diagonal()
    shift = damping * float(diagonal_I.mean())
    return found_II + torch.diag(torch.where(diagonal_I > 0, shift, 1.0))


def fold(weight_OI: torch.Tensor, damped_II: torch.Tensor, gone_I: torch.Tensor) -> torch.Tensor:
    """The weights that do best without the columns `gone_I` (mask), which become zero.

    W_K + W_P H_PK inverse(H_KK), the minimiser of tr((V - W) H (V - W)') over V that is zero in P: least squares on
    the inputs that stay, the Nystroem update, and what removing the columns one by one by OBS ends in.
    """
    kept_I = ~gone_I
    weight_OI = weight_OI.double()
    missing_OK = weight_OI[:, gone_I] @ damped_II[gone_I][:, kept_I]
    found_OI = torch.zeros_like(weight_OI)
    found_OI[:, kept_I] = weight_OI[:, kept_I] + ridge(damped_II[kept_I][:, kept_I], missing_OK.T).T
    return found_OI


def mean_fold(weight_OI: torch.Tensor, mean_I: torch.Tensor, gone_I: torch.Tensor) -> torch.Tensor:
    """What the columns `gone_I` put out on average, outputs long: the bias that stands in for them."""
    return weight_OI.double()[:, gone_I] @ mean_I.double()[gone_I]


def ridge(damped_II: torch.Tensor, cross_IO: torch.Tensor) -> torch.Tensor:
    """The linear map A (inputs x outputs) that minimises |X A - E|^2 + |A|^2_L, from H = X'X + L and X'E."""
    factor_II, info = torch.linalg.cholesky_ex(damped_II)
    if int(info):
        return inverse64(damped_II) @ cross_IO  # raises, and says what to do
    return torch.cholesky_solve(cross_IO, factor_II)


def eliminate(
    weight_OI: torch.Tensor, damped_II: torch.Tensor, columns_UN: torch.Tensor, count: int, strata: int = 1
) -> Trace:
    """Take out `count` of U units, each a group of N columns, the one that is missed least first.

    Group OBS (Kurtic et al. 2023, "ZipLM", eq. 2 and 3): the score of unit S is tr(W_S inverse(P_SS) W_S') with P the
    inverse of H; then W -= W_S inverse(P_SS) P_S: and P loses S by its Schur complement. The scores along the way sum
    to tr((V - W) H (V - W)'). Units come in `strata` runs, which lose equally many. Ties go to the lowest number.
    """
    weight_OI = weight_OI.to(torch.float64, copy=True)
    inverse_II = inverse64(damped_II)
    units = len(columns_UN)
    gone_U = torch.zeros(units, dtype=torch.bool, device=weight_OI.device)
    lost_R = torch.zeros(strata, dtype=torch.int64, device=weight_OI.device)
    trace = Trace([], [])
    for _ in range(count):
        full_U = (lost_R >= count // strata).repeat_interleave(units // strata)
        score_U = _scores(weight_OI, inverse_II, columns_UN, gone_U).masked_fill_(gone_U | full_U, torch.inf)
        loss, unit = score_U.min(0)
        columns_N = columns_UN[unit]
        pivot_NN = inverse_II[columns_N][:, columns_N]
        row_NI = torch.linalg.solve(pivot_NN, inverse_II[columns_N])
        weight_OI -= weight_OI[:, columns_N] @ row_NI
        inverse_II -= inverse_II[:, columns_N] @ row_NI
        # what rounding leaves there must not win or divide by zero
        weight_OI[:, columns_N] = 0
        inverse_II[columns_N] = 0
        inverse_II[:, columns_N] = 0
        inverse_II.diagonal()[columns_N] = 1
        gone_U[unit] = True
        lost_R[unit // (units // strata)] += 1
        trace.order.append(int(unit))
        trace.losses.append(float(loss))
    return trace


def _scores(
    weight_OI: torch.Tensor, inverse_II: torch.Tensor, columns_UN: torch.Tensor, gone_U: torch.Tensor
) -> torch.Tensor:
    if columns_UN.shape[1] == 1:
        columns_U = columns_UN[:, 0]
        return weight_OI.square().sum(0)[columns_U] / inverse_II.diagonal()[columns_U]
    scores = []
    for columns_N, gone in zip(columns_UN, gone_U.tolist(), strict=True):
        if gone:
            scores.append(weight_OI.new_tensor(torch.inf))
            continue
        group_ON = weight_OI[:, columns_N]
        pivot_NN = inverse_II[columns_N][:, columns_N]
        scores.append((torch.linalg.solve(pivot_NN, group_ON.T) * group_ON.T).sum())
    return torch.stack(scores)


def joint_energy(weight_OI: torch.Tensor, gram_II: torch.Tensor, columns_UN: torch.Tensor) -> torch.Tensor:
    """tr(W_u G_uv W_v'), U x U: summed over a set of units on both sides, the energy of what the set puts out."""
    weight_OI = weight_OI.double()
    product_II = (weight_OI.T @ weight_OI) * gram_II.double()
    order = columns_UN.flatten()
    units, width = columns_UN.shape
    return product_II[order][:, order].view(units, width, units, width).sum((1, 3))


def own_energy(weight_OI: torch.Tensor, gram_II: torch.Tensor, columns_UN: torch.Tensor) -> torch.Tensor:
    """tr(W_u G_uu W_u'), U: the energy of what each unit puts out by itself, the diagonal of `joint_energy`."""
    weight_OUN = weight_OI.double()[:, columns_UN]
    gram_UNN = gram_II.double()[columns_UN[:, :, None], columns_UN[:, None, :]]
    return (torch.einsum("oun,unm->oum", weight_OUN, gram_UNN) * weight_OUN).sum((0, 2))


def principal(gram_HH: torch.Tensor, weight_OH: torch.Tensor) -> torch.Tensor:
    """A basis T, H x H, in which dropping the last dimensions loses the least of Z W', Z'Z being `gram_HH`.

    With Z T and W inverse(T)' in place of Z and W the product is the same, and a sum of H terms of falling size: the
    singular directions of Z W'. The gram matrix in it is the identity. All in float64; needs a definite matrix.
    """
    lower_HH = torch.linalg.cholesky(gram_HH)
    vectors_HH = torch.linalg.eigh(lower_HH.T @ (weight_OH.T @ weight_OH) @ lower_HH).eigenvectors.flip(1)
    basis_HH: torch.Tensor = torch.linalg.solve_triangular(lower_HH.T, vectors_HH, upper=True)
    return basis_HH


def unlike(gram_II: torch.Tensor, columns_UN: torch.Tensor) -> torch.Tensor:
    """1 minus the likeness of each of U units to the one most like it, from 0 (a copy) to 1 (nothing in common).

    The likeness of two units is that of their outputs over all tokens: |X_u'X_v| / sqrt(|X_u'X_u| |X_v'X_v|) in the
    Frobenius norm, for single channels the absolute cosine. After the uniqueness of Santacroce et al. 2023, "What Matters
    in the Structured Pruning of Generative Language Models?" (GUM), section 4.
    """
    order, (units, width) = columns_UN.flatten(), columns_UN.shape
    square_UU = gram_II.double()[order][:, order].square().view(units, width, units, width).sum((1, 3))
    scale_U = square_UU.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    likeness_UU = square_UU.sqrt() / scale_U[:, None] / scale_U
    likeness_UU.fill_diagonal_(0)
    return 1 - likeness_UU.amax(1).clamp_max(1)
