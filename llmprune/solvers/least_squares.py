"""The best weights for a given mask."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmprune.kernels.product import product_nt
from llmprune.linalg import Scaled

# relative size of the gradient on the kept weights at which a row counts as solved
TOLERANCE = 1e-4


def least_squares(
    target_OI: torch.Tensor,
    pruned_OI: torch.Tensor,
    system: Scaled,
    *,
    start_OI: torch.Tensor | None = None,
    steps: int = 100,
) -> torch.Tensor:
    """Minimise tr((V - target) H (V - target)') over V that is zero where `pruned_OI`.

    H is the damped Gram matrix behind `system`. Conjugate gradients on all rows at once, each with its own
    step length, restricted to the kept weights; the unit diagonal is the Jacobi preconditioner. Starts from
    `start_OI` (else from the target) and ends after `steps`, or when every row's gradient has shrunk to
    `TOLERANCE` of its right-hand side.
    """
    kept_OI = (~pruned_OI).to(target_OI.dtype)

    def apply(x_OI: torch.Tensor) -> torch.Tensor:
        return product_nt(x_OI, system.matrix_II).mul_(kept_OI)

    goal_OI = target_OI * system.scale_I
    x_OI = (goal_OI if start_OI is None else start_OI * system.scale_I) * kept_OI
    return _descend(x_OI, apply(goal_OI - x_OI), apply(goal_OI), apply, steps) / system.scale_I


def redense(target_OI: torch.Tensor, pruned_OI: torch.Tensor, system: Scaled, penalty: float) -> torch.Tensor:
    """Minimise tr((V - target) H (V - target)') + penalty * (sum of the squares of V where `pruned_OI`).

    On the scale of the unit diagonal, by the same conjugate gradients, from the target. Without a penalty that is the
    target itself; the larger it is, the closer to `least_squares` on the mask.
    """
    # in y = x / shrink the diagonal is one again
    shrink_OI = (1 + penalty * pruned_OI).rsqrt()
    ridge_OI = penalty * pruned_OI * shrink_OI.square()

    def apply(y_OI: torch.Tensor) -> torch.Tensor:
        return product_nt(y_OI * shrink_OI, system.matrix_II).mul_(shrink_OI).addcmul_(ridge_OI, y_OI)

    goal_OI = target_OI * system.scale_I
    right_OI = product_nt(goal_OI, system.matrix_II).mul_(shrink_OI)
    y_OI = goal_OI / shrink_OI
    return _descend(y_OI, right_OI - apply(y_OI), right_OI, apply, 100) * shrink_OI / system.scale_I


def _descend(
    x_OI: torch.Tensor,
    residual_OI: torch.Tensor,
    right_OI: torch.Tensor,
    apply: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
) -> torch.Tensor:
    """Conjugate gradients for `apply(x) = right`, every row by itself; overwrites x and its residual."""
    limit_O = right_OI.square().sum(1) * TOLERANCE**2
    direction_OI = residual_OI.clone()
    square_O = residual_OI.square().sum(1)
    for _ in range(steps):
        if bool((square_O <= limit_O).all()):
            break
        image_OI = apply(direction_OI)
        curvature_O = (direction_OI * image_OI).sum(1)
        length_O = torch.where(curvature_O > 0, square_O / curvature_O, 0.0)
        x_OI.addcmul_(direction_OI, length_O[:, None])
        residual_OI.addcmul_(image_OI, length_O[:, None], value=-1)
        before_O, square_O = square_O, residual_OI.square().sum(1)
        ratio_O = torch.where(before_O > 0, square_O / before_O, 0.0)
        direction_OI.mul_(ratio_O[:, None]).add_(residual_OI)
    return x_OI
