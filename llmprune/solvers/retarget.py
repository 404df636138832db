"""Asymmetric calibration: aim at the dense model's outputs from the pruned model's inputs."""

from __future__ import annotations

import torch

from llmprune.kernels.product import product_nt
from llmprune.linalg import Scaled, inverse


def retarget(weight_OI: torch.Tensor, pull_OI: torch.Tensor, system: Scaled, strength: float) -> torch.Tensor:
    """Weights whose outputs on the pruned model's inputs X come closest to what the dense model has there.

    With Y - X W' what the outputs of W lack, the minimiser of |Y - X V'|^2 + |V - W|^2_L, with L the damping of
    `system`, is W + (Y - X W')'X (X'X + L)^-1; `pull_OI` is (Y - X W')'X. Y is X_dense W', and for a matrix that
    writes to the residual stream also what that stream lacks. `strength` in [0, 1] is the share of this correction that is taken:
    at 1 it may follow the calibration text too closely. The idea is GPTAQ's asymmetric calibration
    (Li et al. 2025, arXiv:2504.02692), applied before pruning so that every solver inherits it.
    """
    correction_OI = product_nt(pull_OI / system.scale_I, inverse(system.matrix_II, 0.0)) / system.scale_I
    return weight_OI + strength * correction_OI
