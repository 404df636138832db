"""Every pruning method by name. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple

from llmprune.methods.composed import REFINEMENTS, UPDATES, Composed
from llmprune.recipe import Recipe, nearest
from llmprune.scores import SCORES, Score
from llmprune.statistics import CURVATURE, OF_WEIGHTS
from llmprune.types import UserError

METHODS = {
    "magnitude": "llmprune.methods.weight.magnitude:Magnitude",
    "wanda": "llmprune.methods.weight.wanda:Wanda",
    "sparsegpt": "llmprune.methods.weight.sparsegpt:SparseGPT",
    "scored": "llmprune.methods.weight.scored:Scored",
    "thanos": "llmprune.methods.weight.thanos:Thanos",
    "alps": "llmprune.methods.weight.alps:Alps",
    "obc": "llmprune.methods.weight.obc:Obc",
    "dsnot": "llmprune.methods.weight.dsnot:Dsnot",
    "besa": "llmprune.methods.weight.besa:BESA",
    "sparsellm": "llmprune.methods.weight.sparsellm:SparseLLM",
    "admm": "llmprune.methods.weight.admm:Admm",
    "sds": "llmprune.methods.weight.sds:Sds",
    "losparse": "llmprune.methods.weight.losparse:LoSparse",
    "obert": "llmprune.methods.weight.obert:Obert",
    "chita": "llmprune.methods.weight.chita:Chita",
    "k-fac": "llmprune.methods.weight.k_fac:KFAC",
    "keep-first": "llmprune.methods.depth.keep_first:KeepFirst",
    "shortgpt": "llmprune.methods.depth.shortgpt:ShortGPT",
    "angular": "llmprune.methods.depth.angular:Angular",
    "sleb": "llmprune.methods.depth.sleb:SLEB",
    "blockpruner": "llmprune.methods.depth.blockpruner:BlockPruner",
    "shortened-llama": "llmprune.methods.depth.shortened_llama:ShortenedLlama",
    "llm-drop": "llmprune.methods.depth.llm_drop:LLMDrop",
    "laco": "llmprune.methods.depth.laco:LaCo",
    "replaceme": "llmprune.methods.depth.replaceme:ReplaceMe",
    "linearpatch": "llmprune.methods.depth.linearpatch:LinearPatch",
    "llm-streamline": "llmprune.methods.depth.llm_streamline:LLMStreamline",
    "group-obs": "llmprune.methods.width.obs:GroupOBS",
    "group-magnitude": "llmprune.methods.width.magnitude:GroupMagnitude",
    "wanda-sp": "llmprune.methods.width.wanda_sp:WandaSP",
    "flap": "llmprune.methods.width.flap:FLAP",
    "llm-pruner": "llmprune.methods.width.llm_pruner:LLMPruner",
    "group-fisher": "llmprune.methods.width.group_fisher:GroupFisher",
    "bonsai": "llmprune.methods.width.bonsai:Bonsai",
    "minitron": "llmprune.methods.width.minitron:Minitron",
    "thinet": "llmprune.methods.width.thinet:ThiNet",
    "k-prune": "llmprune.methods.width.k_prune:KPrune",
    "llm-surgeon-structured": "llmprune.methods.width.llm_surgeon:LLMSurgeonStructured",
    "flattengpt": "llmprune.methods.depth.flattengpt:FlattenGPT",
    "random-units": "llmprune.methods.width.random_units:RandomUnits",
    "reap": "llmprune.methods.expert.reap:REAP",
    "expert-frequency": "llmprune.methods.expert.frequency:ExpertFrequency",
    "expert-norm": "llmprune.methods.expert.norm:ExpertNorm",
    "expert-subset": "llmprune.methods.expert.subset:ExpertSubset",
    "modegpt": "llmprune.methods.width.modegpt:MoDeGPT",
    "slicegpt": "llmprune.methods.width.slicegpt:SliceGPT",
    "hc-smoe": "llmprune.methods.expert.hc_smoe:HCSMoE",
    "m-smoe": "llmprune.methods.expert.m_smoe:MSMoE",
}


class Preset(NamedTuple):
    """A named composition: what the recipe's keys of the same names are where it leaves them open.

    `options`: the method's own, where the recipe does not set them. `hidden`: that of the recipe's `width`.
    """

    method: str
    refine: str | None = None
    update: str | None = None
    retarget: float = 0.0
    reconstruct: int = 0
    allocation: str = "uniform"
    options: Mapping[str, Any] = MappingProxyType({})
    paper: str | None = None
    hidden: float = 0.0


PRESETS = {
    "auto": Preset("admm", retarget=0.75, reconstruct=3),
    "auto-fast": Preset("admm", retarget=0.75, options={"iterations": 20, "mask_iterations": 16, "every": 4}),
    "ria": Preset("scored", options={"score": "ria"}, paper="openreview:Tr0lPx9woF"),
    "wanda-adaptive": Preset("scored", options={"score": "wanda-adaptive"}, paper="arXiv:2306.11695"),
    "activation": Preset("scored", options={"score": "activation"}),
    "slice-obs": Preset("group-obs", allocation="balanced", hidden=0.5),
    "ziplm": Preset("group-obs", options={"stream": "dense"}),
    "slimgpt": Preset("group-obs", paper="arXiv:2412.18110"),
    "osscar": Preset("group-obs", paper="arXiv:2403.12983"),
    "mini-gpts": Preset("minitron", paper="arXiv:2312.12682"),
    "random": Preset("scored", options={"score": "random"}),
    "fisher": Preset("scored", allocation="global", options={"score": "fisher"}, paper="Optimal Brain Damage (1989)"),
    "taylor": Preset("scored", allocation="global", options={"score": "taylor"}, paper="arXiv:1906.10771"),
    "snip": Preset("scored", allocation="global", options={"score": "taylor"}, paper="arXiv:1810.02340"),
    "lm": Preset("scored", allocation="global", options={"score": "taylor"}, paper="arXiv:2006.12421"),
    "qm": Preset("scored", allocation="global", options={"score": "quadratic"}, paper="arXiv:2006.12421"),
    "grasp": Preset("scored", allocation="global", options={"score": "grasp"}, paper="arXiv:2002.07376"),
    "synflow": Preset("scored", allocation="global", options={"score": "synflow"}, paper="arXiv:2006.05467"),
    "llm-surgeon": Preset("k-fac", allocation="global"),
    "gblm": Preset("scored", options={"score": "gblm"}, paper="arXiv:2311.04902"),
    "pruner-zero": Preset("scored", options={"score": "pruner-zero"}, paper="arXiv:2406.02924"),
    "wanda++": Preset("scored", reconstruct=3, options={"score": "regional"}, paper="arXiv:2503.04992"),
}


KINDS = ("weight", "width", "depth", "expert")  # as they are listed


def epochs_of(recipe: Recipe) -> int:
    """How often a recipe has each layer fitted to its dense output, over all batches."""
    preset = PRESETS.get(recipe.method)
    by_default = preset.reconstruct if preset else 0
    return by_default if recipe.reconstruct is None else recipe.reconstruct


def allocation_of(recipe: Recipe) -> str:
    """How a recipe spreads its amount; an N:M pattern leaves nothing to spread unless it is asked for."""
    if recipe.allocation is not None:
        return recipe.allocation
    preset = PRESETS.get(recipe.method)
    return preset.allocation if preset and recipe.pattern == "unstructured" else "uniform"


def hidden_of(recipe: Recipe) -> float:
    """The share of what goes that the hidden state loses before a width method takes the rest.

    A preset's share is not for a recipe that names units, or layers that keep their width.
    """
    width = recipe.width
    if width.hidden is not None:
        return width.hidden
    preset = PRESETS.get(recipe.method)
    return preset.hidden if preset and not (width.units or width.protect_first or width.protect_last) else 0.0


def score_of(method: Any) -> Score:
    """The score by which a method's weights compare over the whole model: its own if that is of the loss, else |w|."""
    method = method.method if isinstance(method, Composed) else method
    score: Score = getattr(method, "by", SCORES["magnitude"])
    return score if score.needs <= OF_WEIGHTS or CURVATURE in score.needs else SCORES["magnitude"]


def method_of(recipe: Recipe) -> Any:
    """What a recipe asks for, steps before and after included; raises UserError."""
    preset = PRESETS.get(recipe.method, Preset(recipe.method))
    method = make_method(preset.method, {**preset.options, **recipe.options}, seed=recipe.seed)
    if method.kind != "weight":
        return method
    refine = preset.refine if recipe.refine is None else recipe.refine
    update = preset.update if recipe.update is None else recipe.update
    strength = preset.retarget if recipe.retarget is None else recipe.retarget
    for key, value, known in (("refine", refine, REFINEMENTS), ("update", update, UPDATES)):
        if value not in (None, "none", *known):
            raise UserError(f"unknown {key} {value!r}{nearest(str(value), ['none', *known])}")
    refine, update = (None if one == "none" else one for one in (refine, update))
    if getattr(method, "bits", 0) and (refine or update or epochs_of(recipe)):
        raise UserError(
            "bits puts weights on a grid, off which refine, update and reconstruct would take them: leave out one"
        )
    if not (refine or update or strength):
        return method
    if method.output != "plain":
        raise UserError(f"{recipe.method!r} has no mask to refine or update: leave out refine, update and retarget")
    if hasattr(method, "fit_layer"):
        raise UserError(f"{recipe.method!r} works on whole layers: refine, update and retarget are not for it")
    return Composed(method, refine, update, strength)


def method_class(name: str) -> Any:
    """The class behind a method name, or behind the user's own `module:Class`; raises UserError."""
    name = PRESETS[name].method if name in PRESETS else name
    path = METHODS.get(name, name if ":" in name else "")
    if not path:
        raise UserError(f"unknown method {name!r}{nearest(name, [*METHODS, *PRESETS])}")
    module, _, attribute = path.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the method {name!r} cannot be imported: {error}") from error


def make_method(name: str, options: dict[str, Any], *, seed: int = 0) -> Any:
    """The method with its options set; raises UserError for an option that it does not have."""
    # what is no option may be a misspelt key of the recipe
    return make_options(method_class(name), options, f"method {name!r}", seed=seed, keys=Recipe.model_fields)


def make_options(cls: Any, options: dict[str, Any], what: str, *, seed: int = 0, keys: Iterable[str] = ()) -> Any:
    """An object of a dataclass whose fields are options, for `what` in words; raises UserError.

    `seed` is what a class that draws at random draws from, unless its options say otherwise. `keys`: what else a name
    that is no option may have meant.
    """
    known = {field.name: field for field in fields(cls)}
    if "seed" in known:
        options = {"seed": seed, **options}
    for key, value in options.items():
        if key not in known:
            raise UserError(f"{what} has no option {key!r}{nearest(key, [*known, *keys])}")
        default = known[key].default
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, _accepted(default)):
            raise UserError(f"option {key}={value!r} of {what} must be a {type(default).__name__}")
    try:
        return cls(**options)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error


def _accepted(default: Any) -> tuple[type, ...]:
    return (int, float) if isinstance(default, float) else (type(default),)


def describe() -> list[dict[str, Any]]:
    """One row a method or preset, kind by kind.

    Name, kind, needed statistics, patterns, output, paper, options, further steps.
    """
    rows = []
    for name in (*PRESETS, *METHODS):
        preset = PRESETS.get(name, Preset(name))
        # as a recipe would have it, so that what a preset adds is among the needs
        method = method_of(Recipe(method=name))
        options = {one.name: one.default for one in fields(method_class(preset.method))}
        rows.append(
            {
                "name": name,
                "kind": method.kind,
                "needs": sorted(method.needs),
                "patterns": list(method.patterns),
                "output": method.output,
                "paper": method.paper if preset.paper is None else preset.paper,
                "options": options | dict(preset.options),
                "steps": {
                    key: getattr(preset, key) for key in ("refine", "update", "retarget", "reconstruct", "allocation")
                },
            }
        )
    return sorted(rows, key=lambda row: KINDS.index(row["kind"]))
