import json
from typing import Any

import pytest

from client.errors import (
    BY_CODE,
    ImageRejected,
    InvalidField,
    InvalidRequest,
    QueueFull,
    Rejected,
    ServiceError,
    problem,
    retry_after,
)

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


def read(document: Any, status: int = 422, **headers: str) -> ServiceError:
    return problem(status, headers, json.dumps(document).encode(), now=NOW)


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_problem__each_code_is_its_own_class(code: str) -> None:
    error = read({"code": code, "detail": "because"}, status=418)
    assert type(error) is BY_CODE[code]
    assert (error.code, error.status, error.detail) == (code, 418, "because")


def test_problem__all_members_arrive() -> None:
    error = read(
        {"code": "queue_full", "detail": "full", "limit": 12, "setting": "queue_size"},
        429,
        **{"retry-after": "3", "x-request-id": "r-1"},
    )
    assert isinstance(error, QueueFull)
    assert (error.limit, error.setting) == (12, "queue_size")
    assert (error.retry_after_s, error.request_id) == (3.0, "r-1")
    assert str(error) == "full (429 queue_full)\n  limit: 12 (queue_size)\n  request id: r-1"


def test_problem__rejected_pictures() -> None:
    error = read(
        {"code": "image_rejected", "detail": "1 of 2", "errors": [{"index": 1, "reason": "cut"}]}
    )
    assert isinstance(error, ImageRejected)
    assert error.errors == (Rejected(1, "cut"),)
    assert "image 1: cut" in str(error)


def test_problem__invalid_fields() -> None:
    error = read(
        {"code": "invalid_request", "detail": "k: no", "errors": [{"field": "k", "reason": "no"}]}
    )
    assert isinstance(error, InvalidRequest)
    assert error.errors == (InvalidField("k", "no"),)


def test_problem__an_unknown_code_is_a_plain_service_error() -> None:
    error = read({"code": "new_one", "detail": "x"}, 400)
    assert type(error) is ServiceError
    assert error.code == "new_one"


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"<html>\nBad Gateway", "<html>"),
        (b"", "the service gave no reason"),
        (b"[1]", "[1]"),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_problem__a_body_from_a_proxy(body: bytes, detail: str) -> None:
    error = problem(502, {}, body, now=NOW)
    assert type(error) is ServiceError
    assert (error.code, error.detail) == ("http_502", detail)


def test_shifted__counts_pictures_from_the_offset_and_keeps_the_rest() -> None:
    error = read(
        {
            "code": "image_rejected",
            "detail": "d",
            "errors": [{"index": 1, "reason": "r"}],
            "limit": 3,
        },
        **{"x-request-id": "r-1"},
    ).shifted(10)
    assert isinstance(error, ImageRejected)
    assert error.errors == (Rejected(11, "r"),)
    assert (error.limit, error.request_id, error.status) == (3, "r-1", 422)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        (" 12 ", 12.0),
        ("Tue, 14 Nov 2023 22:13:27 GMT", 7.0),
        ("Tue, 14 Nov 2023 22:13:27 -0000", 7.0),
        ("Tue, 14 Nov 2023 22:00:00 GMT", 0.0),
        ("soon", None),
        ("-3", None),
    ],
)
def test_retry_after__seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, now=NOW) == seconds
