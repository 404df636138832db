"""`layout=remote-code`: checkpoints that bring the code of their class, and how ours is told from a stranger's.

The code is `modeling_pruned.py` of this folder, to the letter, followed by two classes that name the model's own
class in transformers. A folder whose only code is that text byte for byte runs nothing that is not installed here
anyway, so it is loaded without being asked; for any other code the user has to say so.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmprune.checkpoint import modeling_pruned
from llmprune.types import UserError

FILE = "modeling_pruned.py"
CLASSES = '''

class Pruned{config}(Marked, transformers.{config}):
    """The configuration, with the entries of the layers."""


class Pruned{model}(Pruned, transformers.{model}):
    """The model, with its layers rebuilt."""

    config_class = Pruned{config}
'''


def own_class(thing: Any) -> type:
    """The class of transformers that a model or configuration is, or was before pruning; raises UserError if neither."""
    kind = type(thing)
    if kind.__module__.rpartition(".")[2] == Path(FILE).stem:
        kind = kind.__mro__[2]
    if not kind.__module__.startswith("transformers."):
        raise UserError(
            f"{kind.__name__} is no class of transformers itself, so layout=remote-code cannot build upon it; "
            "leave the layout plain"
        )
    return kind


def add_entries(config: Any, path: str, entries: list[dict[str, Any]]) -> None:
    """Enter into a configuration how the decoder layers at `path` differ, beside what it says of them already."""
    before = getattr(config, "pruned_layers", None) or [{} for _ in entries]
    config.pruned_path = path
    config.pruned_layers = [_merged(old, new) for old, new in zip(before, entries, strict=True)]


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    both = {key: old[key] | new[key] if isinstance(old[key], dict) else old[key] + new[key] for key in old & new.keys()}
    return {**old, **new, **both}


def add_code(folder: Path, model: PreTrainedModel) -> None:
    """Make a folder whose configuration has entries for the layers one that loads by its own code."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    assert "pruned_layers" in config
    names = own_class(model.config).__name__, own_class(model).__name__
    kind = own_class(model.config).model_type  # type: ignore[attr-defined]
    config |= {
        "model_type": modeling_pruned.PREFIX + kind,
        "architectures": [f"Pruned{names[1]}"],
        "auto_map": _auto_map(*names),
    }
    (folder / FILE).write_text(_text(*names))
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def trusted(folder: str | Path, asked: bool) -> bool:
    """Whether code in a model folder may run: the user said so, or all that there is of it is the very text that we write.

    What is answered here is handed to transformers, which runs code of tokenizers and of generation too: so no other
    Python file may be anywhere in the folder, and no other file may name code.
    """
    if asked:
        return True
    path = Path(folder)
    try:
        config = json.loads((path / "config.json").read_text())
        text = (path / FILE).read_text()
        others = [json.loads(file.read_text()) for file in path.glob("*.json") if file.name != "config.json"]
    except (OSError, ValueError, RecursionError):
        return False
    if any("auto_map" in one for one in others) or [one for one in path.rglob("*.py*") if one != path / FILE]:
        return False
    names = re.findall(r"^class Pruned(\w+)\(", text, re.MULTILINE)
    if len(names) != 2 or not isinstance(config, dict):
        return False
    return config.get("auto_map") == _auto_map(*names) and text == _text(*names)


def _text(config: str, model: str) -> str:
    return Path(modeling_pruned.__file__).read_text() + CLASSES.format(config=config, model=model)


def _auto_map(config: str, model: str) -> dict[str, str]:
    stem = Path(FILE).stem
    return {"AutoConfig": f"{stem}.Pruned{config}", "AutoModelForCausalLM": f"{stem}.Pruned{model}"}
