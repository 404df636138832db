"""What every method can do to a model, and why not, from its configuration alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmprune.arch.discover import expert_blocks, expert_count, find_units
from llmprune.checkpoint.layer_lists import refuse_shared_layers
from llmprune.checkpoint.skeleton import build_skeleton, load_config
from llmprune.checkpoint.source import resolve
from llmprune.engine.gradient_store import check_gradients
from llmprune.methods import METHODS, PRESETS, hidden_of, method_of
from llmprune.narrowing import widths
from llmprune.recipe import Recipe
from llmprune.rotation_plan import plan_rotation
from llmprune.statistics import FLOW
from llmprune.two_ways import in_two_ways
from llmprune.types import UserError
from llmprune.width_plan import WidthPlan, plan_width


def check(model: str, *, ratio: float = 0.25, trust_remote_code: bool = False) -> dict[str, Any]:
    """One row a method: its kind, whether it can prune the model, and what would come out or what is in the way.

    `model`: a folder with a config.json (weights are not looked at), or a Hub id, of which the configuration alone is
    fetched. `ratio`: the share of the layers' parameters that width methods are asked to take out. Raises UserError if
    the configuration cannot be read.
    """
    source = str(resolve(model)) if Path(model).expanduser().is_dir() else model
    config = load_config(source, trust_remote_code=trust_remote_code)
    skeleton = build_skeleton(copy.deepcopy(config), torch.bfloat16, trust_remote_code=trust_remote_code)
    params = sum(one.numel() for one in skeleton.parameters())
    rows = list(_rows(skeleton, config, ratio))
    return {"model": model, "class": type(skeleton).__name__, "params": params, "ratio": ratio, "methods": rows}


def _rows(model: PreTrainedModel, config: Any, ratio: float) -> Iterator[dict[str, Any]]:
    # the same for all width methods, and the most work
    plan: WidthPlan | UserError
    try:
        plan = plan_width(model, config, Recipe(ratio=ratio, allocation="uniform"))
    except UserError as error:
        plan = error
    for name in (*PRESETS, *METHODS):
        method, alone = method_of(Recipe(method=name)), Recipe(method=name, ratio=ratio, allocation="uniform")
        try:
            if hidden_of(alone) > 0:
                what = _two_ways(model, config, alone, ratio)
            elif hasattr(method, "turn"):
                what = _rotation(model, config, Recipe(method=name, ratio=ratio))
            elif method.kind == "width":
                what = _width(model, method, plan, config, ratio)
            elif method.kind == "weight":
                what = _weights(model, name, method)
            else:
                what = {"depth": _layers, "expert": _experts}[method.kind](model)
        except UserError as error:
            yield {"name": name, "kind": method.kind, "can": False, "why": str(error)}
        else:
            yield {"name": name, "kind": method.kind, "can": True, **what}


def _weights(model: PreTrainedModel, name: str, method: Any) -> dict[str, Any]:
    units = find_units(model, head=False)
    if FLOW in method.needs:
        check_gradients(name, method.needs, model, units, torch.device("cpu"))
    matrices = [spec for unit in units for spec in unit.matrices]
    what = f"{sum(spec.count for spec in matrices):,} weights in {len(matrices)} matrices"
    return {"what": what, "output": method.output}


def _layers(model: PreTrainedModel) -> dict[str, Any]:
    refuse_shared_layers(model.config)
    return {"what": f"{len(find_units(model, head=False))} layers", "output": "plain"}


def _experts(model: PreTrainedModel) -> dict[str, Any]:
    layers = find_units(model, head=False)
    counts = [expert_count(block) for unit in layers for _, block in expert_blocks(unit.module)]
    if not counts:
        raise UserError("the model has no experts")
    return {"what": f"{max(counts)} experts in each of {len(counts)} layers", "output": "plain"}


def _width(
    model: PreTrainedModel, method: Any, plan: WidthPlan | UserError, config: Any, ratio: float
) -> dict[str, Any]:
    """In a plain class if there is one, else with code of its own if the method has units for that."""
    if isinstance(plan, UserError):
        if not method.whole:
            raise plan
        recipe = Recipe(ratio=ratio, allocation="uniform", layout="remote-code")
        plan = plan_width(model, config, recipe, method.whole)
    method.check(plan.model, plan.asked)
    slicing = plan.example()
    left = [f"{', '.join(map(str, counts))} {kind}s" for kind, counts in widths(slicing).items()]
    before = sum(one.numel() for one in model.parameters())
    after = sum(one.numel() for one in plan.model.parameters()) - slicing.parameters_removed
    what = f"{' and '.join(left)} a layer stay, {after:,} of {before:,} parameters"
    output = "remote-code" if plan.ragged else f"plain ({plan.config_of(slicing).model_type})"
    return {"what": what, "output": output, "params_after": after}


def _two_ways(model: PreTrainedModel, config: Any, recipe: Recipe, ratio: float) -> dict[str, Any]:
    """The hidden state first if a plain class holds it, then or else only what other width methods take out."""
    ways = in_two_ways(recipe, model, config)
    then = _width(model, method_of(ways.then), ways.width_plan(model, config), config, ratio)
    if ways.rotation is None:
        return then
    stays = f"{ways.rotation.width} of {ways.rotation.stream.hidden} dimensions of the hidden state"
    return {**then, "what": f"{stays}, {then['what']}"}


def _rotation(model: PreTrainedModel, config: Any, recipe: Recipe) -> dict[str, Any]:
    """In a plain class if there is one, else with code of its own."""
    try:
        plan = plan_rotation(model, config, recipe)
    except UserError:
        plan = plan_rotation(model, config, recipe.model_copy(update={"layout": "remote-code"}))
    after = sum(one.numel() for one in plan.empty().parameters())
    what = f"{plan.width} of {plan.stream.hidden} dimensions of the hidden state stay, {after:,} parameters"
    output = f"plain ({plan.config_of().model_type})" if plan.shared else "remote-code"
    return {"what": what, "output": output, "params_after": after}
