"""What a running service holds, how it becomes ready, and how it stops.

In: settings and, for tests, ready-made parts. Out: `embedder`, `images` and `gallery` for the
routes, and the state of every check for /readyz. Parts are loaded in the background, so that
/livez answers from the start.
"""

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

import faiss
import structlog
from fastapi import Request

from service.admission import Rates
from service.batching import BoundedThreads, QueueFull
from service.beside import Beside
from service.catch_up import CatchUp, min_version_of
from service.dataset_counts import counting
from service.datasets import Registry
from service.deadline import Deadline
from service.decoder_child import DecoderUnavailable
from service.doorbell import BrokerError
from service.embedded_worker import EmbeddedWorker
from service.embedder import Embedder, EmbedderError
from service.errors import RETRY_AFTER_S, Problem, queue_full
from service.evaluations import Evaluations
from service.galleries import open_logged, open_milvus, report
from service.gallery.database import Database, make_state
from service.gallery.logged import LoggedGallery
from service.gallery.oplog import OperationsLog
from service.gallery.protocol import (
    Applied,
    Change,
    Gallery,
    GalleryError,
    Snapshot,
    StorageError,
)
from service.gallery_problems import search_problems, storage_problems
from service.graph_keeper import GraphKeeper
from service.groupings import Groupings
from service.images import ImagePath
from service.jobs import Jobs
from service.keys import ApiKeys
from service.map import Maps
from service.metrics import Metrics
from service.observability import watch_event_loop
from service.serving import Serving, load_embedder, pinned
from service.settings import Settings
from service.switching import Switch, clear_unfinished
from trainer.representation.bundle import Bundle, BundleError, open_bundle

Result = TypeVar("Result")
CHECKS = ("model", "decoders", "gallery")
# What stops a start with a message for the operator; anything else is a defect.
START_ERRORS = (
    BundleError,
    EmbedderError,
    GalleryError,
    StorageError,
    BrokerError,
    DecoderUnavailable,
)

_log = structlog.get_logger("service")


class Runtime:
    """The parts of one service; use it as `async with runtime.running():`."""

    def __init__(
        self,
        settings: Settings,
        *,
        embedder: Embedder | None,
        gallery: Gallery | None,
        keys: ApiKeys,
        datasets: Registry,
        jobs: Jobs | None = None,
    ) -> None:
        self.settings = settings
        self.keys = keys
        self.datasets = datasets
        self.dataset_counts = counting(settings)
        self.rates = Rates(settings)
        self.metrics = Metrics()
        self.draining = False
        self.failure: Exception | None = None
        self.loaded = asyncio.Event()
        self._load_ended = asyncio.Event()  # also where it failed
        self._jobs = jobs
        self._evaluations: Evaluations | None = None
        self._worker: EmbeddedWorker | None = None
        self._embedder = embedder
        self._gallery = gallery
        self._given_gallery = gallery is not None
        self._images: ImagePath | None = None
        self._serving: Serving | None = None  # the parts together, once all are there
        self._database: Database | None = None  # of a gallery that was not given
        self._switch: Switch | None = None
        self._switching: asyncio.Task[None] | None = None
        self._ending = asyncio.Event()
        self._retiring: dict[Serving, asyncio.Task[None]] = {}
        self._beside: dict[Serving, Beside] = {}
        self._catch_up = CatchUp(settings.max_catch_up_s)
        self._compute = BoundedThreads(
            settings.resolved_search_threads(),
            max_pending=settings.max_pending,
            # OpenMP counts per calling thread; searches of several requests share the cores.
            initializer=lambda: faiss.omp_set_num_threads(1),
        )

    @property
    def embedder(self) -> Embedder:
        """The encoder; a Problem while it is loading."""
        return self._served().embedder

    @property
    def images(self) -> ImagePath:
        """The path from images to vectors; a Problem while it is loading."""
        return self._served().images

    @property
    def gallery(self) -> Gallery:
        """The gallery; a Problem while it is loading."""
        return self._served().gallery

    @property
    def graph(self) -> GraphKeeper:
        """The kept kNN graph of the gallery; a Problem while it is loading."""
        return self._beside[self._served()].graph

    @property
    def groupings(self) -> Groupings:
        """The groupings of the gallery; a Problem while it is loading."""
        return self._beside[self._served()].groupings

    @property
    def maps(self) -> Maps:
        """The maps of the gallery; a Problem while it is loading."""
        return self._beside[self._served()].maps

    @property
    def evaluations(self) -> Evaluations:
        """The evaluations; a Problem while they are loading."""
        if self._evaluations is None:
            raise self._loading()
        return self._evaluations

    @property
    def bundle(self) -> Bundle | None:
        """What is served; None where encoder and gallery were given."""
        return self._served().bundle

    @property
    def speed(self) -> Mapping[str, Any] | None:
        """What the bundle says was timed at its export."""
        return self._served().speed

    def pin(self) -> None:
        """Let the request that begins here see one model to its end, threads included."""
        pinned.set(None if self._serving is None else (self, self._serving))

    def _served(self) -> Serving:
        held = pinned.get()
        if held is not None and held[0] is self:
            return held[1]
        if self._serving is None:
            raise self._loading()
        return self._serving

    def reload(self) -> None:
        """Serve what the bundle path holds now, once it is built; on SIGHUP. While the service is
        loading it is done afterwards."""
        if self._given_gallery or self.settings.gallery is not None:
            _log.warning("switch_ignored", reason="the gallery was given or lies in Milvus")
        elif self._switching is not None and not self._switching.done():
            _log.warning("switch_ignored", reason="one is going on already; /info says how far")
        else:
            self._switching = asyncio.create_task(self._change())

    async def _change(self) -> None:
        await self._load_ended.wait()
        if self.failure is not None:  # the process ends with it
            return
        assert self._switch is not None
        assert self._serving is not None
        old = self._serving

        async def serve(new: Serving) -> None:
            self._beside[new] = await asyncio.to_thread(self._open_beside, new.gallery)
            self._embedder, self._images, self._gallery = new.embedder, new.images, new.gallery
            self._serving = new
            self._report_parts(new)
            # Requests that began with the old model end with it.
            self._retiring[old] = asyncio.create_task(self._retire(old))

        await self._switch.run(old.embedder.model_id, serve)

    async def _retire(self, old: Serving) -> None:
        with contextlib.suppress(TimeoutError):  # at once where the service ends
            await asyncio.wait_for(self._ending.wait(), self.settings.request_timeout_s)
        await asyncio.to_thread(self._beside.pop(old).close)
        await old.images.close()
        await asyncio.to_thread(old.gallery.close)
        del self._retiring[old]

    def checks(self) -> dict[str, str]:
        """What /readyz looks at: "ok" or what is wrong with it."""
        missing = "loading" if self.failure is None else f"failed: {self.failure}"
        decoders = self._images if self._images is not None and self._images.running else None
        # What is kept beside the gallery is read after it: until then it is not open either.
        gallery = self._gallery if self._serving is not None else None
        parts = (self._embedder, decoders, gallery)
        checks = {n: missing if p is None else "ok" for n, p in zip(CHECKS, parts, strict=True)}
        self.keys.refresh()
        if self.keys.failure is not None:
            checks["keys"] = "the API keys cannot be read; the log says why"
        if gallery is not None and (trouble := gallery.trouble()) is not None:
            checks["gallery"] = trouble
        if self.draining:
            checks["accepting"] = "the service is stopping"
        return checks

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load in the background, and release everything at the end."""
        faiss.omp_set_num_threads(1)  # of this thread, which does the shortest searches itself
        loading = asyncio.create_task(self._load())
        watching = asyncio.create_task(watch_event_loop(self.metrics))
        self.dataset_counts.start(self.datasets.all())
        try:
            yield
        finally:
            watching.cancel()
            await loading
            await self._close()

    def deadline(self) -> Deadline:
        """A block that must end within `request_timeout_s`; see service.deadline."""
        return Deadline(self.settings.request_timeout_s)

    async def caught_up(self, request: Request) -> None:
        """Wait until the gallery holds the version that the request names, if it names one.

        Raises:
            Problem: gallery_behind; invalid_request.
        """
        version = min_version_of(request)
        if version is not None:
            await self._catch_up.wait(self.gallery, version)

    async def compute(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call something that takes the CPU, or waits, in a thread, off the event loop.

        Raises:
            Problem: queue_full; of a gallery past one machine unsupported_by_gallery,
                gallery_changed, gallery_unreachable.
        """
        # With what the request has pinned.
        context = contextvars.copy_context()
        with search_problems():
            try:
                return await self._compute.run(context.run, function, *arguments)
            except QueueFull as full:
                raise queue_full("searches", full.limit, "max_pending") from None

    async def read(
        self, snapshot: Snapshot, function: Callable[..., Result], *arguments: Any
    ) -> Result:
        """Call something short that reads a snapshot: here, or in a thread where it waits for a
        network; see `compute`."""
        if snapshot.device == "remote":
            return await self.compute(function, *arguments)
        return function(*arguments)

    async def apply(self, change: Change) -> Applied:
        """Change the gallery; when it returns, the change is on disk.

        Raises:
            Problem: queue_full, storage_full, storage_failed, gallery_retired,
                idempotency_conflict, too_many.
        """
        with self.stored():
            future = self.gallery.apply(change)
            # Shielded: a client that goes away must not leave a change half known.
            return await asyncio.shield(asyncio.wrap_future(future))

    def stored(self) -> contextlib.AbstractContextManager[None]:
        """A block whose storage errors become problems."""
        return storage_problems(self.settings)

    def switch_facts(self) -> Mapping[str, Any]:
        """What /info says of the last change of models."""
        return {} if self._switch is None else self._switch.facts()

    async def _load(self) -> None:
        try:
            await self._load_parts()
        except START_ERRORS as error:
            self.failure = error  # whoever runs the application says it
        except Exception as error:  # noqa: BLE001 - a door: the process ends with this defect
            self.failure = error
            _log.error("start_failed", exc_info=error)
        else:
            self.loaded.set()
        self._load_ended.set()

    async def _load_parts(self) -> None:
        settings = self.settings
        bundle = None
        if self._embedder is None or self._gallery is None:
            bundle = await asyncio.to_thread(open_bundle, settings.bundle)
        if self._embedder is None:
            assert bundle is not None
            self._embedder = await asyncio.to_thread(load_embedder, bundle, settings)
        embedder = self._embedder
        _log.info(
            "encoder_loaded",
            model=embedder.model_id,
            precision=embedder.precision,
            asked=settings.precision,
            execution_provider=embedder.execution_provider,
        )
        self._images = self._image_path(embedder)
        await self._images.start()
        if self._gallery is None and settings.gallery is not None:
            assert bundle is not None
            self._gallery = await asyncio.to_thread(open_milvus, settings, bundle)
        await asyncio.to_thread(make_state, settings.state)
        self._evaluations = await asyncio.to_thread(
            Evaluations, settings, self.datasets, self.metrics, jobs=self._jobs
        )
        if self._gallery is None:
            assert bundle is not None
            self._database = await asyncio.to_thread(
                Database, settings.state, settings.database_url()
            )
            self._gallery = await asyncio.to_thread(self._open_gallery, bundle, None)
            self._switch = Switch(
                settings,
                self._database,
                image_path=self._image_path,
                open_gallery=self._open_gallery,
            )
        speed = None if bundle is None else bundle.speed()
        serving = Serving(embedder, self._images, self._gallery, bundle, speed)
        beside = await asyncio.to_thread(self._open_beside, self._gallery)
        await asyncio.to_thread(beside.forget_others)
        self._beside[serving] = beside
        self._serving = serving
        self._report_parts(serving)
        if self._database is not None:
            await asyncio.to_thread(clear_unfinished, self._database)
        if settings.worker == "embedded":
            self._worker = EmbeddedWorker(settings)

    def _image_path(self, embedder: Embedder) -> ImagePath:
        return ImagePath(embedder, settings=self.settings, metrics=self.metrics, rates=self.rates)

    def _open_beside(self, gallery: Gallery) -> Beside:
        return Beside(gallery, self.settings, on_progress=self.metrics.report_graph)

    def _open_gallery(self, bundle: Bundle, log: OperationsLog | None) -> LoggedGallery:
        assert self._database is not None
        return open_logged(self.settings, self._database, bundle, log)

    def _report_parts(self, serving: Serving) -> None:
        report(serving.gallery, self.metrics)
        serving.gallery.on_change(self._catch_up.note)
        self.metrics.report_model(serving.embedder)

    async def _close(self) -> None:
        if self._switching is not None:
            if self._switch is not None:
                self._switch.stop()
            await self._switching
        self._ending.set()
        await asyncio.gather(*self._retiring.values())
        if self._worker is not None:
            await asyncio.to_thread(self._worker.close)
        if self._images is not None:
            await self._images.close()
        if self._evaluations is not None:
            await asyncio.to_thread(self._evaluations.close)
        await asyncio.to_thread(self.dataset_counts.close)
        await asyncio.to_thread(self._compute.close)
        for beside in self._beside.values():
            await asyncio.to_thread(beside.close)
        if self._gallery is not None and not self._given_gallery:
            await asyncio.to_thread(self._gallery.close)
        if self._database is not None:
            await asyncio.to_thread(self._database.close)

    def _loading(self) -> Problem:
        waiting = [name for name, state in self.checks().items() if state != "ok"]
        return Problem(
            "loading",
            f"not ready yet: {', '.join(waiting) or 'starting'}; /readyz says when it is",
            retry_after_s=RETRY_AFTER_S,
        )
