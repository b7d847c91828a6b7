"""service.gallery.generations: what was written is read; what is damaged or strange never is."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.gallery.choice import Choice
from service.gallery.faiss_index import FaissSnapshot
from service.gallery.generations import Generations, Origin, remove_others
from service.gallery.segment import Segment

Make = Callable[..., FaissSnapshot]
FLAT = Choice("flat")


def origin(seq: int) -> Origin:
    return Origin(log_id="log", model_id="model", dim=16, seq=seq, operation=seq * 7)


def ours(found: Origin) -> str | None:
    return None if found == origin(found.seq) else "it is of another log"


def newest(generations: Generations, choice: Choice = FLAT) -> FaissSnapshot | None:
    return generations.newest(ours, choose=lambda items: choice)


def names(generations: Generations) -> list[str]:
    return sorted(path.name for path in generations.directory.iterdir())


@pytest.fixture
def generations(tmp_path: Path) -> Generations:
    return Generations(tmp_path / "generations")


@pytest.fixture
def vectors(clustered: Callable[..., NDArray[np.float32]]) -> NDArray[np.float32]:
    return clustered(300)


def assert_same(one: FaissSnapshot, other: FaissSnapshot) -> None:
    rows = one.rows()
    np.testing.assert_array_equal(rows, other.rows())
    np.testing.assert_array_equal(one.vectors(rows), other.vectors(rows))
    np.testing.assert_array_equal(one.seqs(rows), other.seqs(rows))
    assert one.ids(rows).tolist() == other.ids(rows).tolist()
    assert [one.item(r).metadata for r in rows] == [other.item(r).metadata for r in rows]
    assert one.version == other.version
    assert [len(s) for s in one.segments] == [len(s) for s in other.segments]


@pytest.mark.parametrize("choice", [FLAT, Choice("flat-fp16"), Choice("hnsw", 9), Choice("ivf", 9)])
@pytest.mark.parametrize(("cuts", "dead"), [([], []), ([200, 290], [3, 250, 299])])
def test_generation__gives_back_what_was_written(
    tmp_path: Path,
    generations: Generations,
    vectors: NDArray[np.float32],
    snapshot: Make,
    choice: Choice,
    cuts: list[int],
    dead: list[int],
) -> None:
    written = snapshot(
        vectors,
        cuts=cuts,
        dead=dead,
        first=lambda records: Segment.indexed(records, choice, directory=tmp_path),
    )
    generations.write(written, origin(300))
    read = newest(generations, choice)
    assert read is not None
    assert_same(written, read)
    assert (read.segments[0].kind, read.segments[0].effort) == (choice.kind, choice.effort)
    if not choice.vectors_on_disk:  # where they are, those of all segments are read from the file
        assert read.num_bytes == written.num_bytes
    for exact in (True, False):
        one, other = (s.search(vectors[:20], 7, exact=exact) for s in (written, read))
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_array_equal(one.similarities, other.similarities)


def test_generation__of_another_index_is_read_without_it(
    tmp_path: Path, generations: Generations, vectors: NDArray[np.float32], snapshot: Make
) -> None:
    hnsw = Choice("hnsw", 64)
    generations.write(
        snapshot(vectors, first=lambda r: Segment.indexed(r, hnsw, directory=tmp_path)),
        origin(300),
    )
    read = newest(generations)
    assert read is not None
    assert read.segments[0].kind == "flat"


def test_generation__of_an_emptied_gallery_is_read(
    generations: Generations, vectors: NDArray[np.float32], snapshot: Make
) -> None:
    nothing = snapshot(vectors[:2], dead=[0, 1])
    generations.write(nothing, origin(2))
    read = newest(generations)
    assert read is not None
    assert len(read) == 0


def test_generations__keep_the_last_two(
    generations: Generations, vectors: NDArray[np.float32], snapshot: Make
) -> None:
    assert newest(generations) is None
    for count in (10, 100, 200):
        generations.write(snapshot(vectors[:count]), origin(count))
    assert names(generations) == ["gen-000000000100", "gen-000000000200"]
    read = newest(generations)
    assert read is not None
    assert len(read) == 200


def damages() -> dict[str, Callable[[Path], Any]]:
    def flip(name: str, at: int) -> Callable[[Path], Any]:
        def damage(directory: Path) -> None:
            content = bytearray((directory / name).read_bytes())
            content[at] ^= 1
            (directory / name).write_bytes(content)

        return damage

    files = ["facts.json", "ids.json", "metadata.bin", "metadata_ends.i64", "vectors.f32"]
    files += ["seqs.i64", "dead.u8", "index.faiss"]
    found: dict[str, Callable[[Path], Any]] = {}
    for name in files:
        found[f"flip {name}"] = flip(name, 5)
        found[f"no {name}"] = lambda directory, name=name: (directory / name).unlink()
        found[f"torn {name}"] = lambda directory, name=name: (directory / name).write_bytes(
            (directory / name).read_bytes()[:-1]
        )
        found[f"empty {name}"] = lambda directory, name=name: (directory / name).write_bytes(b"")
    found["no manifest"] = lambda directory: (directory / "manifest.json").unlink()
    found["flip manifest"] = lambda directory: (directory / "manifest.json").write_text(
        (directory / "manifest.json").read_text().replace('"sha256": "', '"sha256": "0', 1)
    )
    found["torn manifest"] = lambda directory: (directory / "manifest.json").write_text(
        (directory / "manifest.json").read_text()[:-1]
    )
    found["renamed"] = lambda directory: directory.rename(directory.with_name("gen-000000000400"))
    found["a file"] = lambda directory: (
        directory.rename(directory.with_name("other")),
        directory.write_bytes(b""),
    )
    return found


@pytest.mark.parametrize("damage", damages().values(), ids=damages().keys())
def test_generation__that_is_damaged_gives_way_to_the_one_before_it(
    tmp_path: Path,
    generations: Generations,
    vectors: NDArray[np.float32],
    snapshot: Make,
    damage: Callable[[Path], Any],
) -> None:
    hnsw = Choice("hnsw", 64)
    generations.write(snapshot(vectors[:100]), origin(100))
    newer = snapshot(
        vectors,
        cuts=[250],
        dead=[5, 260],
        first=lambda r: Segment.indexed(r, hnsw, directory=tmp_path),
    )
    generations.write(newer, origin(300))
    damage(generations.directory / "gen-000000000300")
    read = newest(generations, hnsw)
    assert read is not None
    assert (read.version, len(read)) == (100, 100)
    assert names(generations)[0] == "gen-000000000100"  # and nothing that would be looked at again
    assert "gen-000000000300" not in names(generations)


def test_generation__of_another_log_is_removed(
    generations: Generations, vectors: NDArray[np.float32], snapshot: Make
) -> None:
    strange = Origin(log_id="other", model_id="model", dim=16, seq=300, operation=2100)
    generations.write(snapshot(vectors), strange)
    assert newest(generations) is None
    assert names(generations) == []


def test_generation__that_cannot_be_written_leaves_nothing(
    generations: Generations,
    vectors: NDArray[np.float32],
    snapshot: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generations.write(snapshot(vectors[:100]), origin(100))
    written = 0

    def full(descriptor: int, content: memoryview) -> int:
        nonlocal written
        written += 1
        if written > 3:
            raise OSError(28, "No space left on device")
        return real(descriptor, content)

    real = os.write
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        generations.write(snapshot(vectors), origin(300))
    monkeypatch.undo()
    assert names(generations) == ["gen-000000000100"]


def test_remove_others__keeps_the_logs_that_there_are(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "gen-000000000001").mkdir(parents=True)
    remove_others(tmp_path, {"a"})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
