"""llmprune: post-training pruning of Hugging Face language models."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A wheel holds kernels/ and eval/ inside this package; a checkout holds them beside it.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

__version__ = "0.1.0"

_PUBLIC = {
    "prune": "llmprune.api",
    "recover": "llmprune.api",
    "evaluate": "llmprune.eval.evaluate",
    "run": "llmprune.workflow",
    "search": "llmprune.searching.find",
    "load": "llmprune.sparse",
    "accelerate": "llmprune.sparse",
    "save_packed": "llmprune.sparse",
    "Result": "llmprune.result",
    "Recipe": "llmprune.recipe",
    "UserError": "llmprune.types",
    "RunError": "llmprune.types",
}
__all__ = [
    "Recipe",
    "Result",
    "RunError",
    "UserError",
    "accelerate",
    "evaluate",
    "load",
    "prune",
    "recover",
    "run",
    "save_packed",
    "search",
]

if TYPE_CHECKING:
    from llmprune.api import prune, recover
    from llmprune.eval.evaluate import evaluate
    from llmprune.recipe import Recipe
    from llmprune.result import Result
    from llmprune.searching.find import search
    from llmprune.sparse import accelerate, load, save_packed
    from llmprune.types import RunError, UserError
    from llmprune.workflow import run


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


def __getattr__(name: str) -> Any:
    # Lazy, so that `import llmprune` stays cheap: transformers is loaded by the first call.
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'llmprune' has no attribute {name!r}")
