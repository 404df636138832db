"""One recipe file on a real model, prune to report: once undisturbed, once killed in every step and continued.

Prune: SparseGPT 2:4, 64 sequences of 256 tokens of the calibration text, seed 0. Recover: fine-tuning of the kept
weights on the same text. Evaluation: windows of 256 tokens of the evaluation text, float32. The kills are SIGKILL, a
random while after the step has begun.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import kill
import record
import yaml

MODEL, TEXT = "mix-qwen3", "web"
STEPS = ("prune", "recover", "eval pruned", "eval recovered")


def workflow(steps: int, windows: int) -> dict[str, Any]:
    text = f"file:{record.SHARED / 'data' / f'{TEXT}-calibration.txt'}"
    return {
        "prune": {
            "model": str(record.SHARED / "models" / MODEL),
            "method": "sparsegpt",
            "pattern": "2:4",
            "calibration": {"source": text, "samples": 64, "seqlen": 256},
        },
        "recover": {
            "how": "finetune",
            "data": {"source": text, "seqlen": 256},
            "training": {"steps": steps, "batch_size": 8, "evaluate_every": 25},
        },
        "eval": {
            "perplexity": [f"file:{record.SHARED / 'data' / f'{TEXT}-eval.txt'}"],
            "seqlen": 256,
            "max_windows": windows,
            "prompts": True,
        },
        "report": {},
    }


def command(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "llmprune", "run", str(recipe), "--out", str(out)]


def digests(out: Path) -> dict[str, str]:
    return {f"{name}/{file}": one for name in ("pruned", "recovered") for file, one in kill.digest(out / name).items()}


def killed(run: list[str], log: Path, step: str, delay: float) -> bool:
    """Start the run, kill it `delay` seconds after `step` begins; whether it still ran then."""
    with log.open("w") as file:
        return kill.killed(run, lambda: f"{step}: begins" in log.read_text(), delay, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(workflow(arguments.steps, arguments.windows), sort_keys=False))
        subprocess.run(command(recipe, folder / "whole"), check=True)
        kills = []
        for step in STEPS:
            delay = generator.uniform(0.5, 4)
            running = killed(command(recipe, folder / "killed"), folder / "log", step, delay)
            kills.append({"step": step, "delay_s": round(delay, 2), "running": running})
            print(kills[-1], flush=True)
        subprocess.run(command(recipe, folder / "killed"), check=True)
        expected, found = digests(folder / "whole"), digests(folder / "killed")
        journal = json.loads((folder / "whole" / "run.json").read_text())
        runs = {
            one: json.loads((folder / "whole" / one / "llmprune.json").read_text())["evaluation"]
            for one in ("pruned", "recovered")
        }
        pages = [(folder / one / "report.html").stat().st_size for one in ("whole", "killed")]
    spec = next(iter(runs["pruned"]["perplexity"]))
    dense = runs["pruned"]["baseline"]["perplexity"][spec]["ppl"]
    rows = [["dense", f"{dense:.3f}", "–", "–"]]
    for one, figures in runs.items():
        close = figures["comparison"]["perplexity"][spec]
        rows.append([one, f"{figures['perplexity'][spec]['ppl']:.3f}", f"{close['kl']:.4f}", f"{close['top1']:.1%}"])
    same = expected == found and bool(expected)
    text = record.table([MODEL, "perplexity", "KL", "same top token"], rows) + "\n"
    text += record.table(
        ["killed in", "after", "still running"],
        [[one["step"], f"{one['delay_s']} s", str(one["running"])] for one in kills],
    )
    text += f"\nContinued by the same command: {len(expected)} files of both models, same bytes: {same}.\n"
    text += (
        f"\nSparseGPT 2:4 on 64 x 256 tokens of {TEXT}-calibration.txt (seed 0); {arguments.steps} steps of 8 x 256 tokens "
        f"of the same text on the kept weights; perplexity on {arguments.windows} windows of 256 tokens of {TEXT}-eval.txt, "
        "float32. One process for each start, one thread; seconds of the undisturbed run: "
        + ", ".join(f"{name} {step['seconds']}" for name, step in journal.items())
        + ", on a machine that other work shared.\n"
    )
    results = {"kills": kills, "same": same, "files": expected, "journal": journal, "pages": pages, "evaluation": runs}
    results = json.loads(json.dumps(results).replace(str(record.SHARED), "../shared").replace(name, "OUT"))
    record.save("run", {"environment": record.environment("peft", "accelerate"), "results": results}, text)
    sys.exit(not same)


if __name__ == "__main__":
    main()
