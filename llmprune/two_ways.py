"""A narrower model in two ways: first fewer dimensions of the hidden state, then fewer heads and channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from llmprune.methods import PRESETS, Preset, allocation_of, hidden_of
from llmprune.recipe import Recipe, validate
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
    share, preset = hidden_of(recipe), PRESETS.get(recipe.method, Preset(recipe.method))
    named = {"method": preset.method, "options": {**preset.options, **recipe.options}}
    keys = recipe.model_dump(exclude_unset=True) | named | {"allocation": allocation_of(recipe)}
    keys["width"] = {**keys.get("width", {}), "hidden": 0.0}
    then = validate(keys)
    whole = sum(one.numel() for one in model.parameters())
    amount = (
        {"ratio": share * recipe.ratio}
        if recipe.ratio is not None
        else {"params": whole - share * (whole - (recipe.params or 0))}
    )
    width = {"round_to": recipe.width.round_to, "hidden": 0.0}
    own = {"method": TURNING, "options": {}, "allocation": None, "layout": "plain", "width": width}
    first = validate(recipe.model_dump(exclude_unset=True) | own | amount)
    try:
        rotation = plan_rotation(model, config, first)
    except UserError as error:
        if recipe.width.hidden is not None:
            raise
        return TwoWays(then, alone=str(error))
    new = rotation.empty()
    if recipe.ratio is None:
        left, wanted = sum(one.numel() for one in new.parameters()), recipe.params or 0
    else:
        left, wanted = in_layers(new, rotation.stream), (1 - recipe.ratio) * in_layers(model, rotation.stream)
        then = then.model_copy(update={"ratio": 1 - wanted / left})
    if left <= wanted:
        return TwoWays(validate(keys), alone=f"{recipe.width.round_to} dimensions less are more than what should go")
    return TwoWays(then, first, rotation)
