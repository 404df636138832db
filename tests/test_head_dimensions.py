"""Fewer dimensions in heads: MoDeGPT's choice of keys and queries, its value and output factors, and how both are stored."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import MORE
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import llmprune
from llmprune.arch.roles import Roles
from llmprune.arch.units import KEY, VALUE, find_units, heads_of
from llmprune.engine.widths import Evidence
from llmprune.methods.width.choice import lowest
from llmprune.methods.width.modegpt import MoDeGPT
from llmprune.solvers.groups import principal
from llmprune.statistics import GRAM, MOMENTS, Stats
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


# How far each family's rotary embedding reaches into a head, and whether it turns neighbours.
TURNED = {
    "llama": (4, False),
    "phi": (2, False),
    "falcon": (8, False),
    "gpt-neox": (2, False),
    "phi3": (8, False),
    "helium": (4, True),
    "cohere2": (4, True),
    "ernie4.5": (4, True),
    "glm": (4, True),
    "gptj": (4, True),
    "gpt2": (0, False),
    "opt": (0, False),
    "bloom": (0, False),
}


@pytest.mark.parametrize("name", TURNED)
@torch.no_grad()
def test_units_are_what_the_rotary_embedding_turns_together(name: str) -> None:
    model = tiny.build(name).double()
    attention = Roles(model).layers[0].attention
    query, key, _ = heads_of(attention)
    # queries of a group have one dimension, its keys another one: do the tokens attend otherwise than alike?
    rows = query.index_HR.reshape(-1), key.index_HR.reshape(-1)
    dense = {one.name: model.get_parameter(one.name).clone() for one in (query.weight, key.weight)}

    def logits(first: int | None, second: int) -> torch.Tensor:
        for part, every, heads, one in (
            (query, rows[0], query.index_HR, first),
            (key, rows[1], key.index_HR, second),
        ):
            axis, kept = part.weight.output_axis, [] if one is None else heads[:, one].tolist()
            gone = torch.tensor([row for row in every.tolist() if row not in kept])
            model.get_parameter(part.weight.name).index_fill_(axis, gone, 0)
            if part.weight.bias:
                model.get_parameter(part.weight.bias)[every] = 0
        found: torch.Tensor = model(input_ids=tiny.tokens(2, 12), use_cache=False).logits
        for one_name, value in dense.items():
            model.get_parameter(one_name).copy_(value)
        return found

    alike = logits(None, 0)
    turned, neighbours = TURNED[name]
    for first in range(attention.head_dim):
        partner = first
        if first < turned:
            partner = first ^ 1 if neighbours else (first + turned // 2) % turned
        meet = {
            second for second in range(attention.head_dim) if float((logits(first, second) - alike).abs().max()) > 1e-9
        }
        assert meet == {first, partner}
        (unit,) = [one.tolist() for one in attention.turned_PN if first in one]
        assert {first, partner} <= set(unit) and len(unit) == (2 if turned else 1)


def column_norms(x_TH: torch.Tensor) -> torch.Tensor:
    """Of the symmetric root of X'X, by its eigenvectors."""
    values, vectors = torch.linalg.eigh(x_TH.T @ x_TH)
    return (vectors * values.clamp_min(0).sqrt() @ vectors.T).norm(dim=0)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gpt-neox", "glm"])
def test_scores_of_key_dimensions_are_those_of_what_attention_compares(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tiny.save(name, tmp_path / "dense")
    width = {"units": ["key-dimension"], "round_to": 2}
    result = llmprune.prune(source, method="modegpt", ratio=0.02, calibration=TEXT, width=width, out=tmp_path / "out")
    found = result.report["structure"]["units"][0]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        seen.append((query.double(), key.double()))
        return sdpa(module, query, key, value, *rest, **more)

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", record)
    model = tiny.build(name)
    with torch.no_grad():
        model(input_ids=torch.tensor(TEXT))
    attention = Roles(model).layers[0].attention
    query_BQTH, key_BGTH = seen[0]
    scores = []
    for group in range(attention.groups):
        ratio = attention.heads // attention.groups
        queries = [column_norms(query_BQTH[:, group * ratio + one].flatten(0, 1)).square() for one in range(ratio)]
        squares = torch.stack(queries).sum(0), column_norms(key_BGTH[:, group].flatten(0, 1)).square()
        pairs = [one.tolist() for one in attention.turned_PN]
        scores += [float((squares[0][pair].sum() * squares[1][pair].sum()).sqrt()) for pair in pairs]
    assert found["name"].endswith("key-dimension")
    # OPT has its queries already divided by the root of the width
    factor = 1 / attention.head_dim**0.5 if name == "opt" else 1.0
    torch.testing.assert_close(factor * torch.tensor(found["scores"]), torch.tensor(scores), rtol=1e-4, atol=0)


def test_of_independent_dimensions_the_choice_is_the_best_of_all() -> None:
    (units, *_) = find_units(Roles(tiny.build("opt")), [KEY])
    assert (units.count, units.strata) == (32, 4)
    # tokens of no correlation, and matrices with orthogonal rows of many sizes
    stats = Stats(32, frozenset({GRAM, MOMENTS}))
    stats.update(torch.eye(32))
    values = {}
    for number, member in enumerate(units.members):
        rows_OI = torch.linalg.qr(draw(32, 32, seed=number)).Q * (0.1 + draw(32, 1, seed=9 + number).abs())
        values[member.parameter] = rows_OI if member.parameter.endswith("weight") else torch.zeros(32)
    evidence = Evidence(units, 0, torch.empty(32, 0), 4, torch.empty(0, 0), stats, values)
    gone = lowest(MoDeGPT().score(evidence), 20, 4)
    query_OI, key_OI = (values[units.members[place].parameter] for place in (0, 2))
    for head in range(4):
        own = slice(8 * head, 8 * head + 8)
        q_TH, k_TH = query_OI[own].T, key_OI[own].T
        errors = {
            kept: float((q_TH @ k_TH.T - q_TH[:, kept] @ k_TH[:, kept].T).square().sum())
            for kept in combinations(range(8), 3)
        }
        assert min(errors, key=lambda one: errors[one]) == tuple(one for one in range(8) if 8 * head + one not in gone)


NAMES = [
    "llama",
    "qwen3",
    "gemma2",
    "mixtral",
    "starcoder2",
    "opt",
    "gpt2",
    "gpt-neox",
    "phi3",
    "falcon",
    "glm",
    "gptj",
]


@pytest.mark.parametrize("name", NAMES)
def test_heads_become_narrower_with_code_of_their_own(name: str, tmp_path: Path) -> None:
    source, ids = tiny.save(name, tmp_path / "dense"), tiny.tokens(2, 12)
    # fused experts cannot differ from layer to layer, so of those models heads alone become narrower
    ratio = 0.06 if name == "mixtral" else 0.15
    settings: dict[str, Any] = {"method": "modegpt", "ratio": ratio, "calibration": TEXT}
    result = llmprune.prune(source, out=tmp_path / "out", layout="remote-code", width={"round_to": 2}, **settings)
    report = result.report
    units = list(report["structure"]["widths"])
    absent = {"mixtral": "channel", "qwen3": "key-dimension"}.get(name)
    assert units == [one for one in ("channel", "key-dimension", "value-dimension") if one != absent]
    settings["width"] = {"units": units, "round_to": 2}
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


def test_a_fresh_process_needs_no_llmprune(tmp_path: Path) -> None:
    source = tiny.save("glm", tmp_path / "dense")
    settings: dict[str, Any] = {"ratio": 0.2, "calibration": TEXT, "layout": "remote-code", "allocation": "influence"}
    settings["width"] = {"round_to": 2, "temperature": 1.0}
    widths = llmprune.prune(source, out=tmp_path / "out", method="modegpt", **settings).report["structure"]["widths"]
    assert any(len(set(counts)) > 1 for counts in widths.values())
    ids = tiny.tokens(1, 10)
    with torch.no_grad():
        expected = llmprune.load(tmp_path / "out")(input_ids=ids).logits
    torch.save({"ids": ids, "logits": expected}, tmp_path / "expected.pt")
    code = (
        "import sys, torch; sys.modules['llmprune'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True).eval()\n"
        f"expected = torch.load({str(tmp_path / 'expected.pt')!r}); ids = expected['ids']\n"
        "print(float((m(input_ids=ids).logits - expected['logits']).abs().max()))\n"
        "print(len({tuple(m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, "
        "use_cache=c)[0].tolist()) for c in (True, False)}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0.0", "1"]


def test_other_methods_take_them_as_they_are_and_what_overlaps_is_refused(tmp_path: Path) -> None:
    source = tiny.save("qwen2", tmp_path / "dense")
    settings: dict[str, Any] = {"ratio": 0.05, "calibration": TEXT, "layout": "remote-code"}
    width = {"units": ["value-dimension"], "round_to": 2}
    report = llmprune.prune(source, out=tmp_path / "out", method="group-obs", width=width, **settings).report
    assert report["verified"].startswith("reloaded; logits equal")
    with pytest.raises(UserError, match="differ in width from what its configuration says"):
        llmprune.prune(tmp_path / "out", method="group-obs", dry_run=True, ratio=0.1, calibration=TEXT)
    refused = {"width": {"units": ["key-dimension"]}, "dry_run": True, **settings, "ratio": 0.01}
    with pytest.raises(UserError, match=r"queries and keys pass .*q_norm"):
        llmprune.prune(tiny.build("qwen3"), method="modegpt", **refused)
    with pytest.raises(UserError, match="no scores for key-dimensions"):
        llmprune.prune(source, method="group-obs", **refused)
    with pytest.raises(UserError, match="parts of heads"):
        llmprune.prune(
            source, method="modegpt", width={"units": ["kv-group", "value-dimension"]}, dry_run=True, **settings
        )
