"""Optimal brain surgeon, one weight at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmprune.types import Pattern

# elements of the inverses that are held at once: 512 MiB in float64
ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Trace:
    """For every row the inputs in the order in which they go, and by how much each step raises the loss."""

    order_OS: torch.Tensor
    loss_OS: torch.Tensor


def eliminate(weight_OI: torch.Tensor, inverse_II: torch.Tensor, pattern: Pattern) -> Trace:
    """Greedily remove weights of every row until none is left, or until every group of an N:M pattern is done.

    Each step takes the input p with the lowest `w_p^2 / inverse_pp`, adds `-w_p / inverse_pp * inverse_:p` to the
    row and downdates the row's own inverse (Frantar and Alistarh 2022, equations 3 and 4). The loss
    (w - w0) H (w - w0)' grows by that quotient. In the dtype of the operands; ties go to the lowest index.
    """
    inputs = weight_OI.shape[1]
    steps = inputs // pattern.group * (pattern.group - pattern.keep) if pattern.structured else inputs
    rows = max(ELEMENTS // inputs**2, 1)
    parts = [_eliminate(part_RI, inverse_II, pattern, steps) for part_RI in weight_OI.split(rows)]
    return Trace(torch.cat([one.order_OS for one in parts]), torch.cat([one.loss_OS for one in parts]))


def _eliminate(weight_RI: torch.Tensor, inverse_II: torch.Tensor, pattern: Pattern, steps: int) -> Trace:
    weight_RI = weight_RI.clone()
    inverse_RII = inverse_II.expand(len(weight_RI), -1, -1).clone()
    diagonal_RI = inverse_RII.diagonal(dim1=1, dim2=2)
    gone_RI = torch.zeros_like(weight_RI, dtype=torch.bool)
    order_RS = torch.empty(len(weight_RI), steps, dtype=torch.int64, device=weight_RI.device)
    loss_RS = torch.empty_like(order_RS, dtype=weight_RI.dtype)
    rows_R = torch.arange(len(weight_RI), device=weight_RI.device)
    for step in range(steps):
        barred_RI = gone_RI
        if pattern.structured:
            full_RG = gone_RI.unflatten(1, (-1, pattern.group)).sum(2) == pattern.group - pattern.keep
            barred_RI = gone_RI | full_RG.repeat_interleave(pattern.group, 1)
        score_RI = (weight_RI.square() / diagonal_RI).masked_fill_(barred_RI, torch.inf)
        loss_RS[:, step], p_R = score_RI.min(1)
        pivot_R1 = diagonal_RI[rows_R, p_R][:, None]
        column_RI = inverse_RII[rows_R, p_R]
        weight_RI -= column_RI * (weight_RI[rows_R, p_R][:, None] / pivot_R1)
        column_RI = column_RI / pivot_R1.sqrt()
        inverse_RII.baddbmm_(column_RI[:, :, None], column_RI[:, None, :], alpha=-1)
        order_RS[:, step] = p_R
        gone_RI[rows_R, p_R] = True
        weight_RI.masked_fill_(gone_RI, 0)
        # what rounding leaves there must not win or divide by zero
        diagonal_RI.masked_fill_(gone_RI, 1)
    return Trace(order_RS, loss_RS)
