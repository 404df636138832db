"""Compare llmprune with llm-compressor: time and memory of SparseGPT and Wanda on the same model and tokens.

    python scripts/bench/peers.py                      # the comparison, into benchmarks/peers.{json,md}
    python scripts/bench/peers.py --pattern 2:4        # the same, and once more at 2:4
    python scripts/bench/peers.py --quality --model DIR --calibration-tokens ids.json \\
        --method wanda --sparsity 0.5 --out PRUNED     # the peer alone, on any model

llm-compressor lives in a virtual environment of its own (`--env`), built on the first call; llmprune is taken
from the interpreter that runs this script. Every run is a fresh process on the CPU, and the sides take turns.
Linux only: memory and the load of other jobs come from /proc. Time it on a quiet machine: a second busy job
stretches the peer's many small parallel steps far more than its share of the cores.
"""

import argparse
import importlib.util
import json
import shlex
import shutil
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import NamedTuple

from peer_workers import BATCH, LENGTH, MODEL, SEED, SEQUENCES
from processes import ROOT, Record, build_env, call, hardware, watched

ENV = Path.home() / ".cache" / "llmprune" / "peers"
PYTHON = ENV / "bin" / "python"
PINS = {"torch": "2.13.0", "llmcompressor": "0.14.0.1"}
SCHEDULES = {"sparsegpt": ("layer", "module"), "wanda": ("layer",)}
TOOLS = ("llm-compressor", "llmprune")
PHASES = ("load", "prune", "save", "total")


class Side(NamedTuple):
    """One contestant: a worker and its options in an interpreter, under a label unique in a case."""

    worker: str
    label: str
    python: Path | str
    options: Record


def measure(python: Path, side: Side, job: Record) -> Record:
    """One run of a side: its record, the sparsity it saved, and how many cores others kept busy meanwhile."""
    record = watched(side.python, side.worker, **job, **side.options)
    record |= call(python, "zeros", out=job["out"])
    shutil.rmtree(job["out"])
    seconds, peak = record["seconds"]["total"], record["memory"]["peak"] / 2**30
    line = f"{job['method']} {job['amount']}, {side.worker} {side.label}: {seconds:.1f} s, {peak:.2f} GiB"
    print(f"{line}, others kept {record['other_cores']:.2f} cores busy", file=sys.stderr, flush=True)
    return record


def sides(python: Path, job: Record, args: argparse.Namespace) -> list[Side]:
    """What takes turns: the peer at each batch size, then ours by each schedule."""
    peer, own = TOOLS
    peers = [Side(peer, f"batch {size}", python, {"batch_size": size}) for size in args.peer_batch_size]
    schedules = () if args.peer_only else SCHEDULES[job["method"]]
    amount = {"pattern": job["amount"]} if ":" in job["amount"] else {"sparsity": float(job["amount"])}
    settings = {"method": job["method"], **amount, "batch_size": BATCH}
    return peers + [Side(own, name, sys.executable, {"settings": settings | {"schedule": name}}) for name in schedules]


def run_case(python: Path, job: Record, args: argparse.Namespace) -> Record:
    """All repeats of one method and amount, and the ratios to the peer at its fastest batch size."""
    plan = sides(python, job, args)
    runs: dict[str, list[Record]] = {side.label: [] for side in plan}
    for _ in range(args.repeats):
        for side in plan:
            runs[side.label].append(measure(python, side, job))
    peers, ours = ({side.label: summarize(runs[side.label]) for side in plan if side.worker == tool} for tool in TOOLS)
    fastest = min(peers, key=lambda label: peers[label]["seconds"]["prune"]["median"])
    return {
        "method": job["method"],
        "amount": job["amount"],
        "llm-compressor": peers,
        "llmprune": ours,
        "fastest_peer": fastest,
        "ratios": {label: ratios(peers[fastest], result) for label, result in ours.items()},
    }


def summarize(runs: list[Record]) -> Record:
    """Spread of seconds and bytes over the runs of one side, with the sparsity and foreign load of each."""

    def spread(group: str, name: str) -> dict[str, float]:
        values = [run[group][name] for run in runs]
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    groups = ("seconds", "memory")
    return {
        **{group: {name: spread(group, name) for name in runs[0][group]} for group in groups},
        "sparsity": [run["sparsity"] for run in runs],
        "other_cores": [round(run["other_cores"], 2) for run in runs],
        "software": runs[0]["software"],
    }


def ratios(peer: Record, ours: Record) -> dict[str, float]:
    """Medians, peer over ours: load + prune + save, `oneshot` alone over our whole call, peak memory."""
    whole = ours["seconds"]["total"]["median"]
    return {
        "total": peer["seconds"]["total"]["median"] / whole,
        "oneshot": peer["seconds"]["prune"]["median"] / whole,
        "memory": peer["memory"]["peak"]["median"] / ours["memory"]["peak"]["median"],
    }


# ---- record ----


def command_line(args: argparse.Namespace) -> str:
    """The command that makes the record again, without its folders."""
    words = ["python", "scripts/bench/peers.py", "--repeats", args.repeats, "--method", *args.method]
    words += ["--sparsity", args.sparsity, "--peer-batch-size", *args.peer_batch_size]
    words += ["--pattern", args.pattern] if args.pattern else []
    words += ["--peer-only"] if args.peer_only else []
    return shlex.join(map(str, words))


def cell(result: dict[str, float] | None, unit: float = 1.0) -> str:
    """`median (min–max)`, or a dash for what has no clock of its own."""
    if result is None:
        return "–"
    return f"{result['median'] / unit:.2f} ({result['min'] / unit:.2f}–{result['max'] / unit:.2f})"


def rows(case: Record) -> list[str]:
    """The table rows of one case: the peer by batch size, then ours by schedule with the ratios."""
    lines = []
    for tool in TOOLS:
        for label, side in case[tool].items():
            ratio = case["ratios"].get(label, {})
            cells = [case["method"], case["amount"], f"{tool}, {label}"]
            cells += [cell(side["seconds"].get(phase)) for phase in PHASES]
            cells += [cell(side["memory"][name], 2**30) for name in ("peak", "before")]
            cells += [", ".join(sorted({f"{value:.5f}" for value in side["sparsity"]}))]
            cells += [f"{max(side['other_cores']):.2f}"]
            cells += [f"{ratio[name]:.2f}" if ratio else "–" for name in ("total", "oneshot", "memory")]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def listing(pairs: Record) -> str:
    """`name value, name value`."""
    return ", ".join(f"{name} {value}" for name, value in pairs.items())


def markdown(record: Record) -> str:
    """The record as a page: the protocol, then one table."""
    heads = ["method", "amount", "side", "load s", "prune s", "save s", "total s", "peak GiB", "start GiB"]
    heads += ["sparsity", "other cores", "time ×", "oneshot ×", "memory ×"]
    page = [
        "# llmprune beside llm-compressor\n",
        f"- {record['date']}: `{record['command']}`",
        f"- Machine: {listing(record['hardware'])}",
        *(f"- {tool} side: {listing(found)}" for tool, found in record["software"].items()),
        f"- Model: {listing(record['model'])}",
        f"- Calibration: {listing(record['calibration'])}",
        f"- Repeats: {record['repeats']}, the sides in turn, each run a fresh process; median (min–max). "
        f"llmprune's batch size is {record['our_batch_size']}. Imports are not timed.",
        "- llmprune's call streams the model from disk and writes the pruned one: *time ×* holds the peer's "
        "load + prune + save against it, *oneshot ×* the peer's `oneshot` on a loaded model. Ratios are the "
        "peer at its fastest batch size over ours: above 1 ours is better.",
        "- Peak is the resident memory of the whole process, start what it held after the imports; other "
        "cores is what other jobs kept busy on average, in the worst run.\n",
        "| " + " | ".join(heads) + " |",
        "|" + " --- |" * len(heads),
        *(line for case in record["cases"] for line in rows(case)),
    ]
    return "\n".join(page) + "\n"


# ---- the two modes ----


def benchmark(args: argparse.Namespace) -> None:
    """Run every case and write the JSON record and its Markdown page."""
    python = build_env(args.env, PINS)
    amounts = [str(args.sparsity)] + ([args.pattern] if args.pattern else [])
    with tempfile.TemporaryDirectory(dir=args.env) as scratch:
        inputs = {"model": f"{scratch}/model", "tokens": f"{scratch}/tokens.json"}
        call(python, "inputs", **inputs)
        job = {**inputs, "out": f"{scratch}/pruned", "dtype": "float32"}
        cases = [
            run_case(python, {**job, "method": method, "amount": amount}, args)
            for method in args.method
            for amount in amounts
        ]
    record = {
        "date": date.today().isoformat(),
        "command": command_line(args),
        "hardware": hardware(),
        "model": {"family": "llama", "dtype": "float32", "weights": "random", "seed": SEED, **MODEL},
        "calibration": {"sequences": SEQUENCES, "length": LENGTH, "tokens": "random", "seed": SEED},
        "software": {tool: side["software"] for tool in TOOLS for side in cases[0][tool].values()},
        "repeats": args.repeats,
        "our_batch_size": BATCH,
        "cases": cases,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    args.out.with_suffix(".md").write_text(markdown(record))
    print(markdown(record), end="")


def quality(args: argparse.Namespace) -> None:
    """Prune one model with the peer alone, leave it in `--out` and print what was measured."""
    python = build_env(args.env, PINS)
    settings = {"method": args.method[0], "amount": args.pattern or str(args.sparsity), "dtype": args.dtype}
    settings["batch_size"] = args.peer_batch_size[0]
    paths = {"model": args.model, "tokens": args.calibration_tokens, "out": args.out}
    record = call(python, TOOLS[0], **paths, **settings)
    print(json.dumps({**settings, **record, **call(python, "zeros", out=args.out)}, indent=2))


def parse() -> argparse.Namespace:
    """The command line, checked."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--env", type=Path, default=ENV, help="virtual environment of the peer (default: %(default)s)")
    add(
        "--out",
        type=Path,
        help="the record, written as .json and .md; with --quality the pruned model's folder",
    )
    add("--method", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    add("--sparsity", type=float, help="fraction of zeros (the comparison's default: 0.5)")
    add("--pattern", help="N:M, N of M weights kept; in the comparison a second amount")
    add("--peer-batch-size", type=int, nargs="+", default=[1, 8], help="--quality takes the first")
    add("--repeats", type=int, default=3)
    add("--peer-only", action="store_true", help="leave llmprune out")
    add("--quality", action="store_true", help="prune --model with the peer alone and keep it")
    add("--model", type=Path, help="with --quality: a model folder")
    add("--calibration-tokens", type=Path, help="with --quality: JSON, a list of lists of token ids")
    add("--dtype", default="float32", help="with --quality: dtype to load, prune and save in, or auto")
    args = parser.parse_args()
    if args.quality:
        if not (args.model and args.calibration_tokens and args.out and len(args.method) == 1):
            parser.error("--quality needs --model, --calibration-tokens, --out and one --method")
        if (args.sparsity is None) == (args.pattern is None):
            parser.error("--quality needs either --sparsity or --pattern")
        return args
    if not args.peer_only and importlib.util.find_spec("llmprune") is None:
        parser.error("llmprune is not installed in this interpreter: install it, or pass --peer-only")
    args.sparsity = 0.5 if args.sparsity is None else args.sparsity
    args.out = args.out or ROOT / "benchmarks" / "peers.json"
    return args


def main() -> None:
    """The quality mode or the comparison."""
    args = parse()
    (quality if args.quality else benchmark)(args)


if __name__ == "__main__":
    main()
