"""Frozen features: those of the served graph, kept, verified when read; broken images counted.

Run: pytest tests/trainer/evaluation/test_features.py
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from trainer.datasets import DataError
from trainer.evaluation import features, protocols
from trainer.evaluation.context import Evaluation, state_digest
from trainer.evaluation.features import extract
from trainer.evaluation.job import KnnJob, parse_job
from trainer.evaluation.outcome import EvaluationError
from trainer.onnx_graph import PARITY_MAX_ABS
from trainer.representation.bundle import BundleError, open_bundle

Make = Callable[..., Evaluation]
OUTPUTS = ("features", "embedding")


def test_features__are_those_of_the_served_graph(make_evaluation: Make) -> None:
    evaluation = make_evaluation()
    found = extract(evaluation, evaluation.trained, "test", OUTPUTS)
    session = onnxruntime.InferenceSession(
        evaluation.bundle.encoder_onnx(), providers=["CPUExecutionProvider"]
    )
    images = evaluation.dataset.test.source.prepared(range(30), evaluation.bundle.contract)
    for name, wanted in zip(OUTPUTS, session.run(list(OUTPUTS), {"images": images}), strict=True):
        assert np.abs(found.values[name] - wanted).max() <= PARITY_MAX_ABS


def test_features__are_computed_once_and_verified_when_read(
    make_evaluation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = make_evaluation()
    computed: list[str] = []
    real = features.embed_all

    def counted(*arguments: object, **options: object) -> dict[str, np.ndarray]:
        computed.append("once")
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(features, "embed_all", counted)
    first = extract(evaluation, evaluation.trained, "test", OUTPUTS)
    again = extract(evaluation, evaluation.trained, "test", ["features"])
    assert computed == ["once"]
    assert np.array_equal(first.values["features"], again.values["features"])
    assert extract(evaluation, evaluation.untrained(), "test", ["features"]).rows.tolist() == [
        *range(30)
    ]
    assert len(computed) == 2  # another network
    (kept, *_) = sorted(evaluation.cache.glob("*/values.npy"))
    for path in evaluation.cache.glob("*/values.npy"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert kept.exists()
    mended = extract(evaluation, evaluation.trained, "test", ["features"])
    assert len(computed) == 3
    assert np.array_equal(first.values["features"], mended.values["features"])


def test_untrained__is_drawn_from_the_seed_and_leaves_torchs_generator_alone(
    make_evaluation: Make,
) -> None:
    evaluation = make_evaluation()
    before = torch.random.get_rng_state()
    one, again = evaluation.untrained(), evaluation.untrained()
    assert torch.equal(before, torch.random.get_rng_state())
    assert state_digest(one.encoder) == state_digest(again.encoder)
    other = make_evaluation(seed=1).untrained()
    assert state_digest(one.encoder) != state_digest(other.encoder)
    assert one.key == again.key != other.key


def test_broken_images__are_left_out_counted_and_limited(
    make_evaluation: Make, make_folder: Callable[..., Path]
) -> None:
    root = make_folder("train", count=10)
    make_folder("test", count=10)
    (root / "train" / "a" / "3.png").write_bytes(b"no image")
    strict = make_evaluation(kind="folder", root=str(root))
    with pytest.raises(DataError, match=r"1 of 20 images of train .* 1% .*a/3\.png: this is no"):
        extract(strict, strict.trained, "train", ["features"])
    mild = make_evaluation(kind="folder", root=str(root), max_skipped=0.1)
    found = extract(mild, mild.trained, "train", ["features"])
    assert found.rows.tolist() == [0, 1, 2, *range(4, 20)]
    assert [each.id for each in mild.skipped["train"]] == ["a/3.png"]
    mild.skipped.clear()
    assert len(extract(mild, mild.trained, "train", ["features"]).rows) == 19
    assert [each.id for each in mild.skipped["train"]] == ["a/3.png"]  # the cache tells it too


def test_class__whose_images_are_all_broken_is_named(
    make_evaluation: Make, make_folder: Callable[..., Path]
) -> None:
    root = make_folder("train", count=3)
    make_folder("test", count=3)
    for path in (root / "train" / "b").iterdir():
        path.write_bytes(b"")
    evaluation = make_evaluation(kind="folder", root=str(root), max_skipped=0.9)
    found = extract(evaluation, evaluation.trained, "train", ["features"])
    with pytest.raises(DataError, match="no training image of the class 'b' can be used"):
        features.labels_of(evaluation, "train", found)


def test_protocol__that_changes_the_encoder_is_caught(
    make_evaluation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = make_evaluation()
    job = parse_job(
        {
            "protocol": "knn",
            "bundle": "b",
            "dataset": {"name": "set", "kind": "npz", "root": "."},
        }
    )
    assert isinstance(job, KnnJob)
    statistics = next(iter(evaluation.trained.encoder.buffers()))

    def careless(*arguments: object) -> None:
        statistics.view(-1)[0] = torch.nextafter(statistics.view(-1)[0], torch.tensor(9.0))

    monkeypatch.setattr(protocols, "knn", careless)
    with pytest.raises(EvaluationError, match="knn changed the encoder"):
        protocols.run_protocol(evaluation, job)


def test_bundle__that_does_not_say_how_it_was_built(make_evaluation: Make) -> None:
    bundle = make_evaluation().bundle
    assert open_bundle(bundle.directory).model_id == bundle.model_id
    object.__setattr__(bundle, "manifest", {**bundle.manifest, "recipe": {}})
    from trainer.evaluation.context import open_network

    with pytest.raises(BundleError, match="does not say how its encoder is built"):
        open_network(bundle, torch.device("cpu"))
