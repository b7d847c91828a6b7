"""GET /docs: the OpenAPI document as one page that loads nothing from elsewhere."""

import html
import json
import re
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

router = APIRouter(include_in_schema=False)

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; font-size: 1.1rem; font-family: ui-monospace, monospace; }
pre, code { font-family: ui-monospace, monospace; font-size: .85rem; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid #8885; border-radius: .4rem; }
td, th { text-align: left; vertical-align: top; padding: .15rem 1rem .15rem 0; }
summary { cursor: pointer; }
"""


@router.get("/docs")
async def docs(request: Request) -> Response:
    """The routes with their parameters, bodies and answers."""
    return HTMLResponse(page(request.app.openapi()))


def page(document: dict[str, Any]) -> str:
    """The OpenAPI document as HTML."""
    title, text = html.escape(document["info"]["title"]), html.escape
    routes = [
        _route(method.upper(), path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    schemas = [
        f'<details id="{text(name)}"><summary><code>{text(name)}</code></summary>{_json(schema)}'
        "</details>"
        for name, schema in document["components"]["schemas"].items()
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{title} {text(document['info']['version'])}</h1>"
        f"<p>{_prose(document['info']['description'])}</p>"
        '<p>For programs: <a href="/openapi.json">openapi.json</a></p>'
        f"{''.join(routes)}<h1>Shapes</h1>{''.join(schemas)}</body></html>"
    )


def _route(method: str, path: str, operation: dict[str, Any]) -> str:
    text = html.escape
    rows = [
        f"<tr><td><code>{text(p['name'])}</code></td><td>{p['in']}</td>"
        f"<td>{_prose(p.get('description', ''))} <code>{text(_kind(p['schema']))}</code></td></tr>"
        for p in operation.get("parameters", [])
    ]
    bodies = operation.get("requestBody", {}).get("content", {})
    body = "".join(
        f"<details><summary>body <code>{text(kind)}</code></summary>{_json(content['schema'])}"
        "</details>"
        for kind, content in bodies.items()
    )
    answers = "".join(
        f"<tr><td>{status}</td><td>{text(answer.get('description', ''))} "
        f"{_names(answer.get('content', {}))}</td></tr>"
        for status, answer in sorted(operation["responses"].items())
    )
    return (
        f"<h2>{method} {text(path)}</h2><p><b>{text(operation.get('summary', ''))}.</b> "
        f"{_prose(operation.get('description', ''))}</p><table>{''.join(rows)}</table>{body}"
        f"<table>{answers}</table>"
    )


def _prose(text: str) -> str:
    """Text with its `names` set as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _names(content: dict[str, Any]) -> str:
    """Links to the shapes of an answer; media types without one are named."""
    parts = []
    for kind, described in content.items():
        reference = described.get("schema", {}).get("$ref", "").rpartition("/")[2]
        shape = f'<a href="#{html.escape(reference)}">{html.escape(reference)}</a>'
        parts.append(shape if reference else f"<code>{html.escape(kind)}</code>")
    return " or ".join(parts)


def _kind(schema: dict[str, Any]) -> str:
    kept = {k: v for k, v in schema.items() if k in ("type", "enum", "default", "minimum")}
    return json.dumps(kept) if kept else ""


def _json(schema: dict[str, Any]) -> str:
    return f"<pre>{html.escape(json.dumps(schema, indent=2, ensure_ascii=False))}</pre>"
