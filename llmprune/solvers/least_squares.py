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
    tolerance: float = TOLERANCE,
    outputs: Scaled | None = None,
) -> torch.Tensor:
    """Minimise tr((V - target) H (V - target)') over V that is zero where `pruned_OI`.

    H is the damped Gram matrix behind `system`. Conjugate gradients on all rows at once, each with its own
    step length, restricted to the kept weights; the unit diagonal is the Jacobi preconditioner. Starts from
    `start_OI` (else from the target) and ends after `steps`, or when every row's gradient has shrunk to
    `tolerance` of its right-hand side. With the damped matrix G behind `outputs` it is tr(G (V - target) H (V - target)'):
    errors of different outputs count together, and all rows share one step length.
    """
    # what is one system of equations: a row, or with `outputs` the whole matrix
    extent = (1,) if outputs is None else (0, 1)
    scale_OI = system.scale_I if outputs is None else system.scale_I * outputs.scale_I[:, None]
    kept_OI = (~pruned_OI).to(target_OI.dtype)

    def apply(x_OI: torch.Tensor) -> torch.Tensor:
        image_OI = product_nt(x_OI, system.matrix_II)
        if outputs is not None:
            image_OI = product_nt(outputs.matrix_II, image_OI.T)
        return image_OI.mul_(kept_OI)

    goal_OI = target_OI * scale_OI
    x_OI = (goal_OI if start_OI is None else start_OI * scale_OI) * kept_OI
    found_OI = _descend(x_OI, apply(goal_OI - x_OI), apply(goal_OI), apply, steps, tolerance, extent)
    return found_OI / scale_OI


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
    tolerance: float = TOLERANCE,
    extent: tuple[int, ...] = (1,),
) -> torch.Tensor:
    """Conjugate gradients for `apply(x) = right`; overwrites x and its residual. `extent`: the axes of one system."""

    def total(x_OI: torch.Tensor) -> torch.Tensor:
        return x_OI.sum(extent, keepdim=True)

    limit_O1 = total(right_OI.square()) * tolerance**2
    direction_OI = residual_OI.clone()
    square_O1 = total(residual_OI.square())
    for _ in range(steps):
        if bool((square_O1 <= limit_O1).all()):
            break
        image_OI = apply(direction_OI)
        curvature_O1 = total(direction_OI * image_OI)
        length_O1 = torch.where(curvature_O1 > 0, square_O1 / curvature_O1, 0.0)
        x_OI.addcmul_(direction_OI, length_O1)
        residual_OI.addcmul_(image_OI, length_O1, value=-1)
        before_O1, square_O1 = square_O1, total(residual_OI.square())
        ratio_O1 = torch.where(before_O1 > 0, square_O1 / before_O1, 0.0)
        direction_OI.mul_(ratio_O1).add_(residual_OI)
    return x_OI
