"""The short way to the routes that are asked most: an ASGI layer before the router.

In: POST requests whose body is a .npy or one image. Out: their answers, by the very functions of
the routes. The router's way from a request to the parameters of a function takes longer than all
of the service's own work on such a request. Anything else takes the router's way, to the same
functions.
"""

from collections.abc import Awaitable, Callable

from fastapi import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.bodies import IMAGES, NPY
from service.errors import Problem
from service.routes import embed, neighbours

Answer = Callable[[Request], Awaitable[Response]]
_TYPES = frozenset((b"content-type", kind.encode()) for kind in (NPY, *IMAGES))


class AnswerDirectly:
    """ASGI layer: arrays and single images for `/embed` and `/neighbours` go past the router."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        # Path -> the route, for log and metrics; its function; whether it reads options itself.
        self._places: dict[str, tuple[BaseRoute, Answer, bool]] = {
            "/embed": (embed.router.routes[0], embed.embed_plainly, False),
            "/neighbours": (neighbours.router.routes[0], neighbours.neighbours, True),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        place = self._places.get(scope["path"]) if scope["type"] == "http" else None
        if place is None or scope["method"] != "POST" or _TYPES.isdisjoint(scope["headers"]):
            await self._app(scope, receive, send)
            return
        route, answer, reads_options = place
        if scope["query_string"] and not reads_options:
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        try:
            response = await answer(Request(scope, receive, send))
        except Problem as problem:
            response = problem.response()
        await response(scope, receive, send)
