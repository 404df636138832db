"""Damped factorizations and quadratic forms of Gram matrices: the only ones of the project."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from llmprune.kernels.product import product_nt
from llmprune.types import RunError

MAX_DAMPING = 1.0
STRIPES = 8


@dataclass(frozen=True)
class Factor:
    """`H = R R'` of the damped Gram matrix `H = G + damping * mean(diag G) * I`, R upper triangular.

    `r_t_II` is R transposed (lower triangular, contiguous rows); `shift` is what was added to the
    diagonal. `damping` and `float64` say which rung of the ladder held.
    """

    r_t_II: torch.Tensor
    shift: float
    damping: float
    float64: bool


def reversed_cholesky(gram_lower_II: torch.Tensor, damping: float) -> Factor:
    """Factor a Gram matrix of which the lower triangle is valid.

    U = inverse(R) is the factor that SparseGPT obtains by Cholesky, inversion and a second
    Cholesky (Frantar and Alistarh 2023, section 3.3), here from one Cholesky of the matrix with
    rows and columns reversed. If it fails in float32, float64 is tried, and only then does damping
    grow, tenfold up to 1 (not at all from 0); at last RunError.
    """
    mean = float(gram_lower_II.diagonal().mean(dtype=torch.float64))
    if not mean > 0 or mean == float("inf"):
        raise RunError(f"the Gram matrix has a mean diagonal of {mean}: no usable calibration input reached it")
    for rung, dtype in _ladder(damping):
        shift = rung * mean
        # flipping the lower triangle gives the upper triangle of the reversed matrix
        reversed_II = gram_lower_II.to(dtype).flip(0, 1)
        reversed_II.diagonal().add_(shift)
        upper_II, info = torch.linalg.cholesky_ex(reversed_II, upper=True)
        del reversed_II
        if int(info) == 0 and bool(torch.isfinite(upper_II.diagonal()).all()):
            r_t_II = upper_II.flip(0, 1).to(torch.float32)
            return Factor(r_t_II, shift, rung, dtype == torch.float64)
    raise RunError(
        f"the Gram matrix is not positive definite even with damping {rung} and in float64; "
        "use more calibration text, or leave this matrix out with `ignore`"
    )


def _ladder(damping: float) -> list[tuple[float, torch.dtype]]:
    # more precision costs time; more damping costs quality
    rungs = [(damping, torch.float32), (damping, torch.float64)]
    while 0 < rungs[-1][0] < MAX_DAMPING:
        rungs.append((min(rungs[-1][0] * 10, MAX_DAMPING), torch.float64))
    return rungs


@dataclass(frozen=True)
class Scaled:
    """A Gram matrix brought to unit diagonal, and damped: `matrix_II = G / (d d') + damping * I`, d = sqrt(diag G).

    Weights enter as `W * scale_I`, in which all inputs weigh alike, so that a few massive activations
    do not set the damping of all others. `scale_I` of an input that was never active is the smallest of the others, so that
    the unit of the activations decides nothing; 1 if none was active.
    """

    matrix_II: torch.Tensor
    scale_I: torch.Tensor

    @cached_property
    def factor(self) -> Factor:
        """Its factor R, made once; nothing is added to the diagonal, which is damped already."""
        return reversed_cholesky(self.matrix_II, 0.0)


def scaled(gram_lower_II: torch.Tensor, damping: float) -> Scaled:
    """Unit-diagonal form of a Gram matrix of which the lower triangle is valid."""
    norm_I = gram_lower_II.diagonal().sqrt()
    active_I = norm_I > 0
    scale_I = torch.where(active_I, norm_I, norm_I[active_I].min() if bool(active_I.any()) else 1.0)
    lower_II = (gram_lower_II / scale_I[:, None] / scale_I).tril_(-1)
    matrix_II = lower_II + lower_II.T
    matrix_II.diagonal().copy_((gram_lower_II.diagonal() > 0) + damping)
    return Scaled(matrix_II, scale_I)


def symmetric(lower_II: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix of which the lower triangle is valid, in full: a fresh tensor."""
    return lower_II.tril() + lower_II.tril(-1).T


def inverse(matrix_II: torch.Tensor, shift: float) -> torch.Tensor:
    """Inverse of `matrix_II + shift * I`, symmetric positive definite; float64 if float32 fails, else RunError."""
    shifted_II = matrix_II.to(torch.float32, copy=True)
    shifted_II.diagonal().add_(shift)
    lower_II, info = torch.linalg.cholesky_ex(shifted_II)
    if int(info) == 0:
        return torch.cholesky_inverse(lower_II)
    shifted_II = matrix_II.to(torch.float64, copy=True)
    shifted_II.diagonal().add_(shift)
    return inverse64(shifted_II).float()


def inverse64(matrix_II: torch.Tensor) -> torch.Tensor:
    """Inverse of a symmetric positive definite matrix in float64; raises RunError if it is not."""
    lower_II, info = torch.linalg.cholesky_ex(matrix_II.double())
    if int(info):
        raise RunError("the damped Gram matrix is not positive definite even in float64; raise `damping`")
    return torch.cholesky_inverse(lower_II)


def output_energy(weight_OI: torch.Tensor, gram_lower_II: torch.Tensor) -> float:
    """tr(W G W'), the squared norm of the outputs of W, from the lower triangle of G.

    Works in stripes so that the symmetry halves the flops.
    """
    width = weight_OI.shape[1]
    stripe = -(-width // STRIPES)
    energy = 0.0
    for start in range(0, width, stripe):
        end = min(start + stripe, width)
        block_OJ = weight_OI[:, start:end]
        # twice everything below the diagonal block, once the diagonal block itself
        product_OJ = product_nt(weight_OI[:, end:], gram_lower_II[end:, start:end].T)
        product_OJ.mul_(2)
        diagonal_JJ = gram_lower_II[start:end, start:end].tril()
        product_OJ.addmm_(block_OJ, diagonal_JJ + diagonal_JJ.tril(-1).T)
        energy += float(torch.sum(product_OJ * block_OJ, dtype=torch.float64))
    return energy
