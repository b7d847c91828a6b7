"""Every setting of the service: the only place that reads the environment.

In: environment variables INVPROP_... or keyword arguments (the command line passes them). Out: one
frozen `Settings`; an unknown name or a value out of range is a validation error that names it.
"""

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.machine import usable_cores, usable_memory_bytes
from trainer.representation.preprocess import MAX_PIXELS

ENV_PREFIX = "INVPROP_"
MIB = 2**20
IMAGES_WINDOW_S = 10  # long enough for the largest request of an ordinary rate


class Settings(BaseSettings):
    """What an operator may choose. Sizes in bytes, times in seconds; 0 threads = one per core."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    bundle: Path = Field(description="Directory of the exported bundle; only read.")
    state: Path = Field(
        description="Directory of the gallery's operations log; made if missing, one owner."
    )
    database: SecretStr | None = Field(
        default=None,
        description="`postgresql://USER:PASSWORD@HOST:PORT/NAME` holds the log and the evaluations "
        "in place of files in `state`; several services may share it. Better in the environment: "
        "a command line is seen by others.",
    )
    gallery: SecretStr | None = Field(
        default=None,
        description="`milvus://[USER:PASSWORD@]HOST:PORT/COLLECTION` (`milvus+tls://` with TLS) "
        "holds the gallery in Milvus: for one past one machine. `state` or `database` hold the "
        "evaluations then. Wants `thumbnails = false`.",
    )
    milvus_index: Literal["flat", "hnsw", "gpu_cagra"] = Field(
        default="flat",
        description="How Milvus searches, fixed when the collection is made: `flat` looks at every "
        "item, the others find nearly all of the nearest and serve no groups.",
    )
    milvus_whole_items: int = Field(
        default=50_000,
        ge=0,
        le=10_000_000,
        description="Up to so many items of a gallery in Milvus groupings and maps go through; "
        "then 422.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(
        default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one."
    )

    api_keys_file: Path | None = Field(
        default=None,
        description="File of lines `NAME ROLE sha256:HEX` from `python -m service.keys`; read "
        "again when it changes. Without keys every caller may do everything.",
    )
    api_keys: str | None = Field(
        default=None, description="Such lines, separated by `;`, instead of or beside the file."
    )

    execution_provider: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Where the encoder runs. `auto`: CUDA when it really loads, else the CPU. "
        "`cuda`: not starting is better than running elsewhere.",
    )
    precision: Literal["fp32", "fp16", "int8", "auto"] = Field(
        default="fp32",
        description="Which of the bundle's graphs embeds. `fp16` runs on CUDA, `int8` on the CPU; "
        "`auto` takes those where the bundle carries them, else `fp32`. Any other is an error.",
    )
    inference_threads: int = Field(
        default=0, ge=0, le=256, description="Encoder runs at a time on the CPU, one thread each."
    )
    search_threads: int = Field(
        default=0,
        ge=0,
        le=256,
        description="Searches at a time, one thread each; also parses bodies.",
    )
    exact_items: int = Field(
        default=200_000,
        ge=0,
        description="Up to so many items every search looks at all of them; past it through an "
        "index, unless a request says `exact` or filters.",
    )
    search_memory_bytes: int = Field(
        default=0,
        ge=0,
        description="What the search index may keep in memory, vectors included; 0 = half of the "
        "memory that this process may have.",
    )
    snapshot_every: int = Field(
        default=50_000,
        ge=1,
        description="Changed items between two generations (snapshots of the gallery on disk); "
        "a stop writes one too.",
    )
    max_batch: int = Field(
        default=32, ge=1, le=1024, description="Images in one run of the encoder."
    )
    queue_size: int = Field(
        default=1024,
        ge=1,
        le=1_000_000,
        description="Images accepted and not yet embedded, over all requests; then 429.",
    )
    max_queue_wait_s: float = Field(
        default=2.0,
        gt=0,
        le=3600,
        description="Once images wait: how long those before a further one may take, as measured; "
        "then 429.",
    )
    max_pending: int = Field(
        default=256, ge=1, le=100_000, description="Searches or writes waiting, each; then 429."
    )
    request_timeout_s: float = Field(
        default=30.0, gt=0, le=3600, description="From the start of a request to its answer; 504."
    )

    decoder_processes: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Child processes that decode images; 0 = one per core, at most 4.",
    )
    decode_timeout_s: float = Field(
        default=1.4,
        gt=0,
        le=60,
        description="Wall time for one image; past it the child is killed.",
    )
    decoder_memory_bytes: int = Field(
        default=560 * MIB, ge=256 * MIB, description="Address space of a decoder process."
    )
    max_large_waiting: int = Field(
        default=1,
        ge=1,
        description="Images of other requests that one may wait behind where each takes over "
        "64 MiB to decode; then 429.",
    )
    decoder_lifetime_images: int = Field(
        default=5000, ge=1, description="A decoder process is replaced after so many images."
    )

    max_requests_per_s: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Requests a second of each key, or of each address without keys; 429. 0: any.",
    )
    max_images_per_s: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Images a second of each key or address, over 10 s; 429. 0: any.",
    )
    max_connections: int = Field(
        default=1024,
        ge=1,
        le=100_000,
        description="Connections at a time. One more displaces the one that has been without a "
        "request for longest; 503 where there is none.",
    )
    header_timeout_s: float = Field(
        default=10.0, gt=0, le=600, description="For the head of a request to arrive; 408."
    )
    body_timeout_s: float = Field(
        default=20.0, gt=0, le=3600, description="For the body of a request to arrive; 408."
    )
    max_header_bytes: int = Field(
        default=32_768, ge=1024, description="Size of a request's head; 431."
    )
    max_url_bytes: int = Field(
        default=16_384, ge=256, description="Size of path and query together; 414."
    )
    max_pending_body_bytes: int = Field(
        default=384 * MIB,
        ge=1024,
        description="What the bodies of all requests may take in memory: twice their bytes, and "
        "for JSON what its values become; 429, and 413 for one body alone.",
    )
    max_body_bytes: int = Field(
        default=64 * MIB, ge=1024, description="Size of a request's body; 413."
    )
    max_line_bytes: int = Field(
        default=32 * MIB,
        ge=1024,
        description="Size of one line of an NDJSON body; the line is rejected.",
    )
    max_images: int = Field(
        default=256, ge=1, le=100_000, description="Images in one request; 413."
    )
    max_rows: int = Field(
        default=10_000, ge=1, le=1_000_000, description="Vectors, ids or items in one request; 413."
    )
    max_results: int = Field(
        default=500_000, ge=1, description="Queries x k of one /neighbours request; 422."
    )
    max_image_pixels: int = Field(
        default=MAX_PIXELS, ge=1, description="Width x height of an image, read from its header."
    )
    max_metadata_bytes: int = Field(
        default=16_384, ge=2, description="Metadata of one item, as JSON; the item is rejected."
    )
    max_page: int = Field(
        default=1000, ge=1, le=100_000, description="Items on one page of GET /items."
    )
    max_group_walk: int = Field(
        default=20_000,
        ge=1,
        le=1_000_000,
        description="Walks of one /groups request: anchors x (k + k^2 + ... + k^steps); 422.",
    )
    graph_neighbours: int = Field(
        default=50,
        ge=0,
        le=1000,
        description="Neighbours of each item in the kNN graph that is kept for groups, 12 bytes "
        "each; 0 keeps none, a larger k is searched for.",
    )
    max_grouping_walk: int = Field(
        default=50_000_000,
        ge=1,
        description="Walks of one grouping: items x (k + k^2 + ... + k^steps), 8 bytes each while "
        "it is computed; 422.",
    )
    groupings_pending: int = Field(
        default=8, ge=1, le=1000, description="Groupings queued or running; then 429."
    )
    groupings_kept: int = Field(
        default=10, ge=1, le=1000, description="Finished groupings kept; the oldest go."
    )
    max_map_sample: int = Field(
        default=20_000, ge=1, le=1_000_000, description="Points of one map; 422."
    )
    maps_pending: int = Field(
        default=4, ge=1, le=1000, description="UMAPs waiting or running; then 429."
    )
    map_timeout_s: float = Field(
        default=900.0, gt=0, le=86_400, description="Wall time of one UMAP; then it is killed."
    )
    map_memory_bytes: int = Field(
        default=4096 * MIB, ge=512 * MIB, description="Address space of the process of a UMAP."
    )

    datasets: Path | None = Field(
        default=None,
        description="YAML file of the labelled data sets that may be evaluated on, "
        "`NAME: {kind: ..., root: ...}`; read again when it changes.",
    )
    broker: SecretStr | None = Field(
        default=None,
        description="redis://, rediss://, amqp:// or amqps:// URL through which workers are told "
        "of evaluations; none: files in `state`, for workers on this host. Better in the "
        "environment: a command line is seen by others.",
    )
    worker: Literal["none", "embedded"] = Field(
        default="none",
        description="`embedded`: the service starts a worker for evaluations on this host's CPU, "
        "and ends it. None: start `celery -A service.worker worker -Q cpu` yourself.",
    )
    evaluations_pending: int = Field(
        default=1000, ge=1, le=1_000_000, description="Evaluations queued or running; then 429."
    )
    evaluation_streams: int = Field(
        default=64, ge=1, le=10_000, description="Streams of events at a time; then 429."
    )
    evaluation_lease_s: float = Field(
        default=60.0,
        ge=1,
        le=3600,
        description="A worker that was silent for so long has lost its evaluation to another.",
    )
    evaluation_timeout_s: float = Field(
        default=6 * 3600.0, ge=1, le=30 * 86400, description="Wall time of one evaluation."
    )
    evaluation_memory_bytes: int = Field(
        default=0, ge=0, description="Address space of an evaluation's process; 0: any."
    )
    dataset_timeout_s: float = Field(
        default=600.0,
        gt=0,
        le=86_400,
        description="Wall time for opening one data set to count it; then it is killed.",
    )
    dataset_memory_bytes: int = Field(
        default=4096 * MIB,
        ge=512 * MIB,
        description="Address space of the process that opens a data set.",
    )

    thumbnails: bool = Field(
        default=True,
        description="Keep a WebP of at most 256 pixels with every item that comes as an image.",
    )
    originals: Literal["off", "keep"] = Field(
        default="off",
        description="`keep`: images of items are kept as they were sent, so that another model can "
        "embed the gallery again.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description="Which log lines are written; `info` has one for each request, but for a "
        "/livez or /readyz that is well.",
    )
    idempotency_ttl_s: float = Field(
        default=86_400.0, gt=0, description="How long an Idempotency-Key and its answer are kept."
    )
    follow_interval_s: float = Field(
        default=0.2,
        gt=0,
        le=60,
        description="How often the changes of other services on one `database` are taken over.",
    )
    max_staleness_s: float = Field(
        default=10.0,
        gt=0,
        description="/readyz fails when the gallery was last in step with `database` longer ago.",
    )
    max_catch_up_s: float = Field(
        default=2.0,
        ge=0,
        le=600,
        description="How long a request with `X-Min-Gallery-Version` waits for that version, "
        "within `request_timeout_s`; then 503.",
    )
    drain_delay_s: float = Field(
        default=0.0,
        ge=0,
        le=300,
        description="On SIGTERM: /readyz says 503 for so long before connections are refused.",
    )
    shutdown_timeout_s: int = Field(
        default=25, ge=1, le=600, description="On SIGTERM: time for running requests to end."
    )

    @model_validator(mode="after")
    def _fits_gallery(self) -> Self:
        if self.gallery is None:
            return self
        if self.thumbnails or self.originals != "off":
            raise ValueError(
                "a gallery in Milvus keeps no pictures: set thumbnails = false and originals = "
                f"off with it (they are {self.thumbnails} and {self.originals})"
            )
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_images > self.queue_size:
            raise ValueError(
                f"max_images = {self.max_images} is larger than queue_size = {self.queue_size}: "
                "such a request could never be accepted"
            )
        most = self.max_images_per_s * IMAGES_WINDOW_S
        if 0 < most < self.max_images:
            raise ValueError(
                f"max_images = {self.max_images} is larger than {IMAGES_WINDOW_S} s of "
                f"max_images_per_s = {self.max_images_per_s}: such a request could never be "
                "accepted"
            )
        if 2 * self.max_body_bytes > self.max_pending_body_bytes:
            raise ValueError(
                f"max_pending_body_bytes = {self.max_pending_body_bytes} is smaller than twice "
                f"max_body_bytes = {self.max_body_bytes}: such a body could never be accepted"
            )
        return self

    def database_url(self) -> str | None:
        """The URL with its password; for the database alone."""
        return None if self.database is None else self.database.get_secret_value()

    def broker_url(self) -> str | None:
        """The URL with its password; for the broker alone."""
        return None if self.broker is None else self.broker.get_secret_value()

    def environment(self) -> dict[str, str]:
        """All settings that are not the default as environment variables, secrets included."""
        given = {}
        for name in self.model_fields_set:
            value = getattr(self, name)
            if value is None:
                continue
            text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            given[f"{ENV_PREFIX}{name.upper()}"] = text
        return given

    def resolved_inference_threads(self) -> int:
        """The number behind `inference_threads` on this machine."""
        return self.inference_threads or usable_cores()

    def resolved_search_threads(self) -> int:
        """The number behind `search_threads` on this machine."""
        return self.search_threads or usable_cores()

    def resolved_search_memory_bytes(self) -> int:
        """The number behind `search_memory_bytes` on this machine."""
        return self.search_memory_bytes or usable_memory_bytes() // 2

    def resolved_decoder_processes(self) -> int:
        """The number behind `decoder_processes` on this machine."""
        return self.decoder_processes or min(4, usable_cores())


def from_environment(setting: str) -> str | None:
    """A setting as the environment has it, for programs that serve nothing; None: not at all."""
    assert setting in Settings.model_fields
    return os.environ.get(f"{ENV_PREFIX}{setting.upper()}") or None
