"""Is what was written a model that plain transformers loads?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmprune import memory
from llmprune.checkpoint.remote import FILE
from llmprune.checkpoint.skeleton import load_model
from llmprune.types import RunError

# The copy that is loaded for the check may take this share of the free memory.
SHARE = 0.25


def verify(
    folder: Path,
    expected: Callable[[torch.Tensor], torch.Tensor] | None,
    unused: list[str],
    *,
    of: str = "in memory",
    dtype: torch.dtype | str = "auto",
    tolerance: float = 1e-3,
    trust_remote_code: bool = False,
) -> str:
    """Reload `folder` with plain `from_pretrained`; compare logits with those that `expected` gives for token ids (those `of` what, in words, computed in `dtype`), to `tolerance` of the largest.

    A checkpoint too large for a second copy is not reloaded: its bytes were compared as they were
    written. Returns what was done, for the report. Raises RunError if the model is not what was pruned.
    """
    size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    if size > SHARE * memory.unused(torch.device("cpu")):
        return "bytes compared; too large to reload here"
    model, info = load_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    strange = sorted(set(info["unexpected_keys"]) - set(unused))
    lost = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if strange or lost:
        raise RunError(f"the saved model does not load plainly: missing {lost[:3]}, unexpected {strange[:3]}")
    ids = token_ids(model)
    found = logits(model, ids)
    if not bool(torch.isfinite(found).all()):
        raise RunError("the saved model gives NaN or infinity")
    if expected is not None:
        gaps = (found - expected(ids).float().cpu()).abs()
        gaps[..., _padding(model)] = 0
        gap = float(gaps.max())
        if gap > tolerance * max(float(found.abs().max()), 1.0):
            raise RunError(f"the saved model's logits differ from those expected by {gap:.2e}")
    if (folder / FILE).exists():
        gap = float((_logits_with_cache(model, ids) - found).abs().max())
        # one token at a time sums in another order, which in 16 bits shows
        if gap > max(1e-3, 16 * torch.finfo(model.dtype).eps) * max(float(found.abs().max()), 1.0):
            raise RunError(f"with the cache the saved model's logits differ by {gap:.2e} from those without")
    return "reloaded; bytes compared" if expected is None else f"reloaded; logits equal those {of}"


def token_ids(model: PreTrainedModel) -> torch.Tensor:
    """The few tokens (1 x T) on which models are compared."""
    count, padding = model.get_input_embeddings().weight.shape[0], _padding(model)
    usual = [token for token in range(count) if token not in padding] or [0]
    return torch.tensor([[usual[place % len(usual)] for place in range(1, 9)]])


def _padding(model: PreTrainedModel) -> list[int]:
    """The padding token, if the embedding knows one: some classes (Youtu) empty its row whenever they load it."""
    found = getattr(model.get_input_embeddings(), "padding_idx", None)
    return [] if found is None else [found]


@torch.no_grad()
def _logits_with_cache(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The same as `logits`, the second half of the tokens one by one."""
    half = ids.shape[1] // 2
    output = model(input_ids=ids[:, :half].to(model.device), use_cache=True)
    parts = [output.logits]
    for place in range(half, ids.shape[1]):
        output = model(
            input_ids=ids[:, place : place + 1].to(model.device), past_key_values=output.past_key_values, use_cache=True
        )
        parts.append(output.logits)
    return torch.cat(parts, dim=1).float().cpu()


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The model's logits for token ids, in float32 on the CPU."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids.to(model.device), use_cache=False).logits
    return found.float().cpu()
