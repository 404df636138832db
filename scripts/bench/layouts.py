"""Methods whose best form needs code of its own, plain and with it: perplexity and true parameters.

Calibration: 32 sequences of 256 tokens of the model's own calibration text, seed 0. Perplexity: the first 60 windows of
256 tokens of its evaluation text, float32. Width methods take out a share of the layers' parameters; `llm-drop` leaves
out halves of layers, `hc-smoe` and `m-smoe` merge experts.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import quality
import record

import llmprune

MODELS = ("tales-llama", "mix-qwen3", "tales-qwen3moe")
WINDOWS = 60
RATIOS = (0.1, 0.2, 0.3)
PLAIN, CODE = "plain", "remote-code"
WIDTH: list[tuple[str, str, dict[str, Any]]] = [
    *[(f"{method} {ratio:.0%}", PLAIN, {"method": method, "ratio": ratio})
      for method in ("group-obs", "modegpt", "slicegpt") for ratio in RATIOS],
    *[(f"slicegpt {ratio:.0%}", CODE, {"method": "slicegpt", "ratio": ratio}) for ratio in RATIOS],
]  # fmt: skip
HALVES: list[tuple[str, str, dict[str, Any]]] = [
    (f"llm-drop {half} {count}", layout, {"method": "llm-drop", "drop_layers": count, "options": {"half": half}})
    for half in ("attention", "mlp")
    for count in (1, 2)
    for layout in (PLAIN, CODE)
]
EXPERTS: list[tuple[str, str, dict[str, Any]]] = [
    (f"{method} {share:.0%}", layout, {"method": method, "drop_experts": share})
    for method in ("hc-smoe", "m-smoe")
    for share in (0.25, 0.5)
    for layout in (PLAIN, CODE)
]


def row(name: str, layout: str, settings: dict[str, Any]) -> dict[str, Any]:
    text = quality.text_of(name)
    with tempfile.TemporaryDirectory() as folder:
        report = llmprune.prune(
            record.SHARED / "models" / name,
            out=Path(folder) / "out",
            layout=layout,
            calibration=text.calibration,
            samples=32,
            seqlen=256,
            **settings,
        ).report
        totals = report["totals"]
        return {
            "ppl": quality.perplexity(Path(folder) / "out", text.evaluation, windows=WINDOWS)["ppl"],
            "params": totals["params_after"],
            "zeros": totals["zeros"],
            "hidden": report["structure"].get("hidden"),
            "seconds": report["run"]["seconds"],
        }


def table(results: dict[str, Any]) -> str:
    parts = []
    for name, found in results.items():
        dense = found["dense"]
        parts.append(f"\n## {name}\n\nDense: perplexity {dense['ppl']:.3f}, {dense['params']:,} parameters.\n\n")
        rows = [
            [*key.split("|"), f"{one['ppl']:.3f}", f"{one['params']:,}", f"{one['zeros']:,}", f"{one['seconds']:.0f}"]
            for key, one in found.items()
            if key != "dense"
        ]
        parts.append(
            record.table(["method and amount", "layout", "perplexity", "parameters", "zeros", "seconds"], rows)
        )
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--note", default="", help="what should be known of the machine, such as what else ran")
    arguments = parser.parse_args()
    saved: dict[str, Any] = {"results": {}, **record.load("layouts")}
    saved["protocol"] = " ".join((__doc__ or "").split())
    saved["note"] = arguments.note
    saved["environment"] = record.environment()
    for name in arguments.models:
        folder = record.SHARED / "models" / name
        model = llmprune.load(folder)
        params = sum(one.numel() for one in model.parameters())
        ppl = quality.perplexity(folder, quality.text_of(name).evaluation, windows=WINDOWS)["ppl"]
        found = saved["results"][name] = {"dense": {"ppl": ppl, "params": params}}
        for label, layout, settings in EXPERTS if name == "tales-qwen3moe" else [*WIDTH, *HALVES]:
            found[f"{label}|{layout}"] = row(name, layout, settings)
            print(name, label, layout, found[f"{label}|{layout}"], flush=True)
            note = f"{arguments.note}\n" if arguments.note else ""
            record.save("layouts", saved, f"{saved['protocol']}\n\n{note}{table(saved['results'])}", echo=False)


if __name__ == "__main__":
    main()
