"""What can go wrong, as exceptions. Catch the widest one that you can act on:

    InvpropError
    ├── ConnectionFailed              no answer: refused, reset, name not found
    │   └── TimedOut                  no answer in timeout_s
    ├── UnexpectedAnswer              an answer that is not this API: wrong URL, a proxy, a version
    ├── IncompatibleVersion           a service too old or too new for this client
    ├── FolderNotAdded                add_folder() cannot begin: the journal says why
    └── ServiceError                  the service said no: status, code, detail, errors, ...
        ├── BadRequest            bad_request             the request cannot be read
        ├── Unauthenticated       unauthenticated         no API key, or one that is not known
        ├── Forbidden             forbidden               the API key has not the role for this
        ├── RouteNotFound         not_found               no such route: a wrong URL, or a version
        ├── ItemNotFound          item_not_found          no item of this id
        ├── ModelNotFound         model_not_found         no model of this name
        ├── GroupingNotFound      grouping_not_found      no grouping or group of this name
        ├── DatasetNotFound       dataset_not_found       no data set of this name is registered
        ├── EvaluationNotFound    evaluation_not_found    no evaluation of this id
        ├── MapNotFound           map_not_found           no map of that version is kept
        ├── MethodNotAllowed      method_not_allowed      the route has no such method
        ├── RequestTimeout        request_timeout         the request arrived too slowly
        ├── IdempotencyConflict   idempotency_conflict    one key, two different requests
        ├── PictureNotFound       picture_not_found       an item without a picture
        ├── PictureDamaged        picture_damaged         a picture that is not what was stored
        ├── EvaluationNotReady    evaluation_not_ready    it has no report (yet)
        ├── NoSuchWorker          no_such_worker          nobody there could run the evaluation
        ├── GroupingNotReady      grouping_not_ready      it is still computed, or it failed
        ├── ModelMismatch         model_mismatch          vectors of another model
        ├── BodyTooLarge          body_too_large          more bytes than allowed
        ├── TooMany               too_many                more pictures, ids or vectors than allowed
        ├── UrlTooLong            url_too_long            path and query longer than allowed
        ├── UnsupportedMediaType  unsupported_media_type  a format the route does not take
        ├── InvalidRequest        invalid_request         errors: which fields, and why
        ├── LimitExceeded         limit_exceeded          limit, setting: what was passed
        ├── ImageRejected         image_rejected          errors: which pictures, and why
        ├── QueueFull             queue_full              at capacity: retry_after_s
        ├── RateLimited           rate_limited            more a second than allowed: retry_after_s
        ├── HeadersTooLarge       headers_too_large       more bytes of headers than allowed
        ├── InternalError         internal_error          a defect of the service: request_id
        ├── Loading               loading                 starting
        ├── Overloaded            overloaded              too many connections
        ├── NotReady              not_ready               a check of /readyz failed
        ├── MapFailed             map_failed              a map could not be computed
        ├── StorageFailed         storage_failed          a change could not be stored
        ├── UnsupportedByGallery  unsupported_by_gallery  its gallery's engine cannot do this
        ├── GalleryUnreachable    gallery_unreachable     its gallery is away: retry_after_s
        ├── GalleryChanged        gallery_changed         items changed meanwhile: send it again
        ├── GalleryBehind         gallery_behind          not at the version asked for yet: again
        ├── GalleryRetired        gallery_retired         replaced by another model's: send it again
        ├── DecoderUnavailable    decoder_unavailable     no picture can be decoded just now
        ├── DeadlineExceeded      deadline_exceeded       the service gave up in time
        └── StorageFull           storage_full            the service's disk is full

A code that this version does not know is a plain ServiceError: `code` and `detail` still say it.
"""

import datetime
import email.utils
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


class InvpropError(Exception):
    """Everything this package raises for what lies outside the caller's program."""


class ConnectionFailed(InvpropError):
    """The service gave no answer; a request may or may not have reached it."""


class TimedOut(ConnectionFailed):
    """No answer within timeout_s of silence."""


class UnexpectedAnswer(InvpropError):
    """An answer that this version of the client cannot read."""


class IncompatibleVersion(InvpropError):
    """The service speaks another version of the API: both versions are named."""


class FolderNotAdded(InvpropError):
    """add_folder() did not begin: its journal is damaged, in use, or of another gallery."""


@dataclass(frozen=True)
class Rejected:
    """One picture that could not be used."""

    index: int  # place in the caller's list of images
    reason: str


@dataclass(frozen=True)
class InvalidField:
    """One value of a request that was missing or out of range."""

    field: str
    reason: str


class ServiceError(InvpropError):
    """The service answered with a problem (RFC 9457).

    Attributes:
        status: HTTP status, 400..599.
        code: the stable name of the problem.
        detail: what was got, what was wanted, what to do.
        errors: the rejected pictures or the invalid fields, where the problem is about those.
        limit, setting: the limit that was passed, and the service's setting that moves it.
        request_id: what the service's log calls this request.
        retry_after_s: when the service wants to be asked again, seconds from the answer.
    """

    code: str
    known_code: ClassVar[str] = ""

    def __init__(
        self,
        detail: str,
        *,
        status: int,
        code: str | None = None,
        errors: Sequence[Rejected | InvalidField] = (),
        limit: float | str | None = None,
        setting: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        self.detail = detail
        self.status = status
        self.code = code or self.known_code
        self.errors = tuple(errors)
        self.limit = limit
        self.setting = setting
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        super().__init__(detail)

    def __str__(self) -> str:
        lines = [f"{self.detail} ({self.status} {self.code})"]
        if self.limit is not None:
            lines.append(f"limit: {self.limit}" + (f" ({self.setting})" if self.setting else ""))
        lines += [
            f"image {error.index}: {error.reason}"
            for error in self.errors
            if isinstance(error, Rejected)
        ]
        if self.request_id:
            lines.append(f"request id: {self.request_id}")
        return "\n  ".join(lines)

    def shifted(self, offset: int) -> "ServiceError":
        """The same problem with `errors` counted from `offset`: one part of a split request."""
        return type(self)(
            self.detail,
            status=self.status,
            code=self.code,
            errors=[
                Rejected(error.index + offset, error.reason)
                if isinstance(error, Rejected)
                else error
                for error in self.errors
            ],
            limit=self.limit,
            setting=self.setting,
            request_id=self.request_id,
            retry_after_s=self.retry_after_s,
        )


class BadRequest(ServiceError):
    known_code = "bad_request"


class Unauthenticated(ServiceError):
    known_code = "unauthenticated"


class Forbidden(ServiceError):
    known_code = "forbidden"


class RouteNotFound(ServiceError):
    known_code = "not_found"


class ItemNotFound(ServiceError):
    known_code = "item_not_found"


class ModelNotFound(ServiceError):
    known_code = "model_not_found"


class GroupingNotFound(ServiceError):
    """There is no grouping of this id, or it has no group of this number."""

    known_code = "grouping_not_found"


class MapNotFound(ServiceError):
    """No map of that gallery version is kept."""

    known_code = "map_not_found"


class MethodNotAllowed(ServiceError):
    known_code = "method_not_allowed"


class RequestTimeout(ServiceError):
    known_code = "request_timeout"


class IdempotencyConflict(ServiceError):
    known_code = "idempotency_conflict"


class DatasetNotFound(ServiceError):
    """No data set of this name is registered; datasets() lists them."""

    known_code = "dataset_not_found"


class EvaluationNotFound(ServiceError):
    """There is no evaluation of this id."""

    known_code = "evaluation_not_found"


class EvaluationNotReady(ServiceError):
    """The evaluation has no report: it has not ended, or not well."""

    known_code = "evaluation_not_ready"


class NoSuchWorker(ServiceError):
    """No worker that could run the evaluation was seen lately, such as one with a GPU."""

    known_code = "no_such_worker"


class GroupingNotReady(ServiceError):
    """The grouping has no groups: it is still computed, or it failed."""

    known_code = "grouping_not_ready"


class ModelMismatch(ServiceError):
    known_code = "model_mismatch"


class BodyTooLarge(ServiceError):
    known_code = "body_too_large"


class TooMany(ServiceError):
    known_code = "too_many"


class UrlTooLong(ServiceError):
    known_code = "url_too_long"


class UnsupportedMediaType(ServiceError):
    known_code = "unsupported_media_type"


class InvalidRequest(ServiceError):
    known_code = "invalid_request"


class LimitExceeded(ServiceError):
    known_code = "limit_exceeded"


class PictureNotFound(ServiceError):
    known_code = "picture_not_found"


class PictureDamaged(ServiceError):
    known_code = "picture_damaged"


class ImageRejected(ServiceError):
    known_code = "image_rejected"


class QueueFull(ServiceError):
    known_code = "queue_full"


class RateLimited(ServiceError):
    known_code = "rate_limited"


class HeadersTooLarge(ServiceError):
    known_code = "headers_too_large"


class InternalError(ServiceError):
    known_code = "internal_error"


class Loading(ServiceError):
    known_code = "loading"


class Overloaded(ServiceError):
    known_code = "overloaded"


class NotReady(ServiceError):
    known_code = "not_ready"


class MapFailed(ServiceError):
    """A map could not be computed; where a limit was met, `setting` names it."""

    known_code = "map_failed"


class StorageFailed(ServiceError):
    known_code = "storage_failed"


class UnsupportedByGallery(ServiceError):
    """The engine that holds the gallery cannot do this; `detail` says what it can."""

    known_code = "unsupported_by_gallery"


class GalleryUnreachable(ServiceError):
    known_code = "gallery_unreachable"


class GalleryChanged(ServiceError):
    """Items were replaced or deleted while the request was answered: send it again."""

    known_code = "gallery_changed"


class GalleryBehind(ServiceError):
    """The service does not hold the gallery version that was asked for yet: ask again."""

    known_code = "gallery_behind"


class GalleryRetired(ServiceError):
    known_code = "gallery_retired"


class DecoderUnavailable(ServiceError):
    known_code = "decoder_unavailable"


class DeadlineExceeded(ServiceError):
    known_code = "deadline_exceeded"


class StorageFull(ServiceError):
    known_code = "storage_full"


BY_CODE: Mapping[str, type[ServiceError]] = {
    error.known_code: error for error in ServiceError.__subclasses__()
}


def problem(status: int, headers: Mapping[str, str], body: bytes, *, now: float) -> ServiceError:
    """Read a problem answer.

    Args:
        headers: with names in lower case.
        now: seconds since the epoch, against which a Retry-After date is read.

    A body that is no problem document (a proxy in between) gives a plain ServiceError with code
    `http_STATUS` and the first line of the body.
    """
    fields = _problem_fields(body)
    code = fields.get("code")
    if not isinstance(code, str):
        code = f"http_{status}"
    detail = fields.get("detail") or fields.get("title")
    if not detail:
        first = body[:200].decode("utf-8", "replace").strip().partition("\n")[0]
        detail = first or "the service gave no reason"
    return BY_CODE.get(code, ServiceError)(
        str(detail),
        status=status,
        code=code,
        errors=_errors(fields.get("errors")),
        limit=fields.get("limit"),
        setting=fields.get("setting"),
        request_id=headers.get("x-request-id"),
        retry_after_s=retry_after(headers.get("retry-after"), now=now),
    )


def retry_after(value: str | None, *, now: float) -> float | None:
    """Seconds to wait from a Retry-After header (RFC 9110, 10.2.3): a number or an HTTP date."""
    if value is None:
        return None
    value = value.strip()
    if value.isdecimal():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:  # "-0000": the time is in UTC, the place unknown
        date = date.replace(tzinfo=datetime.UTC)
    return max(0.0, date.timestamp() - now)


def _problem_fields(body: bytes) -> Mapping[str, Any]:
    try:
        fields = json.loads(body)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _errors(entries: object) -> list[Rejected | InvalidField]:
    found: list[Rejected | InvalidField] = []
    for entry in entries if isinstance(entries, list) else []:
        match entry:
            case {"index": int(index), "reason": str(reason)}:
                found.append(Rejected(index, reason))
            case {"field": str(name), "reason": str(reason)}:
                found.append(InvalidField(name, reason))
    return found
