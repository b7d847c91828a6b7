"""The training step as CUDA graphs: launched as a whole, where a step of many small kernels would
otherwise take the host longer to launch than the device to compute.

In: a `TrainingStep` and batches of one shape. Out: the same step. Two kinds of graph: the views,
one for each plan that is drawn (the order of the colour changes makes up to 24), and all that comes
after them, one. The learning rate lies on the device and changes without a new graph; the weight of
the invariance loss is part of the second graph, which is captured anew when the weight changes:
that is once a run, and a weight of 0 leaves the loss and its gradient out of the graph altogether.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from trainer.augment import Plan
from trainer.feed import Batch
from trainer.step import TrainingStep

# Steps before a capture: libraries choose their kernels and take their workspaces in the first
# ones, torch.compile compiles. torch's documentation uses three.
WARM_UPS = 3

Body = Callable[[], None]


class Graphs(Protocol):
    """How work on a device is recorded."""

    def warm_up(self, body: Body, times: int) -> None:
        """Run `body` as it will run while it is captured."""

    def capture(self, body: Body) -> Body:
        """Record what `body` does without doing it; what is returned does it."""


class CudaGraphs:
    """Recording by CUDA, all graphs in one pool of memory.

    They are replayed one after the other on one stream and leave nothing in the pool that another
    needs but the gradients, which are held while they live.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._device = device

    def warm_up(self, body: Body, times: int) -> None:
        """On the stream of the capture, as torch's documentation wants it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(times):
                body()
        current.wait_stream(self._stream)

    def capture(self, body: Body) -> Body:
        """Record; what the feed's thread does on its own stream meanwhile is no part of it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            body()
        replay: Body = graph.replay
        return replay


class CapturedStep:
    """A `TrainingStep` that is recorded at its first batch and replayed from then on.

    Before a recording, steps are made to warm up and undone, so that a captured run makes as many
    updates as an uncaptured one. One process only: nothing in a graph may wait for another.
    """

    def __init__(self, step: TrainingStep, graphs: Graphs) -> None:
        self._step, self._graphs = step, graphs
        self._views: dict[Plan, Body] = {}
        self._learn: Body | None = None
        self._weight = 0.0
        # What the graphs read and write; at these addresses for good.
        self._batch: Batch | None = None
        self._seen: Tensor | None = None  # (B, 3, S, S)
        self._figures: Tensor | None = None

    def set_rate(self, rate: float) -> None:
        """Learn at this rate from now on."""
        self._step.set_rate(rate)

    def __call__(self, batch: Batch, *, weight: float) -> Tensor:
        """Do one step; see `TrainingStep.__call__`."""
        if self._batch is None:
            pixels = None if batch.pixels is None else batch.pixels.clone()
            self._batch = Batch(batch.message.clone(), batch.like, pixels)
        else:
            self._batch.message.copy_(batch.message)
        self._see(self._batch, batch)
        if self._learn is None or weight != self._weight:
            self._learn, self._weight = self._record_learning(self._batch, weight), weight
        self._learn()
        assert self._figures is not None  # recording made it
        return self._figures.clone()

    def _see(self, own: Batch, batch: Batch) -> None:
        """Make the views."""
        if own.pixels is not None and batch.pixels is not None:
            own.pixels.copy_(batch.pixels)
        plan = batch.like.plan
        if plan not in self._views:

            def body() -> None:
                views = batch.like.unpack(own.drawn)
                self._keep(self._step.see(own.indices, views, own.pixels))

            self._graphs.warm_up(body, 1)
            self._views[plan] = self._graphs.capture(body)
        self._views[plan]()

    def _keep(self, views: Tensor) -> None:
        if self._seen is None:
            self._seen = torch.empty_like(views)
        self._seen.copy_(views)

    def _record_learning(self, own: Batch, weight: float) -> Body:
        step, seen = self._step, self._seen
        assert seen is not None  # the views come first

        def body() -> None:
            figures = step.learn(own.indices, seen, weight)
            if self._figures is None:
                self._figures = torch.empty_like(figures)
            self._figures.copy_(figures)

        restore = step.remember(own.indices)
        self._graphs.warm_up(body, WARM_UPS)
        restore()  # also takes the gradients away, so that the graph makes its own
        return self._graphs.capture(body)
