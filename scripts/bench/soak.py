"""Random small runs, killed at random moments and resumed, each compared with the same run undisturbed.

Every run is a random recipe on a random tiny model (`tests/support/recipes.py`), in a child of this process. A kill
is SIGKILL or SIGTERM; a resumed run may be killed again.
"""

from __future__ import annotations

import argparse
import random
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
    arguments = parser.parse_args()
    import llmprune.job  # noqa: F401 (once, before the children)

    demo = record.ROOT / "llmprune" / "demo" / "model"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        models = {name: recipes.save_model(name, Path(scratch) / name, demo) for name in recipes.MODELS}
        for number in range(arguments.runs):
            rng = random.Random(f"{arguments.seed}-{number}")
            name, recipe = rng.choice(recipes.MODELS), recipes.draw(rng)
            folder = Path(scratch) / f"run{number}"
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
            rows.append({"model": name, "method": recipe["method"], "code": ran.code, "kills": kills, "same": same})
            print(f"{number + 1}: {rows[-1]}", flush=True)
            if not same:
                sys.exit(f"run {number} differs: {recipe}\n{whole.err}\n{ran.err}")
    done = sum(row["code"] == 0 for row in rows)
    text = record.table(
        ["model", "runs", "finished", "refused", "kills that hit"],
        [
            [
                name,
                str(sum(row["model"] == name for row in rows)),
                str(sum(row["model"] == name and row["code"] == 0 for row in rows)),
                str(sum(row["model"] == name and row["code"] == 2 for row in rows)),
                str(sum(row["kills"] for row in rows if row["model"] == name)),
            ]
            for name in recipes.MODELS
        ],
    )
    text += (
        f"\n{len(rows)} runs, seed {arguments.seed}: {done} finished with the bytes of the undisturbed run and exactly "
    )
    text += "the planned zeros; the others were refused with nothing written, as they should be.\n"
    record.save("soak", {"environment": record.environment(), "rows": rows}, text)


if __name__ == "__main__":
    main()
