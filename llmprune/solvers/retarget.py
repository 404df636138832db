"""Asymmetric calibration: aim at the dense model's outputs from the pruned model's inputs."""

from __future__ import annotations

import torch

from llmprune.kernels.product import product_nt
from llmprune.linalg import Scaled, inverse


def retarget(weight_OI: torch.Tensor, drift_II: torch.Tensor, system: Scaled, strength: float) -> torch.Tensor:
    """Weights whose outputs on the pruned model's inputs X come closest to X_dense W'.

    The minimiser of |X_dense W' - X V'|^2 + |V - W|^2_L, with L the damping of `system`, is
    W + W (X_dense - X)'X (X'X + L)^-1. `strength` in [0, 1] is the share of this correction that is taken:
    at 1 it may follow the calibration text too closely. The idea is GPTAQ's asymmetric calibration
    (Li et al. 2025, arXiv:2504.02692), applied before pruning so that every solver inherits it.
    """
    pull_OI = product_nt(weight_OI, drift_II.T) / system.scale_I
    correction_OI = product_nt(pull_OI, inverse(system.matrix_II, 0.0)) / system.scale_I
    return weight_OI + strength * correction_OI
