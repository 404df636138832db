"""Perplexity of a causal language model on a text, with its protocol."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from llmprune import calibration
from llmprune.calibration import load_tokenizer, longest
from llmprune.checkpoint.skeleton import load_config, load_model
from llmprune.checkpoint.source import Checkpoint, resolve
from llmprune.device import choose_device, choose_dtype
from llmprune.memory import unused
from llmprune.sparse import load
from llmprune.types import UserError

# More windows at once save no time.
MOST_WINDOWS = 64
DTYPES = ("auto", "float32", "bfloat16", "float16")


def open_model(
    model: str | Path | PreTrainedModel,
    tokenizer: Any = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    sparse: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """A model ready to be measured, and its tokenizer; raises UserError for what is no model.

    `sparse`: its N:M layers run on the sparse kernels.
    """
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise UserError("a loaded model needs tokenizer= to be measured on text")
        if sparse:
            raise UserError("sparse=True needs the folder of a pruned model, not a loaded one")
        return model.eval(), tokenizer
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    folder = resolve(str(model))
    Checkpoint(folder)
    config = load_config(str(folder), trust_remote_code=trust_remote_code)
    place = choose_device(device)
    if sparse:
        quick = load(folder, sparse=True, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        return quick, tokenizer or load_tokenizer(folder, trust_remote_code)
    try:
        loaded, info = load_model(folder, dtype=choose_dtype(dtype, config, place), trust_remote_code=trust_remote_code)
    except RuntimeError as error:
        raise UserError(f"the weights of {folder} do not fit its configuration: {error}") from error
    if info["missing_keys"]:
        # transformers would fill it with random numbers
        raise UserError(f"{folder} lacks the tensor {min(info['missing_keys'])} that its configuration calls for")
    return loaded.to(place).eval(), tokenizer or load_tokenizer(folder, trust_remote_code)


@dataclass(frozen=True)
class Windows:
    """A text cut into windows of token ids, and how: the protocol that a figure belongs to.

    `ids_WT`: W windows x T tokens, BOS included. Of each window but the first only the last `advance` tokens
    are scored: those that the window before it did not hold.
    """

    ids_WT: torch.Tensor
    advance: int
    bos: str
    stride: int

    def new_tokens(self, number: int, per_token: torch.Tensor) -> torch.Tensor:
        """The part of a window's predictions (one a token but the first) that no earlier window made."""
        return per_token if number == 0 else per_token[-self.advance :]

    def batches(self, size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Batches of windows, each with the number of its first one."""
        for start in range(0, len(self.ids_WT), size):
            yield start, self.ids_WT[start : start + size]

    def protocol(self) -> dict[str, Any]:
        count, length = self.ids_WT.shape
        return {
            "windows": count,
            "seqlen": length,
            "stride": self.stride,
            "bos": self.bos == "window",
            "bos_at": self.bos,
        }


def check_windows(
    *, seqlen: int | str = 2048, stride: int | None = None, max_windows: int | None = None, bos: str = "window"
) -> None:
    """What is wrong with the arguments of `cut` for any model; raises UserError."""
    if bos not in ("window", "text", "never"):
        raise UserError(f"bos {bos!r} is not one of window, text, never")
    if not isinstance(seqlen, int) and seqlen != "max":
        raise UserError(f"seqlen {seqlen!r} must be a number of tokens, or max")
    for name, value, least in (("seqlen", seqlen, 2), ("stride", stride, 1), ("max_windows", max_windows, 1)):
        if isinstance(value, int) and value < least:
            raise UserError(f"{name} {value} must be at least {least}")


def cut(
    model: PreTrainedModel,
    tokenizer: Any,
    spec: str,
    *,
    seqlen: int | Literal["max"] = 2048,
    stride: int | None = None,
    max_windows: int | None = None,
    bos: Literal["window", "text", "never"] = "window",
) -> Windows:
    """Cut the joined text that `spec` names into windows of `seqlen` tokens ("max": the most the model takes).

    Windows lie end to end unless `stride` makes them overlap; a rest shorter than a window is dropped. `bos`:
    if the tokenizer adds BOS, begin each window with it, or the text alone (as the code of the SparseGPT and
    Wanda papers does), or nothing. Raises UserError.
    """
    check_windows(seqlen=seqlen, stride=stride, max_windows=max_windows, bos=bos)
    length = longest(model.config) if seqlen == "max" else min(seqlen, longest(model.config))
    step = length if stride is None else stride
    if not 0 < step <= length:
        raise UserError(f"stride {stride} must lie between 1 and the sequence length {length}")
    ids = calibration.tokenize(calibration.read_documents(spec, split="test"), tokenizer)
    token = tokenizer.bos_token_id if calibration.adds_bos(tokenizer) else None
    each = token is not None and bos == "window"
    if token is not None and bos == "text":
        ids = torch.cat([torch.tensor([token]), ids])
    fresh = length - each
    if len(ids) < fresh:
        raise UserError(
            f"the text {spec!r} has {len(ids)} tokens, {fresh - len(ids)} too few for one window of {length}; "
            "give more text, or a smaller --seqlen"
        )
    calibration.check_vocabulary(f"the text {spec!r}", int(ids.max()), model.get_input_embeddings())
    advance = fresh if stride is None else min(step, fresh)
    ids_WT = ids.unfold(0, fresh, advance)[:max_windows]
    if token is not None and each:
        ids_WT = torch.cat([torch.full((len(ids_WT), 1), token), ids_WT], 1)
    used = "never" if token is None else bos
    return Windows(ids_WT, advance, used, length if stride is None else advance)


def fitting(models: Sequence[PreTrainedModel], windows: Windows, asked: int | Literal["auto"]) -> int:
    """The windows of a batch for `models` that run on it in turns; raises UserError.

    "auto": as many, up to `MOST_WINDOWS`, as have room for their logits in half of the free memory. A window's logits
    are there three times, in float32: as they are made, converted, and as log probabilities.
    """
    check_batch(asked)
    if asked == "auto":
        device = models[0].device
        words: int = max(one.get_output_embeddings().weight.shape[0] for one in models)
        return max(1, min(MOST_WINDOWS, unused(device) // 2 // (len(models) * 3 * 4 * windows.ids_WT.shape[1] * words)))
    return asked


def check_batch(asked: int | Literal["auto"]) -> None:
    """Whether it is a batch size; raises UserError."""
    if asked != "auto" and asked < 1:
        raise UserError(f"batch_size {asked} must be at least 1, or auto")


def measure(
    model: PreTrainedModel, tokenizer: Any, spec: str, *, batch_size: int | Literal["auto"] = 8, **protocol: Any
) -> dict[str, Any]:
    """Perplexity on a text; `protocol` as in `cut`. Every predicted token weighs the same."""
    windows = cut(model, tokenizer, spec, **protocol)
    batch_size = fitting([model], windows, batch_size)
    loss = torch.zeros((), dtype=torch.float64)
    scored = 0
    for first, batch_BT in windows.batches(batch_size):
        nll = _token_losses(model, batch_BT.to(model.device))
        for number, row in enumerate(nll.cpu().double(), first):
            new = windows.new_tokens(number, row)
            loss += new.sum()
            scored += len(new)
    ppl = float(torch.exp(loss / scored))
    if not math.isfinite(ppl):
        raise UserError(f"the model gives NaN or infinity on {spec!r}: it is damaged, or its dtype too narrow")
    dtype = str(model.dtype).removeprefix("torch.")
    return {"ppl": ppl, "tokens": scored, **windows.protocol(), "dtype": dtype}


@torch.no_grad()
def _token_losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood of every token but the first, B x (T - 1)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
