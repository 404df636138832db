"""Whole models on a GPU: SparseGPT of one layer beside the textbook, an 8B shape pruned, a 2:4 model generating.

    python scripts/bench/gpu_model.py layer
    python scripts/bench/gpu_model.py sparsegpt wanda
    python scripts/bench/gpu_model.py generate

Needs a CUDA GPU and triton; each line is a few minutes on an H100 or less. Weights are random bfloat16 in the shape of Llama
3 8B, made on the device. Parts that ran are kept in benchmarks/gpu_model.json. `--quick --device cpu` runs tiny shapes
anywhere and writes nothing: it shows that the script runs, no more.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import record
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import llmprune
from llmprune import masks
from llmprune.arch.discover import find_units
from llmprune.types import Budget, Pattern

SAMPLES, LENGTH, NEW_TOKENS = 128, 2048, 128
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
BLOCK, DAMPING = 128, 0.01

Row = dict[str, Any]


class Bench:
    """Where and at what size the parts run."""

    def __init__(self, device: str, *, quick: bool) -> None:
        self.device, self.quick = torch.device(device), quick
        self.samples, self.length, self.new_tokens = (4, 32, 8) if quick else (SAMPLES, LENGTH, NEW_TOKENS)

    def model(self, layers: int) -> PreTrainedModel:
        config = LlamaConfig(**(TINY if self.quick else SHAPE), num_hidden_layers=layers, tie_word_embeddings=False)
        torch.manual_seed(0)
        with self.device:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return model.eval()

    def tokens(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        vocabulary = (TINY if self.quick else SHAPE)["vocab_size"]
        return list(torch.randint(0, vocabulary, (self.samples, self.length), generator=generator))

    def seconds(self, function: Callable[..., Any], *operands: Any, **settings: Any) -> float:
        """Wall time of a call, until the device has done it."""
        self.wait()
        started = time.perf_counter()
        function(*operands, **settings)
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def prune(model: PreTrainedModel, tokens: list[torch.Tensor], method: str, **amount: Any) -> None:
    llmprune.prune(model, method=method, calibration=tokens, batch_size=4, **amount)


def part_layer(bench: Bench) -> Iterator[Row]:
    """One decoder layer, statistics and solving, by this library and by the textbook."""
    for name, amount in (("2:4", {"pattern": "2:4"}), ("50 %", {"sparsity": 0.5})):
        ours = [bench.seconds(prune, one, bench.tokens(), "sparsegpt", **amount) for one in _fresh(bench, 3)]
        budget = Budget.of(None, Pattern(2, 4)) if "pattern" in amount else Budget(0.5)
        (model,) = _fresh(bench, 1)
        theirs = bench.seconds(textbook, model, bench.tokens(), budget)
        # the first of ours compiles kernels
        yield {"amount": name, "ours": statistics.median(ours[1:]), "textbook": theirs}


def _fresh(bench: Bench, times: int) -> Iterator[PreTrainedModel]:
    return (bench.model(1) for _ in range(times))


@torch.no_grad()
def textbook(model: PreTrainedModel, tokens: list[torch.Tensor], budget: Budget) -> None:
    """SparseGPT as its paper has it: a float32 X'X for every linear layer, then column by column in plain torch."""
    (unit,) = find_units(model, head=False)
    linears = {name: one for name, one in unit.module.named_modules() if isinstance(one, nn.Linear)}
    grams = {name: torch.zeros(one.in_features, one.in_features, device=model.device) for name, one in linears.items()}

    def adding(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x_TI = args[0].flatten(0, -2).float()
            grams[name] += x_TI.T @ x_TI

        return hook

    with contextlib.ExitStack() as stack:
        for name, one in linears.items():
            stack.callback(one.register_forward_pre_hook(adding(name)).remove)
        for ids in tokens:
            model.model(input_ids=ids[None].to(model.device), use_cache=False)
    for name, one in linears.items():
        one.weight.copy_(textbook_matrix(one.weight.float(), grams[name], budget))
    for ids in tokens:
        model.model(input_ids=ids[None].to(model.device), use_cache=False)


def textbook_matrix(weight_OI: torch.Tensor, gram_II: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Algorithm 1 of Frantar and Alistarh 2023 (SparseGPT), right-looking, one column after the other."""
    weight_OI, inputs = weight_OI.clone(), len(gram_II)
    gram_II.diagonal().add_(DAMPING * gram_II.diagonal().mean())
    inverse_II = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram_II)), upper=True)
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        block_OB, upper_BB = weight_OI[:, start:end].clone(), inverse_II[start:end, start:end]
        error_OB = torch.zeros_like(block_OB)
        diagonal_B = upper_BB.diagonal()
        pruned_OB = masks.select((block_OB / diagonal_B).square(), budget, by="matrix")
        group = budget.pattern.group
        for column in range(end - start):
            if group and column % group == 0:
                here = slice(column, column + group)
                pruned_OB[:, here] = masks.select((block_OB[:, here] / diagonal_B[here]).square(), budget, by="row")
            kept_O = block_OB[:, column].masked_fill(pruned_OB[:, column], 0)
            error_O = (block_OB[:, column] - kept_O) / diagonal_B[column]
            block_OB[:, column:] -= error_O[:, None] * upper_BB[column, column:]
            block_OB[:, column] = kept_O
            error_OB[:, column] = error_O
        weight_OI[:, start:end] = block_OB
        weight_OI[:, end:] -= error_OB @ inverse_II[start:end, end:]
    return weight_OI


def part_whole(bench: Bench, method: str) -> Iterator[Row]:
    """All layers; a model of one layer goes first, which compiles the kernels."""
    (warm,) = _fresh(bench, 1)
    prune(warm, bench.tokens(), method, pattern="2:4")
    model = bench.model(2 if bench.quick else 32)
    layers = model.config.num_hidden_layers
    yield {
        "layers": layers,
        "seconds": bench.seconds(prune, model, bench.tokens(), method, pattern="2:4"),
        "peak bytes": torch.cuda.max_memory_allocated() if bench.device.type == "cuda" else 0,
    }


def part_generate(bench: Bench) -> Iterator[Row]:
    """Greedy text of one sequence with a static cache, dense and 2:4 by turns; on CUDA the step runs as a CUDA graph."""
    model = bench.model(2 if bench.quick else 32)
    prune(model, bench.tokens()[:2], "magnitude", pattern="2:4")
    for name in ("dense", "2:4"):
        if name == "2:4":
            llmprune.accelerate(model)
            gc.collect()
        held = torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0
        rate = statistics.median(_rates(bench, model))
        yield {"model": name, "tokens per second": f"{rate:.1f}", "bytes held": held}


def _rates(bench: Bench, model: PreTrainedModel) -> list[float]:
    ids = torch.zeros(1, 16, dtype=torch.long, device=bench.device)
    settings = {"max_new_tokens": bench.new_tokens, "min_new_tokens": bench.new_tokens, "do_sample": False}

    def text() -> None:
        model.generate(ids, cache_implementation="static", pad_token_id=0, **settings)

    text()
    text()
    return [bench.new_tokens / bench.seconds(text) for _ in range(5)]


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "layer": part_layer,
    "sparsegpt": lambda bench: part_whole(bench, "sparsegpt"),
    "wanda": lambda bench: part_whole(bench, "wanda"),
    "generate": part_generate,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing written: does the script run?")
    arguments = parser.parse_args()
    if not (arguments.quick or torch.cuda.is_available()):
        sys.exit("there is no CUDA GPU here, and times from anywhere else would say nothing")
    bench = Bench(arguments.device, quick=arguments.quick)
    path = record.FOLDER / "gpu_model.json"
    measured = json.loads(path.read_text())["measured"] if path.is_file() else {}
    for name in arguments.parts:
        rows = []
        for row in PARTS[name](bench):
            rows.append(row)
            print(name, row, flush=True)
        if not arguments.quick:
            measured[name] = {"environment": record.environment("triton"), "rows": rows}
    if not arguments.quick:
        text = f"Llama 3 8B's shape, random bfloat16, {SAMPLES} x {LENGTH} random tokens, seed 0, schedule layer.\n\n"
        text += "".join(f"## {name}\n\n{_table(one['rows'])}\n" for name, one in measured.items())
        record.save("gpu_model", {"environment": record.environment("triton"), "measured": measured}, text)


def _table(rows: list[Row]) -> str:
    heads = list(rows[0])
    cells = [[f"{row[key]:.2f} s" if isinstance(row[key], float) else str(row[key]) for key in heads] for row in rows]
    return record.table(heads, cells)


if __name__ == "__main__":
    main()
