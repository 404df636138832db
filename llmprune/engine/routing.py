"""Which tokens went to which expert, from the call of an expert block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmprune.engine.suspend import Call
from llmprune.types import RunError


@dataclass(frozen=True)
class Routed:
    """A call of an expert block: hidden states (tokens x width), the experts chosen and their gates (tokens x k).

    The gates are those that the model's own router gave: softmax or sigmoid, renormalised or not, scaled.
    """

    block: nn.Module
    hidden_TD: torch.Tensor
    chosen_TK: torch.Tensor
    gates_TK: torch.Tensor

    @classmethod
    def of(cls, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routed | None:
        """None where the block is not told an index and a gate for every choice."""
        chosen_TK = routing(args, kwargs)
        if chosen_TK is None:
            return None
        values = (one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor) and one is not chosen_TK)
        gates_TK = next((one for one in values if one.shape == chosen_TK.shape), None)
        return cls(block, args[0], chosen_TK, gates_TK) if args and gates_TK is not None else None

    def output(self, expert: int, rows_N: torch.Tensor) -> torch.Tensor:
        """f_e(x) for some of the tokens, without their gates (tokens x width)."""
        chosen_N1 = torch.full((len(rows_N), 1), expert, dtype=self.chosen_TK.dtype, device=rows_N.device)
        gates_N1 = torch.ones(len(rows_N), 1, dtype=self.gates_TK.dtype, device=rows_N.device)
        output: torch.Tensor = self.block(self.hidden_TD[rows_N], chosen_N1, gates_N1)
        return output

    def tokens_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that `expert` was chosen for, and its gates there; first those whose first choice it was.

        That is the order in which the library's own experts take them.
        """
        places_N, rows_N = torch.where(self.chosen_TK.T.eq(expert))
        return rows_N, self.gates_TK[rows_N, places_N]

    def share_of(self, expert: int, lack_TO: torch.Tensor) -> torch.Tensor:
        """Of what the block's outputs lack, what this expert is to add to its gated outputs, for its tokens.

        All chosen experts together then need the smallest change: shares in proportion to the squared gates.
        """
        rows_N, gates_N = self.tokens_of(expert)
        share_N = gates_N.float().square() / self.gates_TK[rows_N].float().square().sum(1)
        return share_N[:, None] * lack_TO[rows_N]


def one_expert_each(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Call]:
    """A call of an expert block once per expert, with every token routed to it."""
    fused = next((one for one in block.parameters(recurse=False) if one.dim() == 3), None)
    if fused is None:
        raise RunError(f"calibration.all_experts: {type(block).__name__} does not fuse its experts; leave it off")
    chosen_TK = routing(args, kwargs)
    if chosen_TK is None:
        raise RunError("calibration.all_experts: this model's expert block takes no expert index, so it cannot be had")
    for expert in range(len(fused)):
        yield (
            tuple(_to_one_expert(one, chosen_TK, expert) for one in args),
            {key: _to_one_expert(one, chosen_TK, expert) for key, one in kwargs.items()},
        )


def routing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The argument of an expert block that holds the chosen experts, tokens x choices."""
    return next((one for one in (*args, *kwargs.values()) if _is_index(one)), None)


def _to_one_expert(value: Any, routing: torch.Tensor, expert: int) -> Any:
    """An argument with its routing replaced: the chosen experts become `expert`, their weights 1."""
    if value is routing:
        return torch.full_like(routing[:, :1], expert)
    if isinstance(value, torch.Tensor) and value.shape == routing.shape:
        return torch.ones_like(value[:, :1])
    return value


def _is_index(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and not value.is_floating_point()
