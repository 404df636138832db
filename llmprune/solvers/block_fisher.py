"""The rise of the loss to second order, the curvature being that of the Fisher matrix within blocks of weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llmprune.types import FISHER_BLOCK, Gradient, RunError, in_blocks

# elements of the blocks that are held in float64 at once: 128 MiB
ELEMENTS = 1 << 24


@dataclass(frozen=True)
class BlockFisher:
    """½ d' F d for a change d of the weights: F is the mean of g g' within each block, and `shift` on its diagonal.

    N blocks of B weights each, in the order of `arrange`; those that only fill up a block are zero and stay so.
    """

    blocks_NBB: torch.Tensor
    shift: float
    shape: torch.Size
    by_columns: bool

    @classmethod
    def of(cls, gradient: Gradient, damping: float) -> BlockFisher:
        """Of the gradients of a matrix; `damping` is a share of the mean of the Fisher's diagonal."""
        assert gradient.blocks_RNBB is not None
        blocks_NBB = gradient.blocks_RNBB.flatten(0, 1) / max(gradient.samples, 1)
        mean = float(gradient.squares_OI.mean(dtype=torch.float64)) / max(gradient.samples, 1)
        # without any gradient all weights weigh alike
        return cls(blocks_NBB, damping * mean or 1.0, gradient.mean_OI.shape, gradient.by_columns)

    def arrange(self, value_OI: torch.Tensor) -> torch.Tensor:
        """Values of the matrix' weights by block, N x B."""
        return in_blocks(value_OI.T if self.by_columns else value_OI).flatten(0, 1)

    def restore(self, value_NB: torch.Tensor) -> torch.Tensor:
        """The inverse of `arrange`, O x I."""
        outputs, inputs = self.shape
        rows, columns = (inputs, outputs) if self.by_columns else (outputs, inputs)
        value_RC = value_NB.view(rows, -1)[:, :columns]
        return value_RC.T if self.by_columns else value_RC

    def saliency(self, weight_NB: torch.Tensor) -> torch.Tensor:
        """w² / (2 [inverse F]_jj): the least rise of the loss if one weight goes and those of its block make up for it."""
        score_NB = torch.empty_like(weight_NB)
        for part, fisher_NBB in self._parts():
            inverse_NBB = torch.cholesky_inverse(_cholesky(fisher_NBB))
            score_NB[part] = weight_NB[part].square() / (2 * inverse_NBB.diagonal(dim1=1, dim2=2)).to(weight_NB.dtype)
        return score_NB

    def optimum(self, weight_NB: torch.Tensor, kept_NB: torch.Tensor) -> torch.Tensor:
        """The weights with the least ½ (v - w)' F (v - w) that are zero where not `kept_NB`: F_KK v_K = (F w)_K."""
        best_NB = torch.empty_like(weight_NB)
        for part, fisher_NBB in self._parts():
            kept_NB1 = kept_NB[part][:, :, None].double()
            right_NB1 = (fisher_NBB @ weight_NB[part][:, :, None].double()) * kept_NB1
            system_NBB = fisher_NBB * kept_NB1 * kept_NB1.mT + torch.diag_embed(1 - kept_NB1[..., 0])
            best_NB[part] = torch.cholesky_solve(right_NB1, _cholesky(system_NBB))[..., 0].to(weight_NB.dtype)
        return best_NB

    def slope(self, change_NB: torch.Tensor) -> torch.Tensor:
        """F d."""
        return torch.bmm(self.blocks_NBB, change_NB[:, :, None])[..., 0] + self.shift * change_NB

    def steepness(self) -> torch.Tensor:
        """The largest eigenvalue of each block that is scaled to unit diagonal, N; float32."""
        found = []
        for _, fisher_NBB in self._parts():
            scale_NB = fisher_NBB.diagonal(dim1=1, dim2=2).sqrt()
            found.append(torch.linalg.eigvalsh(fisher_NBB / scale_NB[:, :, None] / scale_NB[:, None, :])[:, -1])
        return torch.cat(found).float()

    def diagonal(self) -> torch.Tensor:
        """Of F, N x B."""
        return self.blocks_NBB.diagonal(dim1=1, dim2=2) + self.shift

    def _parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The matrices of some blocks at a time, in float64."""
        step = ELEMENTS // FISHER_BLOCK**2
        for start in range(0, len(self.blocks_NBB), step):
            part = slice(start, start + step)
            fisher_NBB = self.blocks_NBB[part].double()
            fisher_NBB.diagonal(dim1=1, dim2=2).add_(self.shift)
            yield part, fisher_NBB


def _cholesky(matrix_NBB: torch.Tensor) -> torch.Tensor:
    lower_NBB: torch.Tensor
    lower_NBB, info_N = torch.linalg.cholesky_ex(matrix_NBB)
    if bool(info_N.any()):
        raise RunError("a block of the Fisher matrix is not positive definite; raise `damping`")
    return lower_NBB
