"""What the structure of a picture file says before anything of it is decoded.

In: the bytes of a JPEG, PNG or WebP file. Out: a reason to refuse it, or None. Nothing is inflated
or decoded here, and what is looked at is bounded, so that the look is cheap whatever the file
says: files that are small and take long, and damage that Pillow does not see.
"""

import re
import struct
import zlib

import numpy as np

# A progressive JPEG has about 10 scans; each one more walks over all coefficients again: 94 kB
# with a thousand scans take ten seconds.
MAX_SCANS = 64
# Of scans x pixels as many as this many times the pixels that are allowed.
MAX_FULL_SCANS = 12
MAX_FRAMES = 1000  # only the first is looked at
# Parts of a file: JPEG segments, PNG chunks, WebP chunks. 50 Mpx in chunks of 8 kB are 18,000.
MAX_PARTS = 65_536

_SCAN_MARKER = int.from_bytes(b"\xff\xda", "little")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
# A marker that is neither a stuffed 0xFF, nor a restart inside of a scan, nor a fill byte.
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
_STANDALONE = (0x01, 0xD8)  # markers without a length


def refusal(content: bytes, kind: str, *, pixels: int, max_pixels: int) -> str | None:
    """Why a file should not be decoded, or None.

    Args:
        content: the whole file.
        kind: Pillow's name of its format; others than JPEG, PNG and WEBP are not looked at.
        pixels: width x height as the header says.
        max_pixels: how many are allowed.
    """
    if kind in ("JPEG", "MPO"):
        return _jpeg_refusal(content, pixels, max_pixels)
    if kind == "PNG":
        return _png_refusal(content)
    if kind == "WEBP":
        return _webp_refusal(content)
    return None


def _jpeg_refusal(content: bytes, pixels: int, max_pixels: int) -> str | None:
    allowed = min(MAX_SCANS, max(1, MAX_FULL_SCANS * max_pixels // max(1, pixels)))
    if _looks_like_scans(content) <= allowed:  # nearly always
        return None
    scans = parts = 0
    marker = _MARKER.search(content, 2)
    while marker is not None and marker[1][0] != _END_OF_IMAGE:
        parts += 1
        if parts > MAX_PARTS:
            return f"the JPEG has more than {MAX_PARTS:,} segments: save it again as a plain file"
        if marker[1][0] == _START_OF_SCAN:
            scans += 1
            if scans > allowed:
                return (
                    f"the JPEG has more than {allowed} scans, too many for its {pixels:,} pixels: "
                    "save it again as a plain (baseline) JPEG"
                )
        place = marker.end()
        if marker[1][0] not in _STANDALONE:
            place += int.from_bytes(content[place : place + 2], "big")
        marker = _MARKER.search(content, place)
    return None


def _looks_like_scans(content: bytes) -> int:
    """How often the marker stands anywhere, in previews too.

    As 16-bit numbers from both alignments: six times as fast as bytes.count, which took a tenth of
    the decoding of a photograph.
    """
    found = 0
    for start in (0, 1):
        if (pairs := (len(content) - start) // 2) > 0:
            numbers = np.frombuffer(content, "<u2", pairs, start)
            found += int(np.count_nonzero(numbers == _SCAN_MARKER))
    return found


def _png_refusal(content: bytes) -> str | None:
    """Checksums of all chunks up to the end chunk; bytes behind that do not matter."""
    view = memoryview(content)
    place, parts, frames = 8, 0, 0
    while len(content) - place >= 12:
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 8 + length
        if end + 4 > len(content):
            return (
                f"the PNG is cut short: its chunk {kind!r} at byte {place:,} announces "
                f"{length:,} bytes, {len(content) - place - 8:,} follow"
            )
        (stored,) = struct.unpack_from(">I", content, end)
        if zlib.crc32(view[place + 4 : end]) != stored:
            return (
                f"the PNG is damaged: the checksum of its chunk {kind!r} at byte {place:,} is "
                "wrong; send it again"
            )
        parts += 1
        frames += kind == b"fcTL"
        if parts > MAX_PARTS:
            return f"the PNG has more than {MAX_PARTS:,} chunks: save it again as a plain file"
        if frames > MAX_FRAMES:
            return _too_many_frames("PNG")
        if kind == b"IEND":
            break
        place = end + 4
    return None


def _webp_refusal(content: bytes) -> str | None:
    place, parts, frames = 12, 0, 0
    while len(content) - place >= 8:
        kind, length = struct.unpack_from("<4sI", content, place)
        parts += 1
        frames += kind == b"ANMF"
        if parts > MAX_PARTS:
            return f"the WebP has more than {MAX_PARTS:,} chunks: save it again as a plain file"
        if frames > MAX_FRAMES:
            return _too_many_frames("WebP")
        place += 8 + length + length % 2
    return None


def _too_many_frames(kind: str) -> str:
    return (
        f"the {kind} has more than {MAX_FRAMES:,} frames; only the first would be embedded: "
        "send that one"
    )
