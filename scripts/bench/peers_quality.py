"""llmprune beside llm-compressor, Model-Optimizer and Torch-Pruning: quality, time, memory and what comes out.

    python scripts/bench/peers_quality.py                                  # everything
    python scripts/bench/peers_quality.py --models mix-qwen3 --tools llmprune     # a part; the rest of the record stays

Same calibration tokens (64 x 256 of the model's own text, seed 0, in llmprune's sampling) and same evaluation (llmprune's
perplexity, windows of 256 tokens, float32, of the checkpoint as plain transformers reload it) for all. Every run is a
fresh process in the tool's own virtual environment, built on the first call; peers compute and save in float32, which
spares them the rounding to bfloat16 that llmprune's output of these models has. A tool that cannot do a run is recorded
with its last words. Gap closed counts against llm-compressor's SparseGPT at the same amount.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peers
import processes
import quality
import record
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmprune
from llmprune.calibration import sample

MODELS = ("tales-llama", "mix-qwen3", "tales-qwen3moe")
AMOUNTS = {"50 %": "0.5", "2:4": "2:4", "70 %": "0.7"}
COMPRESSOR, OPTIMIZER, PRUNER, OWN = TOOLS = ("llm-compressor", "Model-Optimizer", "Torch-Pruning", "llmprune")
CACHE = Path.home() / ".cache" / "llmprune"
# Model-Optimizer needs requests, though it does not declare it; transformers 5.14 is the newest that its extra for language
# models allows.
PINS = {
    "peers": peers.PINS,
    "peers-more": {
        "torch": "2.13.0",
        "transformers": "5.14.1",
        "requests": "2.34.2",
        "nvidia-modelopt": "0.47.0",
        "torch-pruning": "1.6.1",
    },
}
ENVS = {COMPRESSOR: "peers", OPTIMIZER: "peers-more", PRUNER: "peers-more"}
# What Torch-Pruning prunes, first as in its example for language models. Ratios at which about a fifth of the layers'
# parameters goes from the models here.
WIDTHS = {
    "hidden size, heads, channels": {"hidden": True, "heads": True, "ratio": 0.1, "round_to": 4},
    "hidden size, channels": {"hidden": True, "heads": False, "ratio": 0.125, "round_to": 4},
    "channels": {"hidden": False, "heads": False, "ratio": 0.28125, "round_to": 8},
}


class Run(NamedTuple):
    """What one worker is asked; `like` names a run whose number of parameters is to be met."""

    tool: str
    method: str
    amount: str
    job: dict[str, Any]
    like: str = ""

    @property
    def key(self) -> str:
        return f"{self.tool}, {self.method}, {self.amount}"


def planned() -> list[Run]:
    """Every run on a model, those that others refer to first."""
    runs = [
        Run(COMPRESSOR, method, label, {"method": method, "amount": amount, "batch_size": 8})
        for method in ("sparsegpt", "wanda")
        for label, amount in AMOUNTS.items()
    ]
    modes = [("sparse_magnitude", "2:4"), ("sparsegpt", "2:4"), ("sparsegpt", "4:8"), ("sparsegpt", "50 %")]
    runs += [
        Run(OPTIMIZER, mode, label, {"method": mode, "amount": AMOUNTS.get(label, label)}) for mode, label in modes
    ]
    runs += [
        Run(OWN, method, label, {"settings": {"method": method, **quality.AMOUNTS[label]}})
        for method in ("wanda", "sparsegpt", "auto-fast", "auto")
        for label in AMOUNTS
    ]
    for amount, job in WIDTHS.items():
        narrowed = [Run(PRUNER, score, amount, {"score": score, **job}) for score in ("magnitude", "taylor")]
        matched = [(method, f"as {PRUNER}'s {amount}") for method in ("group-magnitude", "group-obs")]
        runs += [*narrowed, *(Run(OWN, method, label, {}, like=narrowed[0].key) for method, label in matched)]
    return runs


def reloaded(folder: Path) -> dict[str, Any]:
    """What lies in an output folder, as plain transformers see it."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    misfits = [str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in found[kind]]
    pickles = [path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    return {"params": model.num_parameters(), "misfits": sorted(misfits), "pickles": sorted(pickles)}


def measured(
    run: Run, job: dict[str, Any], python: Path | str, evaluation: str, repeats: int, limit: float
) -> dict[str, Any]:
    """One row of the record, or the last words of a tool that gave up."""
    out = Path(job["out"])
    try:
        rounds = [processes.watched(python, run.tool, limit=limit, **job, **run.job) for _ in range(repeats)]
        zeros, output = processes.call(sys.executable, "zeros", out=out), reloaded(out)
        ppl = quality.perplexity(out, evaluation)["ppl"]
    except (RuntimeError, ValueError, llmprune.UserError) as error:
        if run.tool == OWN:
            raise
        return {"error": str(error).strip().splitlines()[-1]}
    return {
        "ppl": ppl,
        **zeros,
        **output,
        "seconds": statistics.median(one["seconds"]["total"] for one in rounds),
        "memory": {name: max(one["memory"][name] for one in rounds) for name in ("before", "peak")},
        "other_cores": max(one["other_cores"] for one in rounds),
        "repeats": repeats,
        "software": rounds[0]["software"],
    }


def fill(name: str, runs: list[Run], found: dict[str, Any], repeats: int, limit: float) -> Iterator[None]:
    """Make the rows of a model, and pause after each."""
    model, text = record.SHARED / "models" / name, quality.text_of(name)
    found.setdefault("dense", {"ppl": quality.perplexity(model, text.evaluation)["ppl"], **reloaded(model)})
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.json"
        tokenizer = AutoTokenizer.from_pretrained(model)
        drawn = sample(text.calibration, tokenizer, samples=64, length=256, seed=0)
        tokens.write_text(json.dumps([one.tolist() for one in drawn.sequences]))
        for number, run in enumerate(runs):
            if run.like:
                if "params" not in found.get(run.like, {}):
                    continue
                run = run._replace(job={"settings": {"method": run.method, "params": found[run.like]["params"]}})
            env = ENVS.get(run.tool)
            python = processes.build_env(CACHE / env, PINS[env]) if env else sys.executable
            job = {"model": model, "tokens": tokens, "out": f"{scratch}/{number}", "dtype": "float32"}
            found[run.key] = measured(run, job, python, text.evaluation, repeats, limit)
            yield


def cells(run: Run, row: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """A row of the table."""
    head = [run.tool, run.method, run.amount]
    if "error" in row:
        return [*head, f"failed: {row['error']}".replace("|", "\\|"), *[""] * 7]
    base, dense = found.get(f"{COMPRESSOR}, sparsegpt, {run.amount}", {}).get("ppl"), found["dense"]["ppl"]
    misfits = len(row["misfits"])
    return [
        *head,
        f"{row['ppl']:.3f}",
        f"{100 * (base - row['ppl']) / (base - dense):.1f} %" if base else "–",
        f"{row['params'] / 1e6:.3f} M",
        f"{row['sparsity']:.4f}",
        f"{row['seconds']:.1f}",
        f"{row['memory']['before'] / 2**20:.0f} / {row['memory']['peak'] / 2**20:.0f}",
        f"{row['other_cores']:.1f}",
        ", ".join([f"{misfits} keys amiss" if misfits else "plain", *row["pickles"]]),
    ]


def markdown(results: dict[str, Any], protocol: str) -> str:
    heads = ["tool", "method", "amount", "perplexity", "gap closed", "parameters", "zeros in layers", "seconds"]
    heads += ["start / peak MiB", "other cores", "output"]
    parts = [f"{protocol}\n"]
    for name, found in results.items():
        dense = found["dense"]
        parts.append(
            f"\n## {name}\n\nDense: perplexity {dense['ppl']:.3f}, {dense['params'] / 1e6:.3f} M parameters.\n\n"
        )
        rows = [cells(run, found[run.key], found) for run in planned() if run.key in found]
        parts.append(record.table(heads, rows))
    software = {
        run.tool: row["software"]
        for found in results.values()
        for run in planned()
        if "software" in (row := found.get(run.key, {}))
    }
    parts += [
        f"\n{tool}: {', '.join(f'{key} {value}' for key, value in used.items())}." for tool, used in software.items()
    ]
    return "".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--methods", nargs="*", help="of these tools (default: all)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of which the median time is kept")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a run is given up")
    parser.add_argument("--note", default="", help="what should be known of the machine, such as what else ran")
    arguments = parser.parse_args()
    runs = [
        run
        for run in planned()
        if run.tool in arguments.tools and (not arguments.methods or run.method in arguments.methods)
    ]
    saved: dict[str, Any] = {"results": {}, **record.load("peers_quality")}
    record.enter(saved)
    saved["note"] = arguments.note or saved.get("note", "")
    saved["protocol"] = " ".join((__doc__ or "").rpartition("\n\n")[2].split())
    for name in arguments.models:
        found = saved["results"].setdefault(name, {})
        for _ in fill(name, runs, found, arguments.repeats, arguments.limit):
            page = markdown(saved["results"], f"{saved['protocol']} {saved['note']}".strip())
            record.save("peers_quality", saved, page)


if __name__ == "__main__":
    main()
