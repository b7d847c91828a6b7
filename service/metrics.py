"""Every Prometheus metric of the service, by name.

In: what the stages, the gallery and the requests report. Out: Prometheus text. No user data:
neither ids nor file names nor vectors are used as labels.
"""

import importlib.metadata

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from service.embedder import Embedder
from service.gallery.protocol import Snapshot

_TIME_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """The Prometheus metrics of one application, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "invprop_requests",
            "Requests answered",
            ["method", "route", "status"],
            registry=registry,
        )
        self.request_duration = Histogram(
            "invprop_request_duration_seconds",
            "From the first byte to the last of the answer",
            ["method", "route"],
            registry=registry,
            buckets=_TIME_BUCKETS,
        )
        self.queue_size = Gauge(
            "invprop_queue_size", "Images accepted and not yet embedded", registry=registry
        )
        self.queue_duration = Histogram(
            "invprop_queue_duration_seconds",
            "Time an image waited for the encoder",
            registry=registry,
            buckets=_TIME_BUCKETS,
        )
        self.queue_oldest = Gauge(
            "invprop_queue_oldest_seconds",
            "How long the image that is next for the encoder has waited",
            registry=registry,
        )
        self.batches = Counter(
            "invprop_batches",
            "Runs of the encoder by why they were let go: full (max_batch), drained (all that "
            "waited), shared (other idle threads took the rest)",
            ["reason"],
            registry=registry,
        )
        self.batch_size = Histogram(
            "invprop_batch_size",
            "Images in one run of the encoder",
            registry=registry,
            buckets=_BATCH_BUCKETS,
        )
        self.decode_duration = Histogram(
            "invprop_decode_duration_seconds",
            "Time to decode one image",
            registry=registry,
            buckets=_TIME_BUCKETS,
        )
        self.decode_queue_duration = Histogram(
            "invprop_decode_queue_duration_seconds",
            "Time an image waited for a decoder process",
            registry=registry,
            buckets=_TIME_BUCKETS,
        )
        self.decode_queue_size = Gauge(
            "invprop_decode_queue_size",
            "Images that wait for a decoder process",
            registry=registry,
        )
        self.inference_duration = Histogram(
            "invprop_inference_duration_seconds",
            "Time of one run of the encoder",
            registry=registry,
            buckets=_TIME_BUCKETS,
        )
        self.search_duration = Histogram(
            "invprop_search_duration_seconds",
            "Time of one request's search, waiting included",
            ["route"],
            registry=registry,
            buckets=_TIME_BUCKETS,
        )
        self.images_rejected = Counter(
            "invprop_images_rejected", "Images that could not be decoded", registry=registry
        )
        self.decoders_replaced = Counter(
            "invprop_decoders_replaced",
            "Decoder processes replaced",
            ["reason"],
            registry=registry,
        )
        self.index_vectors = Gauge(
            "invprop_index_vectors", "Items in the gallery", registry=registry
        )
        self.index_bytes = Gauge(
            "invprop_index_bytes",
            "Memory of the search index: vectors, graph, metadata",
            ["kind"],
            registry=registry,
        )
        self.generation_seq = Gauge(
            "invprop_generation_seq",
            "Sequence number of the last change in the newest generation on disk",
            registry=registry,
        )
        self.log_damaged = Gauge(
            "invprop_log_damaged",
            "1 when the log was found to be damaged: searches go on, changes are refused",
            registry=registry,
        )
        self.gallery_version = Gauge(
            "invprop_gallery_version", "Sequence number of the last change", registry=registry
        )
        self.gallery_staleness = Gauge(
            "invprop_gallery_staleness_seconds",
            "Since the gallery was last seen to hold every change of its log",
            registry=registry,
        )
        self.gallery_lag = Gauge(
            "invprop_gallery_lag_operations",
            "Changes of the log, when last looked at, that the gallery does not hold yet",
            registry=registry,
        )
        self.event_loop_lag = Histogram(
            "invprop_event_loop_lag_seconds",
            "How much later than asked the event loop wakes a task",
            registry=registry,
            buckets=_TIME_BUCKETS,
        )
        self.connections = Gauge("invprop_connections", "Open connections", registry=registry)
        self.connections_closed = Counter(
            "invprop_connections_closed",
            "Connections closed for what they did or did not do",
            ["reason"],
            registry=registry,
        )
        self.pending_body_bytes = Gauge(
            "invprop_pending_body_bytes",
            "What bodies of unanswered requests take in memory, as max_pending_body_bytes counts",
            registry=registry,
        )
        self.problems = Counter(
            "invprop_problems", "Errors answered, by code", ["code"], registry=registry
        )
        ProcessCollector(registry=registry)  # memory, CPU, file descriptors
        self.graph_version = Gauge(
            "invprop_graph_version",
            "gallery_version of the kNN graph that is kept; behind the gallery's while it is made",
            registry=registry,
        )
        self.graph_progress = Gauge(
            "invprop_graph_progress",
            "Share (0..1) that is done of the kNN graph of the next version",
            registry=registry,
        )
        self.evaluations = Gauge(
            "invprop_evaluations",
            "Evaluations by state, at the last sweep",
            ["status"],
            registry=registry,
        )
        self.evaluation_queue_age = Gauge(
            "invprop_evaluation_queue_age_seconds",
            "How long the evaluation waits that has waited longest",
            ["queue"],
            registry=registry,
        )
        self.evaluation_workers = Gauge(
            "invprop_evaluation_workers",
            "1 where a worker of the queue was seen lately",
            ["queue"],
            registry=registry,
        )
        self.evaluation_leases_expired = Counter(
            "invprop_evaluation_leases_expired",
            "Evaluations taken from workers that fell silent, by this process",
            registry=registry,
        )
        self.build_info = Gauge(
            "invprop_build_info",
            "1, with what is running as labels",
            ["version", "model", "execution_provider", "precision"],
            registry=registry,
        )

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def report_model(self, embedder: Embedder) -> None:
        """This one is served."""
        self.build_info.clear()
        self.build_info.labels(
            importlib.metadata.version("invprop"),
            embedder.model_id,
            embedder.execution_provider,
            embedder.precision,
        ).set(1)

    def report_snapshot(self, snapshot: Snapshot) -> None:
        """This is the state of the gallery."""
        self.index_vectors.set(len(snapshot))
        self.gallery_version.set(snapshot.version)
        index = snapshot.index()
        self.index_bytes.clear()
        self.index_bytes.labels(index["index"]).set(index["bytes"])

    def report_graph(self, version: int, share: float) -> None:
        """The version of the kept graph, and the share (0..1) that is done of the next."""
        self.graph_version.set(version)
        self.graph_progress.set(share)
