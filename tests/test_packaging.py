"""The house stands as drawn: packages, layers, light imports, and no network or pickle."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import llmprune

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"llmprune": ROOT / "llmprune", "llmprune.kernels": ROOT / "kernels", "llmprune.eval": ROOT / "eval"}

# What a module may import of the project: its own layer and those below.
LAYERS = {
    "types": 0,
    "interruption": 0,
    "texts": 1,
    "masks": 1,
    "grid": 1,
    "linalg": 1,
    "kernels": 1,
    "memory": 1,
    "temporary": 1,
    "ranks": 1,
    "device": 1,
    "recipe": 1,
    "arch": 1,
    "checkpoint": 1,
    "statistics": 2,
    "scores": 2,
    "level_store": 2,
    "calibration": 2,
    "engine": 2,
    "progress": 2,
    "solvers": 2,
    "weights": 2,
    "allocation": 3,
    "methods": 3,
    "plan": 4,
    "measurement": 4,
    "result": 4,
    "record": 4,
    "pipeline": 4,
    "reordering": 4,
    "forecast": 4,
    "fitting": 5,
    "job": 5,
    "restructuring": 5,
    "rotating": 5,
    "rotation_plan": 4,
    "removal": 5,
    "narrowing": 5,
    "width_plan": 4,
    "two_ways": 5,
    "stages": 6,
    "inspection": 5,
    "checking": 6,
    "sparse": 5,
    "eval": 6,
    "report": 6,
    "hub": 7,
    "recovery": 7,
    "demo": 8,
    "api": 8,
    "searching": 8,
    "workflow": 9,
    "commands": 10,
    "cli": 10,
    "__main__": 11,
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found.append((".".join([package, *parts]).removesuffix(".__init__"), path))
    return found


def layer(module: str) -> int:
    return LAYERS[module.split(".")[1]]


@pytest.mark.parametrize(("name", "path"), [one for one in modules() if one[0] != "llmprune"])
def test_imports_go_downwards(name: str, path: Path) -> None:
    top_level = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in top_level:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        for imported in names:
            if imported == "llmprune" and isinstance(node, ast.ImportFrom):
                names += [f"llmprune.{alias.name}" for alias in node.names if alias.name in LAYERS]
            elif imported.startswith("llmprune."):
                assert layer(imported) <= layer(name), f"{name} imports {imported}, which lies above it"


def test_every_folder_is_a_declared_package() -> None:
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    expected = {"llmprune"}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            expected.add(".".join([package, *path.parent.relative_to(folder).parts]))
    assert declared == expected


def test_kernels_and_eval_never_shadow_other_packages() -> None:
    # a regular package of that name elsewhere wins over these folders only while they have no __init__
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "eval" / "__init__.py").exists()


def test_top_level_is_as_promised() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.split("/")[0] for name in listed} - {name for name in listed if name.startswith(".")}
    top = {name for name in top if not name.startswith(".")}
    files = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    folders = {"llmprune", "kernels", "eval", "scripts", "tests", "docs", "benchmarks"}
    assert top <= files | folders, top - files - folders


@pytest.mark.parametrize("where", [ROOT, Path("/")], ids=["in the checkout", "elsewhere"])
def test_mapped_folders_import_under_their_names(where: Path) -> None:
    code = (
        "import importlib, llmprune.kernels.gram, llmprune.eval.perplexity\n"
        "import transformers.utils.import_utils as u\n"
        "print(u.is_kernels_available())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "False"


def test_importing_is_light() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import llmprune\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'transformers', 'datasets', 'lm_eval', 'triton', 'peft', 'altair', 'vl_convert', 'pydantic', 'typer'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_heavy_parts_are_not_needed_by_the_core() -> None:
    code = (
        "import sys\n"
        "for name in ('datasets', 'lm_eval', 'triton', 'peft', 'altair', 'vl_convert', 'accelerate'): sys.modules[name] = None\n"
        "import llmprune.cli, llmprune.api, llmprune.job, llmprune.demo\n"
        "from llmprune.methods import describe; print(len(describe()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3


@pytest.mark.parametrize(("name", "path"), modules())
def test_no_pickle_and_no_unasked_code(name: str, path: Path) -> None:
    text = path.read_text()
    for word in ("torch.load(", "import pickle", "yaml.unsafe_load(", "trust_remote_code=True"):
        assert word not in text, f"{name} contains {word}"
    assert "yaml.load(" not in text.replace("yaml.load(text, Loader=_Loader)", "")  # a SafeLoader of our own
    called = {
        node.func.id
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"eval", "exec", "compile", "__import__"}


def test_files_stay_readable() -> None:
    long = {name: count for name, path in modules() if (count := len(path.read_text().splitlines())) > 400}
    assert not long


def test_public_names_resolve() -> None:
    for name in llmprune.__all__:
        assert getattr(llmprune, name) is not None
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = llmprune.no_such_thing
