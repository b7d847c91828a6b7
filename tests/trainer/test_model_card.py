import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper
from PIL import Image

from trainer.model_card import model_card
from trainer.representation.bundle import Variant
from trainer.representation.preprocess import InputContract

CONTRACT = InputContract(size_px=8, crop_fraction=0.875, resample="bicubic")
PARITY = {
    "images": 10,
    "outputs": {
        "features": {"1": {"max_abs": 1e-7, "min_cosine": 0.9999999}},
        "embedding": {"1": {"max_abs": 3e-6, "min_cosine": 0.9999998}},
    },
}


def card(**changes: Any) -> str:
    facts: dict[str, Any] = {
        "feature_dim": 3,
        "embedding_dim": 2,
        "images": 1797,
        "contract": CONTRACT,
        "recipe": {"name": "digits", "seed": 7},
        "training": {"epochs": 40, "knn": {"first": 0.6612345678, "last": 0.97}},
        "parity": PARITY,
        "variants": {},
        "provenance": {"commit": None, "torch": "2.14.1"},
    }
    return model_card(**{**facts, **changes})


def test_card__front_matter_is_what_hubs_read() -> None:
    opening, front, body = card().split("---\n", 2)
    fields = yaml.safe_load(front)
    assert opening == ""
    assert fields["library_name"] == "invprop"
    assert fields["pipeline_tag"] == "image-feature-extraction"
    assert {"license", "tags"} <= set(fields)
    assert body.lstrip().startswith("# ")


def test_card__states_the_run_and_the_figures() -> None:
    text = card()
    assert "| epochs | 40 |" in text
    assert "| knn.first | 0.661235 |" in text
    assert '"seed": 7' in text
    assert "1,797 unlabelled images" in text
    assert "8 x 8 px (bicubic)" in text
    assert "differ by at most\n  3e-06, and the smallest cosine was 0.9999998" in text
    assert "Made with torch 2.14.1." in text  # no commit is known, none is stated


def test_card__states_the_other_precisions() -> None:
    figures = {
        "images": 1000,
        "cosine": {"min": 0.99951, "mean": 0.99987},
        "knn": {"fp32": 0.976, "variant": 0.9755},
        "held_apart": True,
    }
    variants = {
        "fp16": Variant(b"graph", None, {**figures, "knn": None}),
        "int8": Variant(b"graph", None, figures),
    }
    text = card(variants=variants)
    assert "| `encoder.fp16.onnx` | 0.99951, 0.99987 | - | 1000 |" in text
    assert "| `encoder.int8.onnx` | 0.99951, 0.99987 | 0.9760 -> 0.9755 | 1000 |" in text
    assert "on training images that calibrated nothing; kNN" in text
    text = card(variants={"int8": Variant(None, "its cosine is 0.8", {"images": 9})})
    assert "| no int8: its cosine is 0.8 | - | - | - |" in text
    assert "Other precisions" not in card()


def test_card__a_value_cannot_break_the_table() -> None:
    assert "| note | a \\| b c |" in card(training={"note": "a | b\nc"})


def test_card__braces_in_a_recipe_stay() -> None:
    assert '"pattern": "{size_px}"' in card(recipe={"pattern": "{size_px}"})


def test_card__python_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a stand-in graph: the mean colour, and red and green of it.
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "sides"], ["features"], keepdims=0),
        helper.make_node("Slice", ["features", "zero", "two", "one"], ["embedding"]),
    ]
    constants = {"sides": [1, 2], "zero": [0], "two": [2], "one": [1]}
    graph = helper.make_graph(
        nodes,
        "stand_in",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 8, 8, 3])],
        [
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 2]),
        ],
        [onnx.numpy_helper.from_array(np.array(v), name) for name, v in constants.items()],
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(
        helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "encoder.onnx"
    )
    Image.new("RGB", (20, 10), (200, 100, 50)).save(tmp_path / "picture.jpg", quality=100)

    (program,) = re.findall(r"```python\n(.*?)```", card(), flags=re.DOTALL)
    assert len(program.splitlines()) == 6
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["contract"] == CONTRACT
    np.testing.assert_allclose(names["features"], [[200, 100, 50]], atol=2)
    assert names["embedding"].shape == (1, 2)
