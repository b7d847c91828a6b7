"""What is kept beside one gallery: its kNN graph, its groupings and its maps.

In: settings, and the gallery once it is open. Out: the three, which begin and end together with the
model that the gallery belongs to. All of it can be made again from the gallery.
"""

import shutil
from collections.abc import Callable

from service.gallery.protocol import Gallery
from service.graph_keeper import GraphKeeper
from service.groupings import Groupings
from service.map import Maps
from service.settings import Settings

DIRECTORY = "derived"  # inside the state directory: one directory for each model
_NAME_LENGTH = 16  # characters of the model_id that name it


class Beside:
    """Graph, groupings and maps of one gallery. Made and started at once; `close` it.

    Args:
        on_progress: see GraphKeeper.
    """

    def __init__(
        self,
        gallery: Gallery,
        settings: Settings,
        *,
        on_progress: Callable[[int, float], None],
    ) -> None:
        self.directory = settings.state / DIRECTORY / gallery.model_id[:_NAME_LENGTH]
        # A gallery past one machine has a graph past one memory: edges are searched for.
        remote = gallery.snapshot().device == "remote"
        neighbours = 0 if remote else settings.graph_neighbours
        self.graph = GraphKeeper(self.directory, neighbours=neighbours, on_progress=on_progress)
        self.groupings = Groupings(
            self.directory,
            graph=self.graph,
            kept=settings.groupings_kept,
            max_pending=settings.groupings_pending,
        )
        self.maps = Maps(
            self.directory,
            timeout_s=settings.map_timeout_s,
            memory_bytes=settings.map_memory_bytes,
            max_pending=settings.maps_pending,
        )
        self.graph.start(gallery)
        self.groupings.start(gallery)
        self.maps.start()

    def forget_others(self) -> None:
        """Remove what was kept for models that are no longer served."""
        if self.directory.parent.is_dir():
            for path in self.directory.parent.iterdir():
                if path != self.directory:
                    shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """End them; call it before the gallery is closed."""
        self.maps.close()
        self.groupings.close()
        self.graph.close()
