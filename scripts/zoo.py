"""Every type of causal language model that transformers knows, in tiny, through the whole of llmprune.

    python scripts/zoo.py                 # all types that the record lacks; writes benchmarks/zoo-VERSION.md and .json
    python scripts/zoo.py llama mamba     # of these types
    python scripts/zoo.py --minutes 4     # as many as can be begun in that time: the next call goes on

A row of the record is made anew when the code has changed since, or with `--again`.

Each type is built with random weights from its own configuration class, the sizes cut down, and saved. Then:

* engine: the column norms that the engine sees while it reads layers from disk are those of a plain forward
* sparsegpt 50 %, 2:4, wanda 50 %: from disk and in memory, by both schedules, to the same bytes; what plain
  transformers loads computes what the model in memory does
* depth: a layer less, loaded plainly; generation with the cache is that without
* experts: half of them less, where there are any
* width: a fifth of the layers' heads and channels less, where the roles of their matrices are known

A type that is no decoder-only language model must be refused with a message; it is counted apart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

import record
import torch
import transformers
from zoo_checks import CHECKS, count, logits, one_line
from zoo_models import NO_DECODERS, NOT_ONCE, TYPES, build, save

from llmprune.types import UserError

NAME = f"zoo-{transformers.__version__}"
SECONDS, BYTES = 900, 6 << 30  # that one type may take

# What became of a type: "ok ...", "refused: ..." or "FAILED ..." for each check, and the code that did it.
Row = dict[str, str]


def visit(kind: str) -> Row:
    """Build a type and do everything with it."""
    try:
        model = build(kind)
        logits(model)
    except Exception as error:  # noqa: BLE001 (the classes raise what they like)
        return {"build": f"cannot be built: {one_line(error)}"}
    found = {"build": f"ok {count(model)} parameters"}
    with tempfile.TemporaryDirectory(prefix="zoo_") as scratch:
        folder = Path(scratch) / "model"
        save(kind, model, folder)
        for name, check in CHECKS.items():
            try:
                found[name] = f"ok {check(model, folder)}".strip()
            except UserError as error:
                found[name] = f"refused: {one_line(error).replace(str(folder), 'it')}"
                if name == "engine":  # nothing else can be done with it
                    break
            except Exception as error:  # noqa: BLE001 (whatever it is, it is a fault to be listed)
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                found[name] = f"FAILED {type(error).__name__}: {one_line(error)} ({where})"
    return found


def _alone(kind: str, answer: Connection) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    answer.send(visit(kind))


def visit_apart(kind: str) -> Row:
    """In a process of its own, which may crash or hang."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(kind, there))
    process.start()
    there.close()
    try:
        found: Row = here.recv() if here.poll(SECONDS) else {"build": f"FAILED: more than {SECONDS} s"}
    except EOFError:
        found = {"build": "FAILED: the process died"}
    process.kill()
    process.join()
    return found


def visit_all(kinds: Iterable[str], jobs: int, deadline: float) -> Iterator[tuple[str, Row]]:
    """Every type, so many at a time, but for those that could only be begun after the deadline."""

    def one(kind: str) -> tuple[str, Row] | None:
        return (kind, visit_apart(kind)) if time.monotonic() < deadline else None

    with ThreadPoolExecutor(jobs) as pool:
        yield from (done for done in pool.map(one, kinds) if done is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="types as transformers calls them; all if none is named")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no type after that")
    parser.add_argument("--again", action="store_true", help="also those that the record has")
    arguments = parser.parse_args()
    unknown = [kind for kind in arguments.types if kind not in TYPES]
    if unknown:
        sys.exit(f"{unknown[0]!r} is no type of causal language model of transformers {transformers.__version__}")
    path, code = record.FOLDER / f"{NAME}.json", digest()
    found: dict[str, Row] = json.loads(path.read_text())["types"] if path.exists() else {}
    fresh = () if arguments.again else [kind for kind, row in found.items() if row.get("code") == code]
    wanted = [kind for kind in arguments.types or TYPES if kind not in fresh]
    try:
        for kind, row in visit_all(wanted, arguments.jobs, time.monotonic() + 60 * arguments.minutes):
            found[kind] = {**row, "code": code}
            path.write_text(json.dumps({"environment": record.environment(), "types": found}, indent=1) + "\n")
            print(kind, *(f"\n    {name}: {said}" for name, said in not_ok(row)), flush=True)
    finally:
        found = {kind: found[kind] for kind in TYPES if kind in found}
        record.save(NAME, {"environment": record.environment(), "types": found}, report(found, code))
    sys.exit(1 if faults(found) else 0)


def digest() -> str:
    """A hash of the code whose doing the rows are: the library, the models and what is done with them."""
    files = [*record.ROOT.glob("scripts/zoo_*.py")]
    files += [path for folder in ("llmprune", "kernels", "eval") for path in (record.ROOT / folder).rglob("*.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]


def not_ok(row: Row) -> list[tuple[str, str]]:
    return [(name, said) for name, said in row.items() if name != "code" and not said.startswith("ok")]


def faults(found: dict[str, Row]) -> list[str]:
    """Types with a failed check, and decoder-only types that the engine refuses though text runs each layer once."""
    return [
        kind
        for kind, row in found.items()
        if any(said.startswith("FAILED") for _, said in not_ok(row))
        or (kind not in NO_DECODERS | NOT_ONCE and row.get("engine", "").startswith("refused"))
    ]


def report(found: dict[str, Row], code: str) -> str:
    decoders = {kind: row for kind, row in found.items() if kind not in NO_DECODERS}
    built = {kind: row for kind, row in decoders.items() if row["build"].startswith("ok")}
    others = {kind: row for kind, row in found.items() if kind in NO_DECODERS}
    failed, older = faults(found), [kind for kind, row in found.items() if row.get("code") != code]
    said = [row[name] for row in built.values() for name in CHECKS if name in row]
    lines = [
        f"{len(found)} of the {len(TYPES)} types of causal language models of transformers {transformers.__version__}. "
        f"{len(decoders)} are decoder-only, {len(built)} of them could be built. {len(failed)} have a fault of ours"
        f"{': ' * bool(failed)}{', '.join(failed)}. Of {len(said)} checks {sum(one.startswith('ok') for one in said)} "
        f"passed and {sum(one.startswith('refused') for one in said)} were refused with a message.",
        *(["", f"Made before the code last changed: {', '.join(older)}."] if older else []),
        "",
        record.table(
            ["decoder-only type", *CHECKS],
            [[kind, *(_cell(row.get(name, "")) for name in CHECKS)] for kind, row in built.items()],
        ),
        *("## Faults", "", *(_list(row for row in each_not_ok(decoders) if row[2].startswith("FAILED")) or ["None."])),
        *("", "## Refused, or not built", ""),
        *_list(row for row in each_not_ok(decoders) if not row[2].startswith("FAILED")),
        *("", "## No decoder-only language models", ""),
        *_list(each_not_ok(others)),
        *(f"* {kind}: pruned" for kind, row in others.items() if not not_ok(row)),
    ]
    return "\n".join(lines) + "\n"


def each_not_ok(found: dict[str, Row]) -> Iterator[tuple[str, str, str]]:
    return ((kind, name, said) for kind, row in found.items() for name, said in not_ok(row))


def _list(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """One line for every check and reason, with all types that it is true of."""
    groups: dict[str, list[str]] = {}
    for kind, name, said in rows:
        reason = re.sub(r"'[^']*'", "…", said.partition(" (known: ")[0])
        groups.setdefault(f"{name} {reason}", []).append(kind)
    return [f"* {what} ({len(kinds)}: {', '.join(kinds)})" for what, kinds in groups.items()]


def _cell(said: str) -> str:
    return said.partition(":")[0].partition(" ")[0] if not said.startswith("ok") else said.removeprefix("ok ") or "ok"


if __name__ == "__main__":
    main()
