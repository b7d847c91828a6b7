"""Pictures of items: kept once by their SHA-256 for as long as an item that is there holds them.

In: operations that name pictures by hash, and their contents. Out: the picture of an item, compared
with its hash. Everything happens in the transaction that writes the item.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from service.gallery.protocol import GalleryError, PictureGone, PictureKind
from service.gallery.rows import GalleryRow, Operation, damaged, read_operations
from service.gallery.tables import held, pictures

_IN_ROWS = 500  # parameters of one statement


def digest(content: bytes) -> bytes:
    """The name of a picture."""
    return hashlib.sha256(content).digest()


def hold(
    connection: Connection,
    gallery: GalleryRow,
    appended: Iterable[tuple[int, Operation]],
    contents: Mapping[bytes, bytes],
) -> None:
    """Note which pictures the items just written hold, and keep those that are new.

    A named picture that is not among `contents` is there already.
    """
    rows = [
        {"gallery": gallery.id, "seq": seq, "thumbnail": o.thumbnail, "original": o.original}
        for seq, o in appended
        if o.thumbnail is not None or o.original is not None
    ]
    if not rows:
        return
    connection.execute(sa.insert(held), rows)
    if not contents:
        return
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(
        insert(pictures).on_conflict_do_nothing(index_elements=["sha256"]),
        [{"sha256": sha256, "content": content} for sha256, content in contents.items()],
    )


def release(connection: Connection, gallery: GalleryRow, gone: Sequence[int]) -> None:
    """Let go what the items of these sequence numbers hold; remove what nobody holds any more."""
    for start in range(0, len(gone), _IN_ROWS):
        mine = sa.and_(held.c.gallery == gallery.id, held.c.seq.in_(gone[start : start + _IN_ROWS]))
        rows = connection.execute(sa.select(held.c.thumbnail, held.c.original).where(mine)).all()
        if rows:
            connection.execute(sa.delete(held).where(mine))
            remove_orphans(connection, sorted({s for row in rows for s in row if s is not None}))


def remove_orphans(connection: Connection, hashes: Sequence[bytes] | None = None) -> None:
    """Remove those of these pictures (None: of all) that no item holds."""
    unheld = sa.and_(
        ~sa.exists().where(held.c.thumbnail == pictures.c.sha256),
        ~sa.exists().where(held.c.original == pictures.c.sha256),
    )
    if hashes is None:
        connection.execute(sa.delete(pictures).where(unheld))
        return
    for start in range(0, len(hashes), _IN_ROWS):
        among = pictures.c.sha256.in_(hashes[start : start + _IN_ROWS])
        connection.execute(sa.delete(pictures).where(among, unheld))


def read_picture(
    connection: Connection, gallery: GalleryRow, seq: int, kind: PictureKind
) -> bytes | None:
    """The picture of the item that operation `seq` wrote; None when it came without one.

    Raises:
        PictureGone: it was let go: the item was replaced or deleted, or the table is damaged.
        GalleryError: it is damaged or missing although the item is there.
    """
    found = list(read_operations(connection, gallery, after=seq - 1, limit=1))
    if not found:
        raise damaged(gallery, seq, "it is missing")
    [(_, operation)] = found
    wanted = operation.thumbnail if kind == "thumbnail" else operation.original
    if wanted is None:
        return None
    # As it lies there, whatever the type: text that is none would be an error of the database.
    content = connection.scalar(
        sa.select(sa.cast(pictures.c.content, sa.LargeBinary)).where(pictures.c.sha256 == wanted)
    )
    if isinstance(content, bytes) and digest(content) == wanted:
        return bytes(content)
    where = f"the {kind} of the item that operation {seq} of gallery {gallery.id} wrote"
    cure = "add the image again, or restore the database from a copy"
    mine = sa.and_(held.c.gallery == gallery.id, held.c.seq == seq)
    if content is None and connection.execute(sa.select(held.c.seq).where(mine)).first() is None:
        raise PictureGone(f"{where} is missing; {cure}")
    what = "is missing" if content is None else "does not match its hash"
    raise GalleryError(f"{where} {what}; {cure}")
