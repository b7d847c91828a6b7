import email.parser
import email.policy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.bodies import ENVELOPE_BYTES, cut, items_to_add, multipart, rows_of, to_json


def add(**given: Any) -> list[dict[str, Any]]:
    nothing = {"images": None, "vectors": None, "ids": None, "metadata": None, "model": None}
    return [json.loads(line) for line in items_to_add(**(nothing | given))]


def test_cut__by_count() -> None:
    parts = cut("abcde", size=len, most=2, most_bytes=10_000)
    assert list(parts) == [["a", "b"], ["c", "d"], ["e"]]


def test_cut__by_bytes_leaving_room_for_the_envelope() -> None:
    parts = cut(["aa", "bb", "c", "d"], size=len, most=9, most_bytes=ENVELOPE_BYTES + 4)
    assert list(parts) == [["aa", "bb"], ["c", "d"]]


def test_cut__what_is_too_large_goes_alone() -> None:
    parts = cut(["a", "bbbbbb", "c"], size=len, most=9, most_bytes=ENVELOPE_BYTES + 4)
    assert list(parts) == [["a"], ["bbbbbb"], ["c"]]


def test_cut__takes_no_more_than_it_needs() -> None:
    taken: list[int] = []

    def values():  # type: ignore[no-untyped-def]
        for value in range(100):
            taken.append(value)
            yield value

    next(cut(values(), size=lambda _: 1, most=3, most_bytes=10_000))
    assert taken == [0, 1, 2, 3]


def test_multipart__a_parser_finds_the_same_parts() -> None:
    media_type, body = multipart([b"\r\n--first", b"\x00second"])
    head = f"Content-Type: {media_type}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    parts = list(message.iter_parts())
    assert [part.get_payload(decode=True) for part in parts] == [b"\r\n--first", b"\x00second"]
    assert [part.get_param("name", header="content-disposition") for part in parts] == [
        "images"
    ] * 2
    assert [part.get_filename() for part in parts] == ["0", "1"]


@pytest.mark.parametrize(
    "vectors", [np.array([[1, 2], [3, 4]], np.float32), [[1.0, 2.0], [3.0, 4.0]], ([1, 2], (3, 4))]
)
def test_rows_of__arrays_and_lists(vectors: Any) -> None:
    assert list(rows_of(vectors)) == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize("vector", [np.array([1, 2], np.float32), [1.0, 2.0], (1, 2)])
def test_rows_of__one_vector(vector: Any) -> None:
    assert list(rows_of(vector)) == [[1.0, 2.0]]


def test_rows_of__float32_values_arrive_as_the_same_float32() -> None:
    row = np.float32([0.1, 1 / 3])
    back = np.float32(json.loads(to_json(next(rows_of(row)))))
    np.testing.assert_array_equal(back, row)


def test_to_json__not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json([math.nan])


def test_items_to_add__pictures_are_named_after_their_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"abc")
    assert add(images=[tmp_path / "a.png", str(tmp_path / "b.png")]) == [
        {"id": "a.png", "image": "YWJj"},
        {"id": "b.png", "image": "YWJj"},
    ]


def test_items_to_add__vectors_with_metadata_and_model() -> None:
    items = add(vectors=[[1, 2], [3, 4]], ids=["ä/b", "c"], metadata=[{"f": 1}, None], model="m1")
    assert items == [
        {"id": "ä/b", "vector": [1.0, 2.0], "model": "m1", "metadata": {"f": 1}},
        {"id": "c", "vector": [3.0, 4.0], "model": "m1"},
    ]


def test_items_to_add__one_of_each() -> None:
    items = add(vectors=[1, 2], ids="x", metadata={"f": 1})
    assert items == [{"id": "x", "vector": [1.0, 2.0], "metadata": {"f": 1}}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of images and vectors"),
        ({"images": [b"x"], "vectors": [[1]], "ids": "a"}, "exactly one of images and vectors"),
        ({"images": [b"x"]}, "item 0 has no id: give ids="),
        ({"images": [b"x", b"y"], "ids": ["a"]}, "item 1 has no id: there are fewer ids"),
        ({"images": [b"x"], "ids": ["a", "b"]}, "more ids than the 1 items"),
        ({"images": [b"x", b"y"], "ids": ["a", "a"]}, "'a' is there twice"),
        ({"images": [b"x", b"y"], "ids": ["a", "b"], "metadata": [{}]}, "1 metadata and more"),
        ({"images": [b"x"], "ids": "a", "metadata": [{}, {}]}, "more metadata than the 1 items"),
        ({"images": [b"x"], "ids": "a", "model": "m"}, "which model made the vectors"),
    ],
)
def test_items_to_add__what_does_not_fit_is_said(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add(**given)


def test_items_to_add__an_id_that_is_no_string() -> None:
    with pytest.raises(TypeError, match="ids are strings, got 3"):
        add(vectors=[[1]], ids=[3])
