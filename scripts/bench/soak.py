"""Random small runs, killed at random moments and resumed, each compared with the same run undisturbed.

Every run is a random recipe on a random tiny model (`tests/support/recipes.py`), in a child of this process. A kill
is SIGKILL or SIGTERM; a resumed run may be killed again. Every run is saved as it ends; after `--minutes` the script
ends, to go on at the next call with the runs that are left.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import yaml

sys.path.insert(0, str(record.ROOT / "tests" / "support"))

import recipes
from runner import Forked, Ran, product, tree

MOST_KILLS = 3


def undisturbed(arguments: tuple[object, ...], folder: Path) -> tuple[Ran, float]:
    started = time.perf_counter()
    ran = Forked(*arguments, "--out", folder / "whole", log=folder.with_suffix(".whole")).wait()
    return ran, time.perf_counter() - started


def disturbed(arguments: tuple[object, ...], folder: Path, seconds: float, rng: random.Random) -> tuple[Ran, int]:
    """The run with kills, and how many of them hit."""
    hits = 0
    for attempt in range(MOST_KILLS + 1):
        child = Forked(*arguments, "--out", folder / "out", "--resume", log=folder.with_suffix(f".{attempt}"))
        if attempt < MOST_KILLS and rng.random() < 0.8:
            time.sleep(rng.uniform(0, seconds))
            child.send(rng.choice((signal.SIGKILL, signal.SIGTERM)))
        ran = child.wait()
        if ran.code in (0, 2):
            return ran, hits
        hits += 1
    return ran, hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further run after so long")
    arguments = parser.parse_args()
    import llmprune.job  # noqa: F401 (once, before the children)

    demo = record.ROOT / "llmprune" / "demo" / "model"
    saved = record.load("soak")
    rows: list[dict[str, Any]] = saved["rows"] if saved.get("seed") == arguments.seed else []
    ends = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as scratch:
        models = {name: recipes.save_model(name, Path(scratch) / name, demo) for name in recipes.MODELS}
        for number in range(len(rows), arguments.runs):
            if time.monotonic() > ends:
                print("to be continued")
                break
            rows.append(soak(number, arguments.seed, models, Path(scratch)))
            print(f"{number + 1}: {rows[-1]}", flush=True)
            save(rows, arguments.seed)


def soak(number: int, seed: int, models: dict[str, Path], scratch: Path) -> dict[str, Any]:
    """One run beside its undisturbed twin; ends the script if they differ."""
    rng = random.Random(f"{seed}-{number}")
    name, recipe = rng.choice(recipes.MODELS), recipes.draw(rng)
    folder = scratch / f"run{number}"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ("prune", models[name], "--recipe", folder / "recipe.yaml", "--quiet")
    before = tree(folder)
    whole, seconds = undisturbed(command, folder)
    recipes.keeps_its_word(whole, folder / "whole", before)
    before = tree(folder)
    ran, kills = disturbed(command, folder, seconds, rng)
    recipes.keeps_its_word(ran, folder / "out", before)
    same = ran.code == whole.code and (ran.code != 0 or product(folder / "out") == product(folder / "whole"))
    if not same:
        kept = Path(tempfile.mkdtemp(prefix=f"soak-{seed}-{number}-"))
        shutil.copytree(folder, kept, dirs_exist_ok=True)
        sys.exit(f"run {number} differs, with all that it wrote in {kept}: {name}, {recipe}\n{whole.err}\n{ran.err}")
    return {"model": name, "method": recipe["method"], "code": ran.code, "kills": kills}


def save(rows: list[dict[str, Any]], seed: int) -> None:
    counts = []
    for name in recipes.MODELS:
        of = [row for row in rows if row["model"] == name]
        codes = [row["code"] for row in of]
        counts.append([name, *map(str, (len(of), codes.count(0), codes.count(2), sum(row["kills"] for row in of)))])
    done = sum(row["code"] == 0 for row in rows)
    text = record.table(["model", "runs", "finished", "refused", "kills that hit"], counts)
    text += (
        f"\n{len(rows)} runs, seed {seed}: {done} finished with the bytes of the undisturbed run and exactly the planned "
        "zeros; the others were refused with nothing written, as they should be.\n"
    )
    record.save("soak", {"environment": record.environment(), "seed": seed, "rows": rows}, text, echo=False)


if __name__ == "__main__":
    main()
