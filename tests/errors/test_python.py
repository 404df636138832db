"""Wrong input from Python, and what a caller sees of a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from refusals import DEMO
from transformers import LlamaConfig

import llmprune


@pytest.mark.parametrize("model", [None, 3, LlamaConfig(), torch.nn.Linear(4, 4)])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(llmprune.UserError, match="must be a folder, a Hub id or a loaded model"):
        llmprune.prune(model, sparsity=0.5, out="out")


def test_a_path_is_no_calibration_text() -> None:
    with pytest.raises(llmprune.UserError, match=r"text\.txt.*in quotes"):
        llmprune.prune(DEMO, method="wanda", sparsity=0.5, calibration=Path("text.txt"), dry_run=True)


def test_a_misspelt_key_in_python_is_recognised() -> None:
    with pytest.raises(llmprune.UserError, match=r"'sparcity'; did you mean 'sparsity'\?"):
        llmprune.prune(DEMO, method="magnitude", sparcity=0.5, dry_run=True)


def test_a_result_in_a_few_words_and_without_a_tokenizer() -> None:
    model = tiny.build("llama")
    result = llmprune.prune(model, method="magnitude", sparsity=0.5)
    assert len(repr(result)) < 200 and f"'zeros': {result.report['totals']['zeros']}" in repr(result)
    with pytest.raises(llmprune.UserError, match="pass tokenizer="):
        _ = result.tokenizer


def test_the_public_names_are_listed() -> None:
    assert {"prune", "recover", "evaluate", "load"} <= set(dir(llmprune))
