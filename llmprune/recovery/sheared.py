"""Structured masks that are learned with the weights; what comes out is a smaller plain model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from llmprune.checkpoint.slicing import Place
from llmprune.recovery.finetune import Finetune
from llmprune.recovery.gates import Gate
from llmprune.recovery.kind import Kind
from llmprune.recovery.masked import Masked
from llmprune.recovery.narrower import Narrower
from llmprune.recovery.zeros import Target, attach

# Of the ramp: the share in which all gates are open and are scored.
WARM_UP = 0.5


@dataclass
class Sheared(Narrower):
    """Sheared LLaMA (Xia et al. 2024, arXiv:2310.06694, section 2.1), all weights trained beside the gates.

    Every kv group and channel has a hard concrete gate on the columns that it feeds; multipliers of a price lead each layer
    to the same number of open ones, which falls evenly over the share `ramp` of the steps; in the rest only the weights
    move, those of the shape that was chosen. `gate_rate`: the peak rate of gates and multipliers. At the end the open gates
    go into the weights, and the others are cut out.

    Otherwise than in the paper the hidden state and the depth stay as they are; a layer pays for the gates that are open
    beyond what is due, and nothing below that; and gates do not start alike: in the first half of the ramp all are open
    and scored, and the lower the score, the nearer a gate then is to shutting. In a few hundred steps the loss alone
    tells gates too little apart: its gradient with respect to a gate of a trained model is zero but for noise.
    """

    learning_rate: ClassVar[float] = 3e-4

    ramp: float = 0.1
    gate_rate: float = 1.0
    seed: int = 0

    def trainer(self) -> Kind:
        """The kind that trains the weights themselves."""
        return Finetune()

    def prepare(self, model: PreTrainedModel, targets: list[Target]) -> nn.Module:
        places = self.planned(model, targets)
        trained = self.trainer().prepare(model, targets)
        self._gates = {place: Gate(self.units_of(place), target.kept.device) for place, target in places.items()}
        gates = {target.name: self._gates[place] for place, target in places.items()}
        attach(list(places.values()), lambda target: gates[target.name])
        self._hooks = [
            target.owner.register_forward_pre_hook(gates[target.name].watch)
            for place, target in places.items()
            if not self.units_of(place).stacked
        ]
        return trained

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        gates, multipliers = (
            [getattr(one, name) for one in self._gates.values()] for name in ("log_alpha", "multipliers")
        )
        known = {id(one) for one in (*gates, *multipliers)}
        weights = [one for one in model.parameters() if one.requires_grad and id(one) not in known]
        free = {"rate": self.gate_rate, "weight_decay": 0.0}
        return [
            {"params": weights, "scale": 1.0},
            {"params": gates, **free},
            {"params": multipliers, **free, "maximize": True},
        ]

    def penalty(self) -> torch.Tensor | float:
        return torch.stack([one.price() for one in self._gates.values()]).sum()

    def after_step(self, done: int, steps: int) -> bool:
        last = math.ceil(self.ramp * steps)
        first = max(round(WARM_UP * last), 1)
        if done > last:
            return False
        progress = 1.0 if done == last else max(done - first, 0) / (last - first)
        random = torch.Generator().manual_seed((self.seed * 2**32 + done) % 2**63)
        for place, gate in self._gates.items():
            if done <= first:
                gate.score()
            if done == first:
                gate.start()
            gate.due.fill_(1 - progress * self.due(place, 1.0) / gate.count)
            gate.open.fill_(gate.count - self.due(place, progress))
            gate.redraw(random)
            if done == last:
                gate.choose()
        return done == last

    def removed(self) -> dict[Place, list[int]]:
        return {place: gate.gone() for place, gate in self._gates.items()}

    def merge(self, targets: list[Target]) -> None:
        for one in self._hooks:
            one.remove()
        super().merge(targets)


@dataclass
class Compresso(Sheared):
    """Compresso (Guo et al. 2023, arXiv:2310.05015): the same gates, with LoRA in place of the full weights.

    `rank`, `alpha`, `targets`: of the adapters, merged at the end. The paper prices the number of parameters as a whole;
    here every layer gets the same shape.
    """

    learning_rate: ClassVar[float] = 1e-3
    trains_base: ClassVar[bool] = False

    rank: int = 8
    alpha: float = 16.0
    targets: str = "all-linear"

    def trainer(self) -> Kind:
        return Masked(self.rank, self.alpha, self.targets, self.seed)
