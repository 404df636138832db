"""Perplexity of a causal language model on a text, with its protocol."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune import calibration
from llmprune.checkpoint.skeleton import load_config, quiet_loader
from llmprune.checkpoint.source import Checkpoint, resolve
from llmprune.device import choose_device, choose_dtype
from llmprune.job import load_tokenizer, longest
from llmprune.types import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def open_model(
    model: str | Path | PreTrainedModel,
    tokenizer: Any = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """A model ready to be measured, and its tokenizer; raises UserError for what is no model."""
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise UserError("a loaded model needs tokenizer= to be measured on text")
        return model.eval(), tokenizer
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    folder = resolve(str(model))
    Checkpoint(folder)
    config = load_config(str(folder), trust_remote_code=trust_remote_code)
    place = choose_device(device)
    try:
        with quiet_loader():
            loaded, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=choose_dtype(dtype, config, place),
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except RuntimeError as error:
        raise UserError(f"the weights of {folder} do not fit its configuration: {error}") from error
    if info["missing_keys"]:
        # transformers would fill it with random numbers
        raise UserError(f"{folder} lacks the tensor {min(info['missing_keys'])} that its configuration calls for")
    return loaded.to(place).eval(), tokenizer or load_tokenizer(folder, trust_remote_code)


def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    spec: str,
    *,
    seqlen: int = 2048,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Perplexity on the joined text that `spec` names.

    Windows of `seqlen` tokens (cut to the model's maximum) are laid end to end, each begun with BOS if
    the tokenizer adds one, and a rest shorter than a window is dropped; every predicted token weighs
    the same. With `stride` < `seqlen` windows overlap, and each scores only the tokens that the one
    before it did not.
    """
    for name, value, least in (("seqlen", seqlen, 2), ("batch_size", batch_size, 1), ("max_windows", max_windows, 1)):
        if value is not None and value < least:
            raise UserError(f"{name} {value} must be at least {least}")
    length = min(seqlen, longest(model.config))
    step = length if stride is None else stride
    if not 0 < step <= length:
        raise UserError(f"stride {stride} must lie between 1 and the sequence length {length}")
    ids = calibration.tokenize(calibration.read_documents(spec, split="test"), tokenizer)
    bos = tokenizer.bos_token_id if calibration.adds_bos(tokenizer) else None
    fresh = length - (bos is not None)
    if len(ids) < fresh:
        raise UserError(
            f"the text {spec!r} has {len(ids)} tokens, {fresh - len(ids)} too few for one window of {length}"
        )
    calibration.check_vocabulary(f"the text {spec!r}", int(ids.max()), model.get_input_embeddings())
    advance = fresh if stride is None else min(step, fresh)
    windows = ids.unfold(0, fresh, advance)[:max_windows]
    loss = torch.zeros((), dtype=torch.float64)
    scored = 0
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        if bos is not None:
            batch = torch.cat([torch.full((len(batch), 1), bos), batch], 1)
        nll = _token_losses(model, batch.to(model.device))
        for number, row in enumerate(nll.cpu().double(), start):
            # of an overlapping window only the last `advance` tokens are new
            new = row if number == 0 else row[-advance:]
            loss += new.sum()
            scored += len(new)
    ppl = float(torch.exp(loss / scored))
    if not math.isfinite(ppl):
        raise UserError(f"the model gives NaN or infinity on {spec!r}: it is damaged, or its dtype too narrow")
    return {
        "ppl": ppl,
        "tokens": scored,
        "windows": len(windows),
        "seqlen": length,
        "stride": advance if stride is not None else length,
        "bos": bos is not None,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


@torch.no_grad()
def _token_losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood of every token but the first, B x (T - 1)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
