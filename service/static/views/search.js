// #/search/image/N: what the gallery holds that is like a dropped, pasted or chosen image; and
// #/list/N: items that were selected elsewhere. Images and selections live in this tab's memory:
// an address of one that is gone says so.

import { Problem, ask, limit, query, request } from "../api.js";
import { choice, empty, emptyPage, h, plural, show as put, slider } from "../dom.js";
import { Grid, similarity, wholeList } from "../grid.js";
import { showPropagation } from "./propagation.js";

const MOST_KEPT = 20;
const CAPTION_PX = 26;
const kept = new Map(); // number -> {images} or {ids, title}
let last = 0;

const keep = (what) => {
  kept.set((last += 1), what);
  if (kept.size > MOST_KEPT) kept.delete(kept.keys().next().value);
  return last;
};
/** Keep images to search with; the number stands in the address. */
export const remember = (images) => keep({ images });
/** Keep a selection of items to list; the number stands in the address. */
export const rememberList = (ids, title) => keep({ ids, title });

export async function show(main, { name, parts, values, signal }) {
  const found = kept.get(Number(parts.at(-1)));
  if (name === "list") return showList(main, found, signal);
  if (!found?.images) return put(main, emptyPage("Search with an image", "Drop one anywhere on this page, paste it, or choose a file. Images are searched with, not kept: after a reload they have to be given again.", chooseButton()));
  const most = await limit("max_images");
  const images = found.images.slice(0, most);
  const strip = h("div", { class: "strip", role: "group", "aria-label": "Searched images" });
  const panel = h("div", { class: "panel" });
  put(main, h("div", { class: "head" }, h("h1", null, "Search"), h("p", { class: "tally" }, images.length < found.images.length ? `the first ${images.length} of ${found.images.length} images` : plural(images.length, "image"))),
    strip, h("div", { class: "controls" }, choice("What to show", [["neighbours", "Neighbours"], ["propagation", "Propagation"]], tabOf(values), (tab) => {
      history.replaceState(null, "", `#/${name}/${parts.join("/")}?tab=${tab}`);
      open(current, tab);
    })), panel);
  let current = 0;
  let controller = new AbortController();
  const buttons = images.map((image, i) => {
    const url = URL.createObjectURL(image);
    signal.addEventListener("abort", () => URL.revokeObjectURL(url));
    return h("button", { type: "button", "aria-label": `Search with ${image.name}`, title: image.name, onclick: () => open(i) }, h("img", { src: url, alt: "" }));
  });
  strip.append(...buttons);
  signal.addEventListener("abort", () => controller.abort());
  async function open(index, tab) {
    controller.abort();
    controller = new AbortController();
    current = index;
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
    put(panel);
    const around = (tab ?? (location.hash.includes("tab=propagation") ? "propagation" : "neighbours"));
    try {
      await (around === "propagation" ? propagate : neighbours)(panel, images[index], values, controller.signal);
    } catch (error) {
      if (controller.signal.aborted) return;
      if (!(error instanceof Problem)) throw error;
      put(panel, empty(error.code === "image_rejected" || error.status === 415 ? "This image cannot be read" : "That did not work", error.message));
    }
  }
  await open(0, tabOf(values));
}

const tabOf = (values) => (values.get("tab") === "propagation" ? "propagation" : "neighbours");

function chooseButton() {
  return h("button", { type: "button", class: "button primary", onclick: () => document.getElementById("choose").click() }, "Choose images");
}

/** One image as a request's body, with the options in the address. */
const send = (path, image, options, signal) =>
  request(query(path, options), { method: "POST", body: image, headers: { "Content-Type": image.type }, signal }).then((response) => response.json());

async function neighbours(panel, image, values, signal) {
  const tally = h("small", { class: "soft", role: "status" });
  const grid = new Grid({ list: wholeList([]), signal, label: "Neighbours of the image", captionPx: CAPTION_PX, caption: (item) => similarity(item.similarity) });
  const load = async (k) => {
    const answer = await send("neighbours", image, { k }, signal);
    tally.textContent = answer.exact ? "Every item was compared." : "Through an index that finds nearly all of the nearest.";
    if (answer.results[0].length) grid.refresh(wholeList(answer.results[0]));
    else put(grid.element, empty("The gallery is empty", "There is nothing to compare with yet."));
  };
  panel.append(h("div", { class: "controls" }, slider("k", { min: 5, max: 100, value: 24, changed: load }), tally), grid.element);
  await load(24);
}

const propagate = (panel, image, values, signal) =>
  showPropagation(panel, { values, signal, body: (options) => send("groups", image, options, signal) });

function showList(main, found, signal) {
  if (!found?.ids) return put(main, emptyPage("This selection is gone", "Selections are kept in the tab that made them. Make a new one on the map.", h("a", { class: "button", href: "#/map" }, "Go to the map")));
  const grid = new Grid({ list: wholeList(found.ids.map((id) => ({ id }))), signal, label: "Selected items" });
  put(main, h("div", { class: "head" }, h("h1", null, found.title), h("p", { class: "tally" }, plural(found.ids.length, "item"))), grid.element);
  grid.draw();
}
