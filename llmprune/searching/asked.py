"""What a search is asked: methods, amounts, on which text, and within which quality."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llmprune.methods import method_class
from llmprune.recipe import Names, Recipe, Strict, validate
from llmprune.types import UserError

# The recipe key of an amount, by the kind of method.
KEYS = {"weight": "sparsity", "depth": "drop_layers", "expert": "drop_experts"}
NO_AMOUNT: dict[str, Any] = {"sparsity": None, "pattern": "unstructured", "drop_layers": None, "drop_experts": None}
LEVELS = [f"{number / 20:g}" for number in range(1, 20)]


def _as_amounts(value: Any) -> Any:
    listed = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    return [f"{one:g}" if isinstance(one, int | float) else str(one).strip() for one in listed]


Amounts = Annotated[list[str], BeforeValidator(_as_amounts)]


class Search(Strict):
    """The section `search` of a recipe file; the section `prune` says all else about every run."""

    methods: Names = Field(default_factory=lambda: ["magnitude", "wanda", "sparsegpt"])
    amounts: Amounts = Field(
        default_factory=lambda: ["0.3", "0.5", "0.7", "2:4"],
        description="fractions, N:M patterns, numbers of layers: each method takes those that it understands",
    )
    perplexity: str = Field(description="SPEC of the text that decides")
    seqlen: int | Literal["max", "calibration"] = Field(default="calibration", description="tokens a window")
    max_windows: int | None = None
    bos: Literal["window", "text", "never"] = "window"
    sweep: bool | None = Field(
        default=None, description="every method with every amount; unless a scan or a budget alone is asked for"
    )
    scan: bool = Field(default=False, description="every method with every amount on each layer alone")
    budget: str | None = Field(default=None, description="ppl<=1.05x (times the dense model's), or ppl<=15.2")
    levels: Amounts | None = Field(default=None, description="amounts among which the budget is sought")
    latency: bool = Field(default=False, description="time every model of the sweep in turns with the dense one")
    prompt: int = 128
    new: int = 16


@dataclass(frozen=True)
class Limit:
    """A bound on perplexity: a figure, or a factor times the dense model's."""

    value: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Read `ppl<=1.05x` or `ppl<=15.2`; raises UserError."""
        match = re.fullmatch(r"\s*ppl\s*<=\s*(\d+\.?\d*|\.\d+)\s*(x?)\s*", text)
        if not match:
            raise UserError(f"budget {text!r} is not understood; write ppl<=1.05x (times dense) or ppl<=15.2")
        limit = cls(float(match[1]), bool(match[2]))
        if limit.relative and limit.value < 1:
            raise UserError(f"budget {text!r} asks for a model better than the dense one; write 1x or more")
        return limit

    def perplexity(self, dense: float) -> float:
        return self.value * dense if self.relative else self.value


def amount_keys(method: str, amount: str) -> dict[str, Any] | None:
    """The recipe keys of an amount, or None where the method's kind understands it as no amount."""
    kind = method_class(method).kind
    if ":" in amount:
        return {"pattern": amount} if kind == "weight" else None
    try:
        number = float(amount)
    except ValueError as error:
        raise UserError(f"amount {amount!r} is neither a number nor a pattern such as 2:4") from error
    if kind == "depth":
        return {"drop_layers": int(number)} if number >= 1 and number.is_integer() else None
    return {KEYS[kind]: number} if 0 < number < 1 else None


def recipe_at(base: Recipe, method: str, amount: str) -> Recipe:
    """The recipe of one point of a search."""
    return validate({**base.model_dump(), **NO_AMOUNT, "method": method, **(amount_keys(method, amount) or {})})


def understood(method: str, amounts: list[str]) -> list[str]:
    """Those of the amounts that the method takes; raises UserError if none is."""
    taken = [amount for amount in amounts if amount_keys(method, amount)]
    if not taken:
        raise UserError(
            f"{method!r} takes none of the amounts {', '.join(amounts)}: weight methods take fractions of zeros and N:M "
            "patterns, expert methods fractions of the experts, depth methods numbers of layers"
        )
    return taken


def levels_of(method: str, depth: int) -> list[str]:
    """Where a budget is sought, if the user does not say so."""
    if method_class(method).kind == "depth":
        return [str(count) for count in range(1, depth)]
    return LEVELS
