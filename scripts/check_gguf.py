"""Convert pruned models to GGUF with llama.cpp's converter, and compare what comes back, bit by bit.

    pip install gguf sentencepiece
    python scripts/check_gguf.py LLAMA_CPP/convert_hf_to_gguf.py

The converter is a file of llama.cpp's repository (with the folders `conversion` and `gguf-py` beside it), and of the
source package of llama-cpp-python under vendor/llama.cpp; no registry has it as a package.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

import llmprune

DEMO = Path(llmprune.__file__).parent / "demo" / "model"
EDITS: dict[str, dict[str, Any]] = {
    "2of4": {"method": "magnitude", "pattern": "2:4"},
    "shorter": {"drop_layers": [1, 3]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("converter", type=Path)
    converter = parser.parse_args().converter
    ids = torch.arange(3, 60)[None]
    with tempfile.TemporaryDirectory() as name:
        for label, edit in EDITS.items():
            folder, file = Path(name) / label, Path(name) / f"{label}.gguf"
            llmprune.prune(DEMO, out=folder, **edit)
            paths = [str(converter.parent / "gguf-py"), *filter(None, [os.environ.get("PYTHONPATH")])]
            subprocess.run(
                [sys.executable, converter, folder, "--outfile", file, "--outtype", "f32"],
                check=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
            plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            back = AutoModelForCausalLM.from_pretrained(name, gguf_file=file.name, dtype=torch.float32).eval()
            zeros = sum(int((one.data == 0).sum()) for one in GGUFReader(file).tensors)
            expected = sum(int((one == 0).sum()) for one in plain.parameters())
            with torch.no_grad():
                same = torch.equal(plain(ids).logits, back(ids).logits)
            print(f"{label}: {zeros} zeros of {expected}, same logits: {same}")
            if zeros != expected or not same:
                sys.exit(1)


if __name__ == "__main__":
    main()
