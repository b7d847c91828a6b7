"""Hostile bodies in requests that are in order, drawn at random: good ones with parts replaced,
cut, nested, repeated or lied about."""

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.service.conftest import encoded

JSON_ROUTES = (
    "/embed", "/neighbours", "/groups", "/items/delete", "/v1/embeddings",
    "/v2/models/encoder/infer",
)  # fmt: skip
PICTURE = encoded(7)
TEXT = base64.b64encode(PICTURE).decode()
GOOD: dict[str, Any] = {
    "/embed": {"images": [TEXT]},
    "/neighbours": {"ids": ["train/0001.png"], "k": 3, "filter": {"a": 1}, "include": ["metadata"]},
    "/groups": {"ids": ["train/0001.png"], "k": 3, "steps": 2, "order": "step", "limit": 10},
    "/items/delete": {"ids": ["none"]},
    "/v1/embeddings": {"input": [TEXT], "model": "encoder", "modality": "image"},
    "/v2/models/encoder/infer": {
        "inputs": [
            {"name": "images", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": [0] * 192}
        ]
    },
}


@dataclass(frozen=True)
class Hostile:
    """One request: what it is, and its bytes on the wire in pieces."""

    kind: str
    pieces: Sequence[bytes]


def post(
    path: str, body: bytes, kind: str, content_type: str = "application/json", *headers: str
) -> Hostile:
    """A request whose envelope is in order."""
    head = [
        f"POST {path} HTTP/1.1", "Host: x", f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}", "Connection: close", *headers,
    ]  # fmt: skip
    return Hostile(kind, ["\r\n".join(head).encode("latin-1") + b"\r\n\r\n", body])


def hostile_value(chance: random.Random) -> Any:
    """Something that should not stand there."""
    return chance.choice([
        None, True, -1, 0, 2**31, 2**63, -(2**63), 2**64, 10**9, 1e308, -0.0, 0.5, "", "\x00",
        "a" * 600,
        "\u202e\ud7ff", "../../etc/passwd", "http://127.0.0.1/x", "data:image/png;base64,", "AAAA",
        "%00", [], {}, [[]], [None], {"": {}}, [[0.1] * 12], [["a"]], [1, "a", None],
        [[1e39] * 12], [[0.0] * 12], ["train/0001.png"] * 50, [TEXT[:40]], {"a": [1] * 1001},
        {f"k{n}": n for n in range(40)}, nested(chance.choice([10, 70, 300])), [-1, 8, 8, 3],
        [2**31] * 8, "encoder", "features", "hardest",
    ])  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def mutated_json(chance: random.Random) -> Hostile:
    """A good document with some values replaced, some keys added or gone."""
    path = chance.choice(JSON_ROUTES)
    document = json.loads(json.dumps(GOOD[path]))
    for _ in range(chance.randint(1, 3)):
        where: Any = document
        while True:
            keys = list(where) if isinstance(where, dict) else list(range(len(where)))
            if not keys:
                break
            key = chance.choice(keys)
            inner = where[key]
            if isinstance(inner, dict | list) and inner and chance.random() < 0.6:
                where = inner
                continue
            if isinstance(where, dict) and chance.random() < 0.2:
                key = chance.choice([
                    "vectors", "images", "ids", "k", "filter", "x", "outputs", "parameters", "id"
                ])  # fmt: skip
            where[key] = hostile_value(chance)
            break
    return post(path, json.dumps(document).encode(), "mutated json")


def broken_json(chance: random.Random) -> Hostile:
    """Text that is no JSON, or JSON that no route wants."""
    good = json.dumps(GOOD["/neighbours"]).encode()
    depth = chance.choice([100, 1000, 1025, 100_000, 1_000_000])
    body = chance.choice([
        b"", b" ", b"\x00", b"null", b"[]", b'"x"', b"{", good[:-1], good + b"x", good + good,
        b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth,
        b'{"ids":' + b"[" * depth + b"]" * depth + b"}",
        b'{"vectors":' + b"[" * 900 + b"1" + b"]" * 900 + b"}",
        b'{"k":NaN,"ids":["a"]}', b'{"k":Infinity}', b'{"k":1e999,"ids":["a"]}', b'{"k":0x10}',
        b'{"vectors":[[1e400]]}', b'{"vectors":[[' + b"9" * 5000 + b"]]}",
        b'{"k":' + b"9" * chance.choice([20, 400, 5000, 100_000]) + b"}",
        b'{"ids":["a"],"ids":["b"],"k":1,"k":2}', b"\xff\xfe" + good, b"\xef\xbb\xbf" + good,
        b'{"ids":["\xff"]}', b'{"ids":["\xed\xa0\x80"]}', b'{"ids":["\\ud800"]}',
        b'{"ids":["\\u0000"]}', good.decode().encode("utf-16"), b"[" + b"[]," * 200_000 + b"[]]",
        b'{"ids":[' + b'"",' * 100_000 + b'""]}', b'{"vectors":[' + b"[]," * 50_000 + b"[]]}",
        b'{"vectors":[[' + b"0.1," * 500_000 + b"0.1]]}", b'{"a":1,' * 1000,
        b'{"filter":{' + b",".join(b'"%d":1' % n for n in range(50_000)) + b'},"ids":["a"]}',
    ])  # fmt: skip
    kind = chance.choice(["application/json"] * 8 + ["application/json; charset=utf-16", "text/x"])
    return post(chance.choice(JSON_ROUTES), body, "broken json", kind)


def lines(chance: random.Random) -> Hostile:
    """NDJSON whose lines are good, bad and worse."""
    bad: list[bytes] = [
        b"{", b"[]", b'{"id":""}', b'{"id":1,"vector":[]}', b"\xff", b"null", b" " * 1000,
        b'{"id":"hostile/a","vector":' + b"[" * 500 + b"]" * 500 + b"}",
    ]  # fmt: skip
    for _ in range(chance.randint(1, 6)):
        item = {"id": "hostile/" + "x" * chance.choice([1, 500, 600]), "vector": [0.1] * 12}
        item[chance.choice(["id", "vector", "metadata", "image", "model", "x"])] = hostile_value(
            chance
        )
        bad.append(json.dumps(item).encode())
    deep = b'{"a":' * 400 + b"1" + b"}" * 400
    bad.append(b'{"id":"hostile/d","vector":' + b"[1" + b",1" * 11 + b'],"metadata":' + deep + b"}")
    chosen = chance.choices(bad, k=chance.choice([1, 3, 50, 2000]))
    body = chance.choice([b"\n", b"\r\n"]).join(chosen) + chance.choice([b"", b"\n", b"\n" * 5000])
    key = chance.choice(["", "Idempotency-Key: " + "k" * chance.choice([1, 255, 256, 5000])])
    return post("/items", body, "ndjson", "application/x-ndjson", *([key] if key else []))


def multipart(chance: random.Random) -> Hostile:
    """Forms that are cut, unending, nested or full of parts."""

    def part(name: str, content: bytes, file: str | None = "f.png", extra: str = "") -> bytes:
        named = "" if file is None else f'; filename="{file}"'
        head = f'--b\r\nContent-Disposition: form-data; name="{name}"{named}\r\n{extra}\r\n'
        return head.encode("utf-8", "surrogatepass") + content + b"\r\n"

    end = b"--b--\r\n"
    body = chance.choice([
        b"", end, b"--b", part("images", PICTURE), part("images", PICTURE)[:-30],
        part("images", PICTURE) * 300 + end, part("images", b"") + end,
        part("x", b"1", None) * 10_000 + end, part("images", b"1", None) + end,
        part("metadata", b"[" * 100_000, None) + part("images", PICTURE) + end,
        part("metadata", b"[" + b"{}," * 300_000 + b"{}]", None) + part("images", PICTURE) + end,
        part("metadata", b"x" * 5_000_000, None) + end,
        part("metadata", b'[{"a":' + b'{"a":' * 400 + b"1" + b"}" * 401 + b"]", None)
        + part("images", PICTURE) + end,
        part("images", PICTURE, "\x00") + end, part("images", PICTURE, "x" * 5000) + end,
        part("images", PICTURE, extra="X-Long: " + "x" * 100_000 + "\r\n") + end,
        part("images", PICTURE, extra="X: y\r\n" * 5000) + end,
        part("images", PICTURE, extra="Content-Transfer-Encoding: base64\r\n") + end,
        part("images", b"x" * 3_000_000) + end, b"--b\r\n" * 50_000, b"\r\n" * 100_000,
        part("x" * 100_000, b"1") + end,
    ])  # fmt: skip
    kind = chance.choice([
        "multipart/form-data; boundary=b", "multipart/form-data", "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "b" * 5000, "multipart/mixed; boundary=b",
        'multipart/form-data; boundary="b', "multipart/form-data; boundary=b; charset=utf-7",
    ] if chance.random() < 0.4 else ["multipart/form-data; boundary=b"])  # fmt: skip
    path = chance.choice(["/embed", "/embed?on_error=skip", "/neighbours", "/groups", "/items"])
    return post(path, body, "multipart", kind)


def npy(chance: random.Random) -> Hostile:
    """Arrays of other kinds, with lying headers or cut."""
    array = chance.choice([
        np.zeros((2, 8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((2, 12), np.float32), np.full((1, 12), np.nan, np.float32), np.zeros(0),
        np.full((1, 12), 3e38, np.float32), np.array([[{}]], object), np.zeros((1, 12), ">f4"),
        np.zeros((20_000, 12), np.float32), np.zeros((300, 8, 8, 3), np.uint8),
    ])  # fmt: skip
    buffer = io.BytesIO()
    np.save(buffer, array)
    body = bytearray(buffer.getvalue())
    for _ in range(chance.choice([0, 0, 1, 5])):
        body[chance.randrange(min(128, len(body)))] = chance.randrange(256)
    if chance.random() < 0.3:
        body = body[: chance.randrange(len(body))]
    path = chance.choice(["/embed", "/neighbours?k=2", "/groups", "/neighbours?k=99999999999"])
    return post(path, bytes(body), "npy", "application/x-npy")


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that claims a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def picture(chance: random.Random) -> Hostile:
    """Pictures that are cut, changed, of another format, or larger than they look."""
    formats = [encoded(n, format=f) for n, f in enumerate(("PNG", "JPEG", "WEBP"))]
    body = bytearray(chance.choice([
        *formats, b"x", b"GIF89a" + bytes(100), b"BM" + bytes(100), bytes(1000), b"<svg/>",
        png(60_000, 60_000), png(0, 0), png(2**31 - 1, 1), png(7000, 7000,
        zlib.compress(bytes(10))),
        png(6000, 6000, zlib.compress(bytes(6000 * 751))), b"\xff\xd8" + b"\xff" * 5000,
        formats[1][:60] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * 300,
    ]))  # fmt: skip
    for _ in range(chance.choice([0, 1, 10])):
        body[chance.randrange(len(body))] = chance.randrange(256)
    if chance.random() < 0.3:
        body = body[: chance.randrange(1, len(body) + 1)]
    path = chance.choice(["/embed", "/neighbours", "/groups?k=2", "/embed?output=x", "/items"])
    return post(
        path, bytes(body), "picture", chance.choice(["image/png", "image/jpeg", "image/gif"])
    )


def raw_tensors(chance: random.Random) -> Hostile:
    """The binary tensor extension with sizes that do not add up."""
    size = chance.choice([0, 191, 192, 193, 2**31, -1, "192", None, 1e300])
    tensor = {
        "name": chance.choice(["images", "encoded_images"]),
        "datatype": chance.choice(["UINT8", "BYTES", "FP32", ""]),
        "shape": chance.choice([[1, 8, 8, 3], [1], [], [0], [2**31, 2**31], [256], [1, 1]]),
        "parameters": {"binary_data_size": size},
    }
    head = json.dumps({"inputs": [tensor] * chance.choice([1, 1, 1, 2, 9])}).encode()
    told = chance.choice([len(head), len(head), 0, 1, len(head) + 9, 10**12, -1, "x", "1" * 5000])
    raw = chance.choice([bytes(192), b"\xff" * 192, struct.pack("<I", 188) + bytes(188), b""])
    return post("/v2/models/encoder/infer", head + raw, "raw tensors", "application/octet-stream",
                f"Inference-Header-Content-Length: {told}")  # fmt: skip
