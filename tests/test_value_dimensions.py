"""Fewer dimensions in what heads hand on: MoDeGPT's value and output factors, plain as zeros or with code of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import MORE

import llmprune
from llmprune.arch.roles import Roles
from llmprune.arch.units import VALUE, find_units
from llmprune.engine.widths import Evidence
from llmprune.methods.width.modegpt import MoDeGPT
from llmprune.solvers.groups import principal
from llmprune.statistics import GRAM, Stats
from llmprune.types import UserError

TEXT = [row.tolist() for row in tiny.tokens(6, 20, seed=3)]


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in MORE.items():
        monkeypatch.setitem(tiny.TINY, name, config)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_principal_directions_lose_what_the_singular_values_say() -> None:
    z_TH = draw(50, 8, seed=0) @ draw(8, 8, seed=1)
    weight_OH = draw(6, 8, seed=2)
    basis_HH = principal(z_TH.T @ z_TH, weight_OH)
    turned_TH, weight_OK = z_TH @ basis_HH, weight_OH @ torch.linalg.inv(basis_HH).T
    whole_TO = z_TH @ weight_OH.T
    assert float((turned_TH @ weight_OK.T - whole_TO).abs().max()) <= 1e-10 * float(whole_TO.abs().max())
    singular = torch.linalg.svdvals(whole_TO)
    for kept in (1, 3, 5):
        lost = float((whole_TO - turned_TH[:, :kept] @ weight_OK[:, :kept].T).square().sum())
        assert lost == pytest.approx(float(singular[kept:].square().sum()), rel=1e-9)


def test_a_group_is_turned_for_all_its_query_heads() -> None:
    (units, *_) = find_units(Roles(tiny.build("llama")), [VALUE])
    x_TI = draw(400, 32, seed=3) @ draw(32, 32, seed=4)
    stats = Stats(32, frozenset({GRAM}))
    stats.update(x_TI.float())
    writer_OI = draw(32, 32, seed=5)
    assert units.columns_UN is not None
    evidence = Evidence(units, 0, units.columns_UN, units.strata, writer_OI.float(), stats, {})
    bases_GHK = MoDeGPT(damping=0.0).value_basis(evidence)
    assert bases_GHK.shape == (4, 4, 4)
    # query heads 2 and 3 read kv head 1
    parts = [slice(8, 12), slice(12, 16)]
    gram_HH = sum(x_TI[:, one].T @ x_TI[:, one] for one in parts) / 400
    square_HH = sum(writer_OI[:, one].T @ writer_OI[:, one] for one in parts)
    basis_HH = bases_GHK[1]
    found_HH = basis_HH.T @ gram_HH @ basis_HH
    assert float((found_HH - torch.eye(4)).abs().max()) <= 1e-4
    back_HH = torch.linalg.inv(basis_HH)
    energy_HH = back_HH @ square_HH @ back_HH.T
    falling = energy_HH.diagonal()
    assert float((energy_HH - torch.diag(falling)).abs().max()) <= 1e-4 * float(falling[0])
    assert falling.tolist() == sorted(falling.tolist(), reverse=True)


NAMES = ["llama", "qwen3", "gemma2", "mixtral", "starcoder2", "opt"]


@pytest.mark.parametrize("name", NAMES)
def test_heads_become_narrower_with_code_of_their_own(name: str, tmp_path: Path) -> None:
    source, ids = tiny.save(name, tmp_path / "dense"), tiny.tokens(2, 12)
    # fused experts cannot differ from layer to layer, so of those models heads alone become narrower
    units, ratio = (["value-dimension"], 0.03) if name == "mixtral" else (["value-dimension", "channel"], 0.1)
    settings: dict[str, Any] = {"method": "modegpt", "ratio": ratio, "calibration": TEXT}
    settings["width"] = {"units": units, "round_to": 2}
    result = llmprune.prune(source, out=tmp_path / "out", layout="remote-code", **settings)
    report = result.report
    assert report["verified"].startswith("reloaded; logits equal") and report["layout"] == "remote-code"
    small = llmprune.load(tmp_path / "out")
    totals = report["totals"]
    assert sum(one.numel() for one in small.parameters()) == totals["params_after"] < totals["params_before"]
    assert not totals["zeros"]
    with torch.no_grad():
        logits = small(input_ids=ids, use_cache=False).logits
    # the plain class holds the same, zeros standing for what is gone
    plain = llmprune.prune(tiny.build(name), layout="plain", **settings)
    with torch.no_grad():
        padded = plain.model(input_ids=ids, use_cache=False).logits
    assert float((logits - padded).abs().max()) <= 1e-4 * float(logits.abs().max())
    assert plain.report["totals"]["zeros"] > 0
    ids = ids[:1]
    written = [
        small.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*written)


def test_other_methods_take_them_as_they_are_and_what_overlaps_is_refused(tmp_path: Path) -> None:
    source = tiny.save("qwen2", tmp_path / "dense")
    settings: dict[str, Any] = {"ratio": 0.05, "calibration": TEXT, "layout": "remote-code"}
    width = {"units": ["value-dimension"], "round_to": 2}
    report = llmprune.prune(source, out=tmp_path / "out", method="group-obs", width=width, **settings).report
    assert report["verified"].startswith("reloaded; logits equal")
    with pytest.raises(UserError, match="parts of heads"):
        llmprune.prune(
            source, method="modegpt", width={"units": ["kv-group", "value-dimension"]}, dry_run=True, **settings
        )
