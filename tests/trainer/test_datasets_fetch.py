"""Shards behind a URL: fetched once, whole or not at all. A server on loopback stands for the web.

Run: pytest tests/trainer/test_datasets_fetch.py
"""

import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from trainer.datasets import DataError, open_source
from trainer.datasets.fetch import cache_folder, shown


class _Web(http.server.BaseHTTPRequestHandler):
    """Answers from `files`; `cut` announces more than it sends, `asked` counts."""

    files: dict[str, bytes]
    asked: list[str]

    def do_GET(self) -> None:
        name = self.path.split("?")[0]
        self.asked.append(self.path)
        content = self.files.get(name.replace("/cut/", "/"))
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if "/cut/" in name else content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is written."""


def _shard(name: str) -> bytes:
    picture, shard = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (9, 9), (len(name), 0, 0)).save(picture, "PNG")
    with tarfile.open(fileobj=shard, mode="w") as archive:
        info = tarfile.TarInfo(f"{name}.png")
        info.size = len(picture.getvalue())
        archive.addfile(info, io.BytesIO(picture.getvalue()))
    return shard.getvalue()


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("INVPROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    _Web.files = {f"/set/s-{i:02d}.tar": _shard(f"{i}") for i in (8, 9, 10)}
    _Web.asked = []
    with http.server.HTTPServer(("127.0.0.1", 0), _Web) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_remote__is_fetched_once(web: str, tmp_path: Path) -> None:
    source = open_source(f"{web}/set/s-{{08..10}}.tar?token=secret")
    assert source.ids == ("s-08.tar/8.png", "s-09.tar/9.png", "s-10.tar/10.png")
    assert len(_Web.asked) == 3
    assert _Web.asked[0] == "/set/s-08.tar?token=secret"
    again = open_source(f"{web}/set/s-{{08..10}}.tar?token=another")
    assert again.fingerprint == source.fingerprint
    assert len(_Web.asked) == 3
    kept = sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert kept == ["s-08.tar", "s-09.tar", "s-10.tar"]


def test_remote__of_the_same_name_elsewhere_is_another_file(web: str) -> None:
    _Web.files["/other/s-08.tar"] = _shard("x")
    assert open_source(f"{web}/set/s-08.tar").ids == ("s-08.tar/8.png",)
    assert open_source(f"{web}/other/s-08.tar").ids == ("s-08.tar/x.png",)


def test_remote__that_ends_early_leaves_nothing(web: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s-08\.tar ended after 5,120 of 10,240 bytes: run again"):
        open_source(f"{web}/set/cut/s-08.tar")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_remote__that_is_not_there_keeps_what_came_before(web: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/set/s-11\.tar was answered with 404 Not Found") as told:
        open_source(f"{web}/set/s-{{10..11}}.tar?token=secret")
    assert "secret" not in str(told.value)
    assert [path.name for path in (tmp_path / "cache").rglob("*.tar")] == ["s-10.tar"]


def test_remote__server_that_does_not_answer(web: str) -> None:
    with pytest.raises(DataError, match=r"could not be fetched into .*cache.*INVPROP_CACHE"):
        open_source("http://127.0.0.1:1/s.tar")


def test_remote__cache_that_cannot_be_written(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INVPROP_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="could not be fetched into"):
        open_source(f"{web}/set/s-08.tar")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("set/s.zip", r"s\.zip is no URL of a \.tar"),
        ("set{0..1}/s.tar", "the shards lie in 2 folders"),
    ],
)
def test_remote__of_another_form(web: str, path: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        open_source(f"{web}/{path}")
    assert not _Web.asked


def test_cache_folder__is_named_or_in_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder({"INVPROP_CACHE": "here"}) == Path("here")
    monkeypatch.setenv("HOME", "/nowhere/me")
    assert cache_folder({}) == Path("/nowhere/me/.cache/invprop")


def test_shown__leaves_secrets_out() -> None:
    assert shown("https://me:word@host:8/a/b.tar?key=1#x") == "https://host:8/a/b.tar"
