"""What a dry run of the demo model plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runner import cli

import llmprune

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
KINDS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
ALL = [f"model.layers.{layer}.{kind}.weight" for layer in range(5) for kind in KINDS]


def plan(*options: object) -> dict[str, Any]:
    """What a dry run of the demo model answers."""
    ran = cli("prune", DEMO, "--method", "magnitude", "--dry-run", "--json", *options)
    assert ran.code == 0, ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


def having(*parts: str) -> list[str]:
    return [name for name in ALL if any(part in name for part in parts)]
