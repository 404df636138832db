"""LLM-Streamline: replace a window of layers by one layer, trained to do what the window did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from llmprune.checkpoint.surgery import Surgery
from llmprune.engine.similarity import turns
from llmprune.engine.trunk import States, Trunk, holding
from llmprune.methods.structural import TEXT, Decision, Drop
from llmprune.types import RunError


@dataclass(frozen=True)
class LLMStreamline:
    """The first layer of the window learns, by the mean squared error, to give what leaves the window.

    Chen et al. 2024, "Streamlining Redundant Layers to Compress Large Language Models", section 3. To drop n layers a
    window of n + 1 becomes one. It is the window with the highest cosine similarity of its ends. AdamW, the learning
    rate falling by a cosine from `learning_rate` to 0 over `steps`; batches in turn; training in float32. The best
    values by the error over all batches are kept, the untrained ones included.
    """

    steps: int = 200
    learning_rate: float = 2e-4

    kind: ClassVar[str] = "depth"
    needs: ClassVar[frozenset[str]] = frozenset({TEXT})
    patterns: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[str] = "plain"
    paper: ClassVar[str] = "arXiv:2403.19135"
    takes_list: ClassVar[bool] = False
    memory: ClassVar[str] = "one layer five times (weights, gradients, Adam, best), activations of n + 2 layers"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.learning_rate <= 0:
            raise ValueError("steps and learning_rate must be positive")

    def decide(self, trunk: Trunk, drop: Drop) -> Decision:
        span = drop.count + 1
        distances = dict(enumerate(turns(trunk, span).cosine_distance))
        start = min(distances, key=lambda index: (distances[index], index))
        before: States = trunk.enter()
        for index in range(start):
            with trunk.loaded(index):
                before = trunk.run(index, before)
        after = before
        for index in range(start, start + span):
            with trunk.loaded(index):
                after = trunk.run(index, after)
        values, errors = self._train(trunk, start, before, after)
        replaced = {trunk.units[start].prefix + name: value for name, value in values.items()}
        surgery = Surgery.drop(drop.depth, range(start + 1, start + span)).with_values(replaced)
        notes = {"trained_layer": start, "mean_squared_error_before": errors[0], "mean_squared_error_after": errors[1]}
        return Decision(surgery, distances, {}, notes)

    def _train(
        self, trunk: Trunk, index: int, before: States, after: States
    ) -> tuple[dict[str, torch.Tensor], tuple[float, float]]:
        layer = trunk.units[index].module
        with trunk.loaded(index):
            values = {name: one.detach().float().clone() for name, one in layer.named_parameters()}
            with holding(layer, values) as held, torch.enable_grad():
                for one in held.values():
                    one.requires_grad_(True)
                optimizer = torch.optim.AdamW(held.values(), lr=self.learning_rate, weight_decay=0.0)
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
                first = best = _error(trunk, index, before, after)
                every = max(self.steps // 10, 1)
                for step in range(self.steps):
                    number = step % len(before)
                    loss = F.mse_loss(trunk.apply(index, number, before[number]).float(), after[number].float())
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    if (step + 1) % every == 0 or step + 1 == self.steps:
                        error = _error(trunk, index, before, after)
                        if error < best:
                            best = error
                            values = {name: one.detach().clone() for name, one in held.items()}
        if not all(bool(torch.isfinite(one).all()) for one in values.values()):
            raise RunError("training diverged; take a smaller learning_rate")
        return values, (first, best)


@torch.no_grad()
def _error(trunk: Trunk, index: int, before: States, after: States) -> float:
    """Mean squared error of the layer's output over all batches."""
    total = sum(
        float((trunk.apply(index, number, one).double() - after[number].double()).square().sum())
        for number, one in enumerate(before)
    )
    return total / sum(one.numel() for one in after)
