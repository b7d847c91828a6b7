"""GET /images/{id}: the thumbnail goes in with its item, comes out unchanged, and goes with it."""

import io
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from service.gallery.database import FILE_NAME

Picture = Callable[..., bytes]
NDJSON = {"Content-Type": "application/x-ndjson"}
UNIT = [1.0, *[0.0] * 11]


def add(service: Any, item_id: str, content: bytes) -> None:
    answer = service.client.post("/items", files={"images": (item_id, content)})
    assert answer.status_code == 200, answer.text


def add_vector(service: Any, item_id: str) -> None:
    line = json.dumps({"id": item_id, "vector": UNIT}).encode()
    assert service.client.post("/items", content=line, headers=NDJSON).is_success


def stored(state: Path) -> tuple[int, int]:
    """Pictures in the database, and items that hold some."""
    connection = sqlite3.connect(state / FILE_NAME)
    counts = [
        connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        for table in ("pictures", "held")
    ]
    connection.close()
    return counts[0], counts[1]


def change(state: Path, statement: str) -> None:
    connection = sqlite3.connect(state / FILE_NAME)
    with connection:
        connection.execute(statement)
    connection.close()


def code(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def test_image__is_a_small_webp_that_may_be_kept_and_asked_for_again(
    service: Any, picture: Picture
) -> None:
    add(service, "dir/a b.png", picture(1, size=(600, 300)))
    answer = service.client.get("/images/dir/a%20b.png")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "private, no-cache"
    assert Image.open(io.BytesIO(answer.content)).size == (256, 128)
    etag = answer.headers["etag"]
    for given in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        again = service.client.get("/images/dir/a b.png", headers={"If-None-Match": given})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    other = service.client.get("/images/dir/a b.png", headers={"If-None-Match": '"x"'})
    assert other.content == answer.content
    add(service, "dir/a b.png", picture(2))  # replaced: another picture, another tag
    fresh = service.client.get("/images/dir/a b.png", headers={"If-None-Match": etag})
    assert fresh.status_code == 200
    assert fresh.headers["etag"] != etag


def test_image__of_what_has_none_is_404_and_says_which(service: Any) -> None:
    add_vector(service, "v")
    assert code(service.client.get("/images/v")) == (404, "picture_not_found")
    assert code(service.client.get("/images/train/0001.png")) == (404, "picture_not_found")
    assert code(service.client.get("/images/nothing")) == (404, "item_not_found")
    assert code(service.client.get("/images/")) == (404, "item_not_found")


def test_pictures__are_kept_once_and_go_with_their_last_item(
    start_service: Any, tmp_path: Path, picture: Picture
) -> None:
    for service in start_service(tmp_path, originals="keep"):
        add(service, "a", picture(1))
        add(service, "b", picture(1))
        add(service, "c", picture(2))
        assert stored(tmp_path) == (4, 3)  # two thumbnails, two originals
        service.client.delete("/items/a")
        assert stored(tmp_path) == (4, 2)
        assert service.client.get("/images/b").is_success
        add_vector(service, "b")  # replaced by something without a picture
        assert stored(tmp_path) == (2, 1)
        assert code(service.client.get("/images/b")) == (404, "picture_not_found")
        add(service, "c", picture(2))  # the same again
        assert stored(tmp_path) == (2, 1)
        assert service.client.get("/images/c").is_success
        service.client.post("/items/delete", json={"ids": ["c"]})
        assert stored(tmp_path) == (0, 0)
        files = [("images", (name, picture(n))) for n, name in enumerate(("d", "e"))]
        service.client.post("/items", files=files)
    for service in start_service(tmp_path):  # off again: what is there stays
        assert service.client.get("/images/d").is_success
        assert stored(tmp_path) == (4, 2)


def test_pictures__are_not_kept_where_the_operator_does_not_want_them(
    start_service: Any, tmp_path: Path, picture: Picture
) -> None:
    for service in start_service(tmp_path, thumbnails=False):
        add(service, "a", picture(1))
        assert code(service.client.get("/images/a")) == (404, "picture_not_found")
        assert stored(tmp_path) == (0, 0)


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE pictures SET content = x'00'", "does not match its hash"),
        ("DELETE FROM pictures", "is missing"),
        ("DELETE FROM pictures; DELETE FROM held", "is missing"),
        ("UPDATE operations SET thumbnail = NULL WHERE seq = 41", "seq 41"),
        ("DELETE FROM operations WHERE seq = 41", "seq 41"),
        # What a flipped bit in a record's header does: columns of other types.
        ("UPDATE operations SET id = x'00' WHERE seq = 41", "seq 41"),
        ("UPDATE operations SET metadata = 7 WHERE seq = 41", "seq 41"),
        ("UPDATE pictures SET content = 7", "does not match its hash"),
        # And text that is none: the database's own reading of it fails.
        ("UPDATE operations SET id = CAST(x'ff' AS TEXT) WHERE seq = 41", "seq 41"),
        ("UPDATE pictures SET content = CAST(x'ff' AS TEXT)", "does not match its hash"),
    ],
)
def test_picture__that_is_damaged_is_named_and_never_served(
    service: Any, picture: Picture, statement: str, named: str
) -> None:
    add(service, "a", picture(1))
    for part in statement.split("; "):
        change(service.state, part)
    answer = service.client.get("/images/a")
    assert code(answer) == (500, "picture_damaged")
    assert named in answer.json()["detail"]
    assert service.client.get("/items/a").is_success


def test_missing_picture__is_empty_for_whoever_asks_so(service: Any) -> None:
    add_vector(service, "v")
    answer = service.client.get("/images/v?missing=empty")
    assert (answer.status_code, answer.content) == (204, b"")
    assert service.client.get("/images/v").status_code == 404
    assert service.client.get("/images/nowhere?missing=empty").status_code == 404
    assert service.client.get("/images/v?missing=x").status_code == 422
