"""What is stored has the digits of the checkpoint, whatever dtype the forward passes have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

import llmprune

SMALL = "model.layers.1.self_attn.q_proj.weight"


def source(folder: Path, layout: str, dtype: torch.dtype) -> Path:
    model = tiny.build(layout)
    if dtype == torch.bfloat16:
        # below the smallest number of float16
        model.get_parameter(SMALL).data.mul_(1e-8)
    model.to(dtype).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def pruned(folder: Path, forward: str, **settings: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    out = folder.with_name("out")
    settings = {"calibration": tiny.tokens(), "sparsity": 0.5, **settings}
    report = llmprune.prune(folder, out=out, dtype=forward, **settings).report
    return load_file(out / "model.safetensors"), report


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize(
    ("layout", "stored", "forward"),
    [
        ("llama", torch.float32, "bfloat16"),
        ("llama", torch.bfloat16, "float16"),
        ("llama", torch.float16, "bfloat16"),
        ("gpt2", torch.float32, "bfloat16"),
        ("mixtral", torch.float32, "bfloat16"),
    ],
)
def test_kept_weights_are_kept_as_they_were(
    method: str, layout: str, stored: torch.dtype, forward: str, tmp_path: Path
) -> None:
    dense = load_file(source(tmp_path / "model", layout, stored) / "model.safetensors")
    sparse, report = pruned(tmp_path / "model", forward, method=method)
    assert sparse.keys() == dense.keys() and {one.dtype for one in sparse.values()} == {stored}
    for name, one in sparse.items():
        assert torch.equal(one, dense[name].masked_fill(one == 0, 0)), name
    zeros = sum(int((one == 0).sum()) - int((dense[name] == 0).sum()) for name, one in sparse.items())
    already = sum(int((dense[name] == 0).sum()) for name, one in sparse.items() if not torch.equal(one, dense[name]))
    assert zeros + already == report["totals"]["zeros"]


@pytest.mark.parametrize("settings", [{}, {"schedule": "module"}, {"reconstruct": 1}])
@pytest.mark.parametrize("layout", ["llama", "mixtral"])
def test_solved_weights_have_all_digits(layout: str, settings: dict[str, Any], tmp_path: Path) -> None:
    dense = load_file(source(tmp_path / "model", layout, torch.float32) / "model.safetensors")
    sparse, _ = pruned(tmp_path / "model", "bfloat16", method="sparsegpt", **settings)
    changed = [name for name, one in sparse.items() if not torch.equal(one, dense[name])]
    assert len(changed) >= 7 * tiny.TINY[layout].num_hidden_layers
    for name in changed:
        kept = sparse[name][sparse[name] != 0]
        # of random 24-bit significands one in 2^16 has only 8 bits
        assert float((kept != kept.bfloat16().float()).float().mean()) > 0.9, name


def test_reordered_weights_are_the_same_weights(tmp_path: Path) -> None:
    dense = load_file(source(tmp_path / "model", "llama", torch.float32) / "model.safetensors")
    settings: dict[str, Any] = {"method": "wanda", "sparsity": None, "pattern": "2:4", "permute": True}
    sparse, _ = pruned(tmp_path / "model", "bfloat16", **settings)
    for name, one in sparse.items():
        assert torch.isin(one[one != 0], dense[name]).all(), name


def test_layers_that_stay_keep_their_digits(tmp_path: Path) -> None:
    dense = load_file(source(tmp_path / "model", "llama", torch.float32) / "model.safetensors")
    settings = {"method": "laco", "sparsity": None, "drop_layers": 1}
    sparse, report = pruned(tmp_path / "model", "bfloat16", **settings)
    merged = {name.split(".")[2] for name in report["structure"]["changed"]}
    assert merged
    stay = [name for name in sparse if not (name.startswith("model.layers.") and name.split(".")[2] in merged)]
    assert len(stay) > 9
    for name in stay:
        assert any(torch.equal(sparse[name], one) for one in dense.values()), name
