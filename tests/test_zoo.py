"""A sample of `scripts/zoo.py`: types whose layers differ from all that the other tests build."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import drifted
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import zoo
from zoo_checks import CHECKS, TOKENS, count, load, prune, same
from zoo_models import FIXES, build, save

from llmprune.arch.discover import decoder_layers
from llmprune.types import UserError


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The tiny model of the type that the test names."""
    save(request.param, build(request.param), tmp_path / "model")
    return tmp_path / "model"


def on(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("folder", kinds, indirect=True)


@pytest.mark.parametrize("kind", ["bamba", "lfm2_moe"])
def test_type_passes_every_check(kind: str) -> None:
    found = zoo.visit(kind)
    assert list(found) == ["build", *CHECKS]
    # which of its parameters are heads and channels is not known
    assert found.pop("width").startswith("refused: which parameters of a")
    assert all(said.startswith("ok") for said in found.values()), found


@pytest.mark.parametrize(("kind", "layers"), [("git", "git.encoder.layer"), ("gemma3", "model.language_model.layers")])
def test_layers_of_a_picture_tower_are_not_those_of_the_decoder(kind: str, layers: str) -> None:
    assert decoder_layers(build(kind))[0] == layers


def test_other_types_are_refused() -> None:
    found = zoo.visit("prophetnet")
    assert found["engine"].startswith("refused: it is a part of an encoder-decoder"), found
    assert zoo.faults({"prophetnet": found}) == []
    assert zoo.faults({"llama": found}) == ["llama"]


@pytest.mark.parametrize(
    ("kind", "why"),
    [("hrm_text", "run several times in a forward pass"), ("mllama", "run only where there are pictures")],
)
def test_layers_that_do_not_run_once_are_refused(kind: str, why: str) -> None:
    found = zoo.visit(kind)
    assert why in found["engine"], found
    assert zoo.faults({kind: found}) == []


def test_layers_of_a_sound_tower_are_not_those_of_the_decoder() -> None:
    model = build("phi4_multimodal")
    assert decoder_layers(model)[0] == "model.layers"


@on("reformer", "inkling2_text")
def test_layers_that_hand_on_more_than_the_hidden_state_are_not_left_out(folder: Path) -> None:
    with pytest.raises(UserError, match="cannot be run one at a time"):
        prune(folder, folder.parent / "out", method="keep-first", drop_layers=1)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_layer_whose_tensors_are_counted_otherwise_does_not_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FIXES, "inkling2_text")
    folder = tmp_path / "model"
    build("inkling2_text").save_pretrained(folder)
    with pytest.raises(UserError, match=r"attn_queries\.1' does not say that it belongs to layer 2"):
        prune(folder, folder.parent / "out", method="keep-first", drop_layers=[1])
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@on("youtu")
def test_a_padding_row_that_the_class_empties_is_no_fault(folder: Path) -> None:
    dense = load(folder)
    assert not dense.get_input_embeddings().weight[0].any()
    report = prune(folder, folder.parent / "out", method="keep-first", drop_layers=1).report
    assert report["verified"].startswith("reloaded; logits equal")


def test_settings_of_single_layers_move_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FIXES, "gemma4_text", {"hidden_size_per_layer_input": 0})
    folder = tmp_path / "model"
    build("gemma4_text").save_pretrained(folder)
    full = [kind == "full_attention" for kind in json.loads((folder / "config.json").read_text())["layer_types"]]
    prune(folder, folder.parent / "out", method="keep-first", drop_layers=[0])
    config = json.loads((folder.parent / "out" / "config.json").read_text())
    assert [int(index) for index in config["per_layer_config"]] == [i for i, one in enumerate(full[1:]) if one]


@on("gemma4_text")
def test_a_tensor_with_a_part_for_each_layer_is_not_cut(folder: Path) -> None:
    with pytest.raises(UserError, match="which lies outside the layers, has a part for each of them"):
        prune(folder, folder.parent / "out", method="keep-first", drop_layers=[0])
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


# Parameters that several layers share.


def inputs_of(folder: Path, matrix: str) -> torch.Tensor:
    """What a matrix of a model reads in a plain forward, tokens x inputs."""
    model, seen = load(folder), []
    model.get_submodule(matrix.removesuffix(".weight")).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    return seen[0].double().flatten(0, -2)


@on("zamba", "zamba2")
@pytest.mark.parametrize("source", ["folder", "model"])
def test_the_dense_model_keeps_what_layers_share_when_it_is_pruned(source: str, folder: Path) -> None:
    out, matrix = folder.parent / "out", "model.layers.3.linear.weight"
    drifted.Drifted.seen.clear()
    prune(folder if source == "folder" else load(folder), out, method="drifted:Drifted", sparsity=0.5)
    dense_TI, pruned_TI = (inputs_of(one, matrix) for one in (folder, out))
    expected_II = (dense_TI - pruned_TI).T @ pruned_TI
    # float32 sums over 96 tokens
    torch.testing.assert_close(drifted.Drifted.seen[matrix].double(), expected_II, rtol=1e-3, atol=1e-4)


@on("zamba", "zamba2")
def test_what_layers_share_is_pruned_once(folder: Path) -> None:
    settings = {"method": "sparsegpt", "sparsity": 0.5, "retarget": 0.5, "reconstruct": 1}
    report = prune(folder, folder.parent / "streamed", **settings).report
    prune(load(folder), folder.parent / "resident", **settings)
    one, other = (load(folder.parent / name) for name in ("streamed", "resident"))
    assert all(same(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert count(one) == report["totals"]["params_before"] == count(build(one.config.model_type))
    zeros = {row["name"]: row["achieved"] for row in report["tensors"]}
    shared = {name: source for name, source in one.all_tied_weights_keys.items() if source in zeros}
    assert shared
    for name, source in shared.items():
        assert name not in zeros and report["left_alone"][name] == f"tied: it is {source}"
        assert int((one.get_parameter(name) == 0).sum()) == zeros[source]


@on("zamba2")
def test_layers_that_share_move_together(folder: Path) -> None:
    prune(folder, folder.parent / "out", method="keep-first", drop_layers=[0])
    tied = load(folder.parent / "out").all_tied_weights_keys.items()
    assert {(name.split(".")[2], source.split(".")[2]) for name, source in tied if ".layers." in name} == {("2", "0")}


@on("zamba", "zamba2")
def test_the_layer_that_lends_is_not_left_out(folder: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be built without what would go|would not share its values"):
        prune(folder, folder.parent / "out", method="keep-first", drop_layers=[1])
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@on("zamba")
def test_twins_that_differ_are_refused(folder: Path) -> None:
    model = load(folder)
    name = next(name for name in model.all_tied_weights_keys if ".layers." in name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state[name] += 1
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(UserError, match="stores other values for"):
        prune(folder, folder.parent / "out", method="magnitude", sparsity=0.5)


# The record.


def test_a_record_is_made_in_sittings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    visited: list[str] = []

    def visit(kind: str) -> dict[str, str]:
        visited.append(kind)
        return {"build": "ok 1 parameters", "engine": "ok 1 matrices"}

    def sitting(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["scripts/zoo.py", *arguments])
        with pytest.raises(SystemExit, match="0"):
            zoo.main()

    monkeypatch.setattr(zoo.record, "FOLDER", tmp_path)
    monkeypatch.setattr(zoo, "visit_apart", visit)
    monkeypatch.setattr(zoo, "digest", lambda: "then")
    sitting("llama", "mamba")
    sitting("llama", "opt")
    assert visited == ["llama", "mamba", "opt"]
    sitting("--minutes", "0")
    assert visited == ["llama", "mamba", "opt"]
    sitting("--again", "opt")
    monkeypatch.setattr(zoo, "digest", lambda: "now")
    sitting("llama")
    assert visited[3:] == ["opt", "llama"]
    found = json.loads((tmp_path / f"{zoo.NAME}.json").read_text())["types"]
    assert {kind: row["code"] for kind, row in found.items()} == {"llama": "now", "mamba": "then", "opt": "then"}
    assert "Made before the code last changed: mamba, opt." in (tmp_path / f"{zoo.NAME}.md").read_text()
