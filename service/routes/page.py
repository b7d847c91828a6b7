"""GET / and /static/VERSION/...: the web page. Plain files, nothing of the gallery in them.

The page asks for its data with the key that the person enters; the files themselves are open.
"""

import functools

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.errors import Problem
from service.page import Page, PageFile, read_page

router = APIRouter(include_in_schema=False)
# Stricter than that of every answer: no inline style either, and a text never becomes markup.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_REVALIDATE = "no-cache"
_FOR_EVER = "public, max-age=31536000, immutable"


@functools.cache
def _page() -> Page:
    return read_page()


@router.get("/")
async def index(request: Request) -> Response:
    """The page; it names the version of its files."""
    response = _send(request, _page().index, _REVALIDATE)
    response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
    return response


@router.get("/static/{version}/{name:path}")
async def static(request: Request, version: str, name: str) -> Response:
    """A file of the page. Another version's are gone: a browser that asks for one has an old page
    before it.
    """
    page = _page()
    found = page.files.get(name) if version == page.version else None
    if found is None:
        raise Problem("not_found", f"no such file of page version {page.version}; reload the page")
    return _send(request, found, _FOR_EVER)


def _send(request: Request, file: PageFile, caching: str) -> Response:
    is_compressed = _takes_gzip(_header(request, "accept-encoding"))
    etag = file.etag_of(is_compressed)
    headers = {"ETag": etag, "Cache-Control": caching, "Vary": "Accept-Encoding"}
    given = [tag.strip().removeprefix("W/") for tag in _header(request, "if-none-match").split(",")]
    if etag in given or given == ["*"]:
        return Response(status_code=304, headers=headers)
    if is_compressed:
        headers["Content-Encoding"] = "gzip"
    content = file.compressed if is_compressed else file.plain
    return Response(content, headers=headers, media_type=file.media_type)


def _header(request: Request, name: str) -> str:
    return request.headers.get(name, "")


def _takes_gzip(accepted: str) -> bool:
    """Whether an Accept-Encoding names gzip, and not to refuse it."""
    for part in accepted.lower().split(","):
        coding, _, weight = part.partition(";")
        if coding.strip() == "gzip":
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
