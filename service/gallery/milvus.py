"""Milvus, as the gallery needs it: two collections, and a few calls whose errors say what to do.

In: a milvus:// URL, rows, expressions. Out: rows; StorageError where Milvus cannot be reached or
refuses. NAME holds the items, NAME_facts what is known about them: whose vectors they are, the
version, who writes, kept answers. All reads are Strong: they see every write that was acknowledged.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException

from service.gallery.milvus_language import MAX_ROWS, TERM_LENGTH, VALUE_BYTES, Index, place_of
from service.gallery.protocol import GalleryUnreachable, StorageError, Vectors

FACTS_SUFFIX = "_facts"
ID_BYTES = 2048  # 512 characters of up to 4 bytes
MAX_TERMS = 4096  # Milvus' bound on an array; 16 KiB of metadata hold 2,730 fields
# One message: Milvus takes 64 MiB, and half of it leaves room for what packing adds.
_BLOCK_BYTES, _BLOCK_ROWS = 32 * 2**20, 2000
_STRONG = "Strong"

GRPC_OPTIONS: Mapping[str, Any] = {
    # Servers with gRPC's own limits end the connection of whoever pings while idle.
    "grpc.keepalive_permit_without_calls": False,
    # A server that is back is found again soon. By default an attempt made while its machine or
    # container is not there may wait for 20 s, and the next one begins up to two minutes later.
    "grpc.initial_reconnect_backoff_ms": 500,
    "grpc.min_reconnect_backoff_ms": 2000,  # for an attempt to connect, too
    "grpc.max_reconnect_backoff_ms": 4000,
}

# Index -> Milvus' type, its build parameters, its search parameters for the k nearest.
_TYPES: Mapping[Index, tuple[str, Mapping[str, Any]]] = {
    "flat": ("FLAT", {}),
    "hnsw": ("HNSW", {"M": 32, "efConstruction": 200}),
    "gpu_cagra": ("GPU_CAGRA", {"intermediate_graph_degree": 64, "graph_degree": 32}),
}
SEAL_S = 600.0  # the index of a large collection is built meanwhile
HNSW_EFFORT = 128  # breadth of a search at least; recall@10 of 0.95 and more is measured with it

# It writes expressions, which hold callers' ids, and whole traces into the log.
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)


class Store:
    """The two collections of one gallery. Used by several threads; `close` it.

    Args:
        url: a milvus:// URL.
        timeout_s: of each call.

    Raises:
        GalleryError: the URL is none.
        GalleryUnreachable: Milvus cannot be reached.
    """

    def __init__(self, url: str, *, timeout_s: float = 10.0) -> None:
        self.place = place_of(url)
        self.items, self.facts = self.place.collection, self.place.collection + FACTS_SUFFIX
        self._timeout_s = timeout_s
        with self._reported("cannot be opened"):
            self._client = MilvusClient(
                uri=self.place.uri,
                user=self.place.user,
                password=self.place.password,
                timeout=timeout_s,
                dedicated=True,  # closed with us, and nobody else's
                grpc_options=dict(GRPC_OPTIONS),
            )
            self.version = f"milvus {self._client.get_server_version()}"

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def has_items(self) -> bool:
        """Whether the items' collection is there."""
        with self._reported("cannot be read"):
            return bool(self._client.has_collection(self.items, timeout=self._timeout_s))

    def make_items(self, dim: int, index: Index, description: str) -> None:
        """Make the items' collection; one that is there stays as it is."""
        schema = MilvusClient.create_schema(enable_dynamic_field=False, description=description)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=ID_BYTES)
        schema.add_field("seq", DataType.INT64)
        schema.add_field("metadata", DataType.JSON)
        schema.add_field(
            "terms",
            DataType.ARRAY,
            element_type=DataType.VARCHAR,
            max_capacity=MAX_TERMS,
            max_length=TERM_LENGTH,
        )
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dim)
        kind, parameters = _TYPES[index]
        # The embedded server has no index over lists: a filter looks at all of them there.
        inverted = ("seq",) if "lite" in self.version else ("seq", "terms")
        self._make(self.items, schema, kind, dict(parameters), inverted=inverted)

    def make_facts(self) -> None:
        """Make the collection of the facts; one that is there stays as it is."""
        schema = MilvusClient.create_schema(enable_dynamic_field=False)
        schema.add_field("name", DataType.VARCHAR, is_primary=True, max_length=128)
        schema.add_field("owner", DataType.VARCHAR, max_length=64)
        schema.add_field("at_ms", DataType.INT64)
        schema.add_field("value", DataType.VARCHAR, max_length=VALUE_BYTES)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)  # no collection is without
        self._make(self.facts, schema, "FLAT", {}, inverted=("owner",))

    def load(self) -> None:
        """Have Milvus ready to search both, also after a restart that has not brought them back."""
        with self._reported("cannot be loaded"):
            for collection in (self.facts, self.items):
                self._client.load_collection(collection, timeout=self._timeout_s)

    def seal(self) -> None:
        """Have Milvus lay the items that were written under their index: until it has, it looks at
        each of them. It does so by itself sooner or later; after many at once, sooner is better."""
        with self._reported("cannot be sealed"):
            self._client.flush(self.items, timeout=SEAL_S)

    def query(
        self, collection: str, expression: str, fields: Sequence[str], *, limit: int = MAX_ROWS
    ) -> list[dict[str, Any]]:
        """At most `limit` rows for which the expression holds, in no order to rely on."""
        with self._reported("cannot be read"):
            rows = self._client.query(
                collection,
                filter=expression,
                output_fields=list(fields),
                limit=limit,
                consistency_level=_STRONG,
                timeout=self._timeout_s,
            )
        return [{name: row[name] for name in fields} for row in rows]

    def count(self, expression: str = "") -> int:
        """Items for which the expression holds; all of them for an empty one."""
        with self._reported("cannot be read"):
            (row,) = self._client.query(
                self.items,
                filter=expression,
                output_fields=["count(*)"],
                consistency_level=_STRONG,
                timeout=self._timeout_s,
            )
        return int(row["count(*)"])

    def search(
        self, queries: Vectors, count: int, expression: str
    ) -> list[list[tuple[int, str, float]]]:
        """(B, D) -> for each the `count` nearest (seq, id, similarity), best first."""
        with self._reported("cannot be searched"):
            found = self._client.search(
                self.items,
                data=[np.ascontiguousarray(query) for query in queries],
                anns_field="vector",
                filter=expression,
                limit=count,
                output_fields=["seq"],
                search_params={"params": {"ef": max(HNSW_EFFORT, 2 * count)}},
                consistency_level=_STRONG,
                timeout=self._timeout_s,
            )
        return [[(h["entity"]["seq"], h["id"], h["distance"]) for h in hits] for hits in found]

    def upsert(self, collection: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows, each in place of one of the same name; in several messages where need be."""
        for block in _blocks(rows):
            with self._writing():
                self._client.upsert(collection, data=block, timeout=self._timeout_s)

    def delete(self, collection: str, expression: str) -> None:
        """Delete the rows for which the expression holds."""
        with self._writing():
            self._client.delete(collection, filter=expression, timeout=self._timeout_s)

    def drop(self) -> None:
        """Drop both collections."""
        with self._reported("cannot be dropped"):
            for collection in (self.items, self.facts):
                self._client.drop_collection(collection, timeout=self._timeout_s)

    def _make(
        self,
        name: str,
        schema: Any,
        kind: str,
        parameters: dict[str, Any],
        *,
        inverted: Sequence[str],
    ) -> None:
        with self._reported("cannot be made"):
            if not self._client.has_collection(name, timeout=self._timeout_s):
                self._client.create_collection(
                    name,
                    schema=schema,
                    consistency_level=_STRONG,
                    timeout=self._timeout_s,
                )
            if not self._client.list_indexes(name, timeout=self._timeout_s):
                # Unit vectors: the inner product is the cosine.
                indexes = self._client.prepare_index_params()
                indexes.add_index("vector", index_type=kind, metric_type="IP", params=parameters)
                for field in inverted:
                    indexes.add_index(field, index_type="INVERTED")
                # Nothing is in it yet: there is nothing to wait for.
                self._client.create_index(name, indexes, sync=False, timeout=self._timeout_s)
            self._client.load_collection(name, timeout=self._timeout_s)

    @contextlib.contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        try:
            yield
        except MilvusException as error:
            raise GalleryUnreachable(f"{self.place.name} {what}: {_cause(error)}") from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except MilvusException as error:
            cause = _cause(error)
            raise StorageError(
                f"{self.place.name}: the change was not stored, or not all of it: {cause}",
                full="quota" in cause or "disk" in cause,
            ) from error


def _cause(error: MilvusException) -> str:
    return " ".join(str(error.message).split())[:500]


def _blocks(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    block: list[Mapping[str, Any]] = []
    size = 0
    for row in rows:
        block.append(row)
        size += row["vector"].nbytes + len(str(row.get("metadata", ""))) + ID_BYTES
        if len(block) == _BLOCK_ROWS or size >= _BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block
