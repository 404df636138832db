"""Layers whose spectra have heavier tails keep more."""

from __future__ import annotations

import torch

from llmprune.allocation import Dense
from llmprune.allocation.fit import fit, refuse_pattern, stretched
from llmprune.types import Budget

# amounts lie between 1 - REACH and 1 + REACH times a common one; the paper's value for SparseGPT (Wanda: 0.3)
REACH = 0.2
BINS = 100


def alphapruning(dense: Dense, budget: Budget) -> dict[str, Budget]:
    """Lu et al. 2024, "AlphaPruning" (arXiv:2410.10912): sparsity by the exponent of each layer's spectral tail.

    A matrix's exponent is that of a power law fitted to the tail of its squared singular values, a layer's the
    mean over its matrices; the amount grows linearly with it. Needs no text. Costs an eigendecomposition of the
    smaller Gram matrix of every matrix. Raises UserError for an N:M pattern.
    """
    refuse_pattern("alphapruning", budget)
    found = {spec.name: tail_exponent(weight_OI) for spec, weight_OI in dense.weights()}
    means = [sum(found[spec.name] for spec in layer) / len(layer) for layer in dense.layers]
    share = dense.by_layer([1 - REACH + one for one in stretched(means, 2 * REACH)])
    return fit(dense.specs, budget, lambda level: {name: level * one for name, one in share.items()})


def tail_exponent(weight_OI: torch.Tensor) -> float:
    """alpha of the density x^-alpha that fits the squared singular values from some x on.

    The start of the tail is the one with the smallest Kolmogorov-Smirnov distance among those near the peak of the
    histogram of the logarithms (0.95 to 1.5 times it), as in the authors' code; alpha is Hill's estimate.
    """
    small_OI = (weight_OI if weight_OI.shape[0] <= weight_OI.shape[1] else weight_OI.T).double()
    values_S = torch.linalg.eigvalsh(small_OI @ small_OI.T).cpu()
    values_S = values_S[values_S > values_S[-1] * 1e-12]
    if len(values_S) < 3:
        return 1.0
    logs_S = values_S.log()
    counts, edges = torch.histogram(logs_S, BINS)
    peak = float(edges[counts.argmax()].exp())
    starts = ((values_S >= 0.95 * peak) & (values_S <= 1.5 * peak)).nonzero().flatten().tolist()
    best, alpha = float("inf"), 1.0
    for start in starts:
        tail = len(values_S) - start
        excess = float((logs_S[start:] - logs_S[start]).sum())
        if tail < 2 or excess <= 0:
            continue
        exponent = 1 + tail / excess
        fitted_S = 1 - (values_S[start:] / values_S[start]) ** (1 - exponent)
        distance = float((fitted_S - torch.arange(tail) / tail).abs().max())
        if distance < best:
            best, alpha = distance, exponent
    return alpha
