"""How close a pruned model stays to the dense one, token by token and in what it writes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from llmprune.eval.perplexity import cut, fitting
from llmprune.types import UserError

PROMPTS = (
    "Once upon a time, there was",
    "The capital of France is",
    "In order to make a good cup of tea, you",
    "The most important thing about science is",
)


@torch.no_grad()
def agreement(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokenizer: Any,
    spec: str,
    *,
    batch_size: int | Literal["auto"] = 8,
    **protocol: Any,
) -> dict[str, Any]:
    """KL(dense ‖ pruned) in nats and the share of equal most likely tokens, means over the scored tokens.

    `protocol` as in `perplexity.cut`; both models see the same windows. Raises UserError if their
    vocabularies differ.
    """
    windows = cut(model, tokenizer, spec, **protocol)
    sizes = [one.get_output_embeddings().weight.shape[0] for one in (model, dense)]
    if sizes[0] != sizes[1]:
        raise UserError(f"the vocabularies differ ({sizes[0]} and {sizes[1]} tokens): no KL between the two models")
    kl, same = torch.zeros((), dtype=torch.float64), 0
    tokens = 0
    for first, batch_BT in windows.batches(fitting([model, dense], windows, batch_size)):
        ours_BTV = model(input_ids=batch_BT.to(model.device), use_cache=False).logits[:, :-1]
        theirs_BTV = dense(input_ids=batch_BT.to(dense.device), use_cache=False).logits[:, :-1]
        # row by row: the log probabilities of a whole batch can outgrow the model
        for number, (ours_TV, theirs_TV) in enumerate(zip(ours_BTV, theirs_BTV, strict=True), first):
            log_q_TV = ours_TV.float().log_softmax(-1)
            log_p_TV = theirs_TV.to(ours_TV.device).float().log_softmax(-1)
            kl_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).double()
            same_T = log_q_TV.argmax(-1) == log_p_TV.argmax(-1)
            new = windows.new_tokens(number, kl_T)
            kl += new.sum().cpu()
            same += int(windows.new_tokens(number, same_T).sum())
            tokens += len(new)
    return {"kl": float(kl / tokens), "top1": same / tokens, "tokens": tokens, **windows.protocol()}


@torch.no_grad()
def write(model: PreTrainedModel, tokenizer: Any, prompts: list[str], tokens: int = 40) -> list[str]:
    """What a model writes after each prompt: greedily, at most `tokens` new tokens, one prompt at a time."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids], device=model.device)
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0,
        )  # fmt: skip
        texts.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    return texts
