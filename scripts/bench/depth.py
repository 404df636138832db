"""Depth and expert pruning on the small real models: perplexity, BLiMP accuracy and time, and what scoring costs.

Calibration: 16 sequences of 256 tokens of the model's own calibration text, seed 0. Perplexity: the first 40 windows
of 256 tokens of its evaluation text. BLiMP: a fixed sample of 300 pairs, the sentence with the higher sum of log
likelihoods wins. `--cost` measures the scoring passes alone. Results of models that are not asked for stay as they are.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import quality
import record
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import llmprune
from llmprune.arch.discover import find_units
from llmprune.engine.search import WHOLE, greedy
from llmprune.engine.similarity import turns
from llmprune.engine.trunk import Trunk, token_losses
from llmprune.eval.perplexity import open_model
from llmprune.weights import Resident

PROTECTED = {"protect_first": 1, "protect_last": 1}
DEPTH: dict[str, dict[str, Any]] = {
    "keep-first": {},
    "shortgpt": {},
    "angular": {},
    "sleb": {},
    "shortened-llama ppl": PROTECTED,
    "shortened-llama taylor": {**PROTECTED, "score": "taylor"},
    "laco": {},
    "replaceme": {},
    "linearpatch": {},
    "llm-streamline": {},
    "flattengpt": {},
    "blockpruner": {},
    "llm-drop": {},
    "llm-drop joint": {"half": "joint"},
}
EXPERTS = ("reap", "expert-frequency", "expert-norm", "expert-subset", "hc-smoe", "m-smoe")
WINDOWS = 40
PAIRS = 300


def blimp(folder: Path, text: str) -> float:
    """The share of sampled pairs whose good sentence the model finds likelier; the tales are in lower case."""
    case = str.lower if text == "tales" else str
    model, tokenizer = open_model(folder, dtype="float32")
    lines = (record.SHARED / "data" / "tasks" / "blimp.jsonl").read_text().splitlines()
    right = 0
    for line in random.Random(0).sample(lines, PAIRS):
        pair = json.loads(line)
        right += likelihood(model, tokenizer, case(pair["good"])) > likelihood(model, tokenizer, case(pair["bad"]))
    return right / PAIRS


@torch.no_grad()
def likelihood(model: Any, tokenizer: Any, text: str) -> float:
    ids = torch.tensor([tokenizer(text).input_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return -float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))


def measured(folder: Path, name: str) -> dict[str, Any]:
    ppl = quality.perplexity(folder, quality.text_of(name).evaluation, windows=WINDOWS)["ppl"]
    return {"ppl": ppl, "blimp": blimp(folder, quality.MODELS[name])}


def pruned(name: str, method: str, **settings: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = llmprune.prune(
            record.SHARED / "models" / name,
            out=Path(folder) / "out",
            method=method,
            calibration=None if method == "keep-first" else quality.text_of(name).calibration,
            samples=16,
            seqlen=256,
            **settings,
        ).report
        return {
            **measured(Path(folder) / "out", name),
            "seconds": report["run"]["seconds"],
            "params": report["totals"]["params_after"] / report["totals"]["params_before"],
            "zeros": report["totals"]["zeros"] / report["totals"]["params_before"],
            "dropped": report["structure"]["dropped"],
        }


def run_model(name: str, only: list[str], found: dict[str, Any]) -> Iterator[str]:
    """Fill in the rows of a model, all or those of some methods, and give the name of each."""
    found["dense"] = measured(record.SHARED / "models" / name, name)
    yield "dense"
    if name == "tales-qwen3moe":
        for method in [one for one in EXPERTS if not only or one in only]:
            for share in (0.25, 0.5):
                found[f"{method} {share:.0%}"] = pruned(name, method, drop_experts=share)
                yield f"{method} {share:.0%}"
        return
    for label, options in [one for one in DEPTH.items() if not only or one[0] in only]:
        for count in (1, 2, 3):
            try:
                found[f"{label} {count}"] = pruned(name, label.split()[0], drop_layers=count, options=options)
                yield f"{label} {count}"
            except llmprune.UserError as error:
                print(f"{name}, {label} {count}: {error}")


def fastest(calls: dict[str, Callable[[], Any]], times: int = 7) -> dict[str, float]:
    """The least seconds of every call, in turns, so that a busy moment hits all alike."""
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(times):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


@torch.no_grad()
def cost() -> dict[str, Any]:
    """Scoring against plain forwards and against running the whole model for every candidate."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    batches = [{"input_ids": torch.randint(4096, (2, 256))} for _ in range(2)]

    def trunk() -> Trunk:
        return Trunk(model, find_units(model, head=False), batches, Resident(model))

    def loss() -> float:
        losses = [token_losses(model(**one, use_cache=False).logits, one["input_ids"]) for one in batches]
        return float(torch.cat(losses).mean())

    def naive() -> list[int]:
        """Greedy removal of two layers, a whole forward for every candidate."""
        layers, gone = list(model.model.layers), []
        for _ in range(2):
            scores = {}
            for index in (one for one in range(1, 11) if one not in gone):
                model.model.layers = torch.nn.ModuleList(
                    layer for number, layer in enumerate(layers) if number not in (*gone, index)
                )
                scores[index] = loss()
            gone.append(min(scores, key=scores.__getitem__))
        model.model.layers = torch.nn.ModuleList(layers)
        return gone

    passes = fastest(
        {
            "forward": lambda: [model(**one, use_cache=False) for one in batches],
            "cosine": lambda: turns(trunk(), 1),
            "window": lambda: turns(trunk(), 4),
        }
    )
    searching = trunk()
    start = time.perf_counter()
    ours = greedy(searching, [(index, WHOLE) for index in range(1, 11)], 2)
    ours_seconds = time.perf_counter() - start
    start = time.perf_counter()
    theirs = naive()
    naive_seconds = time.perf_counter() - start
    assert [index for index, _ in ours.removed] == theirs
    return {
        "forward_seconds": passes["forward"],
        "cosine_forwards": passes["cosine"] / passes["forward"],
        "window_of_4_forwards": passes["window"] / passes["forward"],
        "greedy_seconds": ours_seconds,
        "naive_seconds": naive_seconds,
        "greedy_layer_runs": searching.runs,
        "naive_layer_runs": 11 * 10 + 10 * 9,
    }


def table(results: dict[str, Any]) -> str:
    parts = []
    for name, found in results.items():
        dense = found["dense"]
        head = f"\n## {name}\n\nDense: perplexity {dense['ppl']:.3f}, BLiMP {dense['blimp']:.1%}.\n\n"
        rows = [
            [
                label,
                f"{one['ppl']:.3f}",
                f"{one['blimp']:.1%}",
                f"{one['params']:.1%}",
                f"{one['zeros']:.1%}",
                f"{one['seconds']:.1f}",
            ]
            for label, one in found.items()
            if label != "dense"
        ]
        heads = ["method and amount", "perplexity", "BLiMP", "parameters left", "of all: zeros added", "seconds"]
        parts.append(head + record.table(heads, rows))
    return "".join(parts)


def cost_text(found: dict[str, Any]) -> str:
    return (
        "\n## What scoring costs\n\n12 layers of width 512, 4 x 256 tokens, float32, one thread, random weights; best of 7 "
        "for the passes, in turns.\n\n"
        f"* Cosine scores of all layers: {found['cosine_forwards']:.2f} forward passes; windows of 4: "
        f"{found['window_of_4_forwards']:.2f}.\n"
        f"* Greedy removal of 2 of 10 candidates: {found['greedy_seconds']:.2f} s and {found['greedy_layer_runs']} layer "
        f"runs, with a whole forward for every candidate {found['naive_seconds']:.2f} s and {found['naive_layer_runs']}; "
        "both remove the same layers.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--methods", nargs="*", default=[], help="only these rows of the tables")
    parser.add_argument("--cost", action="store_true")
    arguments = parser.parse_args()
    saved: dict[str, Any] = {"results": {}, "cost": {}, **record.load("depth")}
    record.enter(saved)
    saved["protocol"] = " ".join((__doc__ or "").split())
    for name in arguments.models:
        found = saved["results"].setdefault(name, {})
        for label in run_model(name, arguments.methods, found):
            print(name, label, found[label], flush=True)
            save(saved)
    if arguments.cost:
        torch.set_num_threads(1)
        saved["cost"] = cost()
        save(saved)


def save(saved: dict[str, Any]) -> None:
    note = (
        f"\n{saved['protocol']}\n\n`blockpruner` and `llm-drop` count halves of layers: what no plain class can leave out is "
        "filled with zeros. `llm-drop` removes attentions only.\n"
    )
    markdown = note + table(saved["results"]) + (cost_text(saved["cost"]) if saved["cost"] else "")
    record.save("depth", saved, markdown.lstrip(), echo=False)


if __name__ == "__main__":
    main()
