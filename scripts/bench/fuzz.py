"""Feed mutated files to everything that reads them (`tests/support/targets.py`); a fault is printed and ends the run.

    python scripts/bench/fuzz.py --inputs 1000000

After `--minutes` the script ends, to go on with the inputs that are left at the next call.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

import record

sys.path.insert(0, str(record.ROOT / "tests" / "support"))

import targets

# What tends to break readers, beside random bytes.
TOKENS = (
    *(
        b"null",
        b"true",
        b"{}",
        b"[]",
        b'""',
        b"-1",
        b"0",
        b"1e999",
        b"NaN",
        b"18446744073709551616",
        b"..",
        b"/etc/passwd",
    ),
    *(
        b"&a",
        b"*a",
        b"!!python/object:os.system",
        b"<<: *a",
        b"- ",
        b": ",
        b"\n",
        b"\t",
        b"\x00",
        b"\xff",
        b"\xed\xa0\x80",
    ),
    *(
        b"[" * 500,
        b"{" * 500,
        b"9" * 5000,
        b"2024-01-01",
        b"0x1f",
        b"~",
        b"|\n",
        b"? ",
        b"%YAML 9.9\n",
        b"\\u0000",
        b"\\ud800",
    ),
)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four random edits, mostly one, so that many inputs get past the first parser; a cut is rare."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        at, length = rng.randrange(len(found) + 1), rng.randrange(1, 12)
        kind = rng.choice((0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5))
        if kind == 0:
            found[at : at + length] = b""
        elif kind == 1:
            found[at:at] = rng.randbytes(length)
        elif kind == 2:
            found[at : at + rng.choice((0, length))] = rng.choice(TOKENS)
        elif kind == 3 and found:
            found[at % len(found)] ^= 1 << rng.randrange(8)
        elif kind == 4:
            start = rng.randrange(len(found) + 1)
            found[at:at] = found[start : start + 4 * length]
        else:
            del found[at:]
    return bytes(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    arguments = parser.parse_args()
    names = list(targets.TARGETS)
    stored = record.FOLDER / "fuzz.json"
    saved = json.loads(stored.read_text()) if stored.is_file() else {}
    if saved.get("seed") != arguments.seed:
        saved = {
            "seed": arguments.seed,
            "seconds": 0.0,
            "counts": {name: {"inputs": 0, "accepted": 0} for name in names},
        }
    counts, before = saved["counts"], saved["seconds"]
    first = sum(one["inputs"] for one in counts.values())
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(first, arguments.inputs):
            if time.perf_counter() - started > 60 * arguments.minutes:
                print("to be continued")
                break
            name = names[number % len(names)]
            target = targets.TARGETS[name]
            folder = Path(scratch) / name
            folder.mkdir(exist_ok=True)
            rng = random.Random(arguments.seed << 32 | number)
            data = mutate(rng.choice(target.seeds), rng)
            counts[name]["inputs"] += 1
            try:
                target.run(folder, data)
                counts[name]["accepted"] += 1
            except targets.DOCUMENTED:
                pass
            except BaseException:  # noqa: BLE001 (that is what is looked for)
                traceback.print_exc()
                sys.exit(f"{name} fails on {data!r}, input {number} of seed {arguments.seed}")
    saved["seconds"] = before + time.perf_counter() - started
    rows = [[name, f"{one['inputs']:,}", f"{one['accepted']:,}"] for name, one in counts.items()]
    text = record.table(["reader", "inputs", "accepted"], rows)
    text += (
        f"\n{sum(one['inputs'] for one in counts.values()):,} inputs, seed {arguments.seed}, {saved['seconds']:.0f} s: "
        "every other one was refused with a UserError or RunError.\n"
    )
    record.save("fuzz", {"environment": record.environment(), **saved}, text)


if __name__ == "__main__":
    main()
