"""invprop with a fake service behind it; tests/end_to_end has it as a process of its own."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from client import Client, command_line, output
from client.version import VERSION
from tests.client.fake_answers import ADDED, groups_of_each, lines_in, neighbours_of_each, skip_x

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def connect(url: str, **options: Any) -> Client:
        return Client(
            url,
            clock=fake.time.clock(),
            transport=httpx2.MockTransport(fake),
            concurrency=1,
            **options,
        )

    monkeypatch.setattr(command_line, "Client", connect)
    monkeypatch.setattr(command_line.signal, "signal", lambda *_: None)
    monkeypatch.setenv("INVPROP_URL", "http://fake")
    monkeypatch.delenv("INVPROP_API_KEY", raising=False)

    def call(*words: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = command_line.main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """1.png and 2.png, x.png that is no picture, and other files."""
    for name in ("1", "2", "x"):
        (tmp_path / f"{name}.png").write_text(name)
    return tmp_path


def test_embed__json_lines(fake: Any, run: Run, files: Path) -> None:
    fake.on("POST", "/embed", skip_x)
    code, out, err = run("embed", files / "1.png", files / "2.png")
    assert (code, [json.loads(line) for line in out.splitlines()]) == (
        0,
        [
            {"id": str(files / "1.png"), "vector": [1.0, 0.0]},
            {"id": str(files / "2.png"), "vector": [2.0, 0.0]},
        ],
    )
    assert err == "embedding: 2\n"


def test_embed__what_cannot_be_used_is_named_and_the_rest_done(
    fake: Any, run: Run, files: Path
) -> None:
    fake.on("POST", "/embed", skip_x)
    code, out, err = run("embed", files / "gone.png", files / "x.png", files / "2.png")
    assert (code, len(out.splitlines())) == (1, 1)
    assert f"{files / 'x.png'}: bad\n" in err
    assert f"{files / 'gone.png'}: cannot be read: No such file or directory\n" in err


def test_embed__paths_from_stdin_into_npy(fake: Any, run: Run, files: Path) -> None:
    fake.on("POST", "/embed", skip_x)
    target = files / "out.npy"
    code, out, _ = run("embed", "-", "--npy", target, stdin=f"{files}/2.png\n\n{files}/1.png\n")
    assert (code, out) == (0, "")
    np.testing.assert_array_equal(np.load(target), np.float32([[2, 0], [1, 0]]))
    names = (files / "out.npy.ids.jsonl").read_text().splitlines()
    assert [Path(json.loads(name)["id"]).name for name in names] == ["2.png", "1.png"]


def test_embed__a_folder_into_parquet(fake: Any, run: Run, files: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    fake.on("POST", "/embed", skip_x)
    code, _, _ = run("embed", files, "--parquet", files / "out.parquet")
    table = parquet.read_table(files / "out.parquet").to_pydict()
    assert code == 1  # x.png
    assert table["vector"] == [[1, 0], [2, 0]]
    assert table["id"] == [f"{files}/1.png", f"{files}/2.png"]


@pytest.mark.parametrize("kind", ["--npy", "--parquet"])
def test_embed__a_failure_leaves_no_file(fake: Any, run: Run, files: Path, kind: str) -> None:
    fake.on("POST", "/embed", httpx2.Response(500, json={"code": "internal_error", "detail": "x"}))
    (files / "out").write_text("of yesterday")
    code, _, err = run("embed", files / "1.png", kind, files / "out")
    assert (code, "internal_error" in err) == (1, True)
    assert (files / "out").read_text() == "of yesterday"
    assert {path.name for path in files.iterdir()} == {"1.png", "2.png", "x.png", "out"}


def test_embed__a_full_disk_leaves_no_file(
    fake: Any, run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    fake.on("POST", "/embed", skip_x)
    monkeypatch.setattr(output.os, "fsync", full)
    code, _, err = run("embed", files / "1.png", "--npy", files / "out.npy")
    assert (code, "No space left on device" in err) == (1, True)
    assert {path.suffix for path in files.iterdir()} == {".png"}


def test_npy__many_rows_without_any(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
    with output.rows_file(tmp_path / "many.npy", "npy") as file:
        for n in range(0, 1000, 100):
            file.write([str(i) for i in range(n, n + 100)], rows[n : n + 100], None)
    np.testing.assert_array_equal(np.load(tmp_path / "many.npy"), rows)
    with output.rows_file(tmp_path / "none.npy", "npy"):
        pass
    assert np.load(tmp_path / "none.npy").shape == (0, 0)


def test_add__a_folder_goes_through_the_journal(fake: Any, run: Run, files: Path) -> None:
    fake.on("POST", "/items", httpx2.Response(200, json=ADDED))
    (files / "notes.txt").write_text("x")
    fake.version = lambda: 8
    code, out, err = run("add", files, "--journal", files.parent / "j")
    assert (code, "notes.txt: not called like a picture" in err) == (1, True)
    assert "added 1, updated 1, already there 0, refused 1; gallery version 8" in out
    assert [line["id"] for line in lines_in(fake.asked("/items")[0])] == ["1.png", "2.png", "x.png"]
    code, out, _ = run("add", files, "--journal", files.parent / "j", "--json")
    assert json.loads(out)["already"] == 3


def test_add__files_are_named_as_written(
    fake: Any, run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.on("POST", "/items", httpx2.Response(200, json=ADDED))
    monkeypatch.chdir(files)
    code, out, _ = run("add", "./1.png", "2.png")
    assert (code, out) == (0, "added 1, updated 1, refused 0; gallery version 8\n")
    assert [line["id"] for line in lines_in(fake.asked("/items")[0])] == ["1.png", "2.png"]
    code, _, err = run("add", "1.png", "./1.png")
    assert (code, err) == (2, "invprop add: '1.png' is there twice\n")


def test_add__with_metadata_of_a_file(fake: Any, run: Run, files: Path) -> None:
    fake.on("POST", "/items", httpx2.Response(200, json=ADDED))
    folder = files / "photos"
    folder.mkdir()
    for path in files.glob("*.png"):
        path.rename(folder / path.name)
    labels = files / "labels.csv"
    labels.write_text('\ufeffid,label,note\n1.png,cat,"a, b"\n2.png,dog,\n', encoding="utf-8")
    code, _, err = run("add", folder, "--metadata", labels)
    assert (code, err) == (0, "adding: 3 of 3\n")
    sent = {line["id"]: line.get("metadata") for line in lines_in(fake.asked("/items")[0])}
    assert sent == {
        "1.png": {"label": "cat", "note": "a, b"},
        "2.png": {"label": "dog"},
        "x.png": None,
    }
    rows = files / "rows.jsonl"
    rows.write_text('{"id": "x.png", "metadata": {"n": 1}}\n\n{"id": "y", "metadata": {}}\n')
    code, _, err = run("add", folder / "x.png", "--metadata", rows)
    assert code == 1
    assert f"{rows}: 2 of its 2 ids are of no picture that was given, such as 'x.png'" in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "name,label\nx,1\n", "with `id` among them; got name, label"),
        ("a.csv", "", "got nothing"),
        ("a.csv", "id,a,a\n", "each once"),
        ("a.csv", "id,a\nx,1\nx,2\n", "line 3: 'x' is there twice"),
        ("a.csv", "id,a\nx\n", "line 2: wanted an id and 2 values"),
        ("a.csv", "id,a\nx,1,2\n", "line 2: wanted an id and 2 values"),
        ("a.csv", 'id,a\nx,"1\n', "after line 1: unexpected end of data"),
        ("a.jsonl", '{"id": "x"}\n{"id": 1}\n', 'line 2: wanted {"id": "..."'),
        ("a.jsonl", '{"id": "x", "metadata": [1]}\n', "line 1: wanted"),
        ("a.jsonl", "id\n", "line 1: Expecting value"),
    ],
)
def test_add__metadata_that_cannot_be_read(
    fake: Any, run: Run, files: Path, name: str, content: str, message: str
) -> None:
    path = files / name
    path.write_text(content)
    code, _, err = run("add", files / "1.png", "--metadata", path)
    assert code == 2
    assert f"invprop add: {path}" in err
    assert message in err
    assert not fake.asked("/items")


def test_neighbours__lines_and_json(fake: Any, run: Run, files: Path) -> None:
    fake.on("POST", "/neighbours", neighbours_of_each)
    assert run("neighbours", "--id", "a", "-k", 3, "--filter", "kind=cat", "--filter", "n=3") == (
        0,
        "a\t0.5000\tnear a\n",
        "",
    )
    assert fake.bodies("/neighbours")[0] == {
        "ids": ["a"],
        "k": 3,
        "filter": {"kind": "cat", "n": 3},
    }
    code, out, _ = run("neighbours", files / "1.png", "--json")
    assert (code, json.loads(out)["query"]) == (0, str(files / "1.png"))
    assert run("neighbours")[0] == 2


def test_groups(fake: Any, run: Run) -> None:
    fake.on("POST", "/groups", groups_of_each)
    assert run("groups", "--id", "a", "--order", "hardest")[:2] == (0, "a\t1\t0.5000\tb\ta\n")
    assert fake.bodies("/groups")[0]["order"] == "hardest"


def test_evaluate__waits_and_tells_the_report(fake: Any, run: Run) -> None:
    headline = {
        "result": "embedding, k=5",
        "metric": "top1",
        "value": 0.5,
        "interval": [0.4, 0.6],
        "untrained": 0.25,
        "gain": [0.1, 0.3],
    }
    running = {"stage": "features", "done": 3, "total": 4}
    said = [
        {"id": "e1", "status": "running", "progress": running},
        {"id": "e1", "status": "succeeded", "progress": running, "report": None},
    ]
    whole = said[-1] | {"report": {"headline": headline}}
    fake.on("GET", "/evaluations/e1", httpx2.Response(200, json=whole))
    text = "".join(f"data: {json.dumps(each)}\n\n" for each in said)
    fake.on("POST", "/evaluations", httpx2.Response(202, json={"id": "e1", "status": "queued"}))
    fake.on(
        "GET",
        "/evaluations/e1/events",
        httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, text=text),
    )
    code, out, err = run("evaluate", "knn", "birds", "--set", "k=5")
    assert (code, [line.split() for line in out.splitlines()]) == (
        0,
        [
            ["e1", "succeeded"],
            ["top1", "(embedding,", "k=5)", "0.5000", "0.4000", "..", "0.6000"],
            ["of", "an", "untrained", "encoder", "0.2500"],
            ["gain", "0.1000", "..", "0.3000"],
        ],
    )
    assert err == "evaluation e1\nevaluating: features, 3 of 4\n"
    assert fake.bodies("/evaluations")[0]["settings"] == {"k": 5}
    code, out, _ = run("evaluate", "knn", "birds", "--no-wait", "--json")
    assert (code, json.loads(out)["status"]) == (0, "queued")


def test_export__every_page_with_vectors(fake: Any, run: Run, tmp_path: Path) -> None:
    def page(request: httpx2.Request) -> httpx2.Response:
        first = "cursor" not in request.url.params
        name = "a" if first else "b"
        item = {"id": name, "metadata": {"n": name}}
        if request.url.params.get("include") == "vector":
            item["vector"] = [ord(name), 1.0]
        return httpx2.Response(200, json={"items": [item], "next": "1" if first else None})

    fake.on("GET", "/items", page)
    code, _, _ = run("export", "--npy", tmp_path / "all.npy")
    assert code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "all.npy"), [[97, 1], [98, 1]])
    names = [json.loads(n) for n in (tmp_path / "all.npy.ids.jsonl").read_text().splitlines()]
    assert names == [{"id": "a", "metadata": {"n": "a"}}, {"id": "b", "metadata": {"n": "b"}}]
    code, out, _ = run("export", "--no-vectors")
    assert [json.loads(line) for line in out.splitlines()] == names
    assert len(fake.asked("/items")) == 4  # a page each, and nothing for each item
    assert run("export", "--no-vectors", "--npy", tmp_path / "x")[0] == 2


def test_delete(fake: Any, run: Run) -> None:
    answer = {"model": "m1", "gallery_version": 9, "deleted": 1, "missing": ["b"]}
    fake.on("POST", "/items/delete", httpx2.Response(200, json=answer))
    code, out, err = run("delete", "-", stdin="a\nb\n")
    assert (code, out, err) == (1, "deleted 1; gallery version 9\n", "b: no such item\n")


def test_main__the_url_stands_before_or_after_the_command(fake: Any, run: Run) -> None:
    for words in (["--url", "http://there", "info"], ["info", "--url", "http://there"]):
        assert run(*words)[1].startswith("service    http://there,")
        assert fake.requests[-1].url.host == "there"
    assert run("info")[1].startswith("service    http://fake,")
    assert run("--version")[1] == f"invprop {VERSION}\n"


def test_info__lines_and_json(run: Run) -> None:
    code, out, _ = run("info")
    assert (code, "gallery    5 items, version 7" in out) == (0, True)
    assert json.loads(run("info", "--json")[1])["model"] == "m1"


def test_main__the_key_is_sent(fake: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVPROP_API_KEY", "secret")
    run("info")
    assert fake.requests[-1].headers["authorization"] == "Bearer secret"


def test_main__a_wrong_key_a_wrong_url_and_nobody_there(fake: Any, run: Run) -> None:
    problem = {"code": "unauthenticated", "detail": "no such key"}
    fake.on("GET", "/info", httpx2.Response(401, json=problem))
    assert run("info")[::2] == (1, "invprop info: no such key (401 unauthenticated)\n")
    fake.on("GET", "/info", httpx2.Response(404, json={"code": "not_found", "detail": "?"}))
    code, _, err = run("info")
    assert (code, "is the URL right?" in err) == (1, True)
    assert run("--url", "nonsense", "info")[0] == 2

    def refuse(_: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("Connection refused")

    fake.on("GET", "/info", refuse)
    code, _, err = run("info")
    assert (code, "Connection refused" in err) == (1, True)
    assert "is a service running at http://fake? --url or INVPROP_URL says where" in err


def test_main__arguments_that_are_wrong(run: Run, files: Path) -> None:
    assert run()[0] == run("paint")[0] == 2
    assert run("embed", "http://host/a.png")[::2] == (
        2,
        "invprop embed: 'http://host/a.png' is not fetched, neither by the client nor by the "
        "service: download it and pass its path or its bytes\n",
    )
    code, out, _ = run("--help")
    assert (code, "130  interrupted" in out) == (0, True)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), command_line.Ended(1)])
def test_main__stopped_leaves_no_file(
    fake: Any, run: Run, files: Path, error: BaseException
) -> None:
    def stop(_: httpx2.Request) -> httpx2.Response:
        raise error

    fake.on("POST", "/embed", stop)
    code, _, _ = run("embed", files / "1.png", "--npy", files / "out.npy")
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 129)
    assert {path.suffix for path in files.iterdir()} == {".png"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion__knows_every_command(run: Run, shell: str) -> None:
    code, script, _ = run("completion", shell)
    assert code == 0
    for word in ("neighbours", "export", "parquet", "order"):
        assert word in script


def test_completion__works_in_bash(run: Run) -> None:
    _, script, _ = run("completion", "bash")
    ask = 'COMP_WORDS=(invprop groups --or); COMP_CWORD=2; _invprop; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script + ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--order"]
