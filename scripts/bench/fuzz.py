"""Feed what atheris makes of small examples to everything that reads files (`tests/support/targets.py`).

    pip install atheris
    python scripts/bench/fuzz.py --inputs 1000000

Each reader gets its share in a process of its own, guided by the branches of llmprune that an input reaches. A fault
ends the script with its traceback; the input is kept in the folder that atheris names. Readers that are done are
not fuzzed again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record

sys.path.insert(0, str(record.ROOT / "tests" / "support"))

# What breaks readers and is longer than what a mutation adds.
LONG = (b"[" * 3000, b"{" * 3000, b"9" * 6000, b"- " * 500)
MOST_BYTES = 8192


def fuzz(reader: str, inputs: int, seed: int) -> None:
    """Never returns: libFuzzer ends the process. After the last input, the counts stand on stdout."""
    import atheris

    with atheris.instrument_imports(include=["llmprune"]):
        import targets
    target, counts = targets.TARGETS[reader], {"inputs": 0, "accepted": 0}
    folder, corpus = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    for number, example in enumerate((*target.seeds, *LONG)):
        (corpus / str(number)).write_bytes(example)

    def feed(data: bytes) -> None:
        counts["inputs"] += 1
        try:
            target.run(folder, data)
            counts["accepted"] += 1
        except targets.DOCUMENTED:
            pass
        if counts["inputs"] == inputs:
            print(json.dumps(counts), flush=True)

    options = [f"-runs={inputs}", f"-seed={seed + 1}", f"-max_len={MOST_BYTES}", f"-artifact_prefix={corpus}/"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], feed)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", help="fuzz this one alone, in this process, and record nothing")
    arguments = parser.parse_args()
    if arguments.reader:
        fuzz(arguments.reader, arguments.inputs, arguments.seed)
    import targets

    share = -(-arguments.inputs // len(targets.TARGETS))
    asked = {"seed": arguments.seed, "inputs": arguments.inputs}
    stored = record.FOLDER / "fuzz.json"
    saved = json.loads(stored.read_text()) if stored.is_file() else {}
    counts = saved["counts"] if saved.get("asked") == asked else {}
    for reader in targets.TARGETS:
        if reader in counts:
            continue
        started = time.perf_counter()
        options = ["--reader", reader, "--inputs", str(share), "--seed", str(arguments.seed)]
        done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{reader} fails:\n{done.stdout}\n{done.stderr[-8000:]}")
        counts[reader] = json.loads(done.stdout.splitlines()[-1]) | {"seconds": time.perf_counter() - started}
        save(counts, asked)


def save(counts: dict[str, dict[str, float]], asked: dict[str, int]) -> None:
    rows = [
        [reader, f"{one['inputs']:,}", f"{one['accepted']:,}", f"{one['seconds']:.0f} s"]
        for reader, one in counts.items()
    ]
    text = record.table(["reader", "inputs", "accepted", "time"], rows)
    text += (
        f"\n{sum(one['inputs'] for one in counts.values()):,} inputs, seed {asked['seed']}: every other one was refused "
        "with a UserError or RunError.\n"
    )
    environment = record.environment("atheris")
    record.save("fuzz", {"environment": environment, "asked": asked, "counts": counts}, text)


if __name__ == "__main__":
    main()
