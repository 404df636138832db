"""Width pruning on the small real models: every method at 10, 20 and 30 % of the decoder layers' parameters.

Calibration: 32 sequences of 256 tokens of the model's own calibration text, seed 0. Perplexity before any recovery: the
first 120 windows of 256 tokens of its evaluation text, float32. Models are pruned in memory. Every method runs twice:
"equal shape" takes channels alone, the same number in every layer, so that all methods are compared at exactly the same
parameters; "as published" spreads the amount over kv groups and channels as the method does by itself (heads are coarse
on models with two kv groups; parameters that stay as zeros, where layers differ in width, do not count as left).
Options were chosen on the last 15 % of the calibration text. Rows that are not asked for stay as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import record
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.eval.perplexity import measure

MODELS = {"tales-llama": "tales", "mix-qwen3": "web"}
RATIOS = (0.1, 0.2, 0.3)
CHANNELS: dict[str, Any] = {"width": {"units": ["channel"]}}
FULL = "least-squares"
# label: method, its options, and how it spreads the amount itself.
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "default (group-obs)": ("group-obs", {}, {"allocation": "balanced"}),
    "random": ("random-units", {}, {}),
    "magnitude L1": ("group-magnitude", {"norm": 1}, {}),
    "magnitude L2": ("group-magnitude", {}, {}),
    "llm-pruner vector": ("llm-pruner", {"taylor": "vector"}, {}),
    "llm-pruner first": ("llm-pruner", {}, {}),
    "llm-pruner second": ("llm-pruner", {"taylor": "second"}, {}),
    "llm-pruner mixed": ("llm-pruner", {"taylor": "mixed"}, {}),
    "wanda-sp": ("wanda-sp", {}, {}),
    "wanda-sp least-squares": ("wanda-sp", {"compensate": FULL}, {}),
    "flap": ("flap", {}, {"allocation": "pooled"}),
    "flap without bias": ("flap", {"compensate": "none"}, {"allocation": "pooled"}),
    "flap least-squares": ("flap", {"compensate": FULL}, {"allocation": "pooled"}),
    "minitron": ("minitron", {}, {}),
    "thinet": ("thinet", {}, {}),
    "group-fisher": ("group-fisher", {}, {}),
    "group-fisher least-squares": ("group-fisher", {"compensate": FULL}, {}),
    "group-obs rising": ("group-obs", {}, {"allocation": "rising"}),
    "bonsai": ("bonsai", {"masks": 64, "sequences": 8}, {}),
}


def measured(model: Any, tokenizer: Any, text: str) -> float:
    spec = f"file:{record.SHARED / 'data' / f'{text}-eval.txt'}"
    return float(measure(model, tokenizer, spec, seqlen=256, max_windows=120, batch_size=16)["ppl"])


def run(
    name: str, label: str, ratio: float, settings: dict[str, Any], like: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """One row; None where the model's class cannot have what the method adds. `like`: a row that may be the same."""
    method, options, _ = METHODS[label]
    folder, text = record.SHARED / "models" / name, MODELS[name]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked: dict[str, Any] = {
        "tokenizer": tokenizer,
        "method": method,
        "ratio": ratio,
        "calibration": f"file:{record.SHARED / 'data' / f'{text}-calibration.txt'}",
        "samples": 32,
        "seqlen": 256,
        "options": options,
        **settings,
    }
    start = time.perf_counter()
    try:
        planned = llmprune.prune(model, dry_run=True, **asked).report["structure"].get("widths", {})
        if like and planned == {"kv-group": [model.config.num_key_value_heads], **like["widths"]}:
            return like
        result = llmprune.prune(model, **asked)
    except llmprune.UserError as error:
        print(f"{name} {label} {ratio}: {error}", flush=True)
        return None
    seconds = time.perf_counter() - start
    totals = result.report["totals"]
    return {
        "ppl": measured(result.model.eval(), tokenizer, text),
        "params": totals["params_after"] - totals["zeros"],
        "widths": result.report["structure"]["widths"],
        "seconds": seconds,
    }


def rows_of(name: str, labels: list[str], found: dict[str, Any]) -> None:
    """Fill in the rows of a model."""
    if "dense" not in found:
        folder = record.SHARED / "models" / name
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        params = sum(one.numel() for one in dense.parameters())
        found["dense"] = {"ppl": measured(dense, AutoTokenizer.from_pretrained(folder), MODELS[name]), "params": params}
    for label in labels:
        for kind, settings in (("equal shape", CHANNELS), ("as published", METHODS[label][2])):
            rows = found.setdefault(kind, {}).setdefault(label, {})
            for ratio in RATIOS:
                like = None if kind == "equal shape" else found["equal shape"][label][str(ratio)]
                rows[str(ratio)] = run(name, label, ratio, settings, like)
                print(name, kind, label, ratio, rows[str(ratio)], flush=True)


def cell(row: dict[str, Any] | None) -> str:
    return "refused" if row is None else f"{row['ppl']:.2f} ({row['params'] / 1e6:.3f} M, {row['seconds']:.0f} s)"


def markdown(results: dict[str, Any], protocol: str) -> str:
    parts = [f"{protocol}\n"]
    for name, found in results.items():
        dense = found["dense"]
        parts.append(
            f"\n## {name}\n\nDense: perplexity {dense['ppl']:.2f}, {dense['params'] / 1e6:.3f} M parameters.\n"
        )
        for kind in ("equal shape", "as published"):
            rows = sorted(found[kind].items(), key=lambda one: (one[1]["0.3"] or {"ppl": float("inf")})["ppl"])
            cells = [[label, *(cell(row[str(ratio)]) for ratio in RATIOS)] for label, row in rows]
            heads = [f"{kind}", *(f"{ratio:.0%}" for ratio in RATIOS)]
            parts.append("\n" + record.table(heads, cells))
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--note", default="", help="what should be known of the machine, such as what else ran")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stored = record.FOLDER / "width.json"
    saved: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {"results": {}}
    saved["protocol"] = " ".join((__doc__ or "").split())
    for name in arguments.models:
        for label in arguments.methods:
            rows_of(name, [label], saved["results"].setdefault(name, {}))
            saved["environment"] = record.environment()
            commands = [*saved.get("commands", []), saved["environment"]["command"]]
            saved["commands"] = list(dict.fromkeys(commands))
            saved["environment"]["command"] = "; ".join(saved["commands"])
            saved["note"] = arguments.note or saved.get("note", "")
            text = markdown(saved["results"], f"{saved['protocol']} {saved['note']}".strip())
            record.save("width", saved, text)


if __name__ == "__main__":
    main()
