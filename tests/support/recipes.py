"""Any recipe on any tiny model: drawn at random, run as a user would, and judged by what it promised."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tiny
import torch
from runner import Ran, tree
from safetensors import safe_open

MODELS = ("llama", "gpt2", "opt", "qwen3-moe", "mamba", "gemma3")
METHODS = ("magnitude", "wanda", "sparsegpt", "admm", "auto", "auto-fast", "ria", "random", "thanos", "dsnot")
WRONG: tuple[dict[str, Any], ...] = (
    {"sparsity": 1.5},
    {"pattern": "5:4"},
    {"pattern": "2:7", "sparsity": None},
    {"targets": ["no_such_matrix"]},
    {"method": "wandah"},
    {"options": {"no_such_option": 1}},
    {"allocation": "owl", "pattern": "2:4", "sparsity": None},
    {"drop_experts": 0.5},
    {"calibration": {"source": "file:/nowhere.txt"}},
)


def draw(rng: random.Random) -> dict[str, Any]:
    """A recipe for a tiny model; one in six is wrong in some way."""
    recipe: dict[str, Any] = {
        "method": rng.choice(METHODS),
        "calibration": {"source": "demo", "samples": rng.randrange(1, 5), "seqlen": rng.randrange(8, 40)},
        "engine": {"batch_size": rng.randrange(1, 4), "schedule": rng.choice(("auto", "layer", "module"))},
        "seed": rng.randrange(100),
    }
    recipe |= rng.choice(({"pattern": "2:4"}, {"pattern": "1:8"}, {"sparsity": round(rng.uniform(0, 0.95), 3)}))
    if "sparsity" in recipe and rng.random() < 0.4:
        recipe["allocation"] = rng.choice(("uniform", "owl", "global", "arithmetic", "alphapruning", "error"))
    if rng.random() < 0.2:
        recipe["ignore"] = ["re:.*layers\\.0\\..*"]
    if rng.random() < 0.2:
        recipe["engine"]["reduce"] = "ordered"
    if rng.random() < 1 / 6:
        recipe |= rng.choice(WRONG)
        recipe = {key: value for key, value in recipe.items() if value is not None}
    return recipe


def save_model(name: str, folder: Path, tokenizer: Path) -> Path:
    """The tiny model `name`, with as many rows in its embedding as the demo's tokenizer has tokens."""
    model = tiny.build(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(512)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tokenizer / file).read_bytes())
    return folder


def keeps_its_word(ran: Ran, out: Path, before: dict[str, str]) -> None:
    """0: every matrix has exactly the planned zeros. 2: nothing was written. 1: what there is can be resumed."""
    assert "Traceback" not in ran.err, ran.err
    partial = out.with_name(out.name + ".partial")
    if ran.code == 2:
        assert tree(out.parent) == before, ran.err
    elif ran.code == 1:
        assert not out.exists() and not (partial / "config.json").exists() and "--resume" in ran.err, ran.err
    else:
        assert ran.code == 0 and not partial.exists(), ran.err
        report = json.loads((out / "llmprune.json").read_text())
        zeros = count_zeros(out)
        for row in report["tensors"]:
            name = row["name"].partition("[")[0]
            assert row["achieved"] == row["planned"]
            if name == row["name"] and name in zeros:
                assert zeros[name] == row["planned"] + row["notes"].get("zeros_beyond_plan", 0), row
        assert report["totals"]["zeros"] == sum(
            row["planned"] + row["notes"].get("zeros_beyond_plan", 0) for row in report["tensors"]
        )


def count_zeros(folder: Path) -> dict[str, int]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({key: int((file.get_tensor(key) == 0).sum()) for key in file.keys()})  # noqa: SIM118
    return found
