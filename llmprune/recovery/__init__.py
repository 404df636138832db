"""Training that wins quality back and keeps the zeros. A new kind is a file and a line in `KINDS`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from llmprune.methods import make_options
from llmprune.recipe import nearest
from llmprune.types import UserError

KINDS = {
    "finetune": "llmprune.recovery.finetune:Finetune",
    "lora": "llmprune.recovery.lora:Lora",
    "merge-then-mask": "llmprune.recovery.lora:MergeThenMask",
    "masked": "llmprune.recovery.masked:Masked",
    "spp": "llmprune.recovery.spp:Spp",
    "gradual": "llmprune.recovery.gradual:Gradual",
    "movement": "llmprune.recovery.movement:Movement",
    "sheared": "llmprune.recovery.sheared:Sheared",
    "compresso": "llmprune.recovery.sheared:Compresso",
    "splora": "llmprune.recovery.splora:Splora",
    "loraprune": "llmprune.recovery.loraprune:LoraPrune",
    "lorashear": "llmprune.recovery.lorashear:LoraShear",
    "apt": "llmprune.recovery.apt:Apt",
}

# Named settings: recipe keys that hold where the user leaves them open.
PRESETS: dict[str, dict[str, Any]] = {
    "distill": {"how": "finetune", "distill": {"weight": 1.0}},
    # Ma et al. 2023, arXiv:2305.11627, post_training.py
    "llm-pruner": {
        "how": "lora",
        "options": {"rank": 8, "alpha": 16.0, "dropout": 0.05},
        "data": {"seqlen": 256},
        "training": {"epochs": 2, "batch_size": 64, "learning_rate": 1e-4, "warm_up": 100},
    },
    # Ashkboos et al. 2024, arXiv:2401.15024, run_finetuning.py
    "slicegpt": {
        "how": "lora",
        "options": {"rank": 32, "alpha": 10.0, "dropout": 0.05},
        "data": {"seqlen": 1024},
        "training": {"epochs": 1, "batch_size": 3, "learning_rate": 2e-4, "warm_up": 400},
    },
}
# Kim et al. 2024, arXiv:2402.02834: LLM-Pruner's settings, after leaving out layers
PRESETS["shortened-llama"] = PRESETS["llm-pruner"]


def make_kind(name: str, options: dict[str, Any], seed: int) -> Any:
    """The kind of recovery called `name`, with its options set; raises UserError."""
    if name not in KINDS:
        raise UserError(f"unknown kind of recovery {name!r}{nearest(name, ['blockwise', *KINDS, *PRESETS])}")
    module, _, attribute = KINDS[name].partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except ImportError as error:
        raise UserError(f"{name!r} needs the package {error.name}: pip install 'llmprune[recover]'") from error
    kind = make_options(found, options, f"kind {name!r}", seed=seed)
    if (rank := getattr(kind, "rank", 1)) < 1:
        raise UserError(f"rank={rank} of kind {name!r} must be at least 1")
    return kind
