"""How much a single weight matters: one function a score, in float32, low meaning that it can go.

Every function takes the matrix (weights outputs x inputs, gradients if it names them), the statistics of the inputs
and a seed, and answers scores of the shape of the weights. A new score is a function and a line of the table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from llmprune.statistics import FLOW, GRADIENTS, MOMENTS, REGIONAL, TURNED, Stats
from llmprune.types import Gradient, Matrix

TINY = torch.finfo(torch.float32).tiny
# how much a root mean square of gradients counts beside the norm of the input: GBLM's and Wanda++'s own value
GRADIENT_WEIGHT = 100.0


def magnitude(matrix: Matrix, stats: Stats | None = None, seed: int = 0) -> torch.Tensor:
    """|w|."""
    return matrix.weight_OI.abs()


def wanda(matrix: Matrix, stats: Stats, seed: int = 0) -> torch.Tensor:
    """|w_ij| * ||x_j||, whose square is the loss of removing that weight alone (Sun et al. 2023, eq. 1)."""
    return matrix.weight_OI.abs() * stats.square_sums_I.sqrt()


def wanda_adaptive(matrix: Matrix, stats: Stats, seed: int = 0) -> torch.Tensor:
    """The share of its row's total that Wanda's scores reach up to this weight, from the lowest.

    Removing the lowest of these over a matrix is Wanda's row-adaptive variant: every row loses the prefix
    whose score adds up to at most alpha of the row's, with the alpha that gives the exact count.
    """
    ranked_OI = wanda(matrix, stats).sort(dim=1, stable=True)
    reached_OI = ranked_OI.values.double().cumsum(1)
    share_OI = reached_OI / reached_OI[:, -1:].clamp_min(TINY)
    return torch.zeros_like(share_OI).scatter_(1, ranked_OI.indices, share_OI)


def ria(matrix: Matrix, stats: Stats, seed: int = 0) -> torch.Tensor:
    """(|w_ij| / sum of column j + |w_ij| / sum of row i) * ||x_j||^0.5 (RIA, Zhang et al. 2024)."""
    size_OI = matrix.weight_OI.abs()
    column_1I, row_O1 = size_OI.sum(0, keepdim=True).clamp_min(TINY), size_OI.sum(1, keepdim=True).clamp_min(TINY)
    return (size_OI / column_1I + size_OI / row_O1) * stats.square_sums_I.pow(0.25)


def activation(matrix: Matrix, stats: Stats, seed: int = 0) -> torch.Tensor:
    """||x_j|| alone: whole inputs go, and only what is left over is shared out by position."""
    return stats.square_sums_I.sqrt().expand_as(matrix.weight_OI)


def random(matrix: Matrix, stats: Stats | None = None, seed: int = 0) -> torch.Tensor:
    """Uniform noise drawn from seed and name alone, so that neither order nor device matters: the honest baseline."""
    drawn = int.from_bytes(hashlib.sha256(f"{seed}/{matrix.name}".encode()).digest()[:8], "big") >> 1
    noise_OI = torch.rand(matrix.weight_OI.shape, generator=torch.Generator().manual_seed(drawn))
    return noise_OI.to(matrix.weight_OI.device)


def fisher(matrix: Matrix, stats: Stats | None = None, seed: int = 0) -> torch.Tensor:
    """½ h w², the rise of the loss if the weight alone goes, at a minimum and with a diagonal Hessian.

    Optimal Brain Damage (LeCun et al. 1989, eq. 5), h being the empirical Fisher's diagonal: the mean over the
    sequences of the squared gradient of each one's mean loss.
    """
    gradient = gradient_of(matrix)
    return gradient.squares_OI * matrix.weight_OI.square() / (2 * max(gradient.samples, 1))


def taylor(matrix: Matrix, stats: Stats | None = None, seed: int = 0) -> torch.Tensor:
    """|g w|, the change of the loss to first order (Molchanov et al. 2019, eq. 8, whose square ranks the same).

    The same order of weights is SNIP's connection sensitivity (Lee et al. 2019, eq. 5) and the linear model LM of
    Laurent et al. 2020, eq. 4. With g of the synaptic flow (`engine.flow`) it is SynFlow (Tanaka et al. 2020, eq. 2), whose
    authors prune in 100 rounds: `steps`.
    """
    return (gradient_of(matrix).mean_OI * matrix.weight_OI).abs()


def quadratic(matrix: Matrix, stats: Stats | None = None, seed: int = 0) -> torch.Tensor:
    """|-g w + ½ h w²|, the change of the loss to second order (QM of Laurent et al. 2020, eq. 5); h as in `fisher`."""
    return (fisher(matrix) - gradient_of(matrix).mean_OI * matrix.weight_OI).abs()


def grasp(matrix: Matrix, stats: Stats | None = None, seed: int = 0) -> torch.Tensor:
    """w (H g): without what scores lowest, the gradient's norm falls least (GraSP, Wang et al. 2020, eq. 8).

    Of either sign. Deviation: the loss is that of the model itself, not of its logits divided by 200.
    """
    turned_OI = gradient_of(matrix).turned_OI
    assert turned_OI is not None
    return matrix.weight_OI * turned_OI


def gblm(matrix: Matrix, stats: Stats, seed: int = 0) -> torch.Tensor:
    """|w| (||x_j|| + 100 sqrt(sum over sequences of g²)) (Das et al. 2023, "Beyond Size", eq. 4, l2).

    As in the authors' code ||x_j||² is a mean over the sequences and g² a sum, so the gradient counts more the more
    sequences there are.
    """
    gradient = gradient_of(matrix)
    norm_I = (stats.square_sums_I / max(gradient.samples, 1)).sqrt()
    return matrix.weight_OI.abs() * (norm_I + GRADIENT_WEIGHT * gradient.squares_OI.sqrt())


def regional(matrix: Matrix, stats: Stats, seed: int = 0) -> torch.Tensor:
    """|w| (100 sqrt(mean over sequences of g²) + ||x_j||), g the gradient of the norm of the layer's own output.

    The regional gradient score of Wanda++ (Yang et al. 2025, arXiv:2503.04992, eq. 3-4), ||x_j||² a mean over the
    sequences too. Deviation: g is that of the dense model's layer on the dense model's inputs.
    """
    gradient = gradient_of(matrix)
    samples = max(gradient.samples, 1)
    norm_I = (stats.square_sums_I / samples).sqrt()
    return matrix.weight_OI.abs() * (GRADIENT_WEIGHT * (gradient.squares_OI / samples).sqrt() + norm_I)


def pruner_zero(matrix: Matrix, stats: Stats | None = None, seed: int = 0) -> torch.Tensor:
    """w² times the size of the gradient, brought to 0 ... 1 over the matrix (Dong et al. 2024, eq. 5).

    The size is the root of the sum over sequences of g². The weight with the least of it scores 0 whatever its own.
    """
    size_OI = gradient_of(matrix).squares_OI.sqrt()
    low, high = size_OI.min(), size_OI.max()
    return matrix.weight_OI.square() * ((size_OI - low) / (high - low).clamp_min(TINY))


def gradient_of(matrix: Matrix) -> Gradient:
    """The gradients of a matrix whose method needs them."""
    assert matrix.gradient is not None
    return matrix.gradient


class Score(NamedTuple):
    """A score, the statistics it needs, and within what it is compared: "matrix" or "row"."""

    of: Callable[..., torch.Tensor]
    needs: frozenset[str]
    group: str


SCORES = {
    "magnitude": Score(magnitude, frozenset(), "matrix"),
    "wanda": Score(wanda, frozenset({MOMENTS}), "row"),
    "wanda-adaptive": Score(wanda_adaptive, frozenset({MOMENTS}), "matrix"),
    "ria": Score(ria, frozenset({MOMENTS}), "matrix"),
    "activation": Score(activation, frozenset({MOMENTS}), "row"),
    "fisher": Score(fisher, frozenset({GRADIENTS}), "matrix"),
    "taylor": Score(taylor, frozenset({GRADIENTS}), "matrix"),
    "quadratic": Score(quadratic, frozenset({GRADIENTS}), "matrix"),
    "grasp": Score(grasp, frozenset({TURNED}), "matrix"),
    "gblm": Score(gblm, frozenset({MOMENTS, GRADIENTS}), "row"),
    "regional": Score(regional, frozenset({MOMENTS, REGIONAL}), "row"),
    "pruner-zero": Score(pruner_zero, frozenset({GRADIENTS}), "row"),
    "synflow": Score(taylor, frozenset({FLOW}), "matrix"),
    "random": Score(random, frozenset(), "row"),
}
