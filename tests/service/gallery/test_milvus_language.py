"""service.gallery.milvus_language: a URL tells no password, an expression holds nothing that a
caller wrote, terms are equal where JSON values are."""

import pytest

from service.gallery.milvus_language import any_of, expression_of, place_of, quoted, term, terms_of
from service.gallery.protocol import GalleryError


@pytest.mark.parametrize(
    ("url", "uri", "name"),
    [
        ("milvus://host/a", "http://host:19530", "milvus://host:19530/a"),
        ("milvus://u:p%40w@host:1/b_1", "http://host:1", "milvus://host:1/b_1"),
        ("milvus+tls://[::1]:2/c", "https://[::1]:2", "milvuss://[::1]:2/c"),
    ],
)
def test_url__says_where_and_its_name_says_no_password(url: str, uri: str, name: str) -> None:
    place = place_of(url)
    assert (place.uri, place.name) == (uri, name.replace("milvuss", "milvus+tls"))
    assert place.password == ("p@w" if "@" in url else "")


@pytest.mark.parametrize(
    "url",
    ["http://h/a", "milvus://h", "milvus://h/", "milvus:///a", "milvus://h/a/b", "milvus://h/a-b",
     "milvus://h:x/a", "milvus://secret:word@h:99999/a", "milvus://h/é", "milvus://h/1a", ""],
)  # fmt: skip
def test_url__that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(GalleryError, match=r"wanted milvus://") as refused:
        place_of(url)
    assert "word" not in str(refused.value)


def test_expressions__hold_nothing_that_a_caller_wrote() -> None:
    wanted = {'"] or 1 == 1 or x in ["': ["\\", 'a"b', True, None, 0.5], "b": [1]}
    made = expression_of(wanted)
    assert set(made) <= set('abcdef0123456789_tr,ins(ms)yl[o"] ')
    assert made.count("array_contains_any") == 2
    assert expression_of({}) == ""
    assert quoted('a"\\\n') == '"a\\"\\\\\\n"'
    assert any_of(["a", 'b"']) == '["a", "b\\""]'
    assert any_of([1, 2]) == "[1, 2]"


def test_terms__are_equal_where_json_values_are() -> None:
    assert term("a", 1) == term("a", 1.0) != term("a", True)
    assert len({term(*pair) for pair in [("a", 1), ("a", "1"), ("a", None), ("b", 1)]}) == 4
    assert term("ab", "c") != term("a", "bc")
    assert terms_of({"a": 1, "l": [1], "d": {}}) == [term("a", 1)]
