"""`llmprune eval`: measure a model, beside its dense baseline if one is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from llmprune.commands import AsJson, Model, ResultFile, Trust
from llmprune.report import words
from llmprune.types import UserError


def evaluate(
    model: Model,
    perplexity: Annotated[list[str] | None, typer.Option(help="Text SPEC; may be repeated.")] = None,
    seqlen: Annotated[str, typer.Option(help="Tokens a window, or max: the most the model takes.")] = "2048",
    stride: Annotated[int | None, typer.Option(help="Distance of windows; they do not overlap by default.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Measure only the first windows.")] = None,
    bos: Annotated[
        str, typer.Option(help="Where BOS stands, if the tokenizer adds it: window, text, never.")
    ] = "window",
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, comma list; local_… read files of yours.")] = None,
    task_data: Annotated[Path | None, typer.Option(help="Folder with the files of the local tasks.")] = None,
    limit: Annotated[float | None, typer.Option(help="Only the first N rows of a task; below 1: a share.")] = None,
    fewshot: Annotated[
        int | None, typer.Option(help="Examples in the prompt; the task's own number by default.")
    ] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Put prompts in the chat template.")] = False,
    generate: Annotated[bool, typer.Option("--generate", help="Let the model go on from fixed prompts.")] = False,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt of yours to go on from; may be repeated.")] = None,
    baseline: Annotated[str | None, typer.Option(help="The dense model: measured likewise, and compared.")] = None,
    batch_size: Annotated[
        str, typer.Option(help="Windows or requests a batch, or auto: as many as memory allows.")
    ] = "8",
    seed: Annotated[int, typer.Option(help="Seed of lm-eval: few-shot examples.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "auto",
    trust_remote_code: Trust = False,
    out: ResultFile = None,
    record: Annotated[bool, typer.Option("--record", help="Enter the result in MODEL's llmprune.json too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure MODEL: perplexity on texts, lm-eval tasks, closeness to a dense baseline, samples."""
    import llmprune
    from llmprune.checkpoint import output

    if out is not None:
        output.check_file(out)
    window, batch = _number("seqlen", seqlen, "max"), _number("batch-size", batch_size, "auto")
    if not (perplexity or tasks or prompt or generate):
        raise UserError("say what to measure: --perplexity SPEC, --tasks NAMES, --generate, or --prompt TEXT")
    if record and not (written := Path(model) / output.REPORT_NAME).is_file():
        raise UserError(f"--record: there is no {written}; only a model that llmprune made has one")
    result = llmprune.evaluate(
        model,
        perplexity=perplexity or [],
        tasks=[one.strip() for one in tasks.split(",") if one.strip()] if tasks else [],
        baseline=baseline,
        prompts=prompt or generate,
        task_data=task_data,
        seqlen=window,
        stride=stride,
        max_windows=max_windows,
        bos=bos,
        limit=limit,
        fewshot=fewshot,
        chat_template=chat_template,
        seed=seed,
        batch_size=batch,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print(json.dumps(result))
    else:
        _show(result)
    # after it is shown: a disk that is full by now does not take the result away
    if out is not None:
        output.write_json(out, result)
    if record:
        _record(Path(model), result)


def _number(option: str, value: str, word: str) -> Any:
    """A number as an option gives it, or the one word that may stand for it; raises UserError."""
    if value != word and not value.isdigit():
        raise UserError(f"--{option} {value} must be a number, or {word}")
    return value if value == word else int(value)


def _record(folder: Path, result: dict[str, Any]) -> None:
    """Enter a result in the report of a model, beside what was measured of it earlier."""
    from llmprune.checkpoint import output
    from llmprune.eval.recorded import joined, other_baseline

    earlier = json.loads((folder / output.REPORT_NAME).read_text()).get("evaluation", {})
    other = other_baseline(earlier, result)
    if other is not None:
        print(f"what was recorded beside the baseline {other} is dropped: it is another now", file=sys.stderr)
    output.record(folder, "evaluation", joined(earlier, result))


def _show(result: dict[str, Any]) -> None:
    console = Console()
    baseline, comparison = result.get("baseline", {}), result.get("comparison", {})
    if result["perplexity"]:
        console.print(_perplexity_table(result, baseline, comparison))
    if "tasks" in result:
        console.print(_task_table(result, baseline, comparison))
    for number, row in enumerate(result.get("generation", [])):
        console.print(f"\n{row['prompt']}", markup=False, style="bold")
        if baseline:
            console.print(f"  dense: {baseline['generation'][number]['text']}", markup=False)
        console.print(f"  {'pruned' if baseline else 'writes'}: {row['text']}", markup=False)


def _perplexity_table(result: dict[str, Any], baseline: dict[str, Any], comparison: dict[str, Any]) -> Table:
    compared = ("dense", "KL", "same top token") if baseline else ()
    table = Table(Column("text", overflow="fold"), "perplexity", *compared, Column("protocol", overflow="fold"))
    for spec, row in result["perplexity"].items():
        beside = []
        if baseline:
            close = comparison["perplexity"][spec]
            beside = [f"{baseline['perplexity'][spec]['ppl']:.3f}", f"{close['kl']:.4f}", f"{close['top1']:.1%}"]
        protocol = f"{row['tokens']:,} tokens, {words.windows(row)}, {row['dtype']}"
        table.add_row(spec, f"{row['ppl']:.3f}", *beside, protocol)
    return table


def _task_table(result: dict[str, Any], baseline: dict[str, Any], comparison: dict[str, Any]) -> Table:
    heads = ("task", "metric", "value", *(("dense", "delta", "paired p") if baseline else ()), "protocol")
    table = Table(*(Column(head, overflow="fold") for head in heads))
    for name, row in result["tasks"].items():
        for metric in (key for key, value in row.items() if isinstance(value, float) and key != "version"):
            beside = []
            if baseline:
                test = comparison["tasks"].get(name, {}).get(metric)
                tested = ["–", "–"]
                if test is not None:
                    tested = [words.difference(test), "–" if test["p"] is None else f"{test['p']:.3g}"]
                beside = [_with_error(baseline["tasks"][name], metric), *tested]
            table.add_row(name, metric, _with_error(row, metric), *beside, f"{words.prompts(row)}, {row['dtype']}")
    return table


def _with_error(row: dict[str, Any], metric: str) -> str:
    error = row["stderr"].get(metric)
    return f"{row[metric]:.4g}" + (f" ± {error:.2g}" if error is not None else "")
