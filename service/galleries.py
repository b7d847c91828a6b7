"""The two kinds of galleries that a service may have, one on a log and one in Milvus.

In: settings, or an open gallery. Out: the gallery that the settings ask for, and what /info and
/metrics tell of each kind; of another one that was given nothing.
"""

from collections.abc import Mapping
from typing import Any

from service.gallery.choice import SearchOptions
from service.gallery.database import Database, make_state
from service.gallery.logged import LoggedGallery
from service.gallery.milvus_gallery import MilvusGallery, open_store
from service.gallery.oplog import OperationsLog
from service.gallery.protocol import Gallery
from service.metrics import Metrics
from service.settings import Settings
from trainer.representation.bundle import Bundle


def open_logged(
    settings: Settings, database: Database, bundle: Bundle, log: OperationsLog | None
) -> LoggedGallery:
    """The gallery of a bundle: on the active log of the database, or on the one given.

    Raises:
        GalleryError: as LoggedGallery.
    """
    return LoggedGallery(
        database,
        bundle,
        log=log,
        search=SearchOptions(
            settings.resolved_search_memory_bytes(),
            settings.exact_items,
            settings.snapshot_every,
        ),
        follow_interval_s=settings.follow_interval_s,
        max_staleness_s=settings.max_staleness_s,
        max_pending=settings.max_pending,
        idempotency_ttl_s=settings.idempotency_ttl_s,
    )


def open_milvus(settings: Settings, bundle: Bundle) -> MilvusGallery:
    """The gallery of a bundle in the collection that `settings.gallery` names.

    Raises:
        GalleryError, StorageError: as MilvusGallery.
    """
    assert settings.gallery is not None
    make_state(settings.state)  # groupings are kept there
    return MilvusGallery(
        open_store(settings.gallery.get_secret_value()),
        model_id=bundle.model_id,
        dim=bundle.embedding_dim,
        imported=bundle.gallery,
        index=settings.milvus_index,
        whole_items=settings.milvus_whole_items,
        max_pending=settings.max_pending,
        idempotency_ttl_s=settings.idempotency_ttl_s,
        follow_interval_s=settings.follow_interval_s,
        max_staleness_s=settings.max_staleness_s,
    )


def generation_of(gallery: Gallery) -> dict[str, Any]:
    """What /info says of the gallery's snapshots on disk."""
    if not isinstance(gallery, LoggedGallery):
        return {}
    return {"generation": gallery.generation_seq}


def database_of(gallery: Gallery, switch: Mapping[str, Any]) -> dict[str, Any]:
    """What /info says of where the gallery is kept.

    Args:
        switch: what is known of the last change of models.
    """
    if isinstance(gallery, MilvusGallery):
        return {
            "database": gallery.version,
            "read_only": not gallery.is_writer,
            "staleness_s": round(gallery.staleness_s(), 3),
        }
    if not isinstance(gallery, LoggedGallery):
        return {}
    return {
        "database": gallery.database.version,
        "read_only": gallery.is_retired,
        "staleness_s": round(gallery.staleness_s(), 3),
        "switch": switch,
    }


def report(gallery: Gallery, metrics: Metrics) -> None:
    """Have /metrics tell of this gallery, and of no other, from now on."""
    if isinstance(gallery, LoggedGallery):
        metrics.gallery_staleness.set_function(gallery.staleness_s)
        metrics.gallery_lag.set_function(gallery.lag)
        metrics.generation_seq.set_function(lambda: gallery.generation_seq)
        metrics.log_damaged.set_function(lambda: gallery.is_damaged)
    elif isinstance(gallery, MilvusGallery):
        metrics.gallery_staleness.set_function(gallery.staleness_s)
    gallery.on_change(metrics.report_snapshot)
    metrics.report_snapshot(gallery.snapshot())
