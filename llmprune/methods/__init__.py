"""Every pruning method by name. A new one is a file and a line here."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any

from llmprune.recipe import nearest
from llmprune.types import UserError

METHODS = {
    "magnitude": "llmprune.methods.weight.magnitude:Magnitude",
    "wanda": "llmprune.methods.weight.wanda:Wanda",
    "sparsegpt": "llmprune.methods.weight.sparsegpt:SparseGPT",
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
    "reap": "llmprune.methods.expert.reap:REAP",
    "expert-frequency": "llmprune.methods.expert.frequency:ExpertFrequency",
    "expert-norm": "llmprune.methods.expert.norm:ExpertNorm",
    "expert-subset": "llmprune.methods.expert.subset:ExpertSubset",
    "hc-smoe": "llmprune.methods.expert.hc_smoe:HCSMoE",
}


def method_class(name: str) -> Any:
    """The class behind a method name, or behind the user's own `module:Class`; raises UserError."""
    path = METHODS.get(name, name if ":" in name else "")
    if not path:
        raise UserError(f"unknown method {name!r}{nearest(name, list(METHODS))}")
    module, _, attribute = path.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"the method {name!r} cannot be imported: {error}") from error


def make_method(name: str, options: dict[str, Any]) -> Any:
    """The method with its options set; raises UserError for an option that it does not have."""
    cls = method_class(name)
    known = {field.name: field for field in fields(cls)}
    for key, value in options.items():
        if key not in known:
            raise UserError(f"method {name!r} has no option {key!r}{nearest(key, list(known))}")
        default = known[key].default
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, _accepted(default)):
            raise UserError(f"option {key}={value!r} of method {name!r} must be a {type(default).__name__}")
    try:
        return cls(**options)
    except ValueError as error:
        raise UserError(f"method {name!r}: {error}") from error


def _accepted(default: Any) -> tuple[type, ...]:
    return (int, float) if isinstance(default, float) else (type(default),)


def describe() -> list[dict[str, Any]]:
    """One row a method: name, kind, statistics it needs, patterns, kind of output, paper, options."""
    rows = []
    for name in METHODS:
        cls = method_class(name)
        options = {one.name: one.default for one in fields(cls)}
        rows.append(
            {
                "name": name,
                "kind": cls.kind,
                "needs": sorted(cls.needs),
                "patterns": list(cls.patterns),
                "output": cls.output,
                "paper": cls.paper,
                "options": options,
            }
        )
    return rows
