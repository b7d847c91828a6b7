"""The gallery, one item and the propagation view, in a real browser."""

import json
import urllib.parse
from typing import Any

from playwright.sync_api import expect

from tests.browser.conftest import COUNT, HOSTILE, until


def address(item_id: str, tab: str = "") -> str:
    return f"#/item/{urllib.parse.quote(item_id, safe='')}" + (f"?tab={tab}" if tab else "")


def test_gallery__shows_pictures_and_says_how_many(visit: Any) -> None:
    page = visit.open("#/gallery")
    page.wait_for_selector(".grid .placeholder")
    expect(page.locator(".tally")).to_have_text(f"120 of {COUNT + 41} items")
    # Trained items came as vectors: a placeholder with the name, never a broken picture.
    assert page.locator(".grid .placeholder").first.inner_text() == "0000.png"
    page.mouse.wheel(0, 100_000)
    page.wait_for_selector(".grid img")
    expect(page.locator(".tally")).to_have_text(f"{COUNT + 41} items")  # the rest came by cursor
    until(page, "[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    assert page.locator(".hint").count() == 0


def test_gallery__without_any_picture__says_how_they_come_in(visit: Any) -> None:
    visit.page.route("**/images/**", lambda route: route.fulfill(status=204))
    page = visit.open("#/gallery")
    expect(page.locator(".hint pre")).to_have_text(f"invprop --url {visit.site} add FOLDER")


def test_gallery__filters_by_what_its_metadata_hold(visit: Any, pictures: Any) -> None:
    kind = pictures[0][2]["class"]
    page = visit.open("#/gallery")
    page.get_by_label("Filter by class").select_option(label=kind)
    wanted = sum(metadata["class"] == kind for _, _, metadata in pictures)
    expect(page.locator(".tally")).to_have_text(f"{wanted} items")
    filtered = json.dumps({"class": kind}, separators=(",", ":"))
    assert urllib.parse.parse_qs(page.url.partition("?")[2])["filter"] == [filtered]
    page.go_back()
    expect(page.locator(".tally")).to_have_text(f"120 of {COUNT + 41} items")


def test_search_field__takes_a_field_or_an_id(visit: Any, pictures: Any) -> None:
    page = visit.open("#/gallery")
    page.keyboard.press("/")
    page.keyboard.type(f"class={pictures[0][2]['class']}")
    page.keyboard.press("Enter")
    page.wait_for_selector(".chip.on")
    page.fill("#search-text", pictures[0][0])
    page.keyboard.press("Enter")
    page.wait_for_selector("h1.id")
    assert page.inner_text("h1.id") == pictures[0][0]


def test_keys__walk_open_and_go_back(visit: Any) -> None:
    page = visit.open("#/gallery")
    page.locator(".grid a").first.focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    title = page.evaluate("document.activeElement.title")
    second_row = page.evaluate("getComputedStyle(document.querySelector('.grid')).width")
    columns = (int(float(second_row.removesuffix("px"))) + 8) // 168
    assert title == f"train/{columns:04}.png"
    page.keyboard.press("Enter")
    page.wait_for_selector("h1.id")
    assert page.inner_text("h1.id") == title
    page.keyboard.press("Backspace")
    page.wait_for_selector(".grid")


def test_neighbours__are_those_of_the_service_and_each_is_the_next_question(
    visit: Any, pictures: Any
) -> None:
    item_id = pictures[3][0]
    page = visit.open(address(item_id))
    page.wait_for_selector(".grid .similarity")
    answer = page.request.post(f"{visit.site}/neighbours", data={"ids": [item_id], "k": 24}).json()
    shown = page.eval_on_selector_all(".grid a", "links => links.map((a) => a.title)")
    assert shown == [hit["id"] for hit in answer["results"][0]][: len(shown)]
    assert len(shown) > 5
    assert page.locator(".grid .number").first.inner_text() == (
        f"{answer['results'][0][0]['similarity']:.2f}"
    )
    page.locator(".grid a").first.click()
    expect(page.locator("h1.id")).to_have_text(shown[0])
    page.go_back()
    expect(page.locator("h1.id")).to_have_text(item_id)


def test_propagation__draws_every_member_and_lights_its_path(visit: Any, pictures: Any) -> None:
    item_id = pictures[3][0]
    page = visit.open(address(item_id, "propagation"))
    body = {"ids": [item_id], "k": 4, "steps": 3, "order": "step", "limit": 300}
    group = page.request.post(f"{visit.site}/groups", data=body).json()["results"][0]
    members = {member["id"]: member for member in group["members"]}
    assert page.locator(".dots .node").count() == len(members) == group["reached"]
    far = next(m for m in group["members"] if m["step"] == 3)
    node = page.get_by_label(f"{far['id']}, hop 3, similarity {far['similarity']:.2f}")
    node.focus()
    assert page.locator(".lines path.on").count() == 3
    via = members[far["via"]]
    path = [members[via["via"]]["id"], via["id"], far["id"]]
    shown = page.inner_text("figcaption")
    assert shown.endswith(" → ".join(["anchor", *(name.rpartition("/")[2] for name in path)]))


def test_propagation__hardest_moves_the_least_similar_outward(visit: Any, pictures: Any) -> None:
    page = visit.open(address(pictures[3][0], "propagation"))
    body = {"ids": [pictures[3][0]], "k": 4, "steps": 3, "order": "hardest"}
    group = page.request.post(f"{visit.site}/groups", data=body).json()["results"][0]
    ranked = "links => links.map((a) => a.title)"
    nearest = page.eval_on_selector_all(".ranked a", ranked)
    page.get_by_role("button", name="Hardest").click()
    hardest = page.eval_on_selector_all(".ranked a", ranked)
    wanted = [member["id"] for member in group["members"]][: len(hardest)]
    assert hardest == wanted != nearest
    assert "order=hardest" in page.url
    radius = "n => { const m = new DOMMatrix(n.style.transform); return Math.hypot(m.e, m.f) }"
    one_ring = [m for m in group["members"] if m["step"] == 3]
    outer = page.locator(f'.dots .node[aria-label^="{one_ring[0]["id"]}, "]').evaluate(radius)
    inner = page.locator(f'.dots .node[aria-label^="{one_ring[-1]["id"]}, "]').evaluate(radius)
    assert outer > inner


def test_pairs__name_two_items_each(visit: Any, pictures: Any) -> None:
    page = visit.open(address(pictures[0][0], "pairs"))
    first = page.locator(".pairs li").first
    # The hostile item holds the same picture.
    titles = set(first.locator("a").evaluate_all("links => links.map((a) => a.title)"))
    assert titles == {pictures[0][0], HOSTILE}
    assert first.locator(".number").inner_text() == "1.00"


def test_hostile_id_and_metadata__stay_text(visit: Any) -> None:
    page = visit.open(address(HOSTILE))
    page.wait_for_selector(".about img")
    assert page.inner_text("h1.id") == HOSTILE
    assert page.inner_text(".about dt") == "<i>field</i>"
    assert page.inner_text(".about dd") == "<script>alert(1)</script>"
    assert page.locator("main script, main b, main i, main [onerror]").count() == 0
    page.locator(".about dd a").click()
    page.wait_for_selector(".chip.on")
    assert page.inner_text(".tally") == "1 item"
    page.locator(".grid a").first.click()
    page.wait_for_selector("h1.id")
    assert page.inner_text("h1.id") == HOSTILE


def test_unknown_item__says_so(visit: Any) -> None:
    page = visit.open("#/item/nowhere")
    assert "there is no item 'nowhere'" in page.inner_text("main")
    visit.forgive("404")
