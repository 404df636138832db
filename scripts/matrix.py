"""The tests on every supported Python and transformers that can be had, with the optional parts and without.

    python scripts/matrix.py               # all; writes benchmarks/matrix.md and .json
    python scripts/matrix.py --only 3.13   # the rows of one Python; the others stay in the record as they are

Each row gets an environment of its own, from `scripts/setup-env`. Interpreters are those on the PATH and in pyenv.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

import record

NEWEST, OLDEST = "newest", "5.17.0"
PARTS, BARE = "all", "none"
RUNNERS = ("pytest", "pytest-xdist", "hypothesis")


class Row(NamedTuple):
    python: str
    transformers: str
    parts: str


# what differs most in pairs: every Python, both ends of transformers, and what users without extras have
ROWS = (
    Row("3.11", NEWEST, PARTS),
    Row("3.12", NEWEST, PARTS),
    Row("3.13", NEWEST, PARTS),
    Row("3.13", OLDEST, PARTS),
    Row("3.11", OLDEST, BARE),
    Row("3.12", NEWEST, BARE),
)


def interpreter(version: str) -> str | None:
    """A Python of a minor version that starts, or None."""
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for candidate in (shutil.which(f"python{version}"), *map(str, pyenv)):
        if candidate and subprocess.run([candidate, "-c", ""], check=False, capture_output=True).returncode == 0:
            return candidate
    return None


def run(row: Row, python: str, folder: Path, workers: str) -> dict[str, Any]:
    """Make the environment of a row and run the tests in it."""
    environment = os.environ | {"PYTHON": python}
    if row.transformers != NEWEST:
        environment["LLMPRUNE_TRANSFORMERS"] = row.transformers
    setup = [str(record.ROOT / "scripts" / "setup-env"), str(folder / "env")]
    subprocess.run([*setup, *(["test"] if row.parts == PARTS else [])], check=True, env=environment)
    inside = str(folder / "env" / "bin" / "python")
    if row.parts == BARE:
        subprocess.run([inside, "-m", "pip", "install", "--quiet", *RUNNERS], check=True)
    asked = "import transformers, platform; print(platform.python_version(), transformers.__version__)"
    found = subprocess.run([inside, "-c", asked], check=True, capture_output=True, text=True).stdout.split()
    results = folder / "results.xml"
    log = folder / "log"
    with log.open("w") as file:
        command = [inside, "-m", "pytest", "--numprocesses", workers, f"--junitxml={results}"]
        subprocess.run(command, check=False, cwd=record.ROOT, stdout=file, stderr=subprocess.STDOUT)
    if not results.exists():
        raise RuntimeError(f"the tests did not run:\n{log.read_text()[-2000:]}")
    suite = ElementTree.parse(results).getroot().find("testsuite")
    assert suite is not None
    tests, failures, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    broken = [
        f"{one.get('classname')}.{one.get('name')}" for one in suite.iter("testcase") if one.find("failure") is not None
    ]
    return {
        **row._asdict(),
        "versions": found,
        "date": datetime.date.today().isoformat(),
        "passed": tests - failures - errors - skipped,
        "skipped": skipped,
        "failed": failures + errors,
        "broken": broken,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the rows of this Python version")
    parser.add_argument("--workers", default="auto", help="processes of pytest")
    arguments = parser.parse_args()
    path = record.FOLDER / "matrix.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    found = {Row(*(one[key] for key in Row._fields)): one for one in before}
    for row in ROWS:
        python = interpreter(row.python) if row.python.startswith(arguments.only) else None
        if python is not None:
            with tempfile.TemporaryDirectory() as folder:
                found[row] = run(row, python, Path(folder), arguments.workers)
            print(found[row], flush=True)
            save([found[one] for one in ROWS if one in found])
    sys.exit(any(row["failed"] for row in found.values()))


def save(rows: list[dict[str, Any]]) -> None:
    """Write the record, with what it lacks."""
    text = record.table(
        ["Python", "transformers", "optional parts", "date", "passed", "skipped", "failed"],
        [
            [*row["versions"], row["parts"], row["date"], *(str(row[key]) for key in ("passed", "skipped", "failed"))]
            for row in rows
        ],
    )
    there = {Row(*(row[key] for key in Row._fields)) for row in rows}
    text += "".join(f"\nNot run yet: {', '.join(row)}.\n" for row in ROWS if row not in there)
    text += "".join(
        f"\nFailed on Python {row['python']}: {', '.join(row['broken'])}.\n" for row in rows if row["broken"]
    )
    record.save("matrix", {"environment": record.environment(), "rows": rows}, text)


if __name__ == "__main__":
    main()
