"""One service with real photographs and one browser for all tests of the page.

What any page writes to its console, asks of another host or throws is collected by the fixture
`page` and fails its test.
"""

import base64
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from service.settings import Settings
from tests.service.conftest import build_bundle, serving

CHROMIUM = Path("/usr/bin/chromium")
PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "imagenette224_subset5100.tar"
COUNT = 96
HOSTILE = "\"><img src=x onerror=alert(1)>/<b>&amp;'`${1}.png"  # an id
ARGUMENTS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]


def photographs() -> list[tuple[str, bytes, dict[str, Any]]]:
    """(id, file, metadata) of real pictures: photographs where they are, else digits."""
    if not PHOTOS.exists():
        digits = load_digits()
        return [
            (f"digit/{i:03}.png", _png(image), {"class": str(label)})
            for i, (image, label) in enumerate(
                zip(digits.images[:COUNT], digits.target[:COUNT], strict=True)
            )
        ]
    found: list[tuple[str, bytes, dict[str, Any]]] = []
    with tarfile.open(PHOTOS) as archive:
        members = [m for m in archive.getmembers() if m.name.startswith("val/") and m.isfile()]
        for member in members[:: len(members) // COUNT][:COUNT]:
            file = archive.extractfile(member)
            assert file is not None
            kind = member.name.split("/")[1]
            found.append((member.name.removeprefix("val/"), file.read(), {"class": kind}))
    return found


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((image * 15.9).astype(np.uint8)).resize((64, 64)).convert("RGB").save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def add(url: str, items: list[tuple[str, bytes, dict[str, Any]]]) -> None:
    """Put pictures into a gallery by NDJSON, which leaves every id as it is."""
    lines = [
        json.dumps({"id": i, "image": base64.b64encode(content).decode(), "metadata": metadata})
        for i, content, metadata in items
    ]
    headers = {"Content-Type": "application/x-ndjson"}
    answer = httpx.post(f"{url}/items", content="\n".join(lines), headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    assert not answer.json()["rejected"], answer.text


@pytest.fixture(scope="session")
def pictures() -> list[tuple[str, bytes, dict[str, Any]]]:
    return photographs()


@pytest.fixture(scope="session")
def site(
    pictures: list[tuple[str, bytes, dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of a service: real pictures, a hostile id, and 40 trained items without any."""
    directory = tmp_path_factory.mktemp("site")
    settings = Settings(
        bundle=build_bundle(directory / "bundle"), state=directory / "state", decoder_processes=1
    )
    with serving(settings) as url:
        hostile = (HOSTILE, pictures[0][1], {"<i>field</i>": "<script>alert(1)</script>"})
        add(url, [*pictures, hostile])
        yield url


# For a module, not for all: while Playwright is open an event loop counts as running in this
# thread, and the tests of others could not run their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing: the page's tests want Debian's chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


def until(page: Any, expression: str) -> Any:
    """The expression's value as soon as it is true. Playwright's own wait_for_function evaluates
    in the page, which the content policy forbids."""
    for _ in range(100):
        if value := page.evaluate(expression):
            return value
        page.wait_for_timeout(50)
    raise AssertionError(f"never became true: {expression}")


class Visit:
    """A page and what went wrong on it."""

    def __init__(self, page: Any, site: str) -> None:
        self.page, self.site = page, site
        self.wrong: list[str] = []
        self.bytes: list[tuple[str, int]] = []  # of each answer: path and length on the wire
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.wrong.append(f"thrown: {error}"))
        page.on("request", self._asked)

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(f"{message.type}: {message.text} {message.location.get('url')}")

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.site, "blob:", "data:")):
            self.wrong.append(f"asked another host: {request.url}")

    def forgive(self, *parts: str) -> None:
        """Take away what a test provoked: a browser writes every refused request to its console."""
        self.wrong = [line for line in self.wrong if not any(part in line for part in parts)]

    def open(self, address: str) -> Any:
        """Go to a view and wait for it."""
        self.page.goto(f"{self.site}/{address}")
        self.page.wait_for_selector("main:not([aria-busy])")
        return self.page


@pytest.fixture
def visit(browser: Any, site: str) -> Iterator[Visit]:
    """A fresh context on the shared service; fails the test for anything on the console."""
    yield from visiting(browser, site)


@pytest.fixture
def visit_of(browser: Any) -> Callable[..., Iterator[Visit]]:
    return lambda site, **options: visiting(browser, site, **options)


def visiting(browser: Any, site: str, **options: Any) -> Iterator[Visit]:
    """A page in a context of its own; what went wrong on it fails the test at its end."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, **options)
    context.set_default_timeout(10_000)
    seen = Visit(context.new_page(), site)
    yield seen
    wrong = list(seen.wrong)
    seen.page.unroute_all(behavior="ignoreErrors")  # what is under way is of no interest any more
    context.close()
    assert not wrong


@pytest.fixture(scope="session")
def axe() -> Callable[[Any], list[str]]:
    """axe(page) -> what axe-core finds wrong with it."""
    from axe_playwright_python.sync_playwright import Axe

    checker = Axe()

    def check(page: Any) -> list[str]:
        found = checker.run(page).response["violations"]
        return [
            f"{v['id']}: {v['help']}: {[n['html'][:160] for n in v['nodes'][:3]]}" for v in found
        ]

    return check
