import os
from pathlib import Path
from typing import Any

import httpx2
import pytest

from client.images import each, encode, file_name
from client.paths import files_in, local_path, pictures_in
from tests.client.fake_answers import ADDED, embed_digits, lines_in


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures in two folders, one of them hidden, and files that are none."""
    root = tmp_path / "my photos"
    for name in ("b/2.PNG", "a ü.jpg", "b/1.webp", ".git/x.png", "notes.txt", ".DS_Store"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"7")
    return root


def test_local_path__of_a_file_url(tmp_path: Path) -> None:
    path = tmp_path / "a ü%.png"
    path.write_bytes(b"x")
    assert local_path(path.as_uri()) == path
    assert encode(path.as_uri()) == b"x"
    assert file_name(path.as_uri()) == "a ü%.png"
    assert local_path("file://localhost/a.png") == Path("/a.png")


@pytest.mark.parametrize("url", ["http://host/a.png", "HTTPS://host/a.png", "s3://bucket/a.png"])
def test_local_path__addresses_are_refused_by_name(url: str) -> None:
    with pytest.raises(ValueError, match=f"'{url}' is not fetched, neither by the client nor by"):
        local_path(url)
    with pytest.raises(ValueError, match="is not fetched"):
        list(each([b"1", url]))


def test_local_path__a_file_of_another_machine() -> None:
    with pytest.raises(ValueError, match="another machine, server"):
        local_path("file://server/a.png")


def test_pictures_in__sorted_without_hidden_ones(folder: Path) -> None:
    assert [file.id for file in pictures_in(folder)] == ["a ü.jpg", "b/1.webp", "b/2.PNG"]
    assert "notes.txt" in {file.id for file in files_in(folder)}


def test_pictures_in__a_folder_without_any_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no picture: none of its files ends with \.jpeg"):
        list(pictures_in(tmp_path))


def test_files_in__a_loop_of_links_is_not_walked(folder: Path) -> None:
    (folder / "b" / "back").symlink_to(folder)
    assert len(list(files_in(folder))) == 4


def test_files_in__a_folder_that_cannot_be_listed_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "no", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        list(files_in(folder))


def test_embed__a_folder_is_its_pictures(fake: Any, service: Any, folder: Path) -> None:
    fake.on("POST", "/embed", embed_digits)
    assert service.embed(folder).embeddings.shape == (3, 2)
    assert service.embed([b"1", str(folder)]).embeddings.shape == (4, 2)


def test_add__pictures_of_a_folder_are_named_by_their_path_in_it(
    fake: Any, service: Any, folder: Path
) -> None:
    fake.on("POST", "/items", httpx2.Response(200, json=ADDED))
    service.add(folder)
    ids = [line["id"] for line in lines_in(fake.asked("/items")[0])]
    assert ids == ["a ü.jpg", "b/1.webp", "b/2.PNG"]


def test_add__two_folders_with_one_name_are_refused_by_it(service: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"the id 'a ü\.jpg' is there twice"):
        service.add([folder, folder])
