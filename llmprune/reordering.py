"""Inner channels put in an order that suits an N:M pattern, before anything is pruned; the model computes the same."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from llmprune.allocation import Dense, Measured
from llmprune.arch.discover import Unit
from llmprune.arch.permutable import FreeInputs, free_inputs
from llmprune.arch.roles import Roles
from llmprune.plan import Plan
from llmprune.scores import SCORES
from llmprune.solvers.channel_order import channel_order, retained
from llmprune.types import Budget, Matrix, UserError


@dataclass
class Reordering:
    """Orders of free inputs by the name of the layer, and the RIA scores that a pattern keeps without and with them."""

    orders: dict[str, list[tuple[FreeInputs, torch.Tensor]]] = field(default_factory=dict)
    before: float = 0.0
    after: float = 0.0

    def apply(self, unit: Unit) -> None:
        """Give the dense weights of a loaded unit their new order, in place."""
        for free, order_N in self.orders.get(unit.name, ()):
            for slices in (free.inputs, *free.outputs):
                slices.reorder(unit.module.get_parameter(slices.parameter.removeprefix(unit.prefix)).data, order_N)

    def __str__(self) -> str:
        return (
            f"inner channels reordered: their patterns keep {self.after / (self.before or 1) - 1:.1%} more of the score"
        )


def check_reordering(model: PreTrainedModel, budget: Budget) -> None:
    """Whether `permute` means something: an N:M pattern, and a layout that is known; raises UserError."""
    if not budget.pattern.structured:
        raise UserError(
            "permute puts channels in an order that suits a pattern such as 2:4: leave it out for a sparsity"
        )
    Roles(model)


def find_orders(model: PreTrainedModel, plan: Plan, dense: Dense) -> Reordering:
    """Orders by RIA's scores on the dense model's inputs, for matrices with a pattern whose inputs are free.

    Only where whole groups lie within the inputs that may change places: a head's features, an MLP's channels.
    """
    found, free = Reordering(), free_inputs(Roles(model))
    units = plan.chosen_units()

    def look(number: int, matrices: Measured) -> None:
        unit = units[number]
        layer = next(index for index, one in enumerate(plan.units) if one is unit)
        wanted: dict[str, list[FreeInputs]] = {}
        for one in free[layer] if layer < len(free) else ():
            wanted.setdefault(one.matrix, []).append(one)
        for spec, weight_OI, stats in matrices():
            pattern = plan.budgets[spec.name].pattern
            for one in wanted.get(spec.name, ()) if pattern.keep < pattern.group else ():
                if one.count % pattern.group == 0:
                    score_OI = SCORES["ria"].of(Matrix(spec.name, weight_OI), stats)
                    # runs that share an order count as further rows
                    score_XN = score_OI[:, one.inputs.index_RN].flatten(0, 1)
                    order_N = channel_order(score_XN, pattern.keep, pattern.group).cpu()
                    found.orders.setdefault(unit.name, []).append((one, order_N))
                    found.before += retained(score_XN, pattern.keep, pattern.group)
                    found.after += retained(score_XN[:, order_N], pattern.keep, pattern.group)

    dense.measure(SCORES["ria"].needs, look)
    return found
