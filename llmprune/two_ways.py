"""A narrower model in two ways: first fewer dimensions of the hidden state, then fewer heads and channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from llmprune.arch.discover import parameter_count
from llmprune.methods import PRESETS, Preset, allocation_of, hidden_of
from llmprune.recipe import Recipe, Width
from llmprune.rotation_plan import RotationPlan, in_layers, plan_rotation
from llmprune.types import UserError
from llmprune.width_plan import WidthPlan, plan_width

TURNING = "slicegpt"


@dataclass(frozen=True)
class TwoWays:
    """What a recipe becomes: `first` turns the hidden state and cuts it, `then` takes out the rest; or `then` alone.

    `rotation`: what `first` will leave. `alone`: why there is no `first`.
    """

    then: Recipe
    first: Recipe | None = None
    rotation: RotationPlan | None = None
    alone: str = ""

    def width_plan(self, model: PreTrainedModel, config: Any) -> WidthPlan:
        """What will go of heads and channels, where no score has a say; `model` is the one before `first`."""
        if self.rotation is None:
            return plan_width(model, config, self.then)
        return plan_width(self.rotation.empty(), self.rotation.config_of(), self.then)


def in_two_ways(recipe: Recipe, model: PreTrainedModel, config: Any) -> TwoWays:
    """How a recipe is shared out, from the configuration alone.

    The hidden state loses the share `width.hidden` of what is asked, or the least above it that `width.round_to` lets
    go. Where that is all that is asked or more, or where a preset asks for it and no plain class has the result, heads
    and channels go alone. Raises UserError where the user asks for what cannot be.
    """
    recipe.check_share()
    preset, width = PRESETS.get(recipe.method, Preset(recipe.method)), recipe.width
    named = {"method": preset.method, "options": {**preset.options, **recipe.options}}
    alone = {"allocation": allocation_of(recipe), "width": width.model_copy(update={"hidden": 0.0})}
    then = recipe.model_copy(update=named | alone)
    turning: dict[str, Any] = {"method": TURNING, "options": {}, "allocation": None, "layout": "plain"}
    amount = _share(hidden_of(recipe), recipe, model)
    first = recipe.model_copy(update=turning | {"width": Width(round_to=width.round_to)} | amount)
    try:
        rotation = plan_rotation(model, config, first)
    except UserError as error:
        if width.hidden is not None:
            raise
        return TwoWays(then, alone=str(error))
    new = rotation.empty()
    if recipe.ratio is None:
        left, wanted = parameter_count(new), recipe.params or 0
    else:
        left, wanted = in_layers(new, rotation.stream), (1 - recipe.ratio) * in_layers(model, rotation.stream)
    if left <= wanted:
        return TwoWays(then, alone=f"{width.round_to} of its dimensions are more than all that should go")
    rest = {} if recipe.ratio is None else {"ratio": 1 - wanted / left}
    return TwoWays(then.model_copy(update=rest), first, rotation)


def _share(share: float, recipe: Recipe, model: PreTrainedModel) -> dict[str, float]:
    """The recipe key of a share of what is asked."""
    if recipe.ratio is not None:
        return {"ratio": share * recipe.ratio}
    whole = parameter_count(model)
    return {"params": whole - share * (whole - (recipe.params or 0))}
