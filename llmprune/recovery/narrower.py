"""What the kinds have in common that learn which units of width go: the shape in the end, and the cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.arch.units import Units
from llmprune.checkpoint.slicing import Place, Slicing
from llmprune.recipe import Recipe, Width
from llmprune.recovery.kind import Kind
from llmprune.recovery.zeros import Target
from llmprune.types import UserError
from llmprune.width_plan import WidthPlan, plan_width


@dataclass
class Narrower(Kind):
    """Kinds that end as a smaller plain model.

    `ratio`: the share of the layers' parameters that goes; `units`: kinds that may go, as "kv-group,channel". Every layer
    loses as many units as a width method takes out for the same amount. `ramp`: the share of the steps after which the
    shape is that of the end.
    """

    keeps_zeros: ClassVar[bool] = False
    shards: ClassVar[bool] = False  # units are compared over whole matrices

    ratio: float = 0.0
    units: str = ""
    ramp: float = 0.5

    def check(self, targets: list[Target]) -> None:
        if not self.ratio:
            raise UserError("say how much of the layers' parameters goes: --set ratio=0.25")
        if not 0 < self.ratio < 1:
            raise UserError(
                f"ratio={self.ratio} must lie between 0 and 1: the share of the layers' parameters that goes"
            )
        if not 0 < self.ramp <= 1:
            raise UserError(f"ramp={self.ramp} must lie in (0, 1]: the share of the steps in which units go")

    def planned(self, model: PreTrainedModel, targets: list[Target]) -> dict[Place, Target]:
        """The matrix through which the units of each place write that is to lose some; raises UserError."""
        units = [one.strip() for one in self.units.split(",") if one.strip()]
        recipe = Recipe(model="", method=type(self).__name__.lower(), ratio=self.ratio, width=Width(units=units))
        self._plan: WidthPlan = plan_width(model, model.config, recipe)
        self._due = {place: count for place, count in self._plan.asked.spread({}).items() if count}
        by_name = {target.name: target for target in targets}
        found = {}
        for place in self._due:
            writer = self.units_of(place).writer
            if writer is None:
                raise UserError(
                    f"units={place[1]}: they are not the inputs of one matrix, where training could mask them; name "
                    "kv-group, query-head, channel or expert-channel"
                )
            found[place] = by_name[writer.name]
        return found

    def units_of(self, place: Place) -> Units:
        return self._plan.asked.units[place]

    def due(self, place: Place, progress: float) -> int:
        """How many units of a place are gone when `progress` (0 to 1) of its loss is due."""
        strata = self.units_of(place).strata
        return int(progress * self._due[place] / strata) * strata

    def settled(self, done: int, steps: int) -> bool:
        return done >= self.ramp * steps

    def removed(self) -> dict[Place, list[int]]:
        """The units that go in the end."""
        raise NotImplementedError

    def merge(self, targets: list[Target]) -> None:
        self._removed = self.removed()
        super().merge(targets)

    def cut(self) -> tuple[WidthPlan, Slicing]:
        return self._plan, self._plan.sliced(self._removed)


class OnColumns(nn.Module):
    """Says which of the U units that write through a matrix owns each of its input columns."""

    unit_I: torch.Tensor  # of experts E x I: each has columns of its own

    def __init__(self, units: Units, device: torch.device) -> None:
        super().__init__()
        assert units.writer is not None and units.columns_UN is not None
        self.count, self.strata, self._input_axis = units.count, units.strata, units.writer.input_axis
        owners = units.strata if units.stacked else 1
        unit_EI = torch.empty(owners, units.columns_UN.numel() // owners, dtype=torch.int64)
        for owner, (unit_U, columns_UN) in enumerate(
            zip(torch.arange(units.count).chunk(owners), units.columns_UN.chunk(owners), strict=True)
        ):
            unit_EI[owner, columns_UN.flatten()] = unit_U.repeat_interleave(columns_UN.shape[1])
        self.register_buffer("unit_I", (unit_EI if units.stacked else unit_EI[0]).to(device), persistent=False)

    def times(self, weight: torch.Tensor, factor_U: torch.Tensor) -> torch.Tensor:
        """The matrix with every column multiplied by the factor of its unit."""
        factor_I = factor_U[self.unit_I].to(weight.dtype)
        return weight * factor_I.unsqueeze(self._output_axis(weight))

    def per_column(self, weight: torch.Tensor) -> torch.Tensor:
        """The sum of every column, I (of experts E x I)."""
        return weight.sum(self._output_axis(weight))

    def per_unit(self, value_I: torch.Tensor) -> torch.Tensor:
        """The sum of a value of every column over the columns of each unit, U."""
        return value_I.new_zeros(self.count).index_add(0, self.unit_I.flatten(), value_I.flatten())

    def _output_axis(self, weight: torch.Tensor) -> int:
        return -1 if self._input_axis < weight.dim() - 1 else -2
