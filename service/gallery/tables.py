"""The tables of a gallery database, alike in SQLite and PostgreSQL.

Several galleries stand in one database, each the vectors of one model; at most one is active.
"""

import sqlalchemy as sa

SCHEMA = "invprop.database/2"

metadata = sa.MetaData()

schema_table = sa.Table("database", metadata, sa.Column("schema", sa.Text, primary_key=True))

galleries = sa.Table(
    "galleries",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("log_id", sa.Text, nullable=False),
    sa.Column("model_id", sa.Text, nullable=False),
    sa.Column("dim", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False),  # building, active, retired
    sa.Column("last_seq", sa.BigInteger, nullable=False),
    sa.Column("follows", sa.Integer),
    sa.Column("followed_seq", sa.BigInteger, nullable=False),
    sa.Column("crc32", sa.BigInteger, nullable=False),
)
# Whatever goes wrong elsewhere, two galleries are never active.
sa.Index(
    "one_active_gallery",
    galleries.c.state,
    unique=True,
    sqlite_where=galleries.c.state == "active",
    postgresql_where=galleries.c.state == "active",
)

operations = sa.Table(
    "operations",
    metadata,
    sa.Column("gallery", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.Text, nullable=False),  # upsert, delete
    sa.Column("id", sa.Text, nullable=False),
    sa.Column("vector", sa.LargeBinary),  # little-endian float32, NULL for a delete
    sa.Column("metadata", sa.LargeBinary),  # JSON, NULL for a delete
    sa.Column("thumbnail", sa.LargeBinary),  # SHA-256 of the picture, NULL without one
    sa.Column("original", sa.LargeBinary),
    sa.Column("crc32", sa.BigInteger, nullable=False),
)

idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("gallery", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("answer", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),  # seconds since 1970
    sa.Column("crc32", sa.BigInteger, nullable=False),
)

pictures = sa.Table(
    "pictures",
    metadata,
    sa.Column("sha256", sa.LargeBinary, primary_key=True),
    sa.Column("content", sa.LargeBinary, nullable=False),  # an encoded image
)

# Which items that are there now hold which pictures: a picture goes with the last of them.
held = sa.Table(
    "held",
    metadata,
    sa.Column("gallery", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("thumbnail", sa.LargeBinary, index=True),
    sa.Column("original", sa.LargeBinary, index=True),
)
