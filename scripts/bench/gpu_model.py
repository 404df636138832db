"""Whole models on a GPU: one layer beside the textbook, four beside llm-compressor, an 8B shape pruned, a 2:4 model running.

    python scripts/bench/gpu_model.py layer
    python scripts/bench/gpu_model.py sparsegpt wanda
    python scripts/bench/gpu_model.py peer                        # --peer PYTHON: the interpreter of llm-compressor
    python scripts/bench/gpu_model.py generate

Needs a CUDA GPU and triton, and the configurations of `tune.py`, without which plain torch runs. Weights are random
bfloat16 in the shape of Llama 3 8B, made on the device. Parts that ran are kept in benchmarks/gpu_model.json. `--quick`
runs tiny shapes anywhere and writes nothing: it shows that the script runs, no more.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peers
import processes
import textbook
import torch
from device import DEVICE, Row, need_gpu, once, random, run_parts
from peer_workers import write_tokenizer, write_tokens
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import llmprune
from llmprune.kernels import dispatch, tuned
from llmprune.kernels.linear24 import Packed24
from llmprune.methods.weight.sparsegpt import SparseGPT
from llmprune.statistics import Stats, Tokens, update_together
from llmprune.types import Budget, Matrix, Pattern

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
SAMPLES, LENGTH, BATCH, NEW_TOKENS = 128, 2048, 4, 128
PEER_LAYERS = 4
AMOUNTS: dict[str, dict[str, Any]] = {"2:4": {"pattern": "2:4"}, "50 %": {"sparsity": 0.5}}
BUDGETS = {"2:4": Budget.of(None, Pattern(2, 4)), "50 %": Budget(0.5)}


class Bench:
    """At what size the parts run, and where llm-compressor is."""

    def __init__(self, peer: Path, *, quick: bool) -> None:
        self.quick, self.peer = quick, peer
        self.samples, self.length, self.new_tokens = (4, 32, 8) if quick else (SAMPLES, LENGTH, NEW_TOKENS)
        self.shape, self.layers = (TINY, 2) if quick else (SHAPE, 32)

    def model(self, layers: int) -> PreTrainedModel:
        config = LlamaConfig(**self.shape, num_hidden_layers=layers, tie_word_embeddings=False)
        torch.manual_seed(0)
        with DEVICE:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return model.eval()

    def tokens(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return list(torch.randint(0, self.shape["vocab_size"], (self.samples, self.length), generator=generator))


def prune(model: PreTrainedModel, tokens: list[torch.Tensor], method: str, **amount: Any) -> None:
    llmprune.prune(model, method=method, calibration=tokens, batch_size=BATCH, **amount)


def seconds_of_prune(bench: Bench, layers: int, method: str, amount: str) -> tuple[float, str]:
    """A model that was never pruned, after one of one layer, which compiles the kernels; and what ran."""
    prune(bench.model(1), bench.tokens(), method, **AMOUNTS[amount])
    model = bench.model(layers)
    with dispatch.recorded() as ran:
        spent = once(prune, model, bench.tokens(), method, **AMOUNTS[amount])
    return spent, _kernels(ran)


# The parts.


def part_layer(bench: Bench) -> Iterator[Row]:
    """One decoder layer by this library and by the textbook: what the method itself does, and all of it."""
    for amount, budget in BUDGETS.items():
        for name, compare in (("statistics and solving", _solving), ("with both forward passes", _whole_layer)):
            yield {"amount": amount, "what": name, **compare(bench, amount, budget)}


def _whole_layer(bench: Bench, amount: str, budget: Budget) -> Row:
    ours, kernels = seconds_of_prune(bench, 1, "sparsegpt", amount)
    theirs = once(textbook.prune_layer, bench.model(1), bench.tokens(), budget)
    return {"ours": ours, "textbook": theirs, "kernels": kernels}


def _solving(bench: Bench, amount: str, budget: Budget) -> Row:
    """On given inputs: one batch of random ones, taken again and again."""
    hidden, inner = bench.shape["hidden_size"], bench.shape["intermediate_size"]
    narrow = hidden * bench.shape["num_key_value_heads"] // bench.shape["num_attention_heads"]
    # inputs of q, k and v; of o; of gate and up; of down
    groups = [([hidden, narrow, narrow], hidden), ([hidden], hidden), ([inner, inner], hidden), ([hidden], inner)]
    inputs = [random(BATCH * bench.length, width) for _, width in groups]
    batches = bench.samples // BATCH
    matrices = [
        [Matrix("weight", random(outputs, width, dtype=torch.float32)) for outputs in rows] for rows, width in groups
    ]

    def ours() -> None:
        stats = [Stats(width, SparseGPT.needs, DEVICE) for _, width in groups]
        for _ in range(batches):
            update_together(Tokens(one, x_TI) for one, x_TI in zip(stats, inputs, strict=True))
        for together, one in zip(matrices, stats, strict=True):
            SparseGPT().solve_together(together, one, budget)

    def theirs() -> None:
        for together, x_TI in zip(matrices, inputs, strict=True):
            for matrix in together:
                gram_II = torch.zeros(x_TI.shape[1], x_TI.shape[1], device=DEVICE)
                for _ in range(batches):
                    textbook.add_to_gram(gram_II, x_TI)
                textbook.prune_matrix(matrix.weight_OI, gram_II, budget)

    ours()  # compiles the kernels
    with dispatch.recorded() as ran:
        own = once(ours)
    return {"ours": own, "textbook": once(theirs), "kernels": _kernels(ran)}


def part_whole(bench: Bench, method: str) -> Iterator[Row]:
    """All layers."""
    spent, kernels = seconds_of_prune(bench, bench.layers, method, "2:4")
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    yield {"layers": bench.layers, "seconds": spent, "peak bytes": peak, "kernels": kernels}


def part_peer(bench: Bench) -> Iterator[Row]:
    """Four layers by llm-compressor's `oneshot`, in an environment of its own, and by this library.

    Both are given a loaded model and the same tokens, and have used the GPU before the clock starts. llm-compressor
    brings each layer from the host to the GPU by itself. It is run at two batch sizes, and the faster counts. By an estimate
    from operation counts, no measurement, the part takes about five minutes on an H200.
    """
    if not bench.peer.exists() or subprocess.run([bench.peer, "-c", "import llmcompressor"], check=False).returncode:
        print(f"peer is left out: {bench.peer} cannot import llmcompressor", flush=True)
        return
    layers = 2 if bench.quick else PEER_LAYERS
    with tempfile.TemporaryDirectory() as scratch:
        folder, tokens = Path(scratch) / "model", Path(scratch) / "tokens.json"
        bench.model(layers).save_pretrained(folder)
        write_tokenizer(folder, bench.shape["vocab_size"])
        write_tokens(tokens, bench.tokens())
        job = {"model": folder, "tokens": tokens, "out": Path(scratch) / "out", "dtype": "bfloat16"}
        for amount in AMOUNTS:
            peer = {**job, "method": "sparsegpt", "amount": amount.replace("50 %", "0.5")}
            runs = [
                processes.call(bench.peer, "llm-compressor", on_gpu=True, **peer, batch_size=size)
                for size in (1, BATCH)
            ]
            ours, kernels = seconds_of_prune(bench, layers, "sparsegpt", amount)
            yield {
                "amount": amount,
                "layers": layers,
                "ours per layer": ours / layers,
                "llm-compressor per layer": min(one["seconds"]["prune"] for one in runs) / layers,
                "versions": peers.listing(runs[0]["software"]),
                "kernels": kernels,
            }


def part_generate(bench: Bench) -> Iterator[Row]:
    """Greedy text of one sequence with a static cache, dense and then 2:4; on CUDA a step is a CUDA graph."""
    model = bench.model(bench.layers)
    prune(model, bench.tokens()[:BATCH], "magnitude", pattern="2:4")
    for name in ("dense", "2:4"):
        if name == "2:4":
            llmprune.accelerate(model)
            gc.collect()
        with dispatch.recorded() as ran:
            rate = statistics.median(_rates(bench, model))
        matrices = [one for one in model.model.layers.modules() if isinstance(one, (nn.Linear, Packed24))]
        yield {
            "model": name,
            "rate": f"{rate:.1f} tokens/s",
            "bytes": _bytes([model]),
            "bytes of matrices": _bytes(matrices),
            "kernels": _kernels(ran),
        }


def _rates(bench: Bench, model: PreTrainedModel) -> list[float]:
    ids = torch.zeros(1, 16, dtype=torch.long, device=DEVICE)
    settings = {"max_new_tokens": bench.new_tokens, "min_new_tokens": bench.new_tokens, "do_sample": False}

    def text() -> None:
        model.generate(ids, cache_implementation="static", pad_token_id=0, **settings)

    text()
    text()
    return [bench.new_tokens / once(text) for _ in range(5)]


def _bytes(modules: list[Any]) -> int:
    """Of all parameters and buffers."""
    tensors = [one for module in modules for one in (*module.parameters(), *module.buffers())]
    return sum({one.data_ptr(): one.nbytes for one in tensors}.values())


def _kernels(ran: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{operation}={'+'.join(row['ran'])}" for operation, row in ran.items())


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "layer": part_layer,
    "sparsegpt": partial(part_whole, method="sparsegpt"),
    "wanda": partial(part_whole, method="wanda"),
    "peer": part_peer,
    "generate": part_generate,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--peer", type=Path, default=peers.PYTHON, help="interpreter with llm-compressor (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing written: does the script run?")
    arguments = parser.parse_args()
    need_gpu(quick=arguments.quick)
    if DEVICE.type == "cuda" and not tuned.path_of(DEVICE).is_file():
        print(f"{tuned.path_of(DEVICE).name} is missing: plain torch runs until tune.py has made it", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    bench = Bench(arguments.peer, quick=arguments.quick)
    head = f"Llama 3 8B's shape, random bfloat16, {SAMPLES} x {LENGTH} random tokens, seed 0, schedule layer.\n\n"
    run_parts("gpu_model", {name: PARTS[name](bench) for name in arguments.parts}, head, quick=arguments.quick)


if __name__ == "__main__":
    main()
