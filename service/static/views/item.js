// #/item/ID?tab=neighbours|propagation|pairs&k=24&...: one image, and what lies around it.

import { ask, itemPath, limit } from "../api.js";
import { count, empty, h, show as put, slider } from "../dom.js";
import { Grid, itemLink, similarity, wholeList } from "../grid.js";
import { shortName, thumbnail } from "../pictures.js";
import { showPropagation } from "./propagation.js";

const TABS = [["neighbours", "Neighbours"], ["propagation", "Propagation"], ["pairs", "Similar pairs"]];
const CAPTION_PX = 26;
const MOST_PAIRS = 60;

export async function show(main, { parts, values, signal }) {
  const id = parts.join("/");
  const item = await ask(itemPath(id), { signal });
  const tab = TABS.some(([name]) => name === values.get("tab")) ? values.get("tab") : "neighbours";
  document.title = `${shortName(id)} · invprop`;
  const panel = h("div", { class: "panel" });
  const moveTo = (name, extra = {}) => {
    const search = new URLSearchParams({ ...Object.fromEntries(values), tab: name, ...extra });
    history.replaceState(null, "", `#/item/${encodeURIComponent(id)}?${search}`);
  };
  const tabs = h("div", { class: "tabs", role: "group", "aria-label": "What to show" }, TABS.map(([name, text]) =>
    h("a", { href: itemLink(id, name), "aria-current": name === tab ? "true" : undefined }, text)));
  put(main, h("div", { class: "split" },
    h("aside", { class: "about" }, thumbnail(id, signal, { whole: true }), h("h1", { class: "id" }, id), facts(item), tools(id)),
    h("section", { class: "around", "aria-label": "What lies around it" }, tabs, panel)));
  await { neighbours: showNeighbours, propagation: showPropagation, pairs: showPairs }[tab](panel, { id, values, signal, moveTo, item });
}

function facts({ metadata, gallery_version: version }) {
  const rows = Object.entries(metadata);
  return [
    rows.length
      ? h("dl", { class: "facts" }, rows.map(([name, value]) => {
        const text = typeof value === "object" ? JSON.stringify(value) : String(value);
        const filter = JSON.stringify({ [name]: value });
        return [h("dt", null, name), h("dd", null, typeof value === "object" ? text : h("a", { href: `#/gallery?${new URLSearchParams({ filter })}`, title: "All items with it" }, text))];
      }))
      : h("p", { class: "soft" }, "It has no metadata."),
    h("p", { class: "soft" }, `Gallery version ${count(version)}`),
  ];
}

function tools(id) {
  return h("p", { class: "row" },
    h("button", { type: "button", class: "button", onclick: (event) => {
      navigator.clipboard?.writeText(id).then(() => (event.target.textContent = "Copied"), () => (event.target.textContent = "Not allowed here"));
    } }, "Copy id"));
}

async function showNeighbours(panel, { id, values, signal, moveTo }) {
  const k = Math.min(100, Math.max(5, Number(values.get("k")) || 24));
  const tally = h("small", { class: "soft", role: "status" });
  const grid = new Grid({ list: wholeList([]), signal, label: "Neighbours", captionPx: CAPTION_PX, caption: (item) => similarity(item.similarity) });
  const chips = h("div", { class: "chips", role: "group", "aria-label": "Filter by metadata" });
  panel.append(h("div", { class: "controls" }, slider("k", { min: 5, max: 100, value: k, changed: (value) => load(value) }), chips, tally), grid.element);
  let filter = {};
  let wanted = k;
  async function load(count, only = filter) {
    [wanted, filter] = [count, only];
    moveTo("neighbours", { k: count });
    const answer = await ask("neighbours", { json: { ids: [id], k: count, include: ["metadata"], filter }, signal });
    const [items] = answer.results;
    tally.textContent = answer.exact ? "Every item was compared." : "Through an index that finds nearly all of the nearest.";
    if (items.length) grid.refresh(wholeList(items));
    else put(grid.element, empty("No neighbours", "No other item matches."));
    offer(items);
  }
  function offer(items) {
    const seen = new Map(Object.entries(filter).map(([field, value]) => [`${field}\0${value}`, [field, value, 0]]));
    for (const { metadata } of items) for (const [field, value] of Object.entries(metadata ?? {})) {
      if (typeof value === "object") continue;
      const name = `${field}\0${value}`;
      seen.set(name, [field, value, (seen.get(name)?.[2] ?? 0) + 1]);
    }
    const most = [...seen.values()].filter(([field, , n]) => n > 1 || field in filter).sort((a, b) => b[2] - a[2]).slice(0, 8);
    put(chips, most.map(([field, value, n]) => {
      const isOn = field in filter && filter[field] === value;
      return h("button", { type: "button", class: isOn ? "chip on" : "chip", "aria-pressed": String(isOn), onclick: () => load(wanted, isOn ? {} : { [field]: value }) }, `${field} = ${value}`, h("span", { class: "number" }, n));
    }));
  }
  await load(k);
}

/** The most similar pairs among an item and its neighbours: near-duplicates show here. */
async function showPairs(panel, { id, signal }) {
  const around = await ask("neighbours", { json: { ids: [id], k: 50 }, signal });
  const ids = [id, ...around.results[0].map((item) => item.id)];
  const k = Math.min(10, await limit("max_results"));
  const { results } = await ask("neighbours", { json: { ids, k }, signal });
  const among = new Set(ids);
  const pairs = new Map();
  results.forEach((found, i) => {
    for (const other of found) if (among.has(other.id)) pairs.set([ids[i], other.id].sort().join("\0"), { a: ids[i], b: other.id, similarity: other.similarity });
  });
  const sorted = [...pairs.values()].sort((a, b) => b.similarity - a.similarity).slice(0, MOST_PAIRS);
  if (!sorted.length) return put(panel, empty("No pairs", "The gallery holds nothing else."));
  put(panel, h("p", { class: "soft" }, "The most similar pairs among this image and its 50 neighbours. For the whole gallery see ", h("a", { href: "#/duplicates" }, "Duplicates"), "."),
    h("ul", { class: "pairs" }, sorted.map((pair) => h("li", null,
      [pair.a, pair.b].map((one) => h("a", { href: itemLink(one), title: one, "aria-label": one }, thumbnail(one, signal))), similarity(pair.similarity)))));
}
