"""What a run gives back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from llmprune.checkpoint.remote import trusted
from llmprune.checkpoint.skeleton import load_model
from llmprune.types import UserError


@dataclass(repr=False)
class Result:
    """A pruned model: its report, and the model and its tokenizer, loaded from disk when first asked for."""

    report: dict[str, Any]
    folder: Path | None
    trust_remote_code: bool = False
    _model: PreTrainedModel | None = None
    _tokenizer: Any = None

    def __repr__(self) -> str:
        place = "in memory" if self.folder is None else f"in {str(self.folder)!r}"
        return f"<Result {place}: {self.report.get('totals')}; more in .report, .model and .tokenizer>"

    @cached_property
    def model(self) -> PreTrainedModel:
        if self._model is not None:
            return self._model
        assert self.folder is not None
        return load_model(self.folder, trust_remote_code=self.trust_remote_code)[0]

    @cached_property
    def tokenizer(self) -> Any:
        if self._tokenizer is not None:
            return self._tokenizer
        if self.folder is None:
            raise UserError(
                "a loaded model was pruned without its tokenizer, so there is none: pass tokenizer= to prune"
            )
        trust = trusted(self.folder, self.trust_remote_code)
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=trust)

    def push_to_hub(self, repo_id: str, **options: Any) -> dict[str, Any]:
        """Upload the written model with its card; `options` as in `llmprune.hub.push`."""
        from llmprune.hub import push

        if self.folder is None:
            raise UserError("the pruned model was not written: pass out=FOLDER to prune, then push it")
        return push(self.folder, repo_id, **options)
