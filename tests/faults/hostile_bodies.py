"""Hostile requests over real HTTP beside an honest client: seeded, thousands of them.

    python tests/faults/hostile_bodies.py --requests 3000 --seed 1

Asserts: no answer is a 5xx, each comes or the connection is closed within 3 s, the honest client
gets every answer and the right one, and the service with its decoders never takes more than 512 MiB
over what it took before. Prints what was seen; the seed repeats it.
"""

import argparse
import base64
import contextlib
import io
import json
import random
import socket
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.faults.served import Served
from tests.service.conftest import build_bundle, encoded

ANSWER_S = 3.0
SILENT_S = 40.0  # past every deadline of the service: it is not coming
RSS_BYTES = 512 * 2**20
SENDERS = 6
SAMPLE_S = 0.05
MIB = 2**20
UNENDING = ("wire", "large")  # may promise more than they send: half-closed, as if they had crashed

JSON_ROUTES = (
    "/embed", "/neighbours", "/groups", "/items/delete", "/v1/embeddings",
    "/v2/models/encoder/infer",
)  # fmt: skip
ALL_ROUTES = (*JSON_ROUTES, "/items", "/info", "/items/a", "/livez", "/nowhere", "/", "/docs")
PICTURE = encoded(7)
HONEST = "train/0030.png"  # an item that no hostile request names, and so deletes
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


@dataclass
class Seen:
    """What happened."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)  # answered, but later than ANSWER_S
    slowest_s: float = 0.0
    honest: int = 0
    honest_refused: int = 0
    honest_s: list[float] = field(default_factory=list)
    rss_before: int = 0
    rss_most: int = 0


def generate(seed: int, count: int) -> list[Hostile]:
    """The same requests for the same seed."""
    chance = random.Random(seed)
    kinds: list[tuple[Callable[[random.Random], Hostile], int]] = [
        (broken_json, 8), (mutated_json, 12), (lines, 6), (multipart, 8), (npy, 6), (picture, 8),
        (query, 6), (wire, 12), (raw_tensors, 4), (large, 1),
    ]  # fmt: skip
    makers = chance.choices([k for k, _ in kinds], [w for _, w in kinds], k=count)
    return [make(chance) for make in makers]


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


def query(chance: random.Random) -> Hostile:
    """Paths and queries."""
    value = chance.choice([
        "1e309", "-1", "NaN", "9" * 5000, "{}", "[", '{"a":' * 500, "a" * 20_000, "\x00", "%ff",
        "null",
        '{"a":NaN}', '{"a":[[]]}', '{"a":"\ud7ff"}', "true", "1,2", "metadata,vector,x", "' OR 1=1",
    ])  # fmt: skip
    name = chance.choice(["k", "limit", "cursor", "filter", "include", "output", "order", "x", ""])
    path = chance.choice([*ALL_ROUTES, "/items/" + "%2e%2e%2f" * 5, "/items/%00", "/items/%ff%fe",
                          "/items/" + "x" * 9000, "//items", "/%2e/items"])  # fmt: skip
    method = chance.choice(["GET", "GET", "DELETE", "POST", "HEAD", "OPTIONS"])
    url = f"{path}?{name}={quote(value, safe=chance.choice(['', '{}[]:,']))}"
    extra = chance.choice(["", f"&{name}=1", "&" * 100, "&a=1" * 2000])
    head = f"{method} {url}{extra} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    return Hostile("query", [head.encode("latin-1")])


def wire(chance: random.Random) -> Hostile:
    """What is wrong before HTTP's end of headers, or between head and body."""
    ok = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    chunked = ok + b"Transfer-Encoding: chunked\r\n\r\n"
    pieces: Sequence[bytes] = chance.choice([
        [b"\x16\x03\x01" + bytes(200)], [b"GET / HTTP/3.0\r\n\r\n"], [b"\r\n" * 5000],
        [bytes(5000)],
        [b"GET\r\n\r\n"], [b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n"],
        [ok + b"X: " + b"x" * 100_000 + b"\r\n\r\n"], [ok + b"X: y\r\n" * 20_000 + b"\r\n"],
        [ok + b"Content-Length: 100\r\n\r\n", b"short"],
        [ok + b"Content-Length: 3\r\n\r\n", b"much longer than it said" * 100],
        [ok + b"Content-Length: -5\r\n\r\n"], [ok + b"Content-Length: 1e3\r\n\r\n"],
        [ok + b"Content-Length: 18446744073709551616\r\n\r\n"],
        [ok + b"Content-Length: 999999999999\r\n\r\n", b"x"],
        [ok + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n", b"abcd"],
        [ok + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", b"0\r\n\r\n"],
        [chunked, b"zz\r\n"], [chunked, b"5\r\nabc"],
        [chunked, b"ffffffffffffffff\r\n" + bytes(999)],
        [chunked, b"1\r\na\r\n" * 20_000, b"0\r\n\r\n"],
        [chunked, b"1;" + b"x" * 100_000 + b"\r\n"],
        [chunked, b"0\r\n" + b"T: x\r\n" * 20_000 + b"\r\n"],
        [ok + b"Transfer-Encoding: x\r\n\r\n"],
        [ok + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"],
        [ok + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n", b"abc"],
        [ok + b"Expect: x\r\nContent-Length: 3\r\n\r\n", b"abc"],
        [ok + b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n"],
        [ok + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n"],
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], [b"CONNECT x:1 HTTP/1.1\r\n\r\n"],
        [b"GET http://x/livez HTTP/1.1\r\n\r\n"], [b"GET /livez HTTP/1.1\r\n\r\n" * 500],
        [b"OPTIONS * HTTP/1.1\r\n\r\n"], [b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n"],
        [b"GET /livez HTTP/1.0\r\n\r\n"], [b"GET /items/\xff\xfe HTTP/1.1\r\n\r\n"],
        [b"GET /info HTTP/1.1\r\nHost: \x00\r\n\r\n"], [b"GET /info HTTP/1.1\r\n : x\r\n\r\n"],
        [ok + b"X-Request-Id: " + b'"}\t{' * 50 + b"\r\nContent-Length: 0\r\n\r\n"],
        [ok.replace(b"image/png", b"\xff" * 50) + b"Content-Length: 1\r\n\r\nx"],
    ])  # fmt: skip
    return Hostile("wire", pieces)


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


def large(chance: random.Random) -> Hostile:
    """As much as a body may have, and more."""
    route = chance.choice(JSON_ROUTES)
    unit = chance.choice([b"{},", b"[],", b"0.1,", b'"ab",', b"x", b"[", b'{"a":{}},'])
    size = chance.choice([1, 8, 60, 70, 200]) * MIB
    piece = unit * (MIB // len(unit))  # one object, sent again and again
    start = b'{"vectors":['
    length = len(start) + size // MIB * len(piece)
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
    if chance.random() < 0.5:
        head += b"Content-Length: %d\r\n\r\n" % length
        return Hostile("large", [head + start, *[piece] * (size // MIB)])
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    sent = [b"%x\r\n" % len(piece) + piece + b"\r\n"] * (size // MIB)  # and no end
    return Hostile("large", [head + b"%x\r\n%b\r\n" % (len(start), start), *sent])


def send(address: tuple[str, int], hostile: Hostile) -> tuple[str, float]:
    """Send one; gives the status, or `closed`, and the seconds from its last byte."""
    with socket.create_connection(address, timeout=30) as connection:
        with contextlib.suppress(ConnectionError):  # refused while it was still sending
            for piece in hostile.pieces:
                connection.sendall(piece)
            if hostile.kind in UNENDING:
                connection.shutdown(socket.SHUT_WR)
        started = time.perf_counter()
        connection.settimeout(SILENT_S)
        received = b""
        try:
            while b"\r\n" not in received or received.startswith(b"HTTP/1.1 100"):
                piece = connection.recv(65_536)
                if not piece:
                    break
                received += piece
                received = received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        except ConnectionError:
            received = b""
        except TimeoutError:
            return "silent", time.perf_counter() - started
        waited = time.perf_counter() - started
    words = received.split(b" ", 2)
    return (words[1].decode() if len(words) > 1 else "closed"), waited


def run(requests: Sequence[Hostile], folder: Path, **flags: object) -> Seen:
    """Send all of them to a service of its own, beside an honest client."""
    bundle = build_bundle(folder / "bundle")
    service = Served(bundle, folder / "state", log=folder / "log", log_level="warning", **flags)
    seen, done = Seen(), threading.Event()
    try:
        service.start()
        at = urlsplit(service.url)
        assert at.hostname is not None
        assert at.port is not None
        address = (at.hostname, at.port)
        honest_answers(service, seen, 3)
        process = psutil.Process(service.pid)
        seen.rss_before = seen.rss_most = resident(process)
        waiting = list(enumerate(requests))[::-1]

        def sender() -> None:
            while waiting:
                with contextlib.suppress(IndexError):
                    number, hostile = waiting.pop()
                    status, waited_s = send(address, hostile)
                    seen.statuses[status] += 1
                    seen.slowest_s = max(seen.slowest_s, waited_s)
                    head = b"".join(p[:300] for p in hostile.pieces[:3])[:500]
                    said = f"{number} {hostile.kind}: {status} after {waited_s:.1f} s: {head!r}"
                    if status.startswith("5") or status == "silent":
                        seen.wrong.append(said)
                    elif waited_s > ANSWER_S:
                        seen.slow.append(said)

        def sampler() -> None:
            while not done.wait(SAMPLE_S):
                seen.rss_most = max(seen.rss_most, resident(process))

        def honest() -> None:
            while not done.is_set():
                honest_answers(service, seen, 1)

        workers = [threading.Thread(target=sender) for _ in range(SENDERS)]
        beside = [threading.Thread(target=each) for each in (sampler, honest)]
        for thread in (*workers, *beside):
            thread.start()
        for thread in workers:
            thread.join()
        done.set()
        for thread in beside:
            thread.join()
        logged = service.said()
        if "Traceback" in logged or "unexpected_error" in logged:
            seen.wrong.append(f"the log has a defect: {logged[-4000:]}")
        if service.stop() != 0:
            seen.wrong.append(f"it ended with {service.code}")
    finally:
        if not service.ended():
            service.kill()
    return seen


def resident(process: psutil.Process) -> int:
    """Bytes of the service and its decoders."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += each.memory_info().rss
    return total


def honest_answers(service: Served, seen: Seen, times: int) -> None:
    """Ask as a client would, and know the answers; a 429 is obeyed as a client would."""
    connection = service.connect()
    for _ in range(times):
        for path, body, wanted in (
            ("/neighbours", {"ids": [HONEST], "k": 5}, 5),
            ("/embed", {"images": [TEXT]}, 12),
        ):
            started = time.perf_counter()
            answer = connection.ask("POST", path, body)
            seen.honest += 1
            seen.honest_s.append(time.perf_counter() - started)
            if answer.status == 429:
                seen.honest_refused += 1
                time.sleep(float(answer.headers["retry-after"]))
                continue
            document = answer.json()
            rows = document.get("results") or document.get("embeddings")
            if answer.status != 200 or len(rows[0]) != wanted:
                seen.wrong.append(f"honest: {answer.status} {answer.body[:200]!r}")


def check(seen: Seen) -> None:
    """Raise where a promise was broken, but for times: they are the machine's too."""
    assert not seen.wrong, "\n".join(seen.wrong[:40])
    grown = seen.rss_most - seen.rss_before
    assert grown <= RSS_BYTES, f"resident memory grew by {grown / MIB:.0f} MiB"


def report(seen: Seen, seed: int) -> str:
    """What was seen, as text."""
    times = sorted(seen.honest_s)
    return (
        f"seed {seed}: {sum(seen.statuses.values())} requests: "
        f"{dict(sorted(seen.statuses.items()))}; slowest {seen.slowest_s:.2f} s, {len(seen.slow)} "
        f"over {ANSWER_S:g} s; honest "
        f"{seen.honest} ({seen.honest_refused} refused with Retry-After), median "
        f"{times[len(times) // 2] * 1000:.1f} ms, worst {times[-1] * 1000:.0f} ms; resident "
        f"{seen.rss_before / MIB:.0f} MiB before, {seen.rss_most / MIB:.0f} MiB at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--answer-s", type=float, default=ANSWER_S)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = run(generate(given.seed, given.requests), Path(folder))
    sys.stdout.write(report(seen, given.seed) + "\n")
    check(seen)
    assert seen.slowest_s <= given.answer_s, "\n".join(seen.slow[:40])


if __name__ == "__main__":
    main()
