"""Damage every block of every file of a state directory and of a bundle, and start on it.

    python tests/faults/flip_state.py --items 5000 --flips-per-block 16 --seed 0

One bit is flipped in each 4 KiB block (more near the starts of blocks, where structures lie), files
are cut, their tails zeroed, exchanged for another state's, removed. Each time the gallery is opened
and asked for everything it knows. Allowed: the damage is named with the file; it is repaired
without a difference; or nothing differs, also after further changes and another start. Prints a
table by file; fails (exit 1) with the first wrong answer.
"""

import argparse
import logging
import random
import re
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog

sys.path.insert(0, str(Path(__file__).parents[2]))

from service.check import check
from service.gallery.database import Database
from service.gallery.logged import LoggedGallery
from service.gallery.protocol import (
    Applied,
    Change,
    Gallery,
    GalleryError,
    Idempotency,
    Item,
    PictureKind,
    StorageError,
)
from tests.service.conftest import DIM, build_bundle, unit_rows
from trainer.representation.artifact import MANIFEST
from trainer.representation.bundle import Bundle, BundleError, open_bundle

BLOCK = 4096
WAIT_S = 60
KEYS = 6  # Idempotency-Keys that the state remembers
NAMED = (GalleryError, BundleError)
REFUSED = "refused"


def do(gallery: Gallery, **change: Any) -> Applied:
    """One change, waited for."""
    return gallery.apply(Change(**change)).result(WAIT_S)


def build_state(state: Path, bundle: Bundle, *, items: int, seed: int) -> None:
    """A state with all that a log can hold: replaced and deleted items, metadata, kept answers."""
    draw = random.Random(seed)
    vectors = unit_rows(items, DIM, seed + 1)
    gallery = LoggedGallery(state, bundle)
    for start in range(0, items, 50):
        written = [
            Item(
                f"item/{n % (items * 3 // 4)}",
                vectors[n],
                {"n": n, "colour": n % 3},
                thumbnail=b"thumbnail %d" % (n // 2) * 20 if n % 4 == 0 else None,
                original=b"original %d" % n if n % 40 == 0 else None,
            )
            for n in range(start, min(items, start + 50))
        ]
        do(gallery, upserts=written)
        do(gallery, deletes=[f"item/{draw.randrange(items)}", "train/0000.png"])
    for n in range(KEYS):
        item = Item(f"keyed/{n}", vectors[n], {"text": "ü" * n})
        do(gallery, upserts=[item], idempotency=Idempotency(f"key {n}", f"digest {n}"))
    gallery.close()


def known(gallery: Gallery) -> dict[str, Any]:
    """Everything that a gallery answers."""
    snapshot = gallery.snapshot()
    rows = snapshot.page(after=0, limit=10**6).rows
    items = [snapshot.item(int(row)) for row in rows]
    queries = unit_rows(6, DIM, 99)
    found = snapshot.search(queries, 10)
    return {
        "version": snapshot.version,
        "items": [(i.id, i.vector.tobytes(), dict(i.metadata)) for i in items],
        "seqs": snapshot.seqs(rows).tolist(),
        "rows": [snapshot.row(i.id) == int(row) for i, row in zip(items, rows, strict=True)],
        "search": [[snapshot.item(int(r)).id for r in row if r >= 0] for row in found.rows],
        "similarities": found.similarities.tobytes(),
        "colour": [snapshot.item(int(r)).id for r in snapshot.matching({"colour": [1]})],
        "pictures": [_picture(gallery, i.id, k) for i in items for k in ("thumbnail", "original")],
        "answers": [
            gallery.recall(Idempotency(f"key {n}", f"digest {n}")) for n in range(KEYS + 1)
        ],
    }


def _picture(gallery: Gallery, item_id: str, kind: PictureKind) -> bytes | str | None:
    """A picture, or REFUSED where it is named as damaged."""
    try:
        return gallery.picture(item_id, kind)
    except (GalleryError, StorageError) as error:
        if not any(word in str(error) for word in (kind, "seq", "malformed")):
            raise
        return REFUSED


def goes_on(state: Path, bundle: Bundle, changes: int) -> int:
    """Make further changes; how many were answered before one was refused."""
    vectors = unit_rows(40, DIM, 7)
    upserts = [Item(f"more/{n}", v, {"n": n}) for n, v in enumerate(vectors)]
    further: list[dict[str, Any]] = [
        {"upserts": upserts},
        {"deletes": ["more/3"], "idempotency": Idempotency("key more", "digest")},
    ]
    gallery = LoggedGallery(state, bundle)
    done = 0
    try:
        for change in further[:changes]:
            do(gallery, **change)
            done += 1
    except StorageError:
        pass
    finally:
        gallery.close()
    return done


class Trials:
    """A healthy state and bundle, and what became of copies that were damaged."""

    def __init__(self, folder: Path, *, items: int, seed: int) -> None:
        self.folder = folder
        self.seen: dict[str, Counter[str]] = {}
        self._bundle = build_bundle(folder / "bundle", images=8, seed=0)
        self._state = folder / "state"
        bundle = open_bundle(self._bundle)
        build_state(self._state, bundle, items=items, seed=seed)
        self.other = folder / "other"  # another state of the same bundle
        build_state(self.other, bundle, items=items, seed=seed + 1)
        self._wanted = self._known(self._state, bundle)
        self._further = [self._wanted]
        for changes in (1, 2):
            shutil.copytree(self._state, folder / f"further-{changes}")
            assert goes_on(folder / f"further-{changes}", bundle, changes) == changes
            self._further.append(self._known(folder / f"further-{changes}", bundle))
        self._healthy = bundle

    def files(self) -> Iterator[tuple[str, bytes]]:
        """(name, content) of every file of the bundle and of the state."""
        for root in (self._bundle, self._state):
            for path in sorted(root.rglob("*")):
                if path.is_file():
                    yield str(path.relative_to(self.folder)), path.read_bytes()

    def damage(self, name: str, content: bytes | None, kind: str) -> str:
        """Put `content` in the place of a file of a copy, start, and judge what happens."""
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self._state, copy / "state")
        if name.startswith("bundle/"):
            shutil.copytree(self._bundle, copy / "bundle")
        target = copy / name
        if content is None:
            target.unlink()
        else:
            target.write_bytes(content)
        outcome = self._judge(copy, name)
        self.seen.setdefault(_group(name), Counter())[f"{kind}: {outcome}"] += 1
        return outcome

    def _judge(self, copy: Path, name: str) -> str:
        bundle = self._healthy
        is_seen = _sees(copy / "state")
        try:
            if (copy / "bundle").exists():
                bundle = open_bundle(copy / "bundle")
            got = self._known(copy / "state", bundle)
        except NAMED as error:
            # The log is one thing to its reader, with the journal that belongs to it; so is the
            # bundle's manifest with the files that it names.
            named = str(copy / name).removesuffix("-journal").removesuffix(MANIFEST)
            if named not in str(error):
                raise AssertionError(f"the damage of {name} is not named: {error}") from error
            return "named"
        _compare(got, self._wanted)
        if is_seen and "/generations/" in name:
            return "made anew"
        if ".sqlite3" not in name:
            return "harmless"
        done = goes_on(copy / "state", bundle, 2)
        _compare(self._known(copy / "state", bundle), self._further[done])
        if done < 2:
            assert is_seen, "changes are refused, and nothing is wrong for service.check"
            return "refuses changes, seen by service.check"
        if REFUSED in got["pictures"]:
            assert is_seen, "a picture is refused, and nothing is wrong for service.check"
            return "named when the picture is asked for"
        return "harmless, seen by service.check" if is_seen else "harmless"

    @staticmethod
    def _known(state: Path, bundle: Bundle) -> dict[str, Any]:
        gallery = LoggedGallery(state, bundle)
        try:
            return known(gallery)
        finally:
            gallery.close()

    def table(self) -> str:
        """Outcomes by file."""
        lines = ["| file | damage and outcome |", "|---|---|"]
        for name, counts in sorted(self.seen.items()):
            told = ", ".join(f"{what} {n}" for what, n in sorted(counts.items()))
            lines.append(f"| `{name}` | {told} |")
        return "\n".join(lines)


def places(content: bytes, per_block: int, draw: random.Random) -> Iterator[int]:
    """Bytes to flip: of each block some at random, and its first ones where structures lie."""
    for start in range(0, len(content), BLOCK):
        end = min(len(content), start + BLOCK)
        head = range(start, min(end, start + (100 if start == 0 else 12)))
        chosen = {draw.randrange(start, end) for _ in range(per_block)}
        yield from sorted(
            chosen | set(draw.sample(head, min(len(head), per_block if start else 5 * per_block)))
        )


def flip_all(trials: Trials, *, per_block: int, draw: random.Random) -> None:
    """One bit in each block of each file."""
    for name, content in trials.files():
        for place in places(content, per_block, draw):
            changed = bytearray(content)
            changed[place] ^= 1 << draw.randrange(8)
            trials.damage(name, bytes(changed), "flips")


def cut_all(trials: Trials, *, lengths: int, draw: random.Random) -> None:
    """Files cut at many lengths, and with tails of zeros."""
    for name, content in trials.files():
        if not content:
            continue
        borders = {0, 1, len(content) - 1, len(content) // BLOCK // 2 * BLOCK}
        chosen = borders | {draw.randrange(len(content)) for _ in range(lengths)}
        for length in sorted(chosen):
            trials.damage(name, content[:length], "cuts")
            zeroed = content[:length] + bytes(len(content) - length)
            if zeroed != content:
                trials.damage(name, zeroed, "zeroed tails")


def remove_all(trials: Trials) -> None:
    """Files that are gone."""
    for name, _ in trials.files():
        trials.damage(name, None, "removals")


def put_foreign_journal(trials: Trials) -> None:
    """A rollback journal of another state beside the log: SQLite would play it back."""
    log = next(path for path in trials.other.iterdir() if path.suffix == ".sqlite3")
    connection = sqlite3.connect(log, isolation_level=None)
    connection.execute("PRAGMA cache_size = 1")  # pages are written before the commit
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("UPDATE operations SET id = id || 'x'")
    journal = log.with_name(log.name + "-journal").read_bytes()
    connection.execute("ROLLBACK")
    connection.close()
    assert len(journal) > BLOCK
    trials.damage(f"state/{log.name}-journal", journal, "of another state")


def prove(folder: Path, *, items: int, per_block: int, lengths: int, seed: int) -> Trials:
    """All of it; raises AssertionError with the first damage that is served."""
    draw = random.Random(seed)
    trials = Trials(folder, items=items, seed=seed)
    flip_all(trials, per_block=per_block, draw=draw)
    cut_all(trials, lengths=lengths, draw=draw)
    remove_all(trials)
    put_foreign_journal(trials)
    return trials


def _sees(state: Path) -> bool:
    """Whether service.check finds something."""
    try:
        database = Database(state, make=False)
    except GalleryError:
        return True
    try:
        return not check(database).is_sound
    finally:
        database.close()


def _group(name: str) -> str:
    """A file for the table: names that change with the state are left out."""
    return re.sub(r"/[0-9a-f]{32}/gen-\d+/", "/*/", name)


def _compare(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if name == "pictures":
            served = [p if p != REFUSED else w for p, w in zip(got[name], value, strict=True)]
            assert served == value, "served with another picture"
        else:
            assert got[name] == value, f"served with another {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--flips-per-block", type=int, default=8)
    parser.add_argument("--lengths", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    sys.stdout.write(f"seed {options.seed}\n")
    # Where a disk would only slow it down: nothing here is about what reaches one.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        trials = prove(
            Path(folder),
            items=options.items,
            per_block=options.flips_per_block,
            lengths=options.lengths,
            seed=options.seed,
        )
    total = sum(counts.total() for counts in trials.seen.values())
    sys.stdout.write(f"{trials.table()}\n{total} damages, 0 wrong answers; ")
    sys.stdout.write(f"{time.monotonic() - began:.0f} s\n")


if __name__ == "__main__":
    main()
