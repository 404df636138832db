"""What each kind of recovery wins back, and what it costs: model x amount x kind.

Pruning: 64 x 256 tokens of the model's calibration text, seed 0. Recovery: the same text, or the instruction data that the
kind names, the last 15 % held out for the choice of the best weights. The evaluation text is read only at the end, in windows of 256 tokens, float32; BLiMP: the 300
pairs of `depth.py`. A figure that an earlier run of this script recorded is kept, so that long records can be made in
several sittings of --cells figures each; --again measures anew.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record
from depth import blimp
from quality import MODELS, Text, perplexity, text_of

import llmprune

AMOUNTS: dict[str, dict[str, Any]] = {
    "wanda 50 %": {"method": "wanda", "sparsity": 0.5},
    "wanda 2:4": {"method": "wanda", "pattern": "2:4"},
    "wanda 70 %": {"method": "wanda", "sparsity": 0.7},
    "depth 1 of 6": {"method": "shortgpt", "drop_layers": 1},
    "depth 2 of 6": {"method": "shortgpt", "drop_layers": 2},
    "width 25 %": {"method": "group-obs", "ratio": 0.25},
}
# Kinds that make the dense model narrower themselves, as much as the amount says.
LEARNED = ("sheared", "compresso", "loraprune", "lorashear", "splora", "apt")
# What Wanda's masks are set beside: the solver that moves the weights it keeps.
REFERENCES = {"wanda 50 %": "sparsegpt", "wanda 2:4": "sparsegpt", "wanda 70 %": "sparsegpt"}
SPARSE = ("blockwise", "distill", "finetune", "masked", "spp", "merge-then-mask")
# The peak rates: ten times what suits large models, since these have 3 M weights; none was searched for.
RATES = {"finetune": 1e-3, "distill": 1e-3, "masked": 3e-3, "merge-then-mask": 3e-3, "lora": 3e-3, "spp": 1e-2,
         "sheared": 1e-3, "compresso": 3e-3, "loraprune": 3e-3, "lorashear": 3e-3, "splora": 3e-3,
         "apt": 3e-3}  # fmt: skip
# Instruction data, whose responses alone are learnt: a kind is `KIND on NAME`.
INSTRUCT = {"conversations": "synthetic_conversations_1k.jsonl", "gsm8k": "gsm8k_train.jsonl"}
KINDS = {**dict.fromkeys(("wanda 50 %", "wanda 2:4", "wanda 70 %"), (*SPARSE, *(f"masked on {one}" for one in INSTRUCT))),
         **dict.fromkeys(("depth 1 of 6", "depth 2 of 6"), ("lora", "distill", "finetune", *(f"lora on {one}" for one in INSTRUCT))),
         "width 25 %": ("lora", "distill", "finetune", *(f"lora on {one}" for one in INSTRUCT), *LEARNED)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["tales-llama", "mix-qwen3"])
    parser.add_argument("--amounts", nargs="*", default=list(AMOUNTS))
    parser.add_argument("--kinds", nargs="*", default=None, help="all that the amount can have by default")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--cells", type=int, default=None, help="stop after so many new figures")
    parser.add_argument("--again", action="store_true")
    arguments = parser.parse_args()
    results: dict[str, Any] = {} if arguments.again else record.load("recover").get("results", {})
    cells = [
        (name, amount, kind)
        for amount in arguments.amounts
        for name in arguments.models
        for kind in KINDS[amount]
        if arguments.kinds is None or kind in arguments.kinds
        if kind not in results.get(name, {}).get(amount, {}).get("kinds", {})
    ]
    left = len(cells)
    for (name, amount), group in itertools.groupby(cells[: arguments.cells], key=lambda cell: cell[:2]):
        for kind in measured(results, name, amount, [kind for *_, kind in group], arguments.steps):
            left -= 1
            save(results)
            print(f"{name}, {amount}, {kind}: {left} figures left", flush=True)


def measured(results: dict[str, Any], name: str, amount: str, kinds: list[str], steps: int) -> Iterator[str]:
    """Enter what is missing of the dense model, the pruned one and its reference; then each kind, which is yielded."""
    model, text = record.SHARED / "models" / name, text_of(name)
    found = results.setdefault(name, {})
    if "dense" not in found:
        found["dense"] = perplexity(model, text.evaluation)
    cell = found.setdefault(amount, {"kinds": {}})
    with tempfile.TemporaryDirectory() as folder:
        pruned = Path(folder) / "pruned"
        prune(model, text, pruned, **AMOUNTS[amount])
        if "pruned" not in cell:
            cell["pruned"] = {**perplexity(pruned, text.evaluation), "blimp": blimp(pruned, MODELS[name])}
        if amount in REFERENCES and "reference" not in cell:
            prune(model, text, Path(folder) / "reference", **{**AMOUNTS[amount], "method": REFERENCES[amount]})
            cell["reference"] = perplexity(Path(folder) / "reference", text.evaluation)
        for kind in kinds:
            source, out = model if kind in LEARNED else pruned, Path(folder) / kind
            figures = recovered(source, out, text, kind, steps, AMOUNTS[amount])
            cell["kinds"][kind] = {**figures, "blimp": blimp(out, MODELS[name])}
            yield kind


def prune(model: Path, text: Text, out: Path, **amount: Any) -> None:
    llmprune.prune(model, out=out, calibration=text.calibration, samples=64, seqlen=256, **amount)


def recovered(pruned: Path, out: Path, text: Text, label: str, steps: int, amount: dict[str, Any]) -> dict[str, Any]:
    kind, _, instruct = label.partition(" on ")
    data = f"file:{record.SHARED / 'data' / 'instruct' / INSTRUCT[instruct]}" if instruct else text.calibration
    settings: dict[str, Any] = {} if kind == "blockwise" else {
        "steps": steps, "batch_size": 8, "learning_rate": RATES[kind], "training.evaluate_every": max(1, steps // 4)
    }  # fmt: skip
    if kind in LEARNED:
        settings["ratio"] = amount["ratio"]
    wall, cpu = time.perf_counter(), time.process_time()
    result = llmprune.recover(
        pruned,
        out=out,
        how=kind,
        data=data,
        seqlen=256,
        **settings,
    )
    took = {"minutes": (time.perf_counter() - wall) / 60, "cpu_minutes": (time.process_time() - cpu) / 60}
    entry = result.report["recovery"][-1]
    trained = {key: entry[key] for key in ("steps", "best_step", "held_out", "trained") if key in entry}
    return {**perplexity(out, text.evaluation), **took, **trained, "settings": settings}


def save(results: dict[str, Any]) -> None:
    rows = []
    for name, found in results.items():
        dense = found["dense"]["ppl"]
        for amount, cell in found.items():
            if amount == "dense":
                continue
            pruned = cell["pruned"]["ppl"]
            if "reference" in cell:
                rows.append([f"{name} ({dense:.3f})", amount, f"({REFERENCES[amount]} instead)", f"{pruned:.3f}",
                             f"{cell['reference']['ppl']:.3f}", won(dense, pruned, cell["reference"]["ppl"]), *[""] * 6])  # fmt: skip
            for kind, one in cell["kinds"].items():
                rows.append([f"{name} ({dense:.3f})", amount, kind, f"{pruned:.3f}", f"{one['ppl']:.3f}",
                             won(dense, pruned, one["ppl"]), held_out(one), share(cell["pruned"]), share(one), str(one.get("steps", "–")),
                             f"{one['cpu_minutes']:.1f}", f"{one['minutes']:.1f}"])  # fmt: skip
    note = (
        "\nPerplexity on at most 120 windows of 256 tokens of the evaluation text, float32. Pruned with 64 x 256 tokens of the "
        "model's calibration text, seed 0; recovered on the same text, or on the instruction data named, 256 tokens a "
        "sequence, 8 sequences a step, the last 15 % held out for the choice of the best weights. Won back: share of the "
        "gap between the pruned and the dense model; kinds that make the dense model narrower themselves are set beside "
        "the same gap. Held out: perplexity of what was held out (of responses, for instruction data), before and after. "
        "BLiMP: of the pruned model, then of the recovered one; 300 pairs, so 3 % either way is chance. CPU min are "
        "minutes of processor time, min is what a clock on the wall said; other work shared the machine and lengthened "
        "both. Rates and steps of each run: recover.json.\n"
    )
    saved = {"environment": record.environment("accelerate", "peft"), "protocol": note.strip(), "results": results}
    heads = [
        "model (dense)",
        "amount",
        "kind",
        "pruned",
        "recovered",
        "won back",
        "held out",
        "BLiMP",
        "then",
        "steps",
        "CPU min",
        "min",
    ]
    record.save("recover", saved, record.table(heads, rows) + note)


def share(found: dict[str, Any]) -> str:
    """The accuracy on BLiMP; figures of earlier versions of this script have none."""
    return f"{found['blimp']:.1%}" if "blimp" in found else "–"


def held_out(found: dict[str, Any]) -> str:
    return "{before:.2f} → {stored:.2f}".format(**found["held_out"]) if "held_out" in found else "–"


def won(dense: float, pruned: float, after: float) -> str:
    return f"{(pruned - after) / (pruned - dense):.1%}"


if __name__ == "__main__":
    main()
