"""service.keys: what lets a caller in, and how keys come and go while the service runs."""

import hashlib
import os
from pathlib import Path

import pytest

from service.keys import ApiKeys, KeysError, main, make_key, parse_keys
from service.policy import Role

KEY, LINE = make_key("laptop", "read")
OTHER_KEY, OTHER_LINE = make_key("robot", "write")


class Clock:
    """A clock that only the test moves."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_make_key__gives_a_line_without_the_key() -> None:
    assert f"laptop read sha256:{hashlib.sha256(KEY.encode()).hexdigest()}" == LINE
    assert KEY.startswith("invprop_")
    assert len(KEY) == 8 + 43  # 32 random bytes in base64
    assert make_key("laptop", "read")[0] != KEY


def test_command__shows_the_key_once_and_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["laptop", "--role", "write"]) == 0
    words = capsys.readouterr().out.split()
    key = next(word for word in words if word.startswith("invprop_"))
    (line,) = parse_keys([" ".join(words[-3:])], "test")
    assert (line.name, line.role) == ("laptop", Role.WRITE)
    assert line.digest == hashlib.sha256(key.encode()).digest()
    assert main(["a b"]) == 1
    assert "the name 'a b': wanted 1..64" in capsys.readouterr().err


def test_identify__knows_the_keys_of_the_environment_and_no_others() -> None:
    keys = ApiKeys(f"{LINE}; {OTHER_LINE}", None)
    found = keys.identify(KEY), keys.identify(OTHER_KEY)
    assert [(k.name, k.role) for k in found if k] == [("laptop", Role.READ), ("robot", Role.WRITE)]
    for wrong in ("", KEY[:-1], KEY + "x", KEY.upper(), LINE, LINE.rpartition(":")[2], "ü"):
        assert keys.identify(wrong) is None
    assert keys.configured
    assert not ApiKeys(None, None).configured


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "wanted 1..1000 keys, got 0"),
        ("# nothing\n\n", "wanted 1..1000 keys, got 0"),
        ("laptop read", "line 1: wanted `NAME ROLE sha256:HEX`"),
        (f"laptop admin {LINE.split()[2]}", "line 1: wanted"),
        (f"lap*top read {LINE.split()[2]}", "line 1: wanted"),
        (f"laptop read {KEY}", "line 1: wanted"),
        (LINE + "0", "line 1: wanted"),
        (f"{LINE}\n{LINE}", "line 2: this name or key stands there twice"),
        (f"{LINE}\nother write {LINE.split()[2]}", "line 2: this name or key"),
        ("\n".join(make_key(f"k{i}", "read")[1] for i in range(1001)), "wanted 1..1000 keys"),
    ],
    ids=range(10),  # the keys are drawn
)
def test_parse_keys__names_the_line_and_never_repeats_it(text: str, reason: str) -> None:
    with pytest.raises(KeysError, match=reason) as error:
        parse_keys(text.splitlines(), "keys")
    assert KEY not in str(error.value)


def test_file__is_read_again_when_it_changes(tmp_path: Path) -> None:
    file, clock = tmp_path / "keys", Clock()
    file.write_text(f"# of the laboratory\n{LINE}\n")
    keys = ApiKeys(None, file, clock=clock)
    assert keys.identify(KEY) is not None
    file.write_text(OTHER_LINE)
    os.utime(file, ns=(1, 1))
    assert keys.identify(KEY) is not None  # looked at once a second
    clock.seconds += 1
    assert keys.identify(KEY) is None
    assert keys.identify(OTHER_KEY) is not None


@pytest.mark.parametrize("content", [None, b"", b"\xff", b"laptop read"])
def test_file__that_cannot_be_read_any_more_lets_nobody_in(
    tmp_path: Path, content: bytes | None
) -> None:
    file, clock = tmp_path / "keys", Clock()
    file.write_text(LINE)
    keys = ApiKeys(OTHER_LINE, file, clock=clock)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    clock.seconds += 1
    for key in (KEY, OTHER_KEY):
        with pytest.raises(KeysError, match=str(file)):
            keys.identify(key)
    file.write_text(LINE)
    clock.seconds += 1
    assert keys.identify(KEY) is not None
    assert keys.failure is None


def test_file__must_be_readable_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="No such file"):
        ApiKeys(None, tmp_path / "none")
