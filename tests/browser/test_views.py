"""Search, groups, map, duplicates and upload, in a real browser on a real service."""

import json
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import COUNT, HOSTILE, until

DROP = """([name, bytes, type]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name, {type}));
  const made = (kind) => new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true});
  for (const kind of ["dragover", "drop"]) document.body.dispatchEvent(made(kind));
}"""
PASTE = """([name, bytes, type]) => {
  const clipboardData = new DataTransfer();
  clipboardData.items.add(new File([new Uint8Array(bytes)], name, {type}));
  document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData, bubbles: true}));
}"""


def media_type(name: str) -> str:
    return "image/png" if name.endswith(".png") else "image/jpeg"


def file_of(picture: Any) -> dict[str, Any]:
    name, content, _ = picture
    return {"name": Path(name).name, "mimeType": media_type(name), "buffer": content}


@pytest.mark.parametrize("how", ["choose", DROP, PASTE], ids=["choose", "drop", "paste"])
def test_search__finds_the_picture_itself(visit: Any, pictures: Any, how: str) -> None:
    name, content, _ = pictures[7]
    page = visit.open("#/gallery")
    if how == "choose":
        page.set_input_files("#chosen", file_of(pictures[7]))
    else:
        page.evaluate(how, [name, list(content), media_type(name)])
    first = page.locator(".grid a").first
    expect(first).to_have_attribute("title", name)
    expect(first.locator(".number")).to_have_text("1.00")
    assert page.url.endswith("#/search/image/1")


def test_search__of_several_images_propagates_each(visit: Any, pictures: Any) -> None:
    page = visit.open("#/gallery")
    page.set_input_files("#chosen", [file_of(pictures[7]), file_of(pictures[11])])
    page.get_by_role("button", name=f"Search with {Path(pictures[11][0]).name}").click()
    expect(page.locator(".grid a").first).to_have_attribute("title", pictures[11][0])
    page.get_by_role("button", name="Propagation").click()
    label = f"{pictures[11][0]}, hop 1, similarity 1.00"
    expect(page.get_by_label(label, exact=True)).to_be_attached()


def test_search__with_what_is_no_picture__says_so(visit: Any) -> None:
    page = visit.open("#/gallery")
    broken = {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"}
    page.set_input_files("#chosen", broken)
    expect(page.locator(".empty h2")).to_have_text("This image cannot be read")
    page.goto(f"{visit.site}/#/search/image/99")
    expect(page.locator(".empty h1")).to_have_text("Search with an image")
    visit.forgive("422")


def test_groups__are_made_listed_and_opened(visit: Any) -> None:
    page = visit.open("#/groups")
    page.fill("input[name=min_size]", "2")
    page.get_by_role("button", name="Group the gallery").click()
    page.wait_for_selector(".cards .card")
    grouping = page.url.rpartition("/")[2]
    found = page.request.get(f"{visit.site}/groupings/{grouping}").json()
    assert (found["k"], found["steps"], found["min_size"]) == (4, 3, 2)
    expect(page.locator(".tally")).to_have_text(
        f"{found['groups']} groups hold {found['grouped']} of {COUNT + 41} items"
    )
    assert page.locator(".sizes span").count() == found["groups"]
    page.locator(".card").first.click()
    page.wait_for_selector(".grid a")
    members = page.request.get(f"{visit.site}/groupings/{grouping}/groups/0").json()["items"]
    shown = page.eval_on_selector_all(".grid a", "links => links.map((a) => a.title)")
    assert shown == [member["id"] for member in members][: len(shown)]
    page.go_back()
    page.get_by_role("button", name="Split at 2 steps").click()
    expect(page.locator("h1")).to_have_text("k 4 · 2 steps · at least 2")
    page.goto(f"{visit.site}/#/groups")
    expect(page.locator("tbody tr")).to_have_count(2)


def test_map__lays_out_colours_and_selects(visit: Any) -> None:
    page = visit.open("#/map")
    expect(page.locator(".tally")).to_contain_text(f"{COUNT + 41} of {COUNT + 41} items")
    page.get_by_label("Colour by").select_option(label="class")
    page.wait_for_selector(".legend .swatch")
    box = page.locator("canvas").bounding_box()
    left, top = box["x"] + 2, box["y"] + 2
    right, bottom = left + box["width"] - 4, top + box["height"] - 4
    page.get_by_role("button", name="Lasso").click()
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom)):
        page.mouse.move(x, y, steps=3)
    page.mouse.up()
    expect(page.locator(".tray h2")).to_have_text(f"{COUNT + 41} items")
    with page.expect_download() as saving:
        page.get_by_role("button", name="Save the ids").click()
    ids = Path(saving.value.path()).read_text().splitlines()
    listed = page.request.get(f"{visit.site}/items?limit=500").json()["items"]
    assert sorted(ids) == sorted(item["id"] for item in listed)
    page.get_by_role("button", name="Neighbours of the centre").click()
    expect(page.locator("h1")).to_have_text("Nearest to the centre of the selection")
    page.go_back()
    page.wait_for_selector("canvas")


def test_map__zooms_to_pictures_and_opens_one(visit: Any) -> None:
    page = visit.open("#/map")
    page.locator("canvas").focus()
    for _ in range(3):
        page.keyboard.press("+")
    main = "document.getElementById('main').scatter"
    until(page, f"[...{main}.pictures.values()].some((bitmap) => bitmap)")
    where = f"(() => {{ const s = {main}; for (let i = 0; i < s.count; i++) {{"
    where += "const [x, y] = s.place(i); if (x > 99 && y > 99 && x < s.width - 99 && y < s.height"
    where += " - 99 && s.nearest(x, y) === i) return {x, y, id: s.ids[i]}; } })()"
    point = page.evaluate(where)
    box = page.locator("canvas").bounding_box()
    page.mouse.click(box["x"] + point["x"], box["y"] + point["y"])
    expect(page.locator("h1.id")).to_have_text(point["id"])


def test_duplicates__are_marked_undone_and_deleted(visit: Any, pictures: Any) -> None:
    """The hostile item holds the first picture: they are the one pair of similarity 1."""
    page = visit.open("#/duplicates?at=1")
    expect(page.locator(".tally")).to_have_text("1 pair to decide")
    sides = page.eval_on_selector_all(".duel figure a", "links => links.map((a) => a.title)")
    assert sorted(sides) == sorted([HOSTILE, pictures[0][0]])
    delete = page.locator(".controls .danger")
    page.keyboard.press("ArrowDown")
    expect(page.locator(".tally")).to_have_text("0 pairs to decide")
    expect(delete).to_be_disabled()
    page.keyboard.press("u")
    page.keyboard.press("ArrowLeft" if sides[1] == HOSTILE else "ArrowRight")
    expect(delete).to_have_text("Delete 1 item")
    asked: list[Any] = []

    def answer(route: Any) -> None:
        asked.append(json.loads(route.request.post_data))
        deleted = {"model": "", "gallery_version": 0, "deleted": 1, "missing": []}
        route.fulfill(json=deleted)  # the gallery is shared with other tests

    page.route("**/items/delete", answer)
    delete.click()
    assert asked == [], "nothing goes before it is confirmed"
    page.locator("dialog .danger").click()
    expect(page.locator("dialog")).to_have_count(0)
    assert asked == [{"ids": [HOSTILE]}]
    expect(delete).to_be_disabled()


def test_upload__says_of_each_file_what_became_of_it(visit: Any, pictures: Any) -> None:
    page = visit.open("#/upload")
    broken = {"name": "broken.png", "mimeType": "image/png", "buffer": b"no picture"}
    name = "<img src=x>.jpg"
    good = {**file_of(pictures[20]), "name": name, "mimeType": media_type(pictures[20][0])}
    page.get_by_label("Metadata for all files").fill("batch=autumn")
    page.locator("input[type=file]:not([webkitdirectory])").last.set_input_files([good, broken])
    expect(page.locator(".tally")).to_have_text("1 of 2 files stored · 1 failed")
    rows = page.locator("tbody tr").all_inner_texts()
    assert rows[0].startswith("broken.png")
    assert "failed" in rows[0]
    path = f"{visit.site}/items/{urllib.parse.quote(name, safe='')}"
    assert page.request.get(path).json()["metadata"] == {"batch": "autumn"}
    page.get_by_role("button", name="Retry failures").click()
    expect(page.locator(".tally")).to_have_text("1 of 2 files stored · 1 failed")
    with page.expect_download() as saving:
        page.get_by_role("button", name="Save summary").click()
    table = Path(saving.value.path()).read_text().splitlines()
    assert table[0] == "id,state,reason"
    assert table[1] == f'"{name}",done,""'
    assert table[2].startswith('"broken.png",failed,"')
    page.get_by_role("link", name=name).click()
    expect(page.locator("h1.id")).to_have_text(name)
    assert page.request.delete(path).ok
