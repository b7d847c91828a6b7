"""The web page in headless Chromium: how soon, how much, how smooth, how steady.

    python tests/benchmarks/page.py [view map scroll] [--url http://127.0.0.1:8000/]
        [--points 100000]

In: a running service with any gallery. Out: first contentful paint (median of 7 fresh contexts),
bytes on the wire before images, frames per second while a map of `--points` is panned, and heap and
nodes while a gallery of `--points` items is scrolled to its end. Map and large gallery are answers
made up in the browser: what is measured is the page. Nothing is asserted.
"""

import argparse
import json
import math
import random
import statistics
from typing import Any

from playwright.sync_api import sync_playwright

ARGUMENTS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
    "--enable-precise-memory-info",
    "--js-flags=--expose-gc",
]
MANY = """
const real = fetch, total = %d;
window.fetch = async (url, options) => {
  const {pathname, searchParams} = new URL(url);
  if (pathname.startsWith("/images/")) return new Response(null, {status: 204});
  if (pathname !== "/items") return real(url, options);
  const first = Number(searchParams.get("cursor")), end = first + Number(searchParams.get("limit"));
  const items = [];
  for (let i = first; i < Math.min(end, total); i += 1)
    items.push({id: `many/${i}`, metadata: {class: String(i %% 7)}});
  const next = end < total ? String(end) : null;
  return new Response(JSON.stringify({items, next, gallery_version: 1, model: ""}));
};"""
PAN = """async () => {
  const scatter = document.getElementById("main").scatter;
  const times = [];
  const drawn = scatter.frames;
  let last = performance.now();
  const start = last;
  for (let i = 0; performance.now() - start < 4000; i += 1) {
    scatter.pan(8 * Math.cos(i / 20), 8 * Math.sin(i / 20));
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    times.push(now - last);
    last = now;
  }
  times.sort((a, b) => a - b);
  const seconds = (last - start) / 1000;
  const p95_ms = times[Math.floor(times.length * 0.95)];
  return {frames: (scatter.frames - drawn) / seconds, p95_ms};
}"""


def first_view(browser: Any, url: str) -> tuple[float, float]:
    """Milliseconds to the first contentful paint, and kB on the wire before images."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    session = context.new_cdp_session(page)
    session.send("Network.enable")
    paths: dict[str, str] = {}
    sent: dict[str, float] = {}
    session.on(
        "Network.responseReceived", lambda e: paths.update({e["requestId"]: e["response"]["url"]})
    )
    session.on(
        "Network.loadingFinished", lambda e: sent.update({e["requestId"]: e["encodedDataLength"]})
    )
    page.goto(url)
    page.wait_for_selector(".grid a")
    page.wait_for_load_state("networkidle")
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    context.close()
    return paint, sum(n for r, n in sent.items() if "/images/" not in paths.get(r, "")) / 1000


def pan_map(browser: Any, url: str, count: int) -> dict[str, float]:
    """Frames per second while a map is panned."""
    generator = random.Random(0)
    answer = {
        "model": "",
        "gallery_version": 1,
        "method": "pca",
        "items": count,
        "ids": [f"i/{i}" for i in range(count)],
        "coordinates": [[generator.gauss(0, 1), generator.gauss(0, 1)] for _ in range(count)],
    }
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    body = json.dumps(answer)
    page.route("**/map?**", lambda r: r.fulfill(content_type="application/json", body=body))
    page.goto(f"{url}#/map")
    page.wait_for_selector("main:not([aria-busy]) canvas")
    found: dict[str, float] = page.evaluate(PAN)
    context.close()
    return found


def scroll_gallery(browser: Any, url: str, total: int) -> list[tuple[int, float, int]]:
    """(items reached, MB of heap after a collection, nodes) on the way to the end."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    context.add_init_script(MANY % total)
    page = context.new_page()
    page.goto(f"{url}#/gallery")
    page.wait_for_selector(".grid a")
    seen: list[tuple[int, float, int]] = []
    reached, step = 0, total // 10
    known = "Number(document.querySelector('.tally').textContent.split(' ')[0].replaceAll(',', ''))"
    while reached < total:
        page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        page.wait_for_timeout(15)
        reached = int(page.evaluate(known))
        if reached >= step * (len(seen) + 1) or reached >= total:
            page.evaluate("gc()")
            heap = page.evaluate("performance.memory.usedJSHeapSize") / 1e6
            nodes = page.evaluate("document.querySelectorAll('*').length")
            seen.append((reached, heap, nodes))
    context.close()
    return seen


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="view, map, scroll; without any: all")
    parser.add_argument("--url", default="http://127.0.0.1:8000/")
    parser.add_argument("--points", type=int, default=100_000)
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ARGUMENTS)
        parts = arguments.parts or ["view", "map", "scroll"]
        if "view" in parts:
            views = [first_view(browser, arguments.url) for _ in range(7)]
            paints = [paint for paint, _ in views]
            print(f"first contentful paint: median {statistics.median(paints):.0f} ms, "
                  f"worst {max(paints):.0f} ms")  # fmt: skip
            print(f"before images: {math.ceil(max(size for _, size in views))} kB on the wire")
        if "map" in parts:
            panned = pan_map(browser, arguments.url, arguments.points)
            print(f"map of {arguments.points:,} points, panned: {panned['frames']:.1f} frames/s, "
                  f"95 % of frames within {panned['p95_ms']:.1f} ms")  # fmt: skip
        if "scroll" in parts:
            for reached, heap, nodes in scroll_gallery(browser, arguments.url, arguments.points):
                print(f"gallery scrolled to {reached:,}: {heap:.1f} MB of heap, {nodes} nodes")
        browser.close()


if __name__ == "__main__":
    main()
