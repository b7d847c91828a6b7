"""service.bodies: what cannot be read is a problem, never an exception of a library."""

import base64
import io

import numpy as np
import pytest

from service.bodies import decode_image_text, parse_npy, query_options, validate
from service.errors import Problem
from service.schemas.neighbours import NeighboursRequest
from trainer.representation.preprocess import ImageRejected


def npy(array: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)  # type: ignore[arg-type]
    return buffer.getvalue()


def test_parse_npy__reads_what_numpy_writes() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(parse_npy(npy(values), "<f4", (None, 3)), values, strict=True)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_parse_npy__reads_every_version_of_the_header(version: tuple[int, int]) -> None:
    buffer, values = io.BytesIO(), np.ones((1, 3), np.float32)
    np.lib.format.write_array(buffer, values, version=version)
    np.testing.assert_array_equal(parse_npy(buffer.getvalue(), "<f4", (None, 3)), values)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "no .npy file"),
        (b"\x93NUMPY", "no .npy file"),
        (b"\x93NUMPY\x09\x00\x04\x00abcd", "no .npy file"),
        (npy(np.ones((2, 4), np.float32)), r"got <f4 \(2, 4\)"),
        (npy(np.ones((2, 3))), r"got <f8 \(2, 3\)"),
        (npy(np.ones(3, np.float32)), r"got <f4 \(3\)"),
        (npy(np.asfortranarray(np.ones((2, 3), np.float32))), "Fortran order"),
        (npy(np.ones((2, 3), ">f4")), "got >f4"),
        (npy(np.asarray([[{}]], object)), "header cannot be read|got"),
        (npy(np.zeros(2, [("a", "<f4")])), "header cannot be read"),
        (npy(np.ones((2, 3), np.float32))[:-1], "announces 24 bytes of values, 23 follow"),
        (npy(np.ones((2, 3), np.float32)) + b"x", "announces 24 bytes of values, 25 follow"),
        (
            npy(np.ones((2, 3), np.float32)).replace(b"(2, 3), }", b"(999999999999, 3)"),
            "cannot be read|announces",
        ),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}", "header cannot be read"),
        (npy(np.ones((2, 3), np.float32)).replace(b"'<f4'", b"__im_"), "header cannot be read"),
    ],
)
def test_parse_npy__refuses_everything_else(body: bytes, reason: str) -> None:
    with pytest.raises(Problem, match=reason) as problem:
        parse_npy(body, "<f4", (None, 3))
    assert problem.value.code == "invalid_request"


@pytest.mark.parametrize(
    "prefix", ["", "data:image/png;base64,", "data:;base64,", "DATA:image/webp;BASE64,"]
)
def test_decode_image_text__reads_data_uris_and_bare_base64(prefix: str) -> None:
    assert decode_image_text(prefix + base64.b64encode(b"picture").decode()) == b"picture"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("http://127.0.0.1/x.png", "http: addresses are not fetched"),
        ("file:///etc/passwd", "file: addresses are not fetched"),
        ("data:text/html;base64,AAAA", "data: addresses"),
        ("a*b", "no base64"),
        ("abcde", "no base64"),
        ("ü", "no base64"),
        ("", "empty"),
        ("data:image/png;base64,", "empty"),
    ],
)
def test_decode_image_text__says_what_it_is_instead(text: str, reason: str) -> None:
    rejected = decode_image_text(text)
    assert isinstance(rejected, ImageRejected)
    assert reason in str(rejected)


def test_query_options__are_what_the_json_body_would_hold() -> None:
    given = {"k": "5", "filter": '{"a":["b",1]}', "include": "metadata,vector", "order": "step"}
    assert query_options(given, ["k", "filter", "include", "order"]) == {
        "k": 5,
        "filter": {"a": ["b", 1]},
        "include": ["metadata", "vector"],
        "order": "step",
    }
    with pytest.raises(Problem, match="unknown query parameter 'q'; known: k"):
        query_options({"q": "1"}, ["k"])


def test_validate__stops_at_the_first_bad_value_of_a_long_list() -> None:
    with pytest.raises(Problem) as problem:
        validate(NeighboursRequest, {"ids": ["a", *[""] * 100_000]})
    assert [error["field"] for error in problem.value.extensions["errors"]] == ["ids.1"]
