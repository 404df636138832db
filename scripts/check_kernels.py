"""Compile every shipped Triton configuration ahead of time, without a GPU, and look at the machine code.

    python scripts/check_kernels.py            # sm_80, sm_90 and sm_100; a table, and exit code 1 for a fault
    python scripts/check_kernels.py --record   # also write the table and the ceilings to benchmarks/compiled.*

Faults: code that does not compile (but for sm_100, which not every triton can do), registers spilled to memory, more shared
memory than the chip has, no tensor-core instruction where one is meant, a hot loop longer by more than a tenth than the
one recorded for this version of triton. Nothing here says how fast a kernel is.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="check_kernels_"))
sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

import record
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError
from triton.experimental.gluon._runtime import GluonASTSource

from llmprune.kernels import (
    bitmask_triton,
    gram_triton,
    moments_triton,
    overflow_triton,
    sparse24_gluon,
    sparse24_triton,
    sparsegpt_block_triton,
    tuned,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Architecture -> bytes of shared memory that one block may have.
CHIPS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# What may fail to compile: triton 3.6 crashes on one kernel there.
UNFINISHED = {100}
TENSOR_CORES = r"(HGMMA|HMMA|UTCHMMA)"
SLACK = 1.1
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Case:
    """A kernel with the types of its arguments; all but `scalars` are taken as divisible by 16, as they are in use.

    `opcode`: a pattern that one instruction must match, "" for none. `sizes`: what the launch is chosen by, where the
    variant decides it.
    """

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    scalars: tuple[str, ...] = ("tokens",)
    opcode: str = TENSOR_CORES
    source: Any = ASTSource


PRODUCT = {"x_ptr": "*bf16", "y_ptr": "*fp32", "tokens": "i32", "outputs": "i32", "inputs": "i32", "x_stride": "i32"}
GRAM = {"table_ptr": "*i64", "width": "i32"}
SOLVE = {
    **{f"{name}_ptr": "*fp32" for name in ("current", "inverse_t", "loss")},
    "pruned_ptr": "*i8",
    **dict.fromkeys(("columns", "outputs", "current_stride", "inverse_stride", "pruned_stride"), "i32"),
}
SOLVER = sparsegpt_block_triton.solve_kernel
# Configured kernel -> variants that are shipped.
CASES: dict[str, dict[str, Case]] = {
    "gram_update": {
        f"{label}{'' if even else ' odd'}": Case(
            gram_triton.gram_kernel, GRAM, {"DTYPE": dtype, "EVEN": even, "PRECISION": precision}, {"bits": bits}
        )
        for label, dtype, precision, bits in (("bf16", tl.bfloat16, "ieee", 16), ("fp32", tl.float32, "tf32x3", 32))
        for even in (True, False)
    },
    "column_moments": {
        "bf16": Case(
            moments_triton.moments_kernel,
            {
                **{f"{name}_ptr": "*fp32" for name in ("squares", "mean", "deviation")},
                "x_ptr": "*bf16",
                **dict.fromkeys(("tokens", "width", "x_stride"), "i32"),
            },
            opcode="",
        )
    },
    "sparsegpt_block": {
        "2:4": Case(SOLVER, SOLVE, {"BLOCK_B": 128, "GROUP": 4, "PRUNE": 2}, opcode=""),
        "4:8": Case(SOLVER, SOLVE, {"BLOCK_B": 128, "GROUP": 8, "PRUNE": 4}, opcode=""),
        "mask": Case(SOLVER, SOLVE, {"BLOCK_B": 128, "GROUP": 1, "PRUNE": 1}, opcode=""),
    },
    "matmul24": {
        label: Case(
            sparse24_triton.matmul24_kernel, {**PRODUCT, "pairs_ptr": "*i32", "words_ptr": "*i32"}, {"EVEN": even}
        )
        for label, even in (("bf16", True), ("bf16 odd", False))
    },
    "matmul24_gluon": {
        f"{short} {blocks * 8} tokens": Case(
            sparse24_gluon.matmul24_kernel,
            {**PRODUCT, "x_ptr": "*i32", "y_ptr": f"*{short}", "pairs_ptr": "*i32", "words_ptr": "*i64"},
            {"ASM": sparse24_gluon.ASM[dtype], "BLOCKS": blocks},
            {"tokens": blocks * sparse24_gluon.TOKENS},
            opcode=r"HMMA\.SP",
            source=GluonASTSource,
        )
        for dtype, short, counts in ((torch.bfloat16, "bf16", range(1, 9)), (torch.float16, "fp16", (1, 8)))
        for blocks in counts
    },
    "unpack24": {
        "16 bits": Case(
            sparse24_triton.unpack24_kernel,
            {
                **dict.fromkeys(("pairs_ptr", "words_ptr"), "*i32"),
                "dense_ptr": "*i16",
                "outputs": "i32",
                "inputs": "i32",
            },
            {"EVEN": True},
            opcode="",
        )
    },
    "add_surplus": {
        "bf16": Case(
            overflow_triton.add_surplus_kernel,
            {
                **dict.fromkeys(("x_ptr", "extra_ptr", "y_ptr"), "*bf16"),
                "columns_ptr": "*i16",
                "starts_ptr": "*i32",
                **dict.fromkeys(("tokens", "outputs", "x_stride"), "i32"),
            },
            opcode="",
        )
    },
    "matmul_bitmask": {
        "bf16": Case(
            bitmask_triton.matmul_bitmask_kernel,
            {
                **PRODUCT,
                "values_ptr": "*bf16",
                "words_ptr": "*i32",
                "offsets_ptr": "*i16",
                "starts_ptr": "*i64",
            },
            {"INTERPRETED": False},
        )
    },
}


def shipped() -> Iterator[tuple[str, str, Case, dict[str, int]]]:
    """Every configuration file's entries, with each variant that they serve."""
    seen = set()
    for path in sorted(tuned.FOLDER.glob("*.json")):
        for name, cases in CASES.items():
            entries = json.loads(path.read_text())[name]
            for variant, case in cases.items():
                for launch in serving(entries, case.sizes):
                    key = (name, variant, *sorted(launch.items()))
                    if key not in seen:
                        seen.add(key)
                        yield name, variant, case, launch


def serving(entries: list[dict[str, Any]], sizes: dict[str, int]) -> Iterator[dict[str, int]]:
    """The launches that may be chosen where only these sizes are known."""
    for entry in entries:
        bounds = entry["up_to"]
        if all(sizes[axis] <= bound for axis, bound in bounds.items() if axis in sizes):
            yield entry["launch"]
            if bounds.keys() <= sizes.keys():
                return


def compile_for(case: Case, launch: dict[str, int], chip: int) -> Any:
    names = list(case.kernel.arg_names)
    given = {**case.constants, **launch}
    constants = {name: given[name] for name in names if name in given}
    signature = {name: "constexpr" if name in constants else case.types[name] for name in names}
    aligned = [name for name in names if name not in constants and name not in case.scalars]
    source = case.source(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {name: launch[name] for name in OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def examine(case: Case, compiled: Any) -> dict[str, Any]:
    """Registers, shared memory, spills, tensor-core instructions and the longest innermost loop of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = [
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        ]
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", dump[1])
    code = [(int(place, 16), name, rest) for place, name, rest in found]
    names = collections.Counter(name.split(".")[0] for _, name, _ in code)
    jumps = [
        (int(to[1], 16), at)
        for at, name, rest in code
        if name.startswith("BRA") and (to := re.search(r"0x(\w+)", rest))
    ]
    loops = [(first, last) for first, last in jumps if first < last]
    inner = [
        one for one in loops if not any(one != other and one[0] <= other[0] < other[1] <= one[1] for other in loops)
    ]
    longest = max((sum(first <= at <= last for at, _, _ in code) for first, last in inner), default=0)
    registers = re.search(r"REG:(\d+)", dump[0])
    return {
        "registers": int(registers[1]) if registers else 0,
        "shared": compiled.metadata.shared,
        "spills": names["LDL"] + names["STL"],
        "tensor_cores": sum(bool(re.match(case.opcode or TENSOR_CORES, name)) for _, name, _ in code),
        "loop": longest,
    }


def faults(case: Case, chip: int, row: dict[str, Any], ceiling: int | None) -> list[str]:
    if "error" in row:
        return [] if chip in UNFINISHED else ["does not compile"]
    found = []
    if row["spills"]:
        found.append(f"{row['spills']} spills")
    if row["shared"] > CHIPS[chip]:
        found.append(f"more shared memory than the {CHIPS[chip]} bytes of the chip")
    if case.opcode and not row["tensor_cores"]:
        found.append(f"no instruction {case.opcode}")
    if ceiling and row["loop"] > SLACK * ceiling:
        found.append(f"loop longer than the recorded {ceiling}")
    return found


def measure(case: Case, launch: dict[str, int], chip: int) -> dict[str, Any]:
    """What `examine` finds, or the error where nothing comes out."""
    try:
        return examine(case, compile_for(case, launch, chip))
    except (RuntimeError, TritonError) as error:
        return {"error": str(error).splitlines()[0]}


def section(version: str, found: dict[str, Any]) -> str:
    """The table of one version of triton."""
    heads = ["kernel", "registers", "shared memory", "spills", "tensor-core instructions", "longest loop"]
    rows = [
        [label, *map(str, row.values())] if "error" not in row else [label, row["error"], *["–"] * 4]
        for label, row in found["rows"].items()
    ]
    return f"## triton {version}\n\n{found['environment']['date']}.\n\n{record.table(heads, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write benchmarks/compiled.json and .md")
    parser.add_argument("--chips", type=int, nargs="+", default=list(CHIPS), help="compute capability, 90 for sm_90")
    arguments = parser.parse_args()
    path = record.FOLDER / "compiled.json"
    measured = json.loads(path.read_text())["measured"] if path.is_file() else {}
    ceilings = measured.get(triton.__version__, {"rows": {}})["rows"]
    rows, bad = {}, 0
    for name, variant, case, launch in shipped():
        shape = " ".join(f"{key}={value}" for key, value in launch.items())
        for chip in arguments.chips:
            label = f"{name} {variant} sm_{chip} {shape}"
            rows[label] = measure(case, launch, chip)
            wrong = faults(case, chip, rows[label], ceilings.get(label, {}).get("loop"))
            bad += bool(wrong)
            print(label, rows[label], *(f"!! {one}" for one in wrong), flush=True)
    compared = "" if ceilings else ", no loop compared: none is recorded for this version"
    print(f"triton {triton.__version__}: {len(rows)} kernels compiled, {bad} with faults{compared}")
    if arguments.record:
        environment = record.environment("triton")
        measured[triton.__version__] = {"environment": environment, "rows": rows}
        text = "".join(section(version, found) for version, found in sorted(measured.items(), reverse=True))
        record.save("compiled", {"environment": environment, "measured": measured}, text, echo=False)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
