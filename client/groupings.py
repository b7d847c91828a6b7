"""Groupings of the whole gallery, and its map. In: options. Out: steps that end with a model."""

from client import answers
from client.answers import fields_of, reading
from client.models import Grouping, GroupingMember, ListedGroup, Map, PendingMap
from client.retry import Request, Steps
from client.routes import (
    GROUPING,
    GROUPING_GROUPS,
    GROUPING_MEMBERS,
    GROUPINGS,
    MAP,
    START_GROUPING,
    at_least,
    json_request,
    path_of,
)
from client.session import Session


class Groupings(Session):
    """Routes of what the service computes in the background over all items."""

    def start_grouping(
        self, *, k: int, steps: int, min_size: int, min_gallery_version: int | None
    ) -> Steps[Grouping]:
        options = {"k": k, "steps": steps, "min_size": min_size}
        answer = yield from self._exchange(
            json_request(START_GROUPING, options, min_gallery_version=min_gallery_version)
        )
        with reading(START_GROUPING):
            return answers.grouping(fields_of(answer))

    def groupings(self) -> Steps[tuple[Grouping, ...]]:
        answer = yield from self._exchange(Request(GROUPINGS, GROUPINGS.path))
        with reading(GROUPINGS):
            return tuple(answers.grouping(entry) for entry in fields_of(answer)["items"])

    def grouping(self, grouping_id: str) -> Steps[Grouping]:
        path = path_of(GROUPING, grouping=grouping_id)
        answer = yield from self._exchange(Request(GROUPING, path))
        with reading(GROUPING):
            return answers.grouping(fields_of(answer))

    def grouping_groups(
        self, grouping_id: str, *, cursor: str | None
    ) -> Steps[tuple[tuple[ListedGroup, ...], str | None]]:
        path = path_of(GROUPING_GROUPS, grouping=grouping_id)
        query = {} if cursor is None else {"cursor": cursor}
        answer = yield from self._exchange(Request(GROUPING_GROUPS, path, query=query))
        with reading(GROUPING_GROUPS):
            fields = fields_of(answer)
            return tuple(answers.listed_group(entry) for entry in fields["items"]), fields["next"]

    def grouping_members(
        self, grouping_id: str, group: int, *, cursor: str | None
    ) -> Steps[tuple[tuple[GroupingMember, ...], str | None]]:
        path = path_of(GROUPING_MEMBERS, grouping=grouping_id, group=str(group))
        query = {} if cursor is None else {"cursor": cursor}
        answer = yield from self._exchange(Request(GROUPING_MEMBERS, path, query=query))
        with reading(GROUPING_MEMBERS):
            fields = fields_of(answer)
            members = tuple(answers.grouping_member(entry) for entry in fields["items"])
            return members, fields["next"]

    def map(
        self,
        *,
        method: str,
        sample: int | None,
        version: int | None,
        min_gallery_version: int | None,
    ) -> Steps[Map | PendingMap]:
        query = {"method": method}
        query |= {} if sample is None else {"sample": str(sample)}
        query |= {} if version is None else {"version": str(version)}
        answer = yield from self._exchange(
            Request(MAP, MAP.path, query=query, headers=at_least(min_gallery_version))
        )
        with reading(MAP):
            return answers.map_or_pending(answer)
