"""A sample of `scripts/zoo.py`: types whose layers differ from all that the other tests build."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import zoo

from llmprune.arch.discover import decoder_layers


@pytest.mark.parametrize("kind", ["bamba", "lfm2_moe"])
def test_type_passes_every_check(kind: str) -> None:
    found = zoo.visit(kind)
    assert list(found) == ["build", *zoo.CHECKS]
    # which of its parameters are heads and channels is not known
    assert found.pop("width").startswith("refused: which parameters of a")
    assert all(said.startswith("ok") for said in found.values()), found


@pytest.mark.parametrize(("kind", "layers"), [("git", "git.encoder.layer"), ("gemma3", "model.language_model.layers")])
def test_layers_of_a_picture_tower_are_not_those_of_the_decoder(kind: str, layers: str) -> None:
    assert decoder_layers(zoo.build(kind))[0] == layers


def test_other_types_are_refused() -> None:
    found = zoo.visit("prophetnet")
    assert found["engine"].startswith("refused: it is a part of an encoder-decoder"), found
    assert zoo.faults({"prophetnet": found}) == []
    assert zoo.faults({"llama": found}) == ["llama"]


def test_layers_that_run_in_cycles_are_refused() -> None:
    found = zoo.visit("hrm_text")
    assert "run several times in a forward pass" in found["engine"], found


def test_layers_of_a_sound_tower_are_not_those_of_the_decoder() -> None:
    model = zoo.build("phi4_multimodal")
    assert decoder_layers(model)[0] == "model.layers"


def test_layers_that_hand_on_more_than_the_hidden_state_are_not_left_out(tmp_path: Path) -> None:
    zoo.build("reformer").save_pretrained(tmp_path / "model")
    with pytest.raises(zoo.UserError, match="cannot be run one at a time"):
        zoo.prune(tmp_path / "model", tmp_path / "out", method="keep-first", drop_layers=1)
    assert not list(tmp_path.glob("out*"))
