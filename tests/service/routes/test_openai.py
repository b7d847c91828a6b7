"""/v1 with the real `openai` package over real HTTP."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from service.keys import make_key
from service.settings import Settings
from tests.service.conftest import serving

KEY, LINE = make_key("laptop", "read")


def uri(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()


@pytest.fixture(scope="module")
def api(bundle_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    settings = Settings(
        bundle=bundle_directory,
        state=tmp_path_factory.mktemp("openai"),
        decoder_processes=1,
        api_keys=LINE,
        max_images=4,
    )
    with (
        serving(settings) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        yield client


def test_openai__embeds_images(api: Any, shared_service: Any, picture: Any) -> None:
    pictures = [picture(n) for n in range(3)]
    answer = api.embeddings.create(
        model="encoder", input=[uri(p) for p in pictures], extra_body={"modality": "image"}
    )
    assert answer.model == shared_service.bundle.model_id
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    wanted = [shared_service.embedding(p) for p in pictures]
    np.testing.assert_allclose([e.embedding for e in answer.data], wanted, atol=1e-5)
    assert answer.usage.total_tokens == 0


def test_openai__gets_the_same_in_both_encodings(api: Any, picture: Any) -> None:
    bare = base64.b64encode(picture(1)).decode()
    model = api.models.list().data[0].id
    floats = api.embeddings.create(model=model, input=bare, encoding_format="float")
    texts = api.embeddings.create(model=model, input=bare, encoding_format="base64")
    raw = base64.b64decode(texts.data[0].embedding)  # asked for by name: given as it came
    np.testing.assert_array_equal(
        np.frombuffer(raw, "<f4"), np.asarray(floats.data[0].embedding, np.float32)
    )


def test_openai__lists_the_one_model(api: Any, shared_service: Any) -> None:
    assert [model.id for model in api.models.list()] == [shared_service.bundle.model_id]
    assert api.models.retrieve("encoder").id == shared_service.bundle.model_id
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        api.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("options", "kind", "code", "message"),
    [
        ({"model": "text-embedding-3-small"}, openai.NotFoundError, "model_not_found", "no model"),
        ({"input": "cats"}, openai.UnprocessableEntityError, "image_rejected", "image 0"),
        ({"input": "https://x/y.png"}, openai.UnprocessableEntityError, "image_rejected",
         "addresses are not fetched"),
        ({"input": []}, openai.UnprocessableEntityError, "invalid_request", "input"),
        ({"input": ["AAAA"] * 5}, openai.APIStatusError, "too_many", "max_images"),
        ({"dimensions": 5}, openai.UnprocessableEntityError, "invalid_request", "gives 12"),
        ({"extra_body": {"modality": "text"}}, openai.UnprocessableEntityError, "invalid_request",
         "modality"),
    ],
)  # fmt: skip
def test_openai__reads_our_errors(
    api: Any, picture: Any, options: Any, kind: Any, code: str, message: str
) -> None:
    with pytest.raises(kind, match=message) as error:
        api.embeddings.create(**{"model": "encoder", "input": uri(picture()), **options})
    assert error.value.code == code
    assert error.value.type == "invalid_request_error"


def test_openai__is_told_about_a_wrong_key(api: Any) -> None:
    with pytest.raises(openai.AuthenticationError, match="API key is not known") as error:
        api.with_options(api_key="wrong").models.list()
    assert (error.value.code, error.value.type) == ("unauthenticated", "authentication_error")


def test_embeddings__takes_json_alone(shared_service: Any) -> None:
    answer = shared_service.client.post("/v1/embeddings", content=b"{}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert answer.headers["content-type"] == "application/problem+json"
