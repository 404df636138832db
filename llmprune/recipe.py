"""The recipe: everything that decides a result, in one validated object.

The command line, the Python call and a YAML file build the same `Recipe`; the resolved one is
stored beside the pruned model, and feeding it back reproduces the bytes.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from llmprune.types import Budget, Pattern, UserError


def _as_names(value: Any) -> Any:
    return [one.strip() for one in value.split(",") if one.strip()] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_names)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Calibration(_Strict):
    """Which text the statistics come from."""

    source: str = Field(default="demo", description="SPEC of the text")
    samples: int = Field(default=128, ge=1)
    seqlen: int = Field(default=2048, ge=2, description="tokens a sequence, cut to the model's maximum")
    all_experts: bool = Field(
        default=False, description="send every token through every expert, for the statistics alone"
    )
    unseen: Literal["magnitude", "error"] = Field(
        default="magnitude", description="what happens to an expert that no calibration token reached"
    )


class Engine(_Strict):
    """How the run goes; none of it is meant to change a result beyond rounding."""

    schedule: Literal["auto", "layer", "module"] = Field(
        default="auto", description="module where the dense model runs beside (retarget), else layer"
    )
    batch_size: int = Field(default=8, ge=1)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the forward passes"
    )


class Override(_Strict):
    """Another amount for some matrices; the last override that matches counts."""

    targets: Names
    sparsity: float | None = None
    pattern: str = "unstructured"

    def budget(self) -> Budget:
        return Budget.of(self.sparsity, Pattern.parse(self.pattern))


class Recipe(_Strict):
    """What to prune, by which method, how much, and on which evidence."""

    model: str = ""
    method: str = "sparsegpt"
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own fields")
    refine: str | None = Field(default=None, description="how the mask is improved: swaps, or none")
    update: str | None = Field(
        default=None, description="weights for the final mask: least-squares, exact, sparsegpt, or none"
    )
    retarget: float | None = Field(
        default=None, ge=0, le=1, description="how far to aim at the dense model's outputs, 0 to 1"
    )
    sparsity: float | None = Field(default=None, description="fraction of weights set to zero")
    pattern: str = Field(default="unstructured", description="KEEP:GROUP along the inputs, e.g. 2:4")
    reconstruct: int | None = Field(
        default=None, ge=0, description="times that each layer is fitted to its dense output, over all batches"
    )
    allocation: str = Field(default="uniform", description="how the amount is spread over the matrices")
    targets: Names = Field(default_factory=list, description="which matrices; all of the decoder layers if empty")
    ignore: Names = Field(default_factory=list)
    overrides: list[Override] = Field(default_factory=list)
    calibration: Calibration = Field(default_factory=Calibration)
    engine: Engine = Field(default_factory=Engine)
    seed: int = Field(default=0, ge=0, lt=2**63)
    trust_remote_code: bool = False

    def budget(self) -> Budget:
        """The amount for every matrix that no override names; raises UserError."""
        pattern = Pattern.parse(self.pattern)
        if pattern.structured and self.sparsity is not None:
            raise UserError(f"give either sparsity or a pattern: {self.pattern} already implies the sparsity")
        if not pattern.structured and self.sparsity is None:
            raise UserError("say how much to prune: a sparsity such as 0.5, or a pattern such as 2:4")
        return Budget.of(self.sparsity, pattern)


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `2:4` is text and `1e-3` a number. YAML 1.1 has 124 and text."""


_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9]\d*)$"),
    "tag:yaml.org,2002:float": re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$"),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in known if tag not in _NUMBERS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _regex in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _regex, list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """The value of a YAML text; raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def load_recipe(path: Path | None, settings: dict[str, Any]) -> Recipe:
    """Build a recipe from a YAML file and settings that win over it.

    Settings are named by dotted keys (`calibration.samples`); a key that is no recipe key goes to
    the method's options. Raises UserError with the key, its value and the nearest known name.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = read_yaml(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"the recipe {path} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"the recipe {path} is not valid YAML: {error}") from error
        if not isinstance(loaded, dict):
            raise UserError(f"the recipe {path} must be a mapping of keys to values")
        data = loaded
    for key, value in settings.items():
        head, *rest = key.split(".")
        if not rest and head not in Recipe.model_fields:
            key = f"options.{key}"
        node = data
        for part in key.split(".")[:-1]:
            # a section that the file leaves empty is null
            node[part] = {} if node.get(part) is None else node[part]
            node = node[part]
            if not isinstance(node, dict):
                raise UserError(f"recipe key {key!r}: {part!r} has no keys of its own")
        node[key.split(".")[-1]] = value
    return validate(data)


def validate(data: dict[str, Any]) -> Recipe:
    """A recipe from plain data; raises UserError for the first thing that is wrong with it."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _keys(first["loc"][:-1])
            raise UserError(f"unknown recipe key {where!r}{nearest(str(first['loc'][-1]), known)}") from error
        raise UserError(f"recipe key {where!r}: {first['msg']} (got {first['input']!r})") from error


def nearest(name: str, known: list[str]) -> str:
    """A suggestion for a misspelt name: the nearest known one, and all of them."""
    close = difflib.get_close_matches(name, known, 1, 0.5)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"{meant} (known: {', '.join(sorted(known))})"


def _keys(path: tuple[int | str, ...]) -> list[str]:
    model: Any = (
        {"calibration": Calibration, "engine": Engine, "overrides": Override}.get(str(path[0])) if path else Recipe
    )
    return list(model.model_fields) if model else []
