"""`llmprune bench`: time and size of a model, in turns with its dense baseline."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from llmprune.commands import AsJson, Model, ResultFile, Trust


def bench(
    model: Model,
    baseline: Annotated[str | None, typer.Option(help="The dense model, measured in turns with MODEL.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    new: Annotated[int, typer.Option(help="Tokens to decode.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    rounds: Annotated[int, typer.Option(help="Measurements of each; one more warms up.")] = 7,
    sparse: Annotated[bool, typer.Option("--sparse", help="Run N:M layers on the sparse kernels.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "auto",
    trust_remote_code: Trust = False,
    out: ResultFile = None,
    as_json: AsJson = False,
) -> None:
    """Time MODEL: prefill, decoding, loading; memory, file size, parameters, FLOPs."""
    from llmprune.checkpoint import output
    from llmprune.eval import speed

    if out is not None:
        output.check_file(out)
    models = {"pruned": model} if baseline is None else {"dense": baseline, "pruned": model}
    result = speed.bench(
        models,
        prompt=prompt,
        new=new,
        batch_size=batch_size,
        rounds=rounds,
        sparse=sparse,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print(json.dumps(result))
    else:
        _show(result, sparse=sparse)
    if out is not None:
        output.write_json(out, result)


def _show(result: dict[str, Any], *, sparse: bool) -> None:
    table = Table("", *result["models"])
    rows = result["models"].values()
    for title, key in (("prefill", "prefill"), ("decode, a token", "decode")):
        spreads = [
            f"{1e3 * one[key]['median_s']:.3f} ms ({1e3 * one[key]['q1_s']:.3f}–{1e3 * one[key]['q3_s']:.3f})"
            for one in rows
        ]
        table.add_row(title, *spreads)
        table.add_row("  tokens/s", *(f"{one[key]['tokens_per_s']:,.0f}" for one in rows))
    loads = (one["load"] for one in rows)
    table.add_row("load", *(f"{one['median_s']:.2f} s ({one['q1_s']:.2f}–{one['q3_s']:.2f})" for one in loads))
    table.add_row("weights", *(f"{one['weight_bytes'] / 2**20:,.1f} MiB" for one in rows))
    table.add_row("beyond weights", *(f"{one['memory']['beyond_weights_bytes'] / 2**20:,.1f} MiB" for one in rows))
    table.add_row("files", *(f"{one['file_bytes'] / 2**20:,.1f} MiB" for one in rows))
    table.add_row("parameters", *(f"{one['params']:,} ({one['zeros'] / one['params']:.1%} zero)" for one in rows))
    table.add_row("FLOPs of a prefill", *(f"{one['prefill_flops']:.3g}" for one in rows))
    if sparse:
        ran = [one["kernels"].get("matmul24", {"ran": ["dense"]})["ran"] for one in rows]
        table.add_row("products with 2:4 matrices", *(", ".join(names) for names in ran))
    Console().print(table)
    p = result["protocol"]
    print(
        f"medians (quartiles) of {p['rounds']} rounds in turns; prompt {p['prompt']}, {p['new']} new, batch "
        f"{p['batch_size']}; loaded {p['loads']} times; {p['device']}, {p['dtype']}, {p['threads']} threads, "
        f"torch {p['torch']}"
    )
