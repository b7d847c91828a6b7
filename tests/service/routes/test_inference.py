"""/v2 with the real `tritonclient[http]` over real HTTP, and what it would never send."""

import base64
import io
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

SIDE, DIM, FEATURES = 8, 12, 16


@pytest.fixture(scope="module")
def api(served: str) -> Iterator[Any]:
    client = triton.InferenceServerClient(served.removeprefix("http://"))
    yield client
    client.close()


def pixels(count: int) -> Any:
    return np.random.default_rng(count).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def tensor(name: str, values: Any, datatype: str, *, binary: bool) -> Any:
    wanted = triton.InferInput(name, list(values.shape), datatype)
    return wanted.set_data_from_numpy(values, binary_data=binary)


def test_triton__finds_server_and_model_ready(api: Any, shared_service: Any) -> None:
    assert api.is_server_live()
    assert api.is_server_ready()
    assert api.is_model_ready("encoder")
    model = shared_service.bundle.model_id
    assert api.is_model_ready("encoder", model)
    assert not api.is_model_ready("other")
    assert not api.is_model_ready("encoder", "1")
    assert api.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = api.get_model_metadata("encoder")
    assert metadata["versions"] == [model]
    assert metadata["inputs"][0] == {
        "name": "images", "datatype": "UINT8", "shape": [-1, SIDE, SIDE, 3],
    }  # fmt: skip
    assert [(o["name"], o["shape"]) for o in metadata["outputs"]] == [
        ("embedding", [-1, DIM]), ("features", [-1, FEATURES]),
    ]  # fmt: skip


@pytest.mark.parametrize("binary", [True, False])
def test_triton__infers_from_prepared_pixels(api: Any, shared_service: Any, binary: bool) -> None:
    given = pixels(3)
    outputs = [
        triton.InferRequestedOutput(name, binary_data=binary) for name in ("features", "embedding")
    ]
    answer = api.infer(
        "encoder",
        [tensor("images", given, "UINT8", binary=binary)],
        outputs=outputs,
        request_id="r1",
        model_version=shared_service.bundle.model_id,
    )
    assert answer.get_response()["id"] == "r1"
    embedding, features = answer.as_numpy("embedding"), answer.as_numpy("features")
    assert (embedding.shape, features.shape) == ((3, DIM), (3, FEATURES))
    wanted = shared_service.client.post(
        "/embed", content=npy(given), headers={"Content-Type": "application/x-npy"}
    ).json()["embeddings"]
    np.testing.assert_allclose(embedding, wanted, atol=1e-6)


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def test_triton__infers_from_encoded_images(api: Any, shared_service: Any, picture: Any) -> None:
    pictures = [picture(n) for n in range(2)]
    for values in (np.array(pictures, object), np.array([[p] for p in pictures], object)):
        answer = api.infer("encoder", [tensor("encoded_images", values, "BYTES", binary=True)])
        wanted = [shared_service.embedding(p) for p in pictures]
        np.testing.assert_allclose(answer.as_numpy("embedding"), wanted, atol=1e-5)
    texts = np.array([base64.b64encode(p) for p in pictures], object)
    answer = api.infer("encoder", [tensor("encoded_images", texts, "BYTES", binary=False)])
    np.testing.assert_allclose(answer.as_numpy("embedding"), wanted, atol=1e-5)


def test_triton__reads_our_errors(api: Any) -> None:
    with pytest.raises(InferenceServerException, match="there is no model 'other'"):
        api.infer("other", [tensor("images", pixels(1), "UINT8", binary=True)])
    with pytest.raises(InferenceServerException, match=r"wanted UINT8 of shape \[n, 8, 8, 3\]"):
        api.infer("encoder", [tensor("images", pixels(1)[:, :4], "UINT8", binary=True)])
    bad = np.array([b"no picture"], object)
    with pytest.raises(InferenceServerException, match="image 0"):
        api.infer("encoder", [tensor("encoded_images", bad, "BYTES", binary=True)])
    many = pixels(257)
    with pytest.raises(InferenceServerException, match="max_images"):
        api.infer("encoder", [tensor("images", many, "UINT8", binary=True)])


def one(**changes: Any) -> dict[str, Any]:
    given = {"name": "images", "datatype": "UINT8", "shape": [1, SIDE, SIDE, 3], "data": [0] * 192}
    return {"inputs": [{**given, **changes}]}


def infer(service: Any, document: Any, raw: bytes = b"", size: str | None = None) -> Any:
    body = json.dumps(document).encode()
    headers = {}
    if size is not None:
        headers["Inference-Header-Content-Length"] = size.format(len(body)).encode("latin-1")
    return service.client.post("/v2/models/encoder/infer", content=body + raw, headers=headers)


def test_infer__takes_nested_data(shared_service: Any) -> None:
    nested = np.zeros((1, SIDE, SIDE, 3), int).tolist()
    answer = infer(shared_service, one(data=nested)).json()
    assert answer["model_name"] == "encoder"
    assert [len(o["data"]) for o in answer["outputs"]] == [DIM, FEATURES]


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": one()["inputs"] * 2}, "wanted exactly one of"),
        (one(name="x"), "wanted exactly one of"),
        (one(datatype="FP32"), "wanted UINT8"),
        (one(shape=[]), "wanted UINT8"),
        (one(shape=[0, SIDE, SIDE, 3]), "wanted UINT8"),
        (one(shape=[-1, SIDE, SIDE, 3]), "shape"),
        (one(shape=[2, SIDE, SIDE, 3]), "wants 384 values, got 192"),
        (one(data=None), "wanted integers 0..255"),
        (one(data=[256] * 192), "wanted integers 0..255"),
        (one(data=[-1] * 192), "wanted integers 0..255"),
        (one(data=[0.5] * 192), "wanted integers 0..255"),
        (one(data=[True] * 192), "wanted integers 0..255"),
        (one(data=["0"] * 192), "wanted integers 0..255"),
        (one(data=[[0], [0, 0]]), "wanted integers 0..255"),
        (one(data={"a": 1}), "wanted integers 0..255"),
        (one(data=[2**70] * 192), "wanted integers 0..255"),
        (one(parameters={"shared_memory_region": "x"}), "shared memory is not served"),
        (one(parameters={"binary_data_size": 192}), "0 bytes follow"),
        (one(parameters={"binary_data_size": "192"}), "binary_data_size is 192"),
        (one(name="encoded_images"), "wanted BYTES"),
        (one(name="encoded_images", datatype="BYTES", shape=[]), "wanted BYTES"),
        (one(name="encoded_images", datatype="BYTES", shape=[1], data=[1]), "wanted base64"),
        (one(name="encoded_images", datatype="BYTES", shape=[2], data=["AA"]), "says 2 images"),
        ({**one(), "outputs": [{"name": "x"}]}, "wanted each of embedding, features"),
        ({**one(), "outputs": [{"name": "features"}] * 2}, "at most once"),
    ],
)
def test_infer__says_what_is_wrong(shared_service: Any, document: Any, reason: str) -> None:
    answer = infer(shared_service, document)
    assert answer.status_code == 422
    assert reason in answer.json()["detail"]
    assert answer.json()["error"] == answer.json()["detail"]


@pytest.mark.parametrize(
    ("size", "raw", "status", "reason"),
    [
        ("100000000000", b"", 422, "at most 65,536"),
        ("65000", b"", 422, "the body has"),
        ("-1", b"", 422, "wanted a number of bytes"),
        ("²", b"", 422, "wanted a number of bytes"),
        ("0", b"", 400, "no JSON"),
        ("{}", b"x" * 191, 422, "191 bytes follow the JSON part"),
        ("{}", b"x" * 193, 422, "193 bytes follow the JSON part"),
    ],
)
def test_infer__checks_the_raw_part(
    shared_service: Any, size: str, raw: bytes, status: int, reason: str
) -> None:
    document = one(parameters={"binary_data_size": 192})
    del document["inputs"][0]["data"]
    answer = infer(shared_service, document, raw, size)
    assert (answer.status_code, reason in answer.json()["detail"]) == (status, True)


@pytest.mark.parametrize(
    "raw", [b"\x05\0\0\0abc", struct.pack("<I", 2**32 - 1), b"\x01\0", b"\x01\0\0\0a" * 2]
)
def test_infer__checks_the_elements(shared_service: Any, raw: bytes) -> None:
    document = one(
        name="encoded_images", datatype="BYTES", shape=[1],
        parameters={"binary_data_size": len(raw)}, data=None,
    )  # fmt: skip
    answer = infer(shared_service, document, raw, "{}")
    assert answer.status_code == 422
    assert "cut short" in answer.text or "the shape says 1 images" in answer.text
