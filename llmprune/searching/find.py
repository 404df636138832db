"""`llmprune.search`: a sweep, a scan of the layers, the smallest model within a budget; each point measured once."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from llmprune import stages
from llmprune.api import SHORT
from llmprune.arch.discover import find_units
from llmprune.checkpoint.output import write_json
from llmprune.checkpoint.skeleton import build_skeleton, load_config
from llmprune.checkpoint.source import resolve
from llmprune.methods import method_class
from llmprune.progress import Reporter
from llmprune.recipe import Recipe, merge_settings, read_recipe, validate, validated
from llmprune.record import versions
from llmprune.searching.asked import Limit, Search, levels_of, recipe_at, understood
from llmprune.searching.bisection import bisect, climb
from llmprune.searching.levels import Levels, remove_levels
from llmprune.searching.points import Points
from llmprune.types import UserError

RESULT_NAME = "search.json"
RECIPE_NAME = "best.yaml"


def search(
    model: str | Path | None = None,
    *,
    out: str | Path,
    recipe: str | Path | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Find out how much a model can lose. Returns what `OUT/search.json` holds.

    `settings` are keys of the section `search` (`methods`, `amounts`, `perplexity`, `scan`, `budget`, `latency`, …; see
    `searching.asked.Search`), and recipe keys for the runs, as in `llmprune.prune`. `recipe`: a file with the sections
    `prune` and `search`. What an earlier, broken-off call has measured is not measured again.

    With a `budget`, `OUT/best.yaml` is the recipe of the smallest model within it, and `OUT/METHOD-AMOUNT` that model.
    Raises UserError for wrong input, before anything is measured.
    """
    data = read_recipe(None if recipe is None else Path(recipe))
    runs, asked = dict(data.get("prune") or {}), dict(data.get("search") or {})
    for key, value in settings.items():
        section, dot, short = key.rpartition(".")
        if value is not None and (
            section == "search" or (not dot and short in Search.model_fields and short not in SHORT)
        ):
            asked[short] = value
        elif value is not None:
            merge_settings(runs, {SHORT.get(key, key): value}, Recipe)
    if model is not None:
        runs["model"] = str(model)
    if asked.get("perplexity") is None:
        raise UserError("name the text that decides: --perplexity SPEC, or search.perplexity in the recipe")
    folder, reporter = Path(out).expanduser().resolve(), reporter or Reporter(quiet=True)
    result = explore(validate(runs), validated(asked, Search), folder, reporter)
    best = result.get("budget", {}).get("best")
    if best is not None:
        (folder / RECIPE_NAME).write_text(yaml.safe_dump(best["recipe"], sort_keys=False))
        chosen = folder / f"{best['method']}-{best['amount']}".replace(":", "-")
        stages.run(validate(best["recipe"]), None, None, None, chosen, resume=True, reporter=reporter)
    return result


def explore(base: Recipe, asked: Search, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """Measure what `asked` says with runs like `base`, whose method and amount do not matter; write `search.json`."""
    if not base.model:
        raise UserError("name the model to search on")
    source = resolve(base.model).resolve()
    if source == folder or source in folder.parents:
        raise UserError(f"the output {folder} lies in the input folder, which is never written to")
    limit = None if asked.budget is None else Limit.parse(asked.budget)
    finder = _Finder(base, asked, folder, reporter)
    dense = finder.points.dense()
    result: dict[str, Any] = {
        "model": base.model,
        "recipe": base.model_dump(mode="json"),
        "asked": asked.model_dump(mode="json"),
        "versions": versions(),
        "dense": dense,
    }
    if finder.sweeps:
        result["sweep"] = finder.sweep()
    if asked.scan:
        result["scan"] = finder.scan()
    if limit is not None:
        result["budget"] = {"asked": asked.budget, **finder.smallest(limit.perplexity(dense["ppl"]))}
    write_json(folder / RESULT_NAME, result)
    remove_levels(folder / "levels")
    return result


class _Finder:
    """A search whose methods and amounts go together: all that can be wrong with them is found when it is made."""

    def __init__(self, base: Recipe, asked: Search, folder: Path, reporter: Reporter) -> None:
        self._base, self._asked, self._layers = base, asked, _layers(base)
        self.sweeps = asked.sweep if asked.sweep is not None else not asked.scan and asked.budget is None
        methods = asked.methods if self.sweeps or asked.scan else []
        self._pairs = [(method, amount) for method in methods for amount in understood(method, asked.amounts)]
        for pair in self._pairs:
            recipe_at(base, *pair)
        self._grids = {method: self._grid(method) for method in asked.methods if asked.budget is not None}
        self.points = Points(folder / "points", base, asked, reporter)
        self._levels: dict[str, Levels] = {}
        for method in asked.methods if asked.scan or asked.budget else ():
            if method_class(method).kind == "weight":
                amounts = [amount for other, amount in self._pairs if other == method and asked.scan]
                amounts += [one for one in self._grids.get(method, ()) if one not in amounts]
                one = recipe_at(base, method, "0.5")
                self._levels[method] = Levels(folder / "levels", one, amounts, lambda: self._dense, reporter)

    def sweep(self) -> list[dict[str, Any]]:
        """Each pair of method and amount."""
        return [self.points.pruned(*pair, latency=self._asked.latency) for pair in self._pairs]

    def scan(self) -> list[dict[str, Any]]:
        """Each pair of method and amount on each layer alone; for depth methods, each layer left out."""
        rows: list[dict[str, Any]] = []
        for method, amount in self._pairs:
            if method not in self._levels:
                continue
            for number, layer in enumerate(self._levels[method].layers):
                what = {"kind": "layer", "method": method, "amount": amount, "layer": layer}
                made = partial(self._levels[method].put, [number], amount)
                row = self.points.in_memory(what, recipe_at(self._base, method, amount), made)
                rows.append({**row, "calibration": self._levels[method].calibration})
        if any(method_class(method).kind == "depth" for method in self._asked.methods):
            for number, layer in enumerate(self._layers):
                rows.append({**self.points.pruned("keep-first", "1", drop_layers=[number]), "layer": layer})
        return rows

    def smallest(self, limit: float) -> dict[str, Any]:
        """The smallest model whose perplexity is at most `limit`, by each method and of all."""
        found = [{"method": method, **self._smallest_by(method, limit)} for method in self._asked.methods]
        good = [row["found"] for row in found if row["found"] is not None]
        best = min(good, key=lambda one: (one["params_after"] - one["zeros"], one["ppl"]), default=None)
        return {"limit": limit, "methods": found, "best": best}

    def _smallest_by(self, method: str, limit: float) -> dict[str, Any]:
        """Bisection over layers solved once and put together, then whole runs from there; the latter have the say."""
        grid, levels = self._grids[method], self._levels.get(method)
        tried: list[dict[str, Any]] = []

        def whole(index: int) -> bool:
            tried.append(self.points.pruned(method, grid[index]))
            return bool(tried[-1]["ppl"] <= limit)

        def put_together(index: int) -> bool:
            assert levels is not None
            what = {"kind": "levels", "method": method, "amount": grid[index]}
            made = partial(levels.put, range(len(levels.layers)), grid[index])
            tried.append(self.points.in_memory(what, recipe_at(self._base, method, grid[index]), made))
            return bool(tried[-1]["ppl"] <= limit)

        start = bisect(len(grid), whole if levels is None else put_together)
        reached = climb(len(grid), start, whole)
        found = None if reached < 0 else self.points.pruned(method, grid[reached])
        return {"by_levels": grid[start] if start >= 0 else None, "found": found, "tried": tried}

    def _grid(self, method: str) -> list[str]:
        """The amounts among which the budget is sought, rising."""
        asked = self._asked.levels or levels_of(method, len(self._layers))
        return sorted(understood(method, [one for one in asked if ":" not in one]), key=float)

    @cached_property
    def _dense(self) -> tuple[PreTrainedModel, Any]:
        return self.points.open(self._base.model)


def _layers(base: Recipe) -> list[str]:
    """The names of the model's decoder layers."""
    trust = base.trust_remote_code
    config = load_config(str(resolve(base.model)), trust_remote_code=trust)
    model = build_skeleton(config, torch.float32, trust_remote_code=trust)
    return [unit.name for unit in find_units(model, head=False)]
