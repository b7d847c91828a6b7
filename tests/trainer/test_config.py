"""Recipes: what they hold, and what a wrong one is told.

Run: pytest tests/trainer/test_config.py
"""

import re
from pathlib import Path

import pytest
import yaml

from trainer.config import (
    RECIPES,
    RecipeError,
    differing_keys,
    load_recipe,
    recipe_keys,
    recipe_names,
)


def test_recipes__come_with_the_package_and_hold_every_key() -> None:
    assert recipe_names() == ["cifar10", "digits", "folder"]
    for name in recipe_names():
        load_recipe(name)


@pytest.mark.parametrize("name", ["cifar10", "digits", "folder"])
def test_recipe__says_where_each_number_comes_from(name: str) -> None:
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    values = [line for line in lines if re.match(r"\s*\w+: \S", line) and ":  #" not in line]
    assert len(values) == len(recipe_keys())
    without = [line for line in values if not re.search(r"# (\[(paper|code|own)\]|unused)", line)]
    assert without == []


def test_cifar10__is_what_the_authors_ran() -> None:
    recipe = load_recipe("cifar10")
    assert (recipe.bank.num_neighbours, recipe.loss.steps, recipe.loss.num_positives) == (4, 3, 20)
    assert (recipe.loss.num_background, recipe.loss.invariance_weight) == (4096, 0.6)
    assert (recipe.loss.temperature, recipe.loss.warmup_epochs) == (0.2, 30)
    assert (recipe.optim.lr, recipe.optim.momentum, recipe.optim.weight_decay) == (0.03, 0.9, 5e-4)
    assert (recipe.batch_size, recipe.augment.flip, recipe.augment.blur) == (128, 0.0, 0.0)


def test_override__wins_and_is_read_as_yaml() -> None:
    recipe = load_recipe(
        "cifar10",
        ["epochs=5", "loss.temperature=1e-1", "optim.milestones=[3, 4]", "data.workers=2"],
    )
    assert recipe.epochs == 5
    assert recipe.loss.temperature == 0.1
    assert recipe.optim.milestones == (3, 4)
    assert recipe.data.workers == 2


def test_resolved_recipe__read_back_from_its_own_yaml_is_the_same(tmp_path: Path) -> None:
    recipe = load_recipe("folder", ["seed=7"])
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe.as_dict()))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("loss.temprature=0.1", ["loss.temprature", "did you mean 'loss.temperature'"]),
        ("optim.epochs=5", ["optim.epochs", "did you mean 'epochs'"]),
        ("loss.temperature=-1", ["loss.temperature=-1", "above 0 and at most 10"]),
        ("batch_size=1", ["batch_size=1", "at least 2 and at most 65536"]),
        ("device=gpu", ["device='gpu'", "auto, cpu, cuda"]),
        ("data.workers=-2", ["data.workers=-2", "at least 0 and at most 256 or auto"]),
        ("optim.milestones=[0]", ["optim.milestones", "each at least 1"]),
        ("optim.lr=.nan", ["optim.lr=nan", "above 0"]),
        ("augment.crop_scale_min=0.9 augment.crop_scale_max=0.5", ["0.9 is above", "=0.5"]),
        ("seed", ["key=value", "'seed'"]),
        ("seed=[", ["seed=[", "YAML"]),
    ],
)
def test_override__wrong(override: str, told: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("cifar10", override.split())
    for words in told:
        assert words in str(error.value)


def test_recipe__unknown_name() -> None:
    with pytest.raises(RecipeError, match=r"'imagnet'.*cifar10, digits, folder"):
        load_recipe("imagnet")


def test_recipe_file__with_a_missing_and_an_unknown_key(tmp_path: Path) -> None:
    values = load_recipe("digits").as_dict()
    del values["epochs"]
    values["bank"]["momentun"] = 0.5
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match=r"epochs is missing.*'bank.momentun'.*'bank\.momentum'"):
        load_recipe(path)


def test_recipe_file__no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("a: [")
    with pytest.raises(RecipeError, match=r"mine\.yaml cannot be read as YAML"):
        load_recipe(path)
    path.write_text("- a")
    with pytest.raises(RecipeError, match="keys and values, got list"):
        load_recipe(path)


def test_recipe__is_read_only() -> None:
    recipe = load_recipe("digits")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


def test_differing_keys__leave_out_what_changes_no_number() -> None:
    one = load_recipe("folder")
    other = load_recipe("folder", ["data.workers=3", "checkpoint.keep=9", "loss.steps=2", "seed=4"])
    assert differing_keys(one, other) == ["seed", "loss.steps"]
