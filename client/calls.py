"""All routes of the service in one class. In: what Client and AsyncClient pass on. Out: the steps
that they run.
"""

from client.asking import Asking
from client.evaluations import EvaluationCalls
from client.folders import Folders
from client.groupings import Groupings


class Calls(Asking, Folders, Groupings, EvaluationCalls):
    """One method per route. The methods return steps, see client.retry."""


def headers_of(api_key: str | None) -> dict[str, str]:
    """What every request carries."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
