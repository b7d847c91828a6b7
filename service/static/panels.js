// Dialogs of the frame: the facts of what runs here, and the keys.

import { address, ask, info, key } from "./api.js";
import { count, dialog, h } from "./dom.js";

const KEYS = [
  ["Arrows", "walk among the images of a grid"],
  ["Enter", "open the image in focus"],
  ["Backspace", "back"],
  ["g", "propagation of this image; elsewhere the groups"],
  ["/", "search by id or field=value"],
  ["Ctrl V", "search with the image in the clipboard"],
  ["?", "this help"],
  ["← →  ↓  u", "duplicates: keep the left or the right one, keep both, undo"],
  ["+ −  arrows", "map: zoom and move; Shift and drag selects"],
];

export function openHelp() {
  dialog("Keys and help",
    h("dl", { class: "keys" }, KEYS.map(([name, what]) => [h("dt", null, name.split("  ").map((k) => h("kbd", null, k))), h("dd", null, what)])),
    h("p", null, "Drop, paste or choose an image anywhere to find what the encoder thinks is similar. Every image is a link: it becomes the next question. Every view has its own address, to go back to or to share."),
    h("p", null, "For programs: ", h("a", { href: address("docs") }, "the routes"), " and ", h("a", { href: address("openapi.json") }, "openapi.json"), "."));
}

export async function openFacts(askForKey) {
  const [facts, ready] = await Promise.all([info(true), ask("readyz")]);
  const { gallery, dims, search } = facts;
  const rows = [
    ["Model", h("code", { class: "wrap" }, facts.model)],
    ["State", `${ready.status}: ${Object.entries(ready.checks).map(([name, is]) => `${name} ${is}`).join(", ")}`],
    ["Output", `${dims.embedding} numbers an embedding, ${dims.features} a feature`],
    ["Input", Object.entries(facts.input).filter(([, v]) => typeof v !== "object").map(([k, v]) => `${k} ${v}`).join(", ")],
    ["Runs on", `${facts.execution_provider}, ${facts.precision}`],
    ["Gallery", `${count(gallery.items)} items, version ${gallery.version}`],
    ["Search", `${search.kind ?? ""} exact up to ${count(search.exact_items)} items`.trim()],
    ["Versions", Object.entries(facts.versions).map(([k, v]) => `${k} ${v}`).join(", ")],
  ];
  dialog("What runs here",
    h("dl", { class: "facts" }, rows.map(([name, value]) => [h("dt", null, name), h("dd", null, value)])),
    facts.training && h("details", null, h("summary", null, "Training"), h("pre", null, JSON.stringify(facts.training, null, 2))),
    h("details", null, h("summary", null, "Limits"), h("dl", { class: "facts" }, Object.entries(facts.limits).map(([name, { limit }]) => [h("dt", null, name), h("dd", { class: "number" }, count(limit))]))),
    h("p", { class: "row" }, h("button", { type: "button", class: "button", onclick: () => {
      key.set(null);
      document.querySelector("dialog[open]")?.close();
      askForKey({ detail: "" });
    } }, key.get() ? "Change the API key" : "Enter an API key")));
}
