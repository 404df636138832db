"""Structured masks that are learned with the weights; what comes out is a smaller plain model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.arch.units import KEY, RESIDUAL
from llmprune.checkpoint.slicing import Slicing
from llmprune.recipe import Recipe, Width
from llmprune.recovery.finetune import Finetune
from llmprune.recovery.gates import Gate
from llmprune.recovery.kind import Kind
from llmprune.recovery.masked import Masked
from llmprune.recovery.zeros import Target, attach
from llmprune.types import UserError
from llmprune.width_plan import WidthPlan, plan_width


@dataclass
class Sheared(Kind):
    """Sheared LLaMA (Xia et al. 2024, arXiv:2310.06694, section 2.1), all weights trained beside the gates.

    Every kv group and channel has a hard concrete gate on the columns that it feeds; multipliers of a price lead each layer
    to the same number of open ones, which falls evenly over the share `ramp` of the steps; in the rest only the weights
    move, those of the shape that was chosen. The numbers are those that a width method takes out for `ratio`, a share of
    the layers' parameters; `units`: kinds that may go, as "kv-group,channel". The hidden state and the depth stay as they
    are (the paper gates them too). `gate_rate`: of gates and multipliers, as a multiple of the weights' rate. At the end
    the open gates go into the weights, and the others are cut out.
    """

    learning_rate: ClassVar[float] = 3e-4
    keeps_zeros: ClassVar[bool] = False
    shards: ClassVar[bool] = False  # units are compared over whole matrices

    ratio: float = 0.0
    units: str = ""
    ramp: float = 0.5
    gate_rate: float = 500.0

    def check(self, targets: list[Target]) -> None:
        if not 0 < self.ratio < 1:
            raise UserError("say how much of the layers' parameters goes: --set ratio=0.25")
        if not 0 < self.ramp <= 1:
            raise UserError(f"ramp={self.ramp} must lie in (0, 1]: the share of the steps in which gates shut")

    def trainer(self) -> Kind:
        """The kind that trains the weights themselves."""
        return Finetune()

    def prepare(self, model: PreTrainedModel, targets: list[Target]) -> nn.Module:
        units = [one.strip() for one in self.units.split(",") if one.strip()]
        recipe = Recipe(model="", method="sheared", ratio=self.ratio, width=Width(units=units))
        self._plan: WidthPlan = plan_width(model, model.config, recipe)
        asked = self._plan.asked
        counts = {place: count for place, count in asked.spread({}).items() if count}
        if any(asked.units[place].writer is None for place in counts):
            raise UserError(
                f"units={self.units}: gates stand on what o and down read, which {KEY} and {RESIDUAL} are not"
            )
        by_name = {target.name: target for target in targets}
        places = {place: by_name[asked.units[place].writer.name] for place in counts}  # type: ignore[union-attr]
        trained = self.trainer().prepare(model, targets)
        self._gates = {place: Gate(asked.units[place], target.kept.device) for place, target in places.items()}
        gates = {target.name: self._gates[place] for place, target in places.items()}
        attach(list(places.values()), lambda target: gates[target.name])
        self._counts = {place: (asked.units[place].count, counts[place], asked.units[place].strata) for place in counts}
        return trained

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        gates, multipliers = (
            [getattr(one, name) for one in self._gates.values()] for name in ("log_alpha", "multipliers")
        )
        known = {id(one) for one in (*gates, *multipliers)}
        weights = [one for one in model.parameters() if one.requires_grad and id(one) not in known]
        free = {"scale": self.gate_rate, "weight_decay": 0.0}
        return [
            {"params": weights, "scale": 1.0},
            {"params": gates, **free},
            {"params": multipliers, **free, "maximize": True},
        ]

    def penalty(self) -> torch.Tensor | float:
        return torch.stack([one.price() for one in self._gates.values()]).sum()

    def after_step(self, done: int, steps: int) -> bool:
        progress = min(done / (self.ramp * steps), 1.0)
        for place, gate in self._gates.items():
            count, gone, strata = self._counts[place]
            gate.open.fill_(count - int(progress * gone / strata) * strata)
        chosen = self.settled(done, steps) and not all(gate.made for gate in self._gates.values())
        for gate in self._gates.values():
            gate.made.fill_(self.settled(done, steps))
        return chosen

    def settled(self, done: int, steps: int) -> bool:
        return done >= self.ramp * steps

    def merge(self, targets: list[Target]) -> None:
        self._removed = {place: gate.eval().gone() for place, gate in self._gates.items()}
        super().merge(targets)

    def cut(self) -> tuple[WidthPlan, Slicing]:
        return self._plan, self._plan.sliced(self._removed)


@dataclass
class Compresso(Sheared):
    """Compresso (Guo et al. 2023, arXiv:2310.05015): the same gates, with LoRA in place of the full weights.

    `rank`, `alpha`, `targets`: of the adapters, merged at the end. The paper prices the number of parameters as a whole;
    here every layer gets the same shape.
    """

    learning_rate: ClassVar[float] = 1e-3
    trains_base: ClassVar[bool] = False

    gate_rate: float = 150.0
    rank: int = 8
    alpha: float = 16.0
    targets: str = "all-linear"
    seed: int = 0

    def trainer(self) -> Kind:
        return Masked(self.rank, self.alpha, self.targets, self.seed)
