"""Any recipe on any tiny model does what it promised, or refuses, or fails so that it can be resumed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import recipes
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from runner import cli, tree

import llmprune

DEMO = Path(llmprune.__file__).parent / "demo" / "model"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: recipes.save_model(name, folder / name, DEMO) for name in recipes.MODELS}


@given(seed=st.integers(0, 2**32))
@settings(max_examples=16, deadline=None)
def test_any_recipe_keeps_its_word(
    seed: int, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = random.Random(seed)
    model, recipe = models[rng.choice(recipes.MODELS)], recipes.draw(rng)
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    before = tree(folder)
    ran = cli("prune", model, "--recipe", folder / "recipe.yaml", "--out", folder / "out", "--quiet")
    recipes.keeps_its_word(ran, folder / "out", before)
