"""What a run gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from llmprune.checkpoint.remote import trusted
from llmprune.checkpoint.skeleton import load_model
from llmprune.types import UserError


@dataclass
class Result:
    """A pruned model: its report, and the model itself, loaded from disk when first asked for."""

    report: dict[str, Any]
    folder: Path | None
    trust_remote_code: bool = False
    _model: PreTrainedModel | None = field(default=None, repr=False)
    _tokenizer: Any = field(default=None, repr=False)

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
        trust = self.folder is not None and trusted(self.folder, self.trust_remote_code)
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=trust)

    def push_to_hub(self, repo_id: str, **options: Any) -> dict[str, Any]:
        """Upload the written model with its card; `options` as in `llmprune.hub.push`."""
        from llmprune.hub import push

        if self.folder is None:
            raise UserError("the pruned model was not written: pass out=FOLDER to prune, then push it")
        return push(self.folder, repo_id, **options)
