"""Every error answer: RFC 9457 problem documents with a stable `code`.

In: a `Problem` raised anywhere, or what FastAPI raises. Out: application/problem+json, never a
stack trace; `limit` and `setting` say which limit was met and what the operator may change.
"""

from collections.abc import Mapping
from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

MEDIA_TYPE = "application/problem+json"

# code -> (status, title). The codes are part of the contract: clients branch on them.
PROBLEMS: Mapping[str, tuple[int, str]] = {
    "bad_request": (400, "The request cannot be read"),
    "unauthenticated": (401, "The request wants an API key"),
    "forbidden": (403, "The API key may not do this"),
    "not_found": (404, "There is no such route"),
    "item_not_found": (404, "There is no such item"),
    "picture_not_found": (404, "There is no picture of this item"),
    "model_not_found": (404, "There is no such model"),
    "grouping_not_found": (404, "There is no such grouping or group"),
    "dataset_not_found": (404, "There is no such data set"),
    "evaluation_not_found": (404, "There is no such evaluation"),
    "map_not_found": (404, "There is no such map"),
    "method_not_allowed": (405, "The route has no such method"),
    "request_timeout": (408, "The request arrived too slowly"),
    "idempotency_conflict": (409, "The Idempotency-Key was used for another request"),
    "evaluation_not_ready": (409, "The evaluation has no report"),
    "no_such_worker": (409, "No worker could run this"),
    "grouping_not_ready": (409, "The grouping has no groups yet"),
    "model_mismatch": (409, "The vector comes from another model"),
    "body_too_large": (413, "The body is too large"),
    "too_many": (413, "There is too much in one request"),
    "url_too_long": (414, "The URL is too long"),
    "unsupported_media_type": (415, "The body has a format that this route does not take"),
    "invalid_request": (422, "The request is not valid"),
    "limit_exceeded": (422, "A limit is exceeded"),
    "image_rejected": (422, "An image was rejected"),
    "queue_full": (429, "The service is at its capacity"),
    "picture_damaged": (500, "The picture is not what was stored"),
    "rate_limited": (429, "The caller sends too much"),
    "headers_too_large": (431, "The headers are too large"),
    "internal_error": (500, "The service failed"),
    "loading": (503, "The service is loading"),
    "overloaded": (503, "The service has too many connections"),
    "not_ready": (503, "The service is not ready"),
    "map_failed": (503, "The map could not be computed"),
    "storage_failed": (503, "The change could not be stored"),
    "unsupported_by_gallery": (422, "The engine that holds the gallery cannot do this"),
    "gallery_unreachable": (503, "The gallery cannot be reached"),
    "gallery_changed": (503, "Items changed while the request was answered"),
    "gallery_behind": (503, "The gallery has not reached the version that was asked for"),
    "gallery_retired": (503, "The gallery was replaced by one of another model"),
    "decoder_unavailable": (503, "No image decoder is running"),
    "deadline_exceeded": (504, "The answer took too long"),
    "storage_full": (507, "The disk is full"),
}
PROBLEM_CODE = "invprop.problem"  # in the scope of a request that was answered with a problem
MAX_ERRORS = 100  # named in one answer
RETRY_AFTER_S = 1  # queues empty within seconds

# The code for what the web framework itself refuses.
_CODES_BY_STATUS = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}

_log = structlog.get_logger("service")


class Problem(Exception):
    """An error answer.

    Args:
        code: a key of PROBLEMS.
        detail: what was got, what was wanted, what to do.
        retry_after_s: sent as Retry-After.
        extensions: further members of the document, such as `limit` and `setting` or `errors`.
    """

    def __init__(
        self, code: str, detail: str, *, retry_after_s: int | None = None, **extensions: Any
    ) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.extensions = extensions

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """The problem as a response."""
        status, title = PROBLEMS[self.code]
        document = {
            "type": f"urn:invprop:problem:{self.code}",
            "title": title,
            "status": status,
            "detail": self.detail,
            "code": self.code,
            **self.extensions,
        }
        sent = dict(headers or {})
        if self.retry_after_s is not None:
            sent["Retry-After"] = str(self.retry_after_s)
        return _ProblemResponse(document, sent)


class _ProblemResponse(Response):
    media_type = MEDIA_TYPE

    def __init__(self, document: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        body = orjson.dumps(document, option=orjson.OPT_NON_STR_KEYS)
        super().__init__(body, status_code=document["status"], headers=headers)
        self._document = document
        self._given = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[PROBLEM_CODE] = self._document["code"]
        # RFC 9457 lets a problem have further members; clients of two other APIs read this one.
        path = scope["path"]
        if path.startswith("/v1/"):
            document = {**self._document, "error": _openai_error(self._document)}
        elif path.startswith("/v2"):
            document = {**self._document, "error": self._document["detail"]}
        else:
            await super().__call__(scope, receive, send)
            return
        shaped = Response(
            orjson.dumps(document, option=orjson.OPT_NON_STR_KEYS),
            self.status_code,
            self._given,
            MEDIA_TYPE,
        )
        await shaped(scope, receive, send)


def _openai_error(document: Mapping[str, Any]) -> dict[str, Any]:
    status = document["status"]
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {
        "message": document["detail"],
        "type": kind,
        "param": document.get("setting"),
        "code": document["code"],
    }


def over_limit(code: str, what: str, got: int | float, setting: str, limit: int | float) -> Problem:
    """A problem that names the limit and the setting behind it."""
    return Problem(
        code,
        f"{what}: got {got:,}, at most {limit:,} are allowed. Send less at a time, or let the "
        f"operator raise `{setting}`.",
        limit=limit,
        setting=setting,
    )


def queue_full(what: str, limit: int, setting: str) -> Problem:
    """The problem of a bounded queue that is full."""
    return Problem(
        "queue_full",
        f"{limit:,} {what} are waiting already, as many as `{setting}` allows; try again shortly",
        retry_after_s=RETRY_AFTER_S,
        limit=limit,
        setting=setting,
    )


def install_handlers(app: FastAPI) -> None:
    """Let every error of `app` leave as a problem document."""
    app.add_exception_handler(Problem, _answer_problem)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)


def unexpected(error: Exception) -> Response:
    """Log a defect with its trace and answer without it."""
    _log.error("unexpected_error", exc_info=error)
    return Problem(
        "internal_error",
        "This is a defect of the service; its log has the details under the request id of this "
        "answer (header X-Request-Id).",
    ).response()


async def _answer_problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


async def _answer_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_problem(error.errors()).response()


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES_BY_STATUS.get(error.status_code, "bad_request")
    detail = str(error.detail)
    if code == "not_found":
        detail = f"Nothing is served at {request.url.path!r}; /docs lists the routes."
    elif code == "method_not_allowed":
        allowed = (error.headers or {}).get("Allow", "")
        detail = f"{request.method} is not served here; allowed: {allowed or 'see /docs'}."
    return Problem(code, detail).response(error.headers)


def validation_problem(errors: Any) -> Problem:
    """Turn pydantic's error list into a problem with `errors` [{field, reason}]."""
    found = []
    for entry in errors[:MAX_ERRORS]:
        field = ".".join(str(part) for part in entry["loc"] if part not in ("body", "query"))
        limits = entry.get("ctx", {})
        limit = next((limits[name] for name in ("le", "max_length") if name in limits), None)
        reason = {"field": field, "reason": entry["msg"]}
        found.append(reason if limit is None else {**reason, "limit": limit})
    detail = "; ".join(f"{e['field'] or 'request'}: {e['reason']}" for e in found[:5])
    return Problem("invalid_request", detail, errors=found)
