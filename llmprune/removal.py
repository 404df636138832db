"""What a report says of the layers, halves and experts that a method leaves out."""

from __future__ import annotations

from typing import Any

from llmprune.checkpoint.surgery import Cutter, Surgery
from llmprune.engine.absent import modules_of
from llmprune.methods.structural import Decision
from llmprune.plan import Plan


def row(key: Any, score: float, surgery: Surgery, plan: Plan, cutter: Cutter) -> dict[str, Any]:
    """The score of a layer, of an expert or of half a layer, whether it goes, and how many parameters that saves."""
    index, part = key if isinstance(key, tuple) else (key, None)
    unit = plan.units[index]
    name, saved, gone = unit.name, 0, index in surgery.dropped
    if isinstance(part, int):
        name, gone = f"{unit.name} expert {part}", part not in surgery.experts[index]
        saved = cutter.saved(index)
    elif part is not None:
        name = f"{unit.name} {part}"
        gone = gone or part in surgery.silent.get(index, ())
        # a half that is filled with zeros saves nothing
        if index in surgery.dropped or not surgery.replaced:
            modules = [unit.module.get_submodule(one) for one in modules_of(unit.module, part)]
            saved = sum(one.numel() for module in modules for one in module.parameters())
    elif gone:
        saved = sum(one.numel() for one in unit.module.parameters())
    return {"name": name, "score": score, "dropped": gone, "saved": saved if gone else 0}


def dropped(surgery: Surgery) -> dict[str, Any]:
    kept = surgery.experts
    experts = {str(index): list(stay) for index, stay in kept.items()}
    return {"layers": list(surgery.dropped), "kept_layers": list(surgery.layers), "kept_experts": experts}


def in_words(decision: Decision, plan: Plan) -> str:
    surgery = decision.surgery
    parts = []
    if surgery.dropped:
        parts.append(f"layers {', '.join(map(str, surgery.dropped))} of {len(plan.units)} go")
    if surgery.experts:
        stay = {len(one) for one in surgery.experts.values()}
        parts.append(f"{', '.join(map(str, sorted(stay)))} experts stay in each of {len(surgery.experts)} layers")
    for half in sorted({half for halves in surgery.silent.values() for half in halves}):
        layers = [str(index) for index, halves in surgery.silent.items() if half in halves]
        parts.append(f"{half} of layers {', '.join(layers)} puts out nothing")
    if surgery.replaced:
        parts.append(f"{len(surgery.replaced)} parameters change")
    return "; ".join(parts) or "nothing changes"
