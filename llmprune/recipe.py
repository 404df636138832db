"""The recipe: everything that decides a result, in one validated object.

The command line, the Python call and a YAML file build the same `Recipe`; the resolved one is
stored beside the pruned model, and feeding it back reproduces the bytes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llmprune.types import Budget, Pattern, UserError, as_fraction


def _as_names(value: Any) -> Any:
    return [one.strip() for one in value.split(",") if one.strip()] if isinstance(value, str) else value


def _as_layers(value: Any) -> Any:
    """`"4"` is how many layers, `"5,6,7"` (or `"5,"`) which."""
    if not isinstance(value, str):
        return value
    return [one.strip() for one in value.split(",") if one.strip()] if "," in value else value


Names = Annotated[list[str], BeforeValidator(_as_names)]
Layers = Annotated[int | list[int] | None, BeforeValidator(_as_layers)]
Kind = TypeVar("Kind", bound=BaseModel)


class Strict(BaseModel):
    """Refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Calibration(Strict):
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


class Width(Strict):
    """What heads and channels may go."""

    units: Names = Field(
        default_factory=list,
        description="kv-group, query-head or key-dimension and value-dimension, channel, expert-channel, residual",
    )
    round_to: int = Field(default=8, ge=1, description="the number of channels that stay divides by this")
    protect_first: int = Field(default=0, ge=0, description="layers at the start that keep their width")
    protect_last: int = Field(default=0, ge=0, description="layers at the end that keep their width")
    hidden: float | None = Field(
        default=None, ge=0, lt=1, description="share of what goes that the hidden state loses first, by slicegpt"
    )
    generations: int = Field(default=30, ge=1, description="of allocation=evolutionary")
    offspring: int = Field(default=32, ge=1, description="candidates in each generation")
    temperature: float = Field(default=0.1, gt=0, description="of allocation=influence: higher is more even")


class Engine(Strict):
    """How the run goes; none of it is meant to change a result beyond rounding."""

    schedule: Literal["auto", "layer", "module"] = Field(
        default="auto", description="module where the dense model runs beside (retarget), else layer"
    )
    batch_size: int = Field(default=8, ge=1)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the forward passes"
    )
    reduce: Literal["sum", "ordered"] = Field(
        default="sum", description="ordered: the number of processes changes no byte; slower, and more memory"
    )


class Override(Strict):
    """Another amount for some matrices; the last override that matches counts."""

    targets: Names
    sparsity: float | None = None
    pattern: str = "unstructured"

    def budget(self) -> Budget:
        return Budget.of(self.sparsity, Pattern.parse(self.pattern))


# Keys that say which weights become zero: they mean nothing where heads, layers or experts go.
WEIGHT_KEYS = (
    *("sparsity", "pattern", "targets", "ignore", "overrides"),
    *("refine", "update", "retarget", "reconstruct"),
)
# Amounts of what is not weights.
AMOUNTS = ("drop_layers", "drop_experts", "ratio", "params")


class Recipe(Strict):
    """What to prune, by which method, how much, and on which evidence."""

    model: str = ""
    method: str = "auto"
    options: dict[str, Any] = Field(default_factory=dict, description="the method's own fields")
    refine: str | None = Field(default=None, description="how the mask is improved: swaps, dsnot, or none")
    update: str | None = Field(
        default=None, description="weights for the final mask: least-squares, exact, sparsegpt, or none"
    )
    retarget: float | None = Field(
        default=None, ge=0, le=1, description="how far to aim at the dense model's outputs, 0 to 1"
    )
    sparsity: float | None = Field(default=None, description="fraction of weights set to zero")
    pattern: str = Field(default="unstructured", description="KEEP:GROUP along the inputs, e.g. 2:4")
    permute: bool = Field(
        default=False, description="reorder inner channels first, so that an N:M pattern keeps more; computes the same"
    )
    steps: int = Field(
        default=1, ge=1, description="times the model is pruned, each more than before, calibrated anew in between"
    )
    reconstruct: int | None = Field(
        default=None, ge=0, description="times that each layer is fitted to its dense output, over all batches"
    )
    drop_layers: Layers = Field(default=None, description="how many decoder layers, or which ones, from 0")
    drop_experts: float | None = Field(default=None, description="fraction of the routed experts of every layer")
    layout: Literal["plain", "remote-code"] = Field(
        default="plain", description="remote-code may ship a modelling file, where no plain class holds the result"
    )
    ratio: float | None = Field(default=None, description="share of the decoder layers' parameters to take out")
    params: float | None = Field(default=None, description="number of parameters the model should have")
    width: Width = Field(default_factory=Width)
    allocation: str | None = Field(default=None, description="how the amount is spread over the matrices or layers")
    targets: Names = Field(default_factory=list, description="which matrices; all of the decoder layers if empty")
    ignore: Names = Field(default_factory=list)
    overrides: list[Override] = Field(default_factory=list)
    calibration: Calibration = Field(default_factory=Calibration)
    engine: Engine = Field(default_factory=Engine)
    stages: list[dict[str, Any]] = Field(
        default_factory=list, description="recipe keys of each stage, over those of the recipe, for several in a row"
    )
    seed: int = Field(default=0, ge=0, lt=2**63)
    trust_remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _usual_method(cls, data: Any) -> Any:
        """The method that goes with a structural amount, where none is named."""
        if isinstance(data, dict) and "method" not in data:
            drop = _as_layers(data.get("drop_layers"))
            if drop is not None:
                return {**data, "method": "keep-first" if isinstance(drop, list) else "shortgpt"}
            if data.get("drop_experts") is not None:
                return {**data, "method": "reap"}
            if data.get("ratio") is not None or data.get("params") is not None:
                return {**data, "method": "slice-obs"}
        return data

    def budget(self) -> Budget:
        """The amount for every matrix that no override names; raises UserError."""
        for key in AMOUNTS:
            if getattr(self, key) is not None:
                raise UserError(f"{key} is no amount for {self.method!r}, which prunes weights; give a sparsity")
        if self.layout != "plain":
            raise UserError(f"layout {self.layout!r} has no meaning for {self.method!r}, whose result is always plain")
        pattern = Pattern.parse(self.pattern)
        if pattern.structured and self.sparsity is not None:
            raise UserError(f"give either sparsity or a pattern: {self.pattern} already implies the sparsity")
        if not pattern.structured and self.sparsity is None:
            raise UserError("say how much to prune: a sparsity such as 0.5, or a pattern such as 2:4")
        return Budget.of(self.sparsity, pattern)

    def refuse(self, keys: Iterable[str], does: str) -> None:
        """Raise UserError if one of these keys is set, which has no meaning for what the method does."""
        for key in keys:
            if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                raise UserError(f"{key} has no meaning for {self.method!r}, which {does}")

    def check_share(self) -> None:
        """Whether `ratio` or `params` says how much of the width goes; raises UserError."""
        if self.ratio is not None and self.params is not None:
            raise UserError("give either ratio or params, not both: each says how much the model should lose")
        if self.ratio is None and self.params is None:
            raise UserError(
                f"say how much {self.method!r} should take out: ratio=0.25, a share of the decoder layers' parameters, "
                "or params=6e9, the number that the whole model should have"
            )
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise UserError(
                f"ratio {self.ratio} must lie between 0 and 1: it is a share of the layers' parameters"
                f"{as_fraction(self.ratio)}"
            )


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
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, RecursionError) as error:
        # a date that is none, an integer of thousands of digits, a thousand brackets
        raise yaml.YAMLError(str(error)) from error


def load_recipe(path: Path | None, settings: dict[str, Any]) -> Recipe:
    """Build a recipe from a YAML file and settings that win over it; raises UserError (see `merge_settings`)."""
    return validate(merge_settings(read_recipe(path), settings, Recipe))


def read_recipe(path: Path | None) -> dict[str, Any]:
    """The keys and values of a YAML recipe, none if there is no file; raises UserError."""
    if path is None:
        return {}
    try:
        loaded = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the recipe {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the recipe {path} is not valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"the recipe {path} must be a mapping of keys to values")
    return loaded


def merge_settings(data: dict[str, Any], settings: dict[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    """`data` with settings put in, which are named by dotted keys (`calibration.samples`).

    A key that `kind` does not have goes to its `options`. Raises UserError for a key below something that has none.
    """
    for key, value in settings.items():
        head, *rest = key.split(".")
        if not rest and head not in kind.model_fields:
            key = f"options.{key}"
        node = data
        for part in key.split(".")[:-1]:
            # a section that the file leaves empty is null
            node[part] = {} if node.get(part) is None else node[part]
            node = node[part]
            if not isinstance(node, dict):
                raise UserError(f"recipe key {key!r}: {part!r} is {node!r}, which has no keys of its own")
        node[key.split(".")[-1]] = value
    return data


def validate(data: dict[str, Any]) -> Recipe:
    """A pruning recipe from plain data; raises UserError."""
    return validated(data, Recipe)


def validated(data: dict[str, Any], kind: type[Kind]) -> Kind:
    """An object of `kind` from plain data; raises UserError for the first thing that is wrong with it."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        # what follows a key that is no section says which of its types was tried
        path = list(takewhile(lambda part: part not in ("int", "list[int]"), first["loc"]))
        where = ".".join(map(str, path))
        if first["type"] == "extra_forbidden":
            known = _keys(kind, first["loc"][:-1])
            raise UserError(f"unknown recipe key {where!r}{nearest(str(first['loc'][-1]), known)}") from error
        if first["type"] == "model_type":
            keys = ", ".join(_keys(kind, first["loc"]))
            raise UserError(
                f"recipe key {where!r} is a section with the keys {keys} (got {first['input']!r})"
            ) from error
        raise UserError(f"recipe key {where!r}: {first['msg']} (got {first['input']!r})") from error


# Keys that a stage does not take over from the recipe: they belong to one method.
OWN = ("method", "options", "sparsity", "pattern", *AMOUNTS, "width", "layout", "targets", "ignore", "overrides")


def stages_of(recipe: Recipe) -> list[Recipe]:
    """The recipe of every stage; raises UserError for a stage that is none, or amounts outside the stages."""
    if not recipe.stages:
        return _steps_of(recipe) if recipe.steps > 1 else []
    if recipe.steps > 1:
        raise UserError("steps belongs to a recipe without stages")
    # what was left open stays open, so that a stage may fit it to the memory
    base = recipe.model_dump(exclude={"stages", *OWN}, exclude_unset=True)
    fields = type(recipe).model_fields
    outside = [key for key in OWN if getattr(recipe, key) != fields[key].get_default(call_default_factory=True)]
    if outside:
        raise UserError(f"{outside[0]} belongs into one of the stages, not beside them")
    for stage in recipe.stages:
        if own := {"stages", "steps", "model"} & stage.keys():
            raise UserError(f"a stage has neither a model nor stages or steps of its own, but this one has {min(own)}")
    return [validate(_merged(base, stage)) for stage in recipe.stages]


def _steps_of(recipe: Recipe) -> list[Recipe]:
    """One recipe a step, with amounts that grow fast at first and slowly at the end.

    The cubic schedule of Zhu and Gupta 2017 (arXiv:1710.01878, eq. 1): after step t of n the sparsity is
    s (1 - (1 - t/n)^3).
    """
    if recipe.sparsity is None or recipe.overrides:
        raise UserError("steps needs a sparsity for all matrices: a pattern, or an override, has only one amount")
    shares = [1 - (1 - step / recipe.steps) ** 3 for step in range(1, recipe.steps + 1)]
    return [recipe.model_copy(update={"sparsity": recipe.sparsity * share, "steps": 1}) for share in shares]


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = {**base[key], **value} if both else value
    return merged


def nearest(name: str, known: list[str]) -> str:
    """A suggestion for a misspelt name: the nearest known one; all of them where they are few, or none is near."""
    close = difflib.get_close_matches(name, known, 1, 0.5)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return meant if close and len(known) > 30 else f"{meant} (known: {', '.join(sorted(known))})"


def _keys(kind: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at `path` (numbers are places in a list)."""
    for part in path:
        if isinstance(part, str):
            annotation = kind.model_fields[part].annotation
            inner = [one for one in (annotation, *get_args(annotation)) if isinstance(one, type)]
            kind = next(one for one in inner if issubclass(one, BaseModel))
    return list(kind.model_fields)
