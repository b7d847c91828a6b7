"""Write service/openapi.json, the checked-in copy of the OpenAPI document: the contract of clients.

Run: python -m service.write_openapi. A test fails when the copy has drifted from the routes.
"""

from pathlib import Path

import orjson

from service.app import create_app
from service.settings import Settings

CHECKED_IN = Path(__file__).with_name("openapi.json")


def document() -> bytes:
    """The OpenAPI document of the present routes; nothing is loaded for it."""
    app = create_app(Settings(bundle=Path("bundle"), state=Path("state")))
    return orjson.dumps(app.openapi(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


if __name__ == "__main__":
    CHECKED_IN.write_bytes(document())
