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

NAMES = (
    "cifar10",
    "cifar10-lightly",
    "cifar100",
    "digits",
    "folder",
    "imagenet-r50-linear",
    "imagenet-r50-mlp",
    "svhn",
    "wm811k",
)


def _keys(name: str) -> list[str]:
    """The dotted keys that a recipe's file gives, as they stand there."""
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    return [
        f"{section}.{key}" if key else section
        for section, inside in values.items()
        for key in (inside if isinstance(inside, dict) else [""])
    ]


def test_recipes__come_with_the_package() -> None:
    assert tuple(recipe_names()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_recipe__loads_and_gives_every_key_itself(name: str) -> None:
    recipe = load_recipe(name)
    # Also those that the models have a default for: what a run computes is to be read in one place.
    assert sorted(_keys(name)) == sorted(recipe_keys())
    assert recipe.loss.mode == "paper"
    assert load_recipe(name, ["loss.mode=official"]).loss.mode == "official"


@pytest.mark.parametrize("name", NAMES)
def test_recipe__says_where_each_number_comes_from(name: str) -> None:
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    values = [line for line in lines if re.match(r"\s*\w+: [^#\s]", line)]
    assert len(values) == len(recipe_keys())
    # One's own choice, and a number that is not read, need a reason.
    origin = r"# (\[(paper|code|lightly)\]|\[own\] \w.{5}|unused: \w)"
    assert [line for line in values if not re.search(origin, line)] == []
    assert ("[lightly]" in "".join(values)) == (name == "cifar10-lightly")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "imagenet-r50-mlp",
            "resnet50 224 mlp 0.2 799 128 0.03 0.0001 official_cosine 3 50 0.2 0.8 0.1 0.5 0.5",
        ),
        (
            "imagenet-r50-linear",
            "resnet50 224 linear 0.07 799 128 0.03 0.0001 official_cosine 3 50 0.2 1.0 0.4 0.0 0.5",
        ),
        (
            "cifar10",
            "resnet18 32 mlp 0.2 799 128 0.03 0.0005 official_cosine 3 20 0.2 1.0 0.4 0.0 0.0",
        ),
        (
            "cifar100",
            "resnet18 32 mlp 0.2 799 128 0.03 0.0005 official_cosine 4 20 0.2 1.0 0.4 0.0 0.0",
        ),
        (
            "svhn",
            "resnet18 32 mlp 0.2 799 128 0.03 0.0005 official_cosine 3 20 0.2 1.0 0.4 0.0 0.0",
        ),
        (
            "cifar10-lightly",
            "resnet18 32 mlp 0.2 200 128 0.06 0.0005 cosine 3 20 0.08 0.8 0.1 0.0 0.5",
        ),
    ],
)
def test_recipe__of_a_published_run_is_that_run(name: str, wanted: str) -> None:
    recipe = load_recipe(name)
    encoder, loss, optim, augment = recipe.encoder, recipe.loss, recipe.optim, recipe.augment
    values = (
        *(encoder.backbone, encoder.image_size_px, encoder.head, loss.temperature),
        *(recipe.epochs, recipe.batch_size, optim.lr, optim.weight_decay, optim.schedule),
        *(loss.steps, loss.num_positives, augment.crop_scale_min, augment.jitter, augment.hue),
        *(augment.blur, augment.flip),
    )
    assert " ".join(map(str, values)) == wanted
    assert (recipe.bank.num_neighbours, recipe.bank.momentum, optim.momentum) == (4, 0.5, 0.9)
    assert (loss.num_background, loss.invariance_weight, loss.warmup_epochs) == (4096, 0.6, 30)
    assert encoder.normalise == (name == "cifar10-lightly")


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
    with pytest.raises(RecipeError, match=r"'imagnet'.*cifar10, cifar10-lightly, cifar100, digits"):
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
    other = load_recipe("folder", ["data.workers=3", "bank.sharded=true", "loss.steps=2", "seed=4"])
    assert differing_keys(one, other) == ["seed", "loss.steps"]
