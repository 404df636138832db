"""Measuring one candidate after the other, each once: what is finished is a small file."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmprune import calibration, stages
from llmprune.checkpoint.output import write_json
from llmprune.checkpoint.source import Checkpoint, resolve
from llmprune.eval import speed
from llmprune.eval.perplexity import measure, open_model
from llmprune.progress import Reporter
from llmprune.recipe import Recipe
from llmprune.record import key_of, versions
from llmprune.searching.asked import Search, recipe_at


class Points:
    """The measured points of a search. A point's file is named by a hash of all that decides its figures."""

    def __init__(self, folder: Path, base: Recipe, asked: Search, reporter: Reporter) -> None:
        self._folder, self._base, self._asked, self._reporter = folder, base, asked, reporter
        self.windows: dict[str, Any] = {
            "seqlen": base.calibration.seqlen if asked.seqlen == "calibration" else asked.seqlen,
            "max_windows": asked.max_windows,
            "bos": asked.bos,
        }
        self._decides = {
            "model": Checkpoint(resolve(base.model)).fingerprint(),
            "texts": [_digest(asked.perplexity, "test"), _digest(base.calibration.source, "train")],
            "windows": self.windows,
            "versions": versions(),
        }

    def dense(self) -> dict[str, Any]:
        """The model before pruning."""
        return self._once({"kind": "dense"}, self._base, lambda _: self._measured(*self.open(self._base.model)))

    def pruned(self, method: str, amount: str, *, latency: bool = False, **more: Any) -> dict[str, Any]:
        """A whole run: prune, measure what was written, remove it. `more`: recipe keys besides the amount."""
        recipe = recipe_at(self._base, method, amount).model_copy(update=more)

        def run(folder: Path) -> dict[str, Any]:
            report = stages.run(recipe, None, None, None, folder, resume=True, reporter=Reporter(quiet=True)).report
            row = {
                **self._measured(*self.open(str(folder))),
                **{key: report["totals"][key] for key in ("params_before", "params_after", "zeros")},
                "seconds": report["run"]["seconds"],
                "recipe": report["recipe"],
                "calibration": report["calibration"],
            }
            if latency:
                row["latency"] = self._timed(str(folder))
            shutil.rmtree(folder)
            return row

        what = {"kind": "run", "method": method, "amount": amount, **more}
        return self._once(what | ({"timed": [self._asked.prompt, self._asked.new]} if latency else {}), recipe, run)

    def in_memory(
        self,
        what: dict[str, Any],
        recipe: Recipe,
        held: Callable[[], AbstractContextManager[tuple[PreTrainedModel, Any]]],
    ) -> dict[str, Any]:
        """A model, with its tokenizer, that is what it should be as long as `held` is entered."""

        def measure(folder: Path) -> dict[str, Any]:
            with held() as (model, tokenizer):
                return self._measured(model, tokenizer)

        return self._once(what, recipe, measure)

    def open(self, model: str) -> tuple[PreTrainedModel, Any]:
        engine, trust = self._base.engine, self._base.trust_remote_code
        return open_model(model, dtype=engine.dtype, device=engine.device, trust_remote_code=trust)

    def _once(self, what: dict[str, Any], recipe: Recipe, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The point, from its file or measured now; `work` gets a folder for what it writes."""
        decides = [what, recipe.model_dump(mode="json", exclude={"model"}), self._decides]
        key = key_of(decides)[:24]
        path = self._folder / f"{key}.json"
        if path.is_file():
            point: dict[str, Any] = json.loads(path.read_text())
            return point
        self._folder.mkdir(parents=True, exist_ok=True)
        point = {**what, **work(self._folder / key)}
        write_json(path, point)
        named = " ".join(str(value) for key, value in what.items() if key != "timed")
        self._reporter.say(f"{named}: perplexity {point['ppl']:.3f}")
        return point

    def _measured(self, model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
        spec = self._asked.perplexity
        found = measure(model, tokenizer, spec, batch_size=self._base.engine.batch_size, **self.windows)
        return {"ppl": found.pop("ppl"), "protocol": found}

    def _timed(self, folder: str) -> dict[str, Any]:
        """Medians of prefill and of decoding a token in seconds, of this model and, in turns with it, of the dense."""
        pair = {"dense": self._base.model, "pruned": folder}
        engine, trust = self._base.engine, self._base.trust_remote_code
        found = speed.bench(
            pair, prompt=self._asked.prompt, new=self._asked.new, dtype=engine.dtype, device=engine.device,
            trust_remote_code=trust,
        )  # fmt: skip
        medians = {
            label: {what: row[what]["median_s"] for what in ("prefill", "decode")}
            for label, row in found["models"].items()
        }
        return {**medians, "protocol": found["protocol"]}


def _digest(spec: str, split: str) -> str:
    """Of the text itself, which is read: points outlive a run, and what a SPEC names on the Hub may change."""
    text = "\n\n".join(calibration.read_documents(spec, split=split))
    return hashlib.sha256(text.encode()).hexdigest()
