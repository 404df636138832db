"""Width pruning on the small real models: every method at 10, 20 and 30 % of the decoder layers' parameters.

Calibration: 32 sequences of 256 tokens of the model's own calibration text, seed 0. Perplexity before any recovery: the
first 120 windows of 256 tokens of its evaluation text, float32. "channels alone" takes the same number of channels from
every layer, so that all methods are compared at exactly one shape; "as published" spreads the amount over units as the
method does by itself. Parameters are those of the model without zeros that only pad it. Since units are coarse on small
models, the tables interpolate: log perplexity, linear in the parameters between dense and the measured points, at exactly
10, 20 and 30 % fewer parameters of the layers. Latency is that of a prefill of 128 tokens on one thread over the
dense model's, medians of rounds in turns. Options were chosen on the last 15 % of the calibration text.

Every row is saved as it is measured; rows that are there are not measured again (`--again`), and after `--minutes` the
script ends, to go on at the next call. `--times` measures the latency of rows that have none or were timed beside other
programs.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import quality
import record
import torch

import llmprune
from llmprune.eval import speed

MODELS = ("tales-llama", "mix-qwen3", "tales-qwen3moe")
RATIOS = (0.1, 0.2, 0.3)
ALONE, PUBLISHED = "channels alone", "as published"
DEFAULT = "default (slice-obs)"
# Above this load other programs shared the two cores: times say little.
QUIET = 1.3


class Way(NamedTuple):
    """A method with its options, and the recipe keys with which it spreads the amount itself.

    `alone`: whether it also runs on channels alone. `plain`: whether the result is of one width in a plain class.
    `further`: an amount beyond the others, for methods that count what they take out in another way and fall short.
    """

    method: str
    options: Mapping[str, Any] = {}
    keys: Mapping[str, Any] = {}
    alone: bool = True
    plain: bool = True
    further: tuple[float, ...] = ()


REMOTE = {"layout": "remote-code"}
SEARCH = {"allocation": "evolutionary", "width": {"generations": 12, "offspring": 16}, **REMOTE}
FULL = {"compensate": "least-squares"}
METHODS = {
    DEFAULT: Way("slice-obs", alone=False),
    "group-obs balanced": Way("group-obs", keys={"allocation": "balanced"}),
    "group-obs uniform": Way("group-obs", alone=False),
    "group-obs rising": Way("group-obs", keys={"allocation": "rising", **REMOTE}, alone=False, plain=False),
    "ziplm (dense stream)": Way("group-obs", {"stream": "dense"}, {"allocation": "balanced"}),
    "random": Way("random-units"),
    "magnitude L1": Way("group-magnitude", {"norm": 1}),
    "magnitude L2": Way("group-magnitude"),
    "llm-pruner vector": Way("llm-pruner", {"taylor": "vector"}),
    "llm-pruner first": Way("llm-pruner"),
    "llm-pruner second": Way("llm-pruner", {"taylor": "second"}),
    "llm-pruner mixed": Way("llm-pruner", {"taylor": "mixed"}),
    "llm-pruner channel-wise": Way("llm-pruner", keys={"width": {"units": ["residual"]}}, alone=False),
    "wanda-sp": Way("wanda-sp"),
    "wanda-sp least-squares (FASP)": Way("wanda-sp", FULL),
    "flap": Way("flap", keys={"allocation": "pooled", **REMOTE}, plain=False, further=(0.4,)),
    "flap without bias": Way(
        "flap", {"compensate": "none"}, {"allocation": "pooled", **REMOTE}, plain=False, further=(0.4,)
    ),
    "flap least-squares": Way("flap", FULL, {"allocation": "pooled", **REMOTE}, plain=False, further=(0.4,)),
    "minitron": Way("minitron"),
    "minitron channels and hidden": Way("minitron", keys={"width": {"units": ["channel", "residual"]}}, alone=False),
    "thinet": Way("thinet"),
    "modegpt": Way("modegpt"),
    "modegpt whole": Way("modegpt", keys={"allocation": "influence", **REMOTE}, alone=False, plain=False),
    "group-fisher": Way("group-fisher"),
    "group-fisher least-squares": Way("group-fisher", FULL),
    "bonsai": Way("bonsai", {"masks": 64, "sequences": 8}),
    "slicegpt": Way("slicegpt", keys=REMOTE, alone=False, plain=False, further=(0.4,)),
    "slicegpt one basis": Way("slicegpt", alone=False, further=(0.4,)),
    "k-prune": Way("k-prune"),
    "llm-surgeon": Way("llm-surgeon-structured"),
    "group-obs evolutionary": Way("group-obs", keys=SEARCH, alone=False, plain=False),
}


def latency(dense: Path, pruned: Path) -> dict[str, Any]:
    """Prefill time over that of the dense model, and the load of the machine meanwhile."""
    found = speed.bench({"dense": dense, "pruned": pruned}, prompt=128, new=2, rounds=9, dtype="float32", device="cpu")
    times = {label: row["prefill"]["median_s"] for label, row in found["models"].items()}
    return {"ratio": times["pruned"] / times["dense"], "load": os.getloadavg()[0]}


def asked(name: str, label: str, kind: str, ratio: float) -> dict[str, Any]:
    """The recipe of a row."""
    way = METHODS[label]
    units = ["expert-channel"] if "moe" in name else ["channel"]
    keys = (
        {**way.keys, "width": {"units": units}, "layout": "plain", "allocation": "uniform"}
        if kind == ALONE
        else way.keys
    )
    if "moe" in name and kind == PUBLISHED and "width" in keys:
        moe = [one.replace("channel", "expert-channel") for one in keys["width"]["units"]]
        keys = {**keys, "width": {"units": moe}}
    return {
        "method": way.method,
        "options": dict(way.options),
        "ratio": ratio,
        "calibration": quality.text_of(name).calibration,
        "samples": 32,
        "seqlen": 256,
        **keys,
    }


def row_of(name: str, label: str, kind: str, ratio: float) -> dict[str, Any]:
    """One row; says why where the model's class cannot have what the method adds."""
    source = record.SHARED / "models" / name
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        start = time.perf_counter()
        try:
            report = llmprune.prune(source, out=out, **asked(name, label, kind, ratio)).report
        except llmprune.UserError as error:
            return {"refused": str(error)}
        seconds = time.perf_counter() - start
        totals, structure = report["totals"], report["structure"]
        return {
            "ppl": quality.perplexity(out, quality.text_of(name).evaluation)["ppl"],
            "params": totals["params_after"] - totals["zeros"],
            "widths": structure.get("widths") or structure.get("hidden"),
            "seconds": seconds,
            "load": os.getloadavg()[0],
            "latency": latency(source, out),
        }


def dense_of(name: str) -> dict[str, Any]:
    folder = record.SHARED / "models" / name
    model = llmprune.load(folder, dtype="float32")
    layers = sum(one.numel() for one in model.model.layers.parameters())
    params = sum(one.numel() for one in model.parameters())
    ppl = quality.perplexity(folder, quality.text_of(name).evaluation)["ppl"]
    return {"ppl": ppl, "params": params, "layers": layers}


def wanted(names: list[str], labels: list[str], kinds: list[str]) -> Iterator[tuple[str, str, str, float]]:
    for name in names:
        for label in labels:
            for kind in kinds if METHODS[label].alone else [kind for kind in kinds if kind == PUBLISHED]:
                ratios = RATIOS if kind == ALONE else RATIOS + METHODS[label].further
                yield from ((name, label, kind, ratio) for ratio in ratios)


def interpolated(dense: dict[str, Any], rows: Mapping[str, Any], ratio: float) -> float | None:
    """The perplexity at exactly this share of the layers' parameters less; None where the rows do not reach so far."""
    points = [(row["params"], math.log(row["ppl"])) for row in rows.values() if "ppl" in row]
    points = sorted({(dense["params"], math.log(dense["ppl"])), *points})
    target = dense["params"] - ratio * dense["layers"]
    for (low, at_low), (high, at_high) in itertools.pairwise(points):
        if low <= target <= high and low < high:
            share = (target - low) / (high - low)
            return math.exp(at_low + share * (at_high - at_low))
    return None


def at_equal_parameters(found: dict[str, Any], kind: str) -> dict[str, list[float | None]]:
    """By method, the interpolated perplexities at the ratios."""
    return {
        label: [interpolated(found["dense"], rows, ratio) for ratio in RATIOS]
        for label, rows in found.get(kind, {}).items()
    }


def verdicts(found: dict[str, Any]) -> list[list[str]]:
    """How the default stands at equal parameters: to the best of one width and of all, and to what was published."""
    dense, ppl = found["dense"]["ppl"], at_equal_parameters(found, PUBLISHED)
    if DEFAULT not in ppl:
        return []
    rows = []
    for number, ratio in enumerate(RATIOS):
        here = {label: one[number] for label, one in ppl.items() if one[number] is not None}
        if DEFAULT not in here:
            continue
        mine, plain = here[DEFAULT], {label: one for label, one in here.items() if METHODS[label].plain}
        cells = [f"{ratio:.0%}", f"{mine:.2f}"]
        for among in (plain, here):
            best = min(among, key=lambda label: among[label])
            cells += [f"{best} ({among[best]:.2f})", f"{mine / among[best] - 1:+.1%}"]
        for other in ("llm-pruner first", "slicegpt"):
            gap = f"{(here[other] - mine) / (here[other] - dense):.0%}" if other in here else "not measured"
            cells.append(gap)
        rows.append(cells)
    return rows


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if "refused" in row:
        return "refused"
    mark = "" if row["load"] <= QUIET else "~"
    timed = "" if row["latency"]["load"] <= QUIET else "~"
    return f"{row['ppl']:.2f} ({row['params'] / 1e6:.3f} M, {mark}{row['seconds']:.0f} s, {timed}{row['latency']['ratio']:.2f})"


def markdown(results: dict[str, Any], protocol: str) -> str:
    parts = [f"{protocol}\n"]
    heads = [f"{ratio:.0%}" for ratio in RATIOS]
    for name, found in results.items():
        dense = found["dense"]
        parts.append(
            f"\n## {name}\n\nDense: perplexity {dense['ppl']:.2f}, {dense['params'] / 1e6:.3f} M parameters, "
            f"{dense['layers'] / 1e6:.3f} M of them in the layers.\n"
        )
        rows = verdicts(found)
        if rows:
            columns = ["as published", "default", "best of one width", "default to it", "best of all", "default to it"]
            parts.append("\n" + record.table([*columns, "LLM-Pruner's gap closed", "SliceGPT's gap closed"], rows))
        for kind in (PUBLISHED, ALONE):
            equal = at_equal_parameters(found, kind)
            order = sorted(equal, key=lambda label: equal[label][-1] or math.inf)
            lines = [[label, *(f"{one:.2f}" if one else "–" for one in equal[label])] for label in order]
            parts.append(f"\nPerplexity, {kind}, at equal parameters:\n\n" + record.table([kind, *heads], lines))
            lines = [[label, *(cell(found[kind][label].get(str(ratio))) for ratio in RATIOS)] for label in order]
            head = f"\nAs measured, {kind}: perplexity (parameters, time, latency over dense):\n\n"
            parts.append(head + record.table([kind, *heads], lines))
    return "".join(parts)


def store(saved: dict[str, Any]) -> None:
    saved["protocol"] = " ".join((__doc__ or "").split("\n\n")[1].split())
    saved["environment"] = {**record.environment(), "command": "python scripts/bench/width.py"}
    note = "~: other programs shared the cores, such times say little."
    record.save("width", saved, markdown(saved["results"], f"{saved['protocol']} {note}"), echo=False)


def rows_to_do(arguments: argparse.Namespace, results: dict[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    for name, label, kind, ratio in wanted(arguments.models, arguments.methods, arguments.kinds):
        row = results.get(name, {}).get(kind, {}).get(label, {}).get(str(ratio))
        late = row is not None and "latency" in row and row["latency"]["load"] > QUIET
        if row is None or arguments.again or (arguments.times and late):
            yield name, label, kind, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--kinds", nargs="*", default=[PUBLISHED, ALONE], choices=[PUBLISHED, ALONE])
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further row after so long")
    parser.add_argument("--again", action="store_true", help="measure rows again that are there")
    parser.add_argument("--times", action="store_true", help="measure rows again whose times were disturbed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    saved: dict[str, Any] = {"results": {}, **record.load("width")}
    end = time.monotonic() + 60 * arguments.minutes
    for name, label, kind, ratio in list(rows_to_do(arguments, saved["results"])):
        if time.monotonic() > end:
            print("to be continued: call again", flush=True)
            break
        found = saved["results"].setdefault(name, {})
        if "dense" not in found:
            found["dense"] = dense_of(name)
        found.setdefault(kind, {}).setdefault(label, {})[str(ratio)] = row = row_of(name, label, kind, ratio)
        print(name, kind, label, ratio, row.get("refused") or cell(row), flush=True)
        store(saved)


if __name__ == "__main__":
    main()
