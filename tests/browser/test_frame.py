"""The frame: keys, readiness, prefix, themes, access for all, how little is sent and kept."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import expect

from service.keys import PREFIX
from service.settings import Settings
from tests.browser.conftest import add
from tests.browser.fake_evaluations import FakeEvaluations
from tests.service.conftest import build_bundle, serving

KEY = PREFIX + "k" * 43


@pytest.fixture(scope="module")
def locked(pictures: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service that wants a key; 1 picture in its gallery, found by its key alone."""
    directory = tmp_path_factory.mktemp("locked")
    state = directory / "state"
    bundle = build_bundle(directory / "bundle")
    with serving(Settings(bundle=bundle, state=state, decoder_processes=1)) as url:
        add(url, [("private.jpg", pictures[0][1], {})])
    line = f"page read sha256:{hashlib.sha256(KEY.encode()).hexdigest()}"
    with serving(Settings(bundle=bundle, state=state, decoder_processes=1, api_keys=line)) as url:
        yield url


def test_key__is_asked_for_kept_in_the_tab_and_sent_with_pictures(
    locked: str, visit_of: Callable[..., Iterator[Any]]
) -> None:
    visiting = visit_of(locked)
    visit = next(visiting)
    page = visit.page
    page.goto(f"{locked}/#/item/private.jpg")
    page.get_by_label("API key", exact=True).locator("input").fill("wrong" + KEY)
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("dialog p")).to_contain_text("the API key is not known")
    page.locator("dialog input").fill(KEY)
    page.get_by_role("button", name="Use this key").click()
    page.wait_for_selector(".about img")
    assert page.evaluate("document.querySelector('.about img').naturalWidth") > 0
    assert page.evaluate("localStorage.length + document.cookie.length") <= 1  # the theme
    assert page.evaluate("sessionStorage.getItem('invprop.key')") == KEY
    page.reload()
    page.wait_for_selector(".about img")
    visit.forgive("401")
    with pytest.raises(StopIteration):
        next(visiting)


def test_not_ready__says_why_and_goes_on_by_itself(visit: Any) -> None:
    page = visit.page
    refused = {"status": 503, "code": "not_ready", "detail": "gallery: loading", "title": "x"}
    for path in ("readyz", "info", "items**"):
        page.route(f"**/{path}", lambda r: r.fulfill(status=503, json=refused))
    page.goto(f"{visit.site}/#/gallery")
    expect(page.locator(".empty h1")).to_have_text("The service is not ready yet")
    expect(page.locator("#status")).to_have_attribute("aria-label", "not ready: gallery: loading")
    page.unroute_all()
    page.wait_for_selector(".grid a")
    expect(page.locator("#status")).to_have_attribute("aria-label", "ready")
    visit.forgive("503")


def test_busy__waits_by_itself(visit: Any) -> None:
    page, refused = visit.page, []

    def once(route: Any) -> None:
        if refused:
            route.fallback()
            return
        refused.append(1)
        problem = {"status": 429, "code": "queue_full", "detail": "8 are waiting", "title": "x"}
        route.fulfill(status=429, headers={"Retry-After": "1"}, json=problem)

    page.route("**/items?**", once)
    page.goto(f"{visit.site}/#/gallery")
    expect(page.locator("#notice")).to_contain_text("The service is busy; going on in 1 s.")
    page.wait_for_selector(".grid a")
    visit.forgive("429")


def test_prefix__needs_no_setting(visit: Any) -> None:
    page, site = visit.page, visit.site
    visit.site = f"{site}/some/prefix"  # a request outside of it is an error
    page.route(
        "**/*", lambda r: r.fulfill(response=r.fetch(url=r.request.url.replace("/some/prefix", "")))
    )
    page.goto(f"{visit.site}/#/gallery")
    page.wait_for_selector(".grid .placeholder")
    page.locator(".grid a").first.click()
    page.wait_for_selector(".similarity")
    page.evaluate("location.hash = '#/map'")
    page.wait_for_selector("canvas")


def test_theme__is_chosen_and_kept(visit: Any) -> None:
    page = visit.open("#/gallery")
    colour = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(colour) == "rgb(255, 255, 255)"
    page.locator("#theme").click()
    page.locator("#theme").click()
    assert page.evaluate(colour) == "rgb(20, 21, 24)"
    page.reload()
    assert page.evaluate(colour) == "rgb(20, 21, 24)"
    expect(page.locator("#theme")).to_have_attribute("aria-label", "Theme: dark")


def test_dialogs__open_by_key_and_close_by_escape(visit: Any) -> None:
    page = visit.open("#/gallery")
    page.keyboard.press("?")
    expect(page.locator("dialog h2")).to_have_text("Keys and help")
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)
    page.locator("#facts").click()
    expect(page.locator("dialog h2")).to_have_text("What runs here")
    model = page.request.get(f"{visit.site}/info").json()["model"]
    expect(page.locator("dialog dd").first).to_have_text(model)


def test_unknown_address__leads_back(visit: Any) -> None:
    page = visit.open("#/nowhere/%")
    expect(page.locator(".empty h1")).to_have_text("There is no such page")


ADDRESSES = (
    "#/gallery", "#/item/ID", "#/item/ID?tab=propagation", "#/item/ID?tab=pairs", "#/groups",
    "#/groups/GROUPING", "#/groups/GROUPING/0", "#/map", "#/duplicates?at=0.9", "#/upload",
    "#/search/image/0", "#/evaluations", "#/evaluations/one", "#/evaluations/slow",
    "#/evaluations/compare?a=one&b=two", "#/nowhere",
)  # fmt: skip


@pytest.mark.parametrize(
    ("width", "theme"),
    [
        (1280, "light"),
        (390, "dark"),
        pytest.param(1280, "dark", marks=pytest.mark.long),
        pytest.param(390, "light", marks=pytest.mark.long),
    ],
)
def test_every_view__is_accessible_and_fits(
    browser: Any, site: str, visit_of: Any, axe: Any, pictures: Any, theme: str, width: int
) -> None:
    visiting = visit_of(site, color_scheme=theme, reduced_motion="reduce")
    visit = next(visiting)
    page = visit.page
    page.set_viewport_size({"width": width, "height": 800})
    FakeEvaluations().install(page)
    options = {"k": 4, "steps": 3, "min_size": 2}
    grouping = page.request.post(f"{site}/groupings", data=options).json()["id"]
    wrong: list[str] = []
    for address in ADDRESSES:
        name = pictures[3][0].replace("/", "%2F")
        visit.open(address.replace("ID", name).replace("GROUPING", grouping))
        wrong += [f"{address}: {found}" for found in axe(page)]
        wide = page.evaluate("document.documentElement.scrollWidth")
        if wide > width:
            wrong.append(f"{address}: {wide} px wide in a window of {width}")
    page.keyboard.press("?")
    wrong += [f"help: {found}" for found in axe(page)]
    page.keyboard.press("Escape")
    page.locator("#facts").click()
    page.wait_for_selector("dialog dd")
    wrong += [f"facts: {found}" for found in axe(page)]
    assert not wrong, "\n".join(wrong)
    with pytest.raises(StopIteration):
        next(visiting)


def test_first_view__is_small_and_soon(visit: Any) -> None:
    page = visit.page
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    sent: dict[str, float] = {}
    kinds: dict[str, str] = {}
    session.on(
        "Network.responseReceived",
        lambda e: kinds.update({e["requestId"]: e["type"] + e["response"]["url"]}),
    )
    session.on(
        "Network.loadingFinished", lambda e: sent.update({e["requestId"]: e["encodedDataLength"]})
    )
    visit.open("#/gallery")
    page.wait_for_load_state("networkidle")
    before_images = sum(n for r, n in sent.items() if "/images/" not in kinds[r])
    assert 10_000 < before_images <= 150_000
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert paint > 0  # how soon is measured in tests/benchmarks/page.py


def test_gallery_of_many__keeps_few_nodes(visit: Any) -> None:
    """100,000 items by a fake GET /items: however far it is scrolled, the document stays small."""
    page, total = visit.page, 100_000

    def answer(route: Any) -> None:
        values = dict(p.split("=") for p in route.request.url.partition("?")[2].split("&"))
        first, limit = int(values.get("cursor", 0)), int(values["limit"])
        items = [{"id": f"many/{i}", "metadata": {}} for i in range(first, first + limit)]
        after = first + limit
        page_of = {"items": items, "next": str(after) if after < total else None}
        route.fulfill(json=page_of)

    page.route("**/items?**", answer)
    page.route("**/images/**", lambda r: r.fulfill(status=204))
    visit.open("#/gallery")
    nodes = []
    for _ in range(25):
        page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        page.wait_for_timeout(60)
        nodes.append(page.evaluate("document.querySelectorAll('*').length"))
    assert page.evaluate("document.querySelector('.tally').textContent") > "1,000 of"
    assert page.evaluate("document.documentElement.scrollHeight") > 15_000
    assert max(nodes) < 900
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_selector(".grid a[title='many/0']")  # asked for again: its page had been let go
