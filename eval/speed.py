"""How fast and how large: dense and pruned models measured in turns in one process."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from llmprune.calibration import longest
from llmprune.checkpoint.skeleton import load_config
from llmprune.checkpoint.source import Checkpoint, resolve
from llmprune.eval.perplexity import open_model
from llmprune.kernels import dispatch
from llmprune.kernels.linear24 import SparseLinear24
from llmprune.memory import PeakMemory, current
from llmprune.types import UserError

# How often each model is loaded after the first time, which warms up; the last of them is measured further.
LOADS = 3


def bench(
    models: Mapping[str, str | Path],
    *,
    prompt: int = 128,
    new: int = 32,
    batch_size: int = 1,
    rounds: int = 7,
    seed: int = 0,
    sparse: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Time `models` (label → folder or Hub id) in turns: round by round, one after the other.

    Prefill is the time to the first token of a random prompt of `prompt` tokens; decoding that of `new` greedy
    tokens after it, per token (of the whole batch). Loading takes turns too, `LOADS` times. The first round warms up
    and is not counted. Figures are medians in seconds with the quartiles. `sparse`: all but the model called "dense"
    run their N:M layers on the sparse kernels; which ones those were is in `kernels`. Raises UserError.
    """
    _check(models, prompt, new, batch_size, rounds, trust_remote_code)
    how: Any = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    opened, loads = _open_in_turns(models, sparse, how)
    smallest = min(one.get_input_embeddings().weight.shape[0] for one in opened.values())
    ids_BT = torch.randint(smallest, (batch_size, prompt), generator=torch.Generator().manual_seed(seed))
    rows = {
        label: {"model": str(models[label]), **_size(str(models[label]), model), **_warm_up(model, ids_BT, new)}
        for label, model in opened.items()
    }
    times: dict[str, dict[str, list[float]]] = {label: {"prefill": [], "decode": []} for label in models}
    for _ in range(rounds):
        for label, model in opened.items():
            place = ids_BT.to(model.device)
            first, whole = _clock(model, place, 1), _clock(model, place, new)
            times[label]["prefill"].append(first)
            times[label]["decode"].append((whole - first) / (new - 1))
    for label, row in rows.items():
        row["load"] = _spread(loads[label])
        for what, tokens in (("prefill", batch_size * prompt), ("decode", batch_size)):
            spread = _spread(times[label][what])
            row[what] = {**spread, "tokens_per_s": tokens / spread["median_s"]}
    one = next(iter(opened.values()))
    return {
        "models": rows,
        "protocol": {
            "prompt": prompt, "new": new, "batch_size": batch_size, "rounds": rounds, "loads": LOADS, "seed": seed,
            "sparse": sparse,
            "device": _device_name(one.device), "dtype": str(one.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(), "torch": torch.__version__,
        },
    }  # fmt: skip


def _check(
    models: Mapping[str, str | Path], prompt: int, new: int, batch_size: int, rounds: int, trust_remote_code: bool
) -> None:
    """Whether the numbers are large enough, and small enough for every model; raises UserError."""
    limits = {"prompt": (prompt, 1), "new": (new, 2), "batch_size": (batch_size, 1), "rounds": (rounds, 2)}
    for name, (value, least) in limits.items():
        if value < least:
            raise UserError(f"{name} {value} must be at least {least}")
    for which in models.values():
        room = longest(load_config(str(resolve(str(which))), trust_remote_code=trust_remote_code))
        if prompt + new > room:
            raise UserError(f"prompt {prompt} + new {new} is more than the {room} tokens of {which}")


def _open_in_turns(
    models: Mapping[str, str | Path], sparse: bool, how: dict[str, Any]
) -> tuple[dict[str, PreTrainedModel], dict[str, list[float]]]:
    """Each model as it was loaded last, and the seconds of its counted loads."""
    seconds: dict[str, list[float]] = {label: [] for label in models}
    opened: dict[str, PreTrainedModel] = {}
    for number in range(LOADS + 1):
        for label, which in models.items():
            # never twice in memory
            opened.pop(label, None)
            gc.collect()
            opened[label], took = _load(which, sparse=sparse and label != "dense", **how)
            if number > 0:
                seconds[label].append(took)
    return opened, seconds


def _warm_up(model: PreTrainedModel, ids_BT: torch.Tensor, new: int) -> dict[str, Any]:
    """The round that is not timed: operations and memory that it takes, and the kernels that run."""
    place = ids_BT.to(model.device)
    with dispatch.recorded() as ran:
        found = {"prefill_flops": _flops(model, place), "memory": _peak(model, place, new)}
    return {**found, "kernels": ran}


class _Unused:
    """In the place of a tokenizer, which no timing needs."""


def _load(which: str | Path, **options: Any) -> tuple[PreTrainedModel, float]:
    """A model, ready to run, and the seconds that took."""
    started = time.perf_counter()
    model, _ = open_model(which, _Unused(), **options)
    _wait(model.device)
    return model, time.perf_counter() - started


def _size(which: str, model: PreTrainedModel) -> dict[str, Any]:
    """Bytes of the files and of the loaded weights; parameters and zeros as of the dense matrices that packed ones stand for."""
    checkpoint = Checkpoint(resolve(which))
    tied = model.all_tied_weights_keys
    held = [one for name, one in model.named_parameters() if name not in tied]
    packed = [one for one in model.modules() if isinstance(one, SparseLinear24)]
    counts = [(one.numel(), int((one == 0).sum())) for one in itertools.chain(held, (one.weight for one in packed))]
    buffers = {id(one): one for layer in packed for one in layer.packed.buffers()}
    return {
        "file_bytes": sum((checkpoint.folder / name).stat().st_size for name in checkpoint.files),
        "params": sum(count for count, _ in counts),
        "zeros": sum(zeros for _, zeros in counts),
        "weight_bytes": sum(one.nbytes for one in (*held, *buffers.values())),
    }


@torch.no_grad()
def _generate(model: PreTrainedModel, ids_BT: torch.Tensor, new: int) -> None:
    model.generate(
        input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), min_new_tokens=new, max_new_tokens=new,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip


@torch.no_grad()
def _flops(model: PreTrainedModel, ids_BT: torch.Tensor) -> int:
    """Floating point operations of the matrix products of a prefill, zeros counted like any weight."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.llmprune.matmul24: _packed_flops}) as counter:
        model(input_ids=ids_BT, use_cache=False)
    return int(counter.get_total_flops())


def _packed_flops(x_TI: list[int], values_OV: list[int], *rest: object, **result: object) -> int:
    """Of a product with a packed 2:4 matrix, from the shapes of its operands."""
    tokens, inputs = x_TI
    return 2 * tokens * inputs * values_OV[0]


def _clock(model: PreTrainedModel, ids_BT: torch.Tensor, new: int) -> float:
    _wait(model.device)
    started = time.perf_counter()
    _generate(model, ids_BT, new)
    _wait(model.device)
    return time.perf_counter() - started


def _peak(model: PreTrainedModel, ids_BT: torch.Tensor, new: int) -> dict[str, Any]:
    """Bytes that a generation takes beyond the loaded models, at its peak, and how that was measured."""
    if model.device.type == "cpu":
        before = current()[0]
        with PeakMemory(interval_s=0.005) as memory:
            _generate(model, ids_BT, new)
        return {"beyond_weights_bytes": max(memory.anonymous - before, 0), "by": "resident memory, sampled"}
    torch.accelerator.reset_peak_memory_stats(model.device)
    before = torch.accelerator.memory_allocated(model.device)
    _generate(model, ids_BT, new)
    _wait(model.device)
    peak = torch.accelerator.max_memory_allocated(model.device)
    return {"beyond_weights_bytes": peak - before, "by": "allocator"}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles in seconds."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median_s": middle, "q1_s": low, "q3_s": high}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
