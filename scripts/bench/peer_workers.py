"""One pruning run of one tool, in a process of its own: `python peer_workers.py WORKER JOB RESULT`.

`processes.call` starts it with the interpreter of the tool's environment, hence nothing but the standard library at
the top. Loading, pruning and saving are on three clocks, imports on none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from processes import Record, memory, software, timed

MODEL = {
    "num_hidden_layers": 4,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
SEQUENCES, LENGTH, SEED, BATCH = 32, 512, 0, 8


def write_inputs(job: Record) -> Record:
    """Write the random Llama with a word-level tokenizer, and the random calibration tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(**MODEL, max_position_embeddings=LENGTH, dtype="float32")
    LlamaForCausalLM(config).save_pretrained(job["model"])
    write_tokenizer(job["model"], MODEL["vocab_size"])
    write_tokens(job["tokens"], torch.randint(MODEL["vocab_size"], (SEQUENCES, LENGTH)))
    return {}


def write_tokenizer(folder: str | Path, words: int) -> None:
    """A tokenizer of so many words, which tools want beside a model even where tokens are given."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def write_tokens(path: str | Path, sequences: Iterable[Any]) -> None:
    """Calibration tokens, tensors of one sequence each, where `calibration` reads them."""
    Path(path).write_text(json.dumps([one.tolist() for one in sequences]))


def calibration(job: Record) -> list[list[int]]:
    """The token ids that a run calibrates on."""
    tokens: list[list[int]] = json.loads(Path(job["tokens"]).read_text())
    return tokens


def batches(tokens: list[list[int]]) -> Any:
    """The calibration tokens as tensors [batch, length]."""
    import torch

    return torch.tensor(tokens).split(BATCH)


def staged(job: Record, prune: Callable[[Any], object], tool: str) -> Record:
    """Load a model, prune it in place and save it as a plain checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    if torch.cuda.is_available():  # its libraries are loaded on no clock
        torch.linalg.cholesky(torch.eye(64, device="cuda") @ torch.eye(64, device="cuda"))
    before = memory("VmRSS")
    model, load = timed(AutoModelForCausalLM.from_pretrained, job["model"], dtype=job["dtype"])
    _, spent = timed(prune, model.eval())
    _, save = timed(model.save_pretrained, job["out"])
    tokenizer.save_pretrained(job["out"])
    return {
        "seconds": {"load": load, "prune": spent, "save": save, "total": load + spent + save},
        "memory": {"before": before, "peak": memory("VmHWM")},
        "software": software("torch", "transformers", tool),
    }


def compressor_modifier(method: str, amount: str) -> Any:
    """llm-compressor's modifier; its N:M counts the weights removed, ours those kept."""
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier

    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[method]
    if ":" in amount:
        keep, group = map(int, amount.split(":"))
        settings = {"sparsity": 1 - keep / group, "mask_structure": f"{group - keep}:{group}"}
    else:
        settings = {"sparsity": float(amount), "mask_structure": "0:0"}
    return modifier(**settings, targets=["Linear"], ignore=["re:.*lm_head"])


def llm_compressor(job: Record) -> Record:
    """llm-compressor's `oneshot`, which takes fused experts apart by itself."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoTokenizer

    tokens = calibration(job)
    dataset = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(row) for row in tokens]})
    settings = {
        "tokenizer": AutoTokenizer.from_pretrained(job["model"]),
        "recipe": compressor_modifier(job["method"], job["amount"]),
        "dataset": dataset,
        "num_calibration_samples": len(tokens),
        "max_seq_length": max(map(len, tokens)),
        "shuffle_calibration_samples": False,
        "batch_size": job["batch_size"],
    }
    return staged(job, lambda model: oneshot(model=model, **settings), "llmcompressor")


def model_optimizer(job: Record) -> Record:
    """Model-Optimizer's `sparsify`, with its masks burnt in by `export`."""
    import modelopt.torch.sparsity as mts
    import torch

    def forward(model: Any) -> None:
        for batch in batches(calibration(job)):
            model(batch)

    def prune(model: Any) -> None:
        settings = {"pattern": f"{job['amount']} sparsity", "forward_loop": forward}
        with torch.no_grad():
            mts.export(mts.sparsify(model, job["method"], config=settings))

    return staged(job, prune, "nvidia-modelopt")


def torch_pruning(job: Record) -> Record:
    """Torch-Pruning as in its example for language models: channels, hidden size and query heads by one ratio.

    `hidden` and `heads` say whether the latter two are pruned; if not, they are among its `ignored_layers`.
    """
    import torch_pruning as tp

    def prune(model: Any) -> None:
        config, layers = model.config, model.model.layers
        heads, ignored = {}, [model.lm_head]
        for layer in layers:
            of = layer.self_attn
            heads |= {of.q_proj: config.num_attention_heads}
            heads |= dict.fromkeys((of.k_proj, of.v_proj), config.num_key_value_heads)
            ignored += [] if job["heads"] else [of.q_proj, of.k_proj, of.v_proj]
            ignored += [] if job["hidden"] else [of.o_proj, layer.mlp.down_proj]
        ignored += [] if job["hidden"] else [model.model.embed_tokens]
        score = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs=batches(calibration(job))[0][:1, :8],
            output_transform=lambda found: found.logits,
            importance=score[job["score"]](group_reduction="mean"),
            global_pruning=False,
            pruning_ratio=job["ratio"],
            ignored_layers=ignored,
            num_heads=heads,
            prune_num_heads=job["heads"],
            prune_head_dims=False,
            head_pruning_ratio=job["ratio"],
            round_to=job["round_to"],
        )
        if job["score"] == "taylor":
            for batch in batches(calibration(job)):
                model(batch, labels=batch).loss.backward()
        for group in pruner.step(interactive=True):
            group.prune()
        config.hidden_size = model.lm_head.in_features
        config.intermediate_size = layers[0].mlp.gate_proj.out_features
        config.num_attention_heads = layers[0].self_attn.q_proj.out_features // config.head_dim

    return staged(job, prune, "torch-pruning")


def llmprune(job: Record) -> Record:
    """llmprune: one call that loads, prunes and saves; `settings` are its arguments."""
    from llmprune import prune

    tokens = calibration(job)
    before = memory("VmRSS")
    _, total = timed(
        prune,
        job["model"],
        **job["settings"],
        calibration=tokens,
        seqlen=max(map(len, tokens)),
        samples=len(tokens),
        out=job["out"],
        seed=SEED,
        overwrite=True,
    )
    return {
        "seconds": {"total": total},
        "memory": {"before": before, "peak": memory("VmHWM")},
        "software": software("torch", "transformers", "llmprune"),
    }


def count_zeros(job: Record) -> Record:
    """Fraction of zeros among the matrices of the decoder layers of a saved checkpoint."""
    from safetensors import safe_open

    zeros = total = 0
    for shard in sorted(Path(job["out"]).glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            names = file.keys()
            tensors = [file.get_tensor(name) for name in names if ".layers." in name]
        matrices = [tensor for tensor in tensors if tensor.ndim > 1]
        zeros += sum(int((tensor == 0).sum()) for tensor in matrices)
        total += sum(tensor.numel() for tensor in matrices)
    if not total:
        raise ValueError(f"no matrix of a decoder layer in {job['out']}")
    return {"sparsity": zeros / total}


WORKERS = {
    "inputs": write_inputs,
    "llm-compressor": llm_compressor,
    "Model-Optimizer": model_optimizer,
    "Torch-Pruning": torch_pruning,
    "llmprune": llmprune,
    "zeros": count_zeros,
}


if __name__ == "__main__":
    _, worker, job, result = sys.argv
    Path(result).write_text(json.dumps(WORKERS[worker](json.loads(job))))
