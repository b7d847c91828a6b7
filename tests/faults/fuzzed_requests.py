"""Hostile requests from a seed: harmful bodies (fuzzed_bodies.py), paths and queries, HTTP that is
wrong, and bodies as large as may be."""

import random
from collections.abc import Callable, Sequence
from urllib.parse import quote

from tests.faults.fuzzed_bodies import (
    JSON_ROUTES,
    Hostile,
    broken_json,
    lines,
    multipart,
    mutated_json,
    npy,
    picture,
    raw_tensors,
)

MIB = 2**20
ALL_ROUTES = (*JSON_ROUTES, "/items", "/info", "/items/a", "/livez", "/nowhere", "/", "/docs")


def generate(seed: int, count: int) -> list[Hostile]:
    """The same requests for the same seed."""
    chance = random.Random(seed)
    kinds: list[tuple[Callable[[random.Random], Hostile], int]] = [
        (broken_json, 8), (mutated_json, 12), (lines, 6), (multipart, 8), (npy, 6), (picture, 8),
        (query, 6), (wire, 12), (raw_tensors, 4), (large, 1),
    ]  # fmt: skip
    makers = chance.choices([k for k, _ in kinds], [w for _, w in kinds], k=count)
    return [make(chance) for make in makers]


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
