"""Evaluations on demand, and the labelled sets they run on.

In: protocol, data set, settings. Out: steps that end with an Evaluation, for client.blocking and
client.awaitable, whose `evaluations` are the doors to these.
"""

import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from client import answers
from client.answers import fields_of, reading
from client.errors import ConnectionFailed, ServiceError, TimedOut
from client.models import Dataset, Evaluation, Json
from client.retry import RETRIED_STATUSES, Attempt, Request, RetryPolicy, Steps, Wait
from client.routes import (
    CANCEL,
    DATASETS,
    EVALUATION,
    EVALUATIONS,
    EVENTS,
    SUBMIT,
    json_request,
    path_of,
)
from client.session import Session

# Between two looks of wait(): soon at first, for evaluations that take seconds.
FIRST_LOOK_S = 0.2
LONGEST_LOOK_S = 5.0


class EvaluationPage(NamedTuple):
    """One page of evaluations, and where the next one begins (None: it was the last)."""

    items: tuple[Evaluation, ...]
    next: str | None


class EvaluationCalls(Session):
    """Routes of evaluations."""

    def datasets(self) -> Steps[tuple[Dataset, ...]]:
        answer = yield from self._exchange(Request(DATASETS, DATASETS.path))
        with reading(DATASETS):
            return tuple(answers.dataset(entry) for entry in fields_of(answer)["items"])

    def submit(
        self, protocol: str, dataset: str, *, settings: Json | None, seed: int, key: str | None
    ) -> Steps[Evaluation]:
        body: Mapping[str, Any] = {
            "protocol": protocol,
            "dataset": dataset,
            "settings": dict(settings or {}),
            "seed": seed,
        }
        request = json_request(SUBMIT, body, idempotency_key=key or uuid.uuid4().hex)
        answer = yield from self._exchange(request)
        with reading(SUBMIT):
            return answers.evaluation(fields_of(answer))

    def evaluation(self, evaluation_id: str) -> Steps[Evaluation]:
        path = path_of(EVALUATION, evaluation=evaluation_id)
        answer = yield from self._exchange(Request(EVALUATION, path))
        with reading(EVALUATION):
            return answers.evaluation(fields_of(answer))

    def evaluations(self, *, status: str | None, cursor: str | None) -> Steps[EvaluationPage]:
        query = {} if status is None else {"status": status}
        query |= {} if cursor is None else {"cursor": cursor}
        answer = yield from self._exchange(Request(EVALUATIONS, EVALUATIONS.path, query=query))
        with reading(EVALUATIONS):
            fields = fields_of(answer)
            found = tuple(answers.evaluation(entry) for entry in fields["items"])
            return EvaluationPage(found, fields["next"])

    def cancel(self, evaluation_id: str) -> Steps[Evaluation]:
        request = Request(CANCEL, path_of(CANCEL, evaluation=evaluation_id))
        answer = yield from self._exchange(request)
        with reading(CANCEL):
            return answers.evaluation(fields_of(answer))

    def wait(self, evaluation_id: str, *, timeout_s: float | None) -> Steps[Evaluation]:
        clock, look_s = self._policy.clock, FIRST_LOOK_S
        deadline = None if timeout_s is None else clock.monotonic() + timeout_s
        while True:
            found = yield from self.evaluation(evaluation_id)
            if found.ended:
                return found
            if deadline is not None and clock.monotonic() + look_s > deadline:
                raise TimedOut(
                    f"evaluation {evaluation_id} is still {found.status} after {timeout_s:g} s; "
                    "it goes on: wait() again, or cancel() it"
                )
            yield Wait(look_s)
            look_s = min(LONGEST_LOOK_S, 1.5 * look_s)

    def watch(self, evaluation_id: str) -> "Watch":
        """What a stream of its events needs."""
        return Watch(evaluation_id, self._policy)


class Watch:
    """A stream of events that is taken up again where it breaks."""

    def __init__(self, evaluation_id: str, policy: RetryPolicy) -> None:
        self.ended = False
        self._policy = policy
        self._request = Request(EVENTS, path_of(EVENTS, evaluation=evaluation_id))
        self._failures = 0  # since the last event

    @property
    def attempt(self) -> Attempt:
        """What to ask for."""
        return Attempt(self._request, self._policy.timeout_s)

    def read(self, data: str) -> Evaluation:
        """One event."""
        with reading(EVENTS):
            found = answers.evaluation(answers.json_object(data))
        self._failures, self.ended = 0, found.ended
        return found

    def broken(self, failure: ConnectionFailed | ServiceError | None) -> Steps[None]:
        """Wait before the stream is asked for again; raise where that would be in vain.

        Args:
            failure: None where the service ended the stream though the evaluation goes on.
        """
        if failure is None:
            failure = ConnectionFailed(
                f"GET {self._request.path}: the stream ended before the evaluation did"
            )
        self._failures += 1
        refused = isinstance(failure, ServiceError) and failure.status not in RETRIED_STATUSES
        if refused or self._failures > self._policy.max_retries:
            raise failure
        yield Wait(self._policy.delay_s(self._failures, failure))
