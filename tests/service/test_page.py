"""The files of the web page: one version for all, and nothing that loads from elsewhere."""

import gzip
import re
from pathlib import Path

import pytest

from service.page import STATIC, read_page


def write(directory: Path, **files: str) -> Path:
    directory.mkdir()
    for name, text in files.items():
        (directory / name.replace("_", ".")).write_text(text)
    return directory


def test_version__changes_with_any_file_and_with_nothing_else(tmp_path: Path) -> None:
    one = read_page(write(tmp_path / "a", index_html="static/@version/app.js", app_js="1"))
    same = read_page(write(tmp_path / "b", index_html="static/@version/app.js", app_js="1"))
    other = read_page(write(tmp_path / "c", index_html="static/@version/app.js", app_js="2"))
    assert one.version == same.version != other.version
    assert one.index.plain == f"static/{one.version}/app.js".encode()
    assert set(one.files) == {"app.js"}


def test_file__is_the_same_compressed(tmp_path: Path) -> None:
    page = read_page(write(tmp_path / "a", index_html="", app_js="const x = 1;" * 50))
    file = page.files["app.js"]
    assert gzip.decompress(file.compressed) == file.plain
    assert len(file.compressed) < len(file.plain)
    assert file.etag_of(True) != file.etag_of(False)


def test_file_of_unknown_kind__is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"notes\.txt: no file of the page"):
        read_page(write(tmp_path / "a", index_html="", notes_txt=""))


def test_page__is_small_and_names_no_other_host() -> None:
    page = read_page()
    sent = len(page.index.compressed) + sum(len(f.compressed) for f in page.files.values())
    assert sent <= 150_000, "bytes of the whole page as they are sent"
    for name, file in {"index.html": page.index, **page.files}.items():
        hosts = set(re.findall(rb"(?:https?:)?//([a-z0-9.-]+\.[a-z]{2,})", file.plain))
        assert hosts <= {b"www.w3.org"}, f"{name} names another host"  # of the SVG namespace


def test_scripts__make_no_markup_from_strings() -> None:
    forbidden = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser"
    )
    for path in STATIC.rglob("*.js"):
        assert not forbidden.search(path.read_text()), path.name
