"""add_folder(), cut short in every way that a fake service can: both clients."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from client import ConnectionFailed, FolderNotAdded, RefusedFile
from client.journal import Journal, Sent


class Kept:
    """A service's gallery that honours idempotency keys, and loses what it is told to lose."""

    def __init__(self, fake: Any) -> None:
        self.items: dict[str, Any] = {}
        self.received: list[list[str]] = []  # ids of each request that was worked on
        self.replayed = 0
        self.lose_request: set[int] = set()  # counted from 0: never arrives
        self.lose_answer: set[int] = set()  # worked on, the answer does not get back
        self._answers: dict[str, tuple[bytes, dict[str, Any]]] = {}
        self._requests = 0
        fake.on("POST", "/items", self)
        fake.version = lambda: len(self.received)

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        number, self._requests = self._requests, self._requests + 1
        if number in self.lose_request:
            raise httpx2.ConnectError("killed before")
        key = request.headers["idempotency-key"]
        if key in self._answers:
            body, answer = self._answers[key]
            if body != request.content:
                return httpx2.Response(409, json={"code": "idempotency_conflict", "detail": "!"})
            self.replayed += 1
            return httpx2.Response(200, json=answer)
        answer = self._work(request)
        self._answers[key] = request.content, answer
        if number in self.lose_answer:
            raise httpx2.ReadError("killed after")
        return httpx2.Response(200, json=answer)

    def _work(self, request: httpx2.Request) -> dict[str, Any]:
        lines = [json.loads(line) for line in request.content.splitlines()]
        self.received.append([line["id"] for line in lines])
        bad = [line for line in lines if line["image"] == "YmFk"]  # b"bad"
        good = [line for line in lines if line not in bad]
        new = [line for line in good if line["id"] not in self.items]
        self.items |= {line["id"]: line for line in good}
        return {
            "model": "m1",
            "gallery_version": len(self.received),
            "added": len(new),
            "updated": len(good) - len(new),
            "rejected": [
                {"id": line["id"], "reason": "cut", "line": n} for n, line in enumerate(bad, 1)
            ],
        }


@pytest.fixture
def kept(fake: Any) -> Kept:
    fake.limits["max_images"] = 2
    return Kept(fake)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures: four requests of at most two."""
    root = tmp_path / "photos"
    for name in ("a/1.png", "a/2.png", "b/1.jpg", "b/2.jpg", "c.webp", "d.JPEG", "e ü.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


IDS = ["a/1.png", "a/2.png", "b/1.jpg", "b/2.jpg", "c.webp", "d.JPEG", "e ü.png"]


def test_add_folder__ids_are_paths_in_it(kept: Kept, service: Any, folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = service.add_folder(
        folder,
        metadata=lambda item_id: {"kind": item_id[0]} if "/" in item_id else None,
        progress=lambda at, of: seen.append((at, of)),
    )
    assert (done.added, done.updated, done.already, done.refused) == (7, 0, 0, ())
    assert sorted(kept.items) == IDS
    assert kept.items["a/1.png"]["metadata"] == {"kind": "a"}
    assert "metadata" not in kept.items["c.webp"]
    assert sorted(seen) == seen
    assert seen[-1] == (7, 7)
    assert Path(done.journal) == folder.with_name("photos.invprop-journal")


def test_add_folder__again_sends_nothing(kept: Kept, service: Any, folder: Path) -> None:
    service.add_folder(folder)
    requests = len(kept.received)
    again = service.add_folder(folder)
    assert (again.added, again.already, again.gallery_version) == (0, 7, requests)
    assert len(kept.received) == requests


def test_add_folder__again_sends_what_is_new_or_changed(
    kept: Kept, service: Any, folder: Path
) -> None:
    service.add_folder(folder)
    (folder / "c.webp").write_bytes(b"other content")
    (folder / "new.png").write_bytes(b"new")
    again = service.add_folder(folder)
    assert (again.added, again.updated, again.already) == (1, 1, 6)
    assert sorted(kept.received[-1]) == ["c.webp", "new.png"]


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("lost", ["lose_request", "lose_answer"])
def test_add_folder__cut_short_anywhere_ends_complete_and_without_doubles(
    kept: Kept, connect: Callable[..., Any], folder: Path, lost: str, number: int, concurrency: int
) -> None:
    getattr(kept, lost).add(number)
    cut = connect(max_retries=0, concurrency=concurrency)
    with pytest.raises(ConnectionFailed):
        cut.add_folder(folder)
    done = connect(concurrency=concurrency).add_folder(folder)
    assert sorted(kept.items) == IDS
    # Nothing was worked on twice: what had been sent unanswered came again under its key.
    assert sorted(i for ids in kept.received for i in ids) == IDS
    if concurrency == 1:
        assert kept.replayed == (lost == "lose_answer")
    assert done.updated == 0


def test_add_folder__files_that_changed_after_a_lost_answer_are_sent_as_new(
    kept: Kept, connect: Callable[..., Any], folder: Path
) -> None:
    kept.lose_answer.add(0)
    with pytest.raises(ConnectionFailed):
        connect(max_retries=0).add_folder(folder)
    (folder / "c.webp").write_bytes(b"changed since")
    done = connect().add_folder(folder)
    assert (done.added, done.updated) == (5, 2)
    third = connect().add_folder(folder)  # the old part of the journal is not taken up again
    assert (third.added, third.updated, third.already) == (0, 0, 7)


def test_add_folder__other_metadata_after_a_lost_answer(
    kept: Kept, connect: Callable[..., Any], folder: Path
) -> None:
    kept.lose_answer.add(0)
    with pytest.raises(ConnectionFailed):
        connect(max_retries=0).add_folder(folder)
    done = connect().add_folder(folder, metadata=lambda _: {"x": 1})
    assert (done.added, done.updated) == (5, 2)
    assert all(item["metadata"] == {"x": 1} for item in kept.items.values())
    assert connect().add_folder(folder).already == 7


def test_add_folder__metadata_that_changed_are_sent(kept: Kept, service: Any, folder: Path) -> None:
    service.add_folder(folder)  # nothing is said of them
    done = service.add_folder(folder, metadata=lambda item_id: {"a": 1, "b": item_id[0]})
    assert (done.updated, done.already) == (7, 0)
    done = service.add_folder(folder, metadata=lambda item_id: {"b": item_id[0], "a": 1})
    assert (done.updated, done.already) == (0, 7)
    done = service.add_folder(
        folder, metadata=lambda i: {"b": i[0], "a": 1} if i != "c.webp" else {"b": "other"}
    )
    assert (done.updated, done.already) == (1, 6)
    assert kept.items["c.webp"]["metadata"] == {"b": "other"}
    done = service.add_folder(folder)
    assert (done.updated, done.already) == (0, 7)
    assert kept.items["c.webp"]["metadata"] == {"b": "other"}
    done = service.add_folder(folder, metadata=lambda i: {"n": 1} if i == "d.JPEG" else None)
    assert (done.updated, done.already) == (1, 6)  # a file that names some says nothing of others
    assert kept.items["c.webp"]["metadata"] == {"b": "other"}
    done = service.add_folder(folder, metadata=lambda _: {})
    assert done.updated == 7
    assert kept.items["c.webp"]["metadata"] == {}


def test_add_folder__goes_on_with_a_journal_without_digests(
    kept: Kept, service: Any, folder: Path
) -> None:
    done = service.add_folder(folder)
    journal = Path(done.journal)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        if "files" in line:
            line["files"] = [entry[:3] for entry in line["files"]]  # as earlier versions wrote it
    journal.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert service.add_folder(folder).already == 7


def test_add_folder__what_is_no_picture_is_listed(
    fake: Any, kept: Kept, service: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "notes.txt").write_text("x")
    (folder / "b" / "cut.png").write_bytes(b"bad")
    (folder / "secret.png").write_bytes(b"x")
    (folder / "huge.png").write_bytes(b"x" * 9000)
    (folder / "gone.png").symlink_to(folder / "nothing")
    (folder / "e u\u0308.png").write_bytes(b"x")  # "e ü.png" in another spelling
    fake.limits["max_body_bytes"] = 9000
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == "secret.png":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    done = service.add_folder(folder)
    reasons = {file.id: file.reason for file in done.refused}
    assert sorted(reasons) == [
        "b/cut.png",
        "e ü.png",
        "gone.png",
        "huge.png",
        "notes.txt",
        "secret.png",
    ]
    assert reasons["b/cut.png"] == "cut"
    assert reasons["gone.png"] == "cannot be read: No such file or directory"
    assert reasons["secret.png"] == "cannot be read: Permission denied"
    assert "max_body_bytes" in reasons["huge.png"]
    assert "not called like a picture" in reasons["notes.txt"]
    assert "a duplicate" in reasons["e ü.png"]
    assert done.added == 7
    requests = len(kept.received)
    again = service.add_folder(folder)
    assert (again.refused, again.already) == (done.refused, 7)
    assert kept.received[requests:] == [["b/cut.png"]]  # a busy decoder may have refused it


def test_add_folder__a_name_that_is_not_utf8(kept: Kept, service: Any, folder: Path) -> None:
    try:
        (Path(os.fsdecode(bytes(folder) + b"/\xff.png"))).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system has no such names")
    assert service.add_folder(folder).refused == (
        RefusedFile("\\udcff.png", "its name is not UTF-8"),
    )


def test_add_folder__that_is_none(service: Any, tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="nowhere is no folder"):
        service.add_folder(tmp_path / "nowhere")


def test_add_folder__a_journal_of_another_service(
    fake: Any, kept: Kept, connect: Callable[..., Any], folder: Path
) -> None:
    connect("http://user:secret@fake").add_folder(folder)
    journal = folder.with_name("photos.invprop-journal")
    assert "secret" not in journal.read_text()
    fake.on("GET", "/other/info", fake.info)
    with pytest.raises(
        FolderNotAdded, match=r"of the service 'http://fake', this is 'http://fake/"
    ):
        connect("http://fake/other").add_folder(folder)


def test_add_folder__a_gallery_begun_anew(
    fake: Any, kept: Kept, service: Any, folder: Path
) -> None:
    service.add_folder(folder)
    fake.version = lambda: 1
    with pytest.raises(FolderNotAdded, match=r"at version 1, and .* has an answer of version 4"):
        service.add_folder(folder)


def test_add_folder__twice_at_once(kept: Kept, service: Any, folder: Path, tmp_path: Path) -> None:
    with Journal(tmp_path / "j"), pytest.raises(FolderNotAdded, match="is in use"):
        service.add_folder(folder, journal=tmp_path / "j")


def test_journal__a_torn_last_line_is_dropped(kept: Kept, service: Any, folder: Path) -> None:
    service.add_folder(folder)
    journal = folder.with_name("photos.invprop-journal")
    whole = journal.read_bytes()
    ended = [line for line in whole.splitlines(keepends=True) if b'"end"' in line]
    for length in range(1, len(ended[-1])):  # the last answer was being written
        journal.write_bytes(whole[: len(whole) - length])
        with Journal(journal) as book:
            assert len(book.kept.answered) == 6
            assert len(book.kept.begun) == 1
        assert journal.read_bytes() == whole[: len(whole) - len(ended[-1])]


@pytest.mark.parametrize(
    ("text", "line"), [("what\n", 1), ('{"journal": 1}\nnonsense\n', 2), ('{"journal": 9}\n', 1)]
)
def test_journal__that_is_damaged_names_the_line(
    service: Any, folder: Path, text: str, line: int
) -> None:
    journal = folder.with_name("photos.invprop-journal")
    journal.write_text(text)
    with pytest.raises(FolderNotAdded, match=f"line {line}, is damaged or no journal"):
        service.add_folder(folder)
    assert journal.read_text() == text


def test_journal__a_write_that_fails_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    room = [10**6]

    def write(descriptor: int, content: Any) -> int:
        if room[0] <= 0:
            raise OSError(28, "No space left on device")
        taken = real(descriptor, bytes(content)[: room[0]])
        room[0] -= taken
        return taken

    with Journal(tmp_path / "j") as book:
        book.start(model="m1")
        monkeypatch.setattr(os, "write", write)
        room[0] = 20
        with pytest.raises(OSError, match="No space left"):
            book.begin("k1", (Sent("a", 1, 2), Sent("b", 1, 2)))
        room[0] = 10**6
        book.begin("k2", (Sent("c", 1, 2),))
        book.end("k2", version=3, refused={})
    with Journal(tmp_path / "j") as book:
        assert list(book.kept.answered) == ["c"]
        assert (book.kept.begun, book.kept.gallery_version) == ({}, 3)
