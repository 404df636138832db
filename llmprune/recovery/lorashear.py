"""Units of width are driven to zero in periods, by half-space projection, while adapters take up what they knew."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from accelerate.utils import reduce

from llmprune.arch.units import Units
from llmprune.methods.width.choice import lowest
from llmprune.recovery.progressive import Mask, Progressive
from llmprune.recovery.splora import Sensed
from llmprune.recovery.zeros import Target
from llmprune.types import UserError

# Of the ramp: the share in which units are only scored.
WARM_UP = 0.2
# In how many periods units become redundant.
PERIODS = 4
# A unit whose weights keep less than this share of their length in a step is set to zero.
EPSILON = 0.1


class Projected(Sensed):
    """The factor f of every unit; those that are redundant (not `kept`) are on their way to zero, for good.

    `guarded`: those that may not become redundant.
    """

    guarded: torch.Tensor

    def __init__(self, units: Units, device: torch.device) -> None:
        super().__init__(units, device)
        self.register_buffer("guarded", torch.zeros(units.count, dtype=torch.bool, device=device))
        self.taken_U = torch.zeros_like(self.slope_U)

    def taken(self) -> torch.Tensor:
        """Of each unit |f dL/df|, what the loss would change by without it, to first order."""
        self.taken_U = reduce(self.slope_U, "mean")
        self.slope_U = torch.zeros_like(self.slope_U)
        return self.taken_U.abs()

    def guard(self, count: int) -> None:
        """The `count` units that cost most now stay, as many in each stratum."""
        self.guarded[lowest(-self.score, count, self.strata)] = True

    def choose(self, gone: int) -> None:
        """Make `gone` units redundant: those that are so already, and of the others the lowest scores."""
        score_U = self.score.masked_fill(self.guarded, torch.inf).masked_fill(~self.kept, -1)
        self.kept[lowest(score_U, gone, self.strata)] = False

    def project(self, left: int) -> None:
        """One step of redundant units, which must be zero in `left` steps.

        On the ray of a unit's weights w the trial step is f~ = f - dL/df - f / left, and the half-space of f w holds it while
        f~ >= EPSILON f.
        """
        slope_U = self.taken_U / self.factor.clamp_min(torch.finfo(torch.float32).tiny)
        trial_U = (self.factor * (1 - 1 / left) - slope_U).clamp_max(1)
        trial_U = torch.where(trial_U >= EPSILON * self.factor, trial_U, 0.0) * (left > 1)
        self.factor.copy_(torch.where(self.kept | (self.factor == 0), self.factor, trial_U))


@dataclass
class LoraShear(Progressive):
    """LoRAShear (Chen et al. 2023, arXiv:2310.18356): LoRA half-space projected gradient (LHSPG) on groups of structures.

    After a warm-up of adapters alone, units become redundant in four periods over the `ramp`, those with the lowest
    saliency first, and for good; within its period a unit is driven to zero by gradient steps with a growing pull and
    a half-space projection, while the adapters of the others learn what it did. `protect`: the share of the units of each
    layer, those that cost most when the warm-up ends, that may not go.

    What the paper leaves open, or what a plain class with one width for all layers does not allow, is done so: saliency is
    the moving average of the loss's first-order change with a unit; base weights are frozen, so that a unit can only move
    along its own weights, with a factor; the pull is such that the factor is zero when its period ends; the analysis of what
    may go is by the same saliency within each layer, not by loss with whole groups of nodes left out, and so spares no whole
    layers; and the training goes on with the same text, not with one that is chosen anew by what was lost.
    """

    protect: float = 0.1

    def check(self, targets: list[Target]) -> None:
        super().check(targets)
        if not 0 <= self.protect <= 1 - self.ratio:
            raise UserError(
                f"protect={self.protect}: at most {1 - self.ratio:g} of the units can stay with ratio={self.ratio}"
            )

    def mask(self, units: Units, target: Target) -> Mask:
        return Projected(units, target.kept.device)

    @torch.no_grad()
    def after_step(self, done: int, steps: int) -> bool:
        last = math.ceil(self.ramp * steps)
        first = min(math.ceil(WARM_UP * last), last - 1)
        if done > last:
            return False
        # of the step that comes next, and of the last of its period
        period = min((done - first) * PERIODS // (last - first), PERIODS - 1)
        end = first + math.ceil((period + 1) * (last - first) / PERIODS)
        for place, mask in self.masks.items():
            assert isinstance(mask, Projected)
            mask.score.lerp_(mask.taken(), 1 - self.memory)
            if done == first:
                stay = mask.count - self.due(place, 1.0)
                mask.guard(min(round(self.protect * mask.count / mask.strata) * mask.strata, stay))
            if done >= first:
                mask.choose(self.due(place, (period + 1) / PERIODS))
                mask.project(max(end - done, 1))
        return False
