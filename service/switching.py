"""A running service takes over a new bundle: built beside the old one, switched at one moment.

In: SIGHUP, and a bundle path (it may be a symlink) that now holds another model. Out: the new
parts are served, or the reason why the old ones stay; /info tells the state. Until it says "done"
the old model answers.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import structlog

from service.decoder_child import DecoderUnavailable
from service.embedder import EmbedderError
from service.gallery.database import Database
from service.gallery.logged import LoggedGallery
from service.gallery.oplog import OperationsLog
from service.gallery.protocol import Change, GalleryError, StorageError, Vectors
from service.gallery.rows import active_of, galleries_of
from service.gallery.successor import Progress, Successor, SwitchRefused, drop_building
from service.images import ImagePath
from service.serving import EmbedOriginals, Serving, load_embedder
from service.settings import Settings
from trainer.representation.bundle import Bundle, BundleError, open_bundle

# What ends a switch and leaves the service as it was.
_REASONS = (
    BundleError,
    EmbedderError,
    DecoderUnavailable,
    SwitchRefused,
    GalleryError,
    StorageError,
)
_log = structlog.get_logger("service")


def clear_unfinished(database: Database) -> None:
    """Remove what a switch that was killed has left, unless another process is at it."""
    try:
        with database.switching():
            dropped = drop_building(database)
    except StorageError as error:
        _log.info("switch_elsewhere", note=str(error))
        return
    if dropped:
        _log.info("switch_unfinished_removed", galleries=dropped)


class Stopped(Exception):
    """The service ends; the switch goes on with the next one."""


class Switch:
    """One switch after the other, and what is known of the last one.

    Args:
        database: of the gallery, with the new one.
        image_path: an encoder -> a path of images that is not started.
        open_gallery: opens a gallery of a bundle, of the active log or of the one given.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        *,
        image_path: Callable[[Any], ImagePath],
        open_gallery: Callable[[Bundle, OperationsLog | None], LoggedGallery],
    ) -> None:
        self._settings = settings
        self._database = database
        self._image_path = image_path
        self._open_gallery = open_gallery
        self._stopping = threading.Event()
        self._facts: dict[str, Any] = {"state": "none"}
        self._progress: Progress | None = None

    def facts(self) -> Mapping[str, Any]:
        """What /info says: state none, building, done, unchanged or refused; model; progress."""
        if self._progress is None:
            return self._facts
        return {**self._facts, "done": self._progress.done, "total": self._progress.total}

    def stop(self) -> None:
        """Let a switch that is running end soon, unfinished."""
        self._stopping.set()

    async def run(self, current: str, serve: Callable[[Serving], Awaitable[None]]) -> None:
        """Build what the bundle path holds now and have it served.

        Nothing is served anew when that is model `current`, or when it is refused.
        """
        self._progress = None
        self._facts = {"state": "building"}
        try:
            # Once, so that a symlink that moves meanwhile cannot mix two bundles.
            path = self._settings.bundle.resolve()
            bundle = await asyncio.to_thread(open_bundle, path)
            if bundle.model_id == current:
                self._facts = {"state": "unchanged", "model": current}
                _log.info("switch_unchanged", model=current)
                return
            self._facts = {"state": "building", "model": bundle.model_id}
            _log.info("switch_begun", model=bundle.model_id, was=current)
            serving = await self._build(bundle)
            try:
                await serve(serving)
            except BaseException:
                await serving.images.close()
                await asyncio.to_thread(serving.gallery.close)
                raise
        except Stopped:
            self._facts = {**self._facts, "state": "stopped"}
            return
        except _REASONS as error:
            self._facts = {**self._facts, "state": "refused", "reason": str(error)}
            _log.warning("switch_refused", reason=str(error))
            return
        except Exception as error:  # noqa: BLE001 - the task's door: the old model goes on
            self._facts = {**self._facts, "state": "failed", "reason": "a defect; see the log"}
            _log.error("switch_failed", exc_info=error)
            return
        self._facts = {"state": "done", "model": bundle.model_id}
        _log.info("switch_done", model=bundle.model_id, items=len(serving.gallery.snapshot()))

    async def _build(self, bundle: Bundle) -> Serving:
        if self._stopping.is_set():
            raise Stopped
        embedder = await asyncio.to_thread(load_embedder, bundle, self._settings)
        images = self._image_path(embedder)
        try:
            await images.start()
            embed = EmbedOriginals(images, asyncio.get_running_loop(), self._settings)
            gallery = await asyncio.to_thread(self._succeed, bundle, embed)
        except BaseException:
            await images.close()
            raise
        return Serving(embedder, images, gallery, bundle, bundle.speed())

    def _succeed(self, bundle: Bundle, embed: EmbedOriginals) -> LoggedGallery:
        """The gallery of the bundle as the active one."""

        def embed_unless_stopped(contents: Sequence[bytes]) -> list[Vectors | str]:
            if self._stopping.is_set():
                raise Stopped
            return embed(contents)

        with self._database.switching():
            with self._database.reading() as connection:
                active = active_of(galleries_of(connection))
            if active is not None and active.model_id == bundle.model_id:
                return self._open_gallery(bundle, None)  # another process was first
            successor = Successor(self._database, bundle, embed_unless_stopped)
            self._progress = successor.progress
            try:
                successor.follow()
                # Loaded before the switch, so that the old gallery is missed for a moment only.
                log = OperationsLog(self._database, successor.new.gallery)
                gallery = self._open_gallery(bundle, log)
                try:
                    successor.finish()
                    gallery.apply(Change()).result()  # takes over what came last
                except BaseException:
                    gallery.close()
                    raise
            except SwitchRefused:
                drop_building(self._database)
                raise
            return gallery
