// #/map?method=pca|umap&sample=N&by=...: the gallery in two dimensions; lasso a part and ask of it.

import { ask, info, itemPath, pause, query, request } from "../api.js";
import { choice, count, empty, h, plural, save, select, show as put } from "../dom.js";
import { itemLink } from "../grid.js";
import { shortName, thumbnail } from "../pictures.js";
import { COLOURS, OTHERS, Scatter } from "../scatter.js";
import { rememberList } from "./search.js";

const CENTROID_OF = 64; // vectors of a selection that are averaged
const GROUPS = OTHERS; // the largest get a colour each
const SAMPLES = 5; // places of the gallery where fields are looked for, from its first write to its last
const SAMPLE = 100; // items at each
const COLOURED_AT_ONCE = 20_000; // items of a gallery that is coloured before anybody asks

export async function show(main, { values, signal }) {
  const { gallery, limits } = await info(true);
  const most = Math.min(limits.max_map_sample.limit, Math.max(1, gallery.items));
  const method = values.get("method") === "umap" ? "umap" : "pca";
  const sample = Math.min(most, Math.max(1, Number(values.get("sample")) || most));
  const go = (change) => (location.hash = `#/map?${new URLSearchParams({ ...Object.fromEntries(values), method, sample, ...change })}`);
  const tally = h("p", { class: "tally", role: "status" }, "laying it out …");
  const legend = h("ul", { class: "legend", "aria-label": "Colours" });
  const tray = h("section", { class: "tray", "aria-label": "Selection", hidden: true });
  const colouring = h("span");
  const place = h("div", { class: "place" });
  const lasso = h("button", { type: "button", class: "button", "aria-pressed": "false", title: "Or hold Shift while dragging" }, "Lasso");
  const steps = [["1000"], ["5000"], ["20000"], ["50000"], ["100000"]].map(([n]) => Number(n)).filter((n) => n < most).concat(most).map((n) => [String(n), `${count(n)} points`]);
  put(main, h("div", { class: "head" }, h("h1", null, "Map"), tally),
    h("div", { class: "controls" }, choice("Method", [["pca", "PCA", "At once: the two directions of most difference"], ["umap", "UMAP", "Computed in the background: neighbourhoods"]], method, (value) => go({ method: value })),
      select("Points", steps, String(sample), (value) => go({ sample: value })), colouring, lasso), place);
  if (!gallery.items) return put(place, empty("The gallery is empty", h("a", { class: "button primary", href: "#/upload" }, "Upload images")));
  const answer = await laidOut(method, sample, tally, signal);
  tally.textContent = `${count(answer.ids.length)} of ${plural(answer.items, "item")} · gallery version ${answer.gallery_version}`;
  const tip = h("div", { class: "tip", hidden: true });
  const scatter = new Scatter({ ids: answer.ids, coordinates: answer.coordinates, signal, chosen: (ids) => showTray(tray, ids, scatter, signal), hovered: hover, opened: (id) => (location.hash = itemLink(id)) });
  main.scatter = scatter; // for the benchmark
  put(place, scatter.element, tip, tray, legend);
  scatter.resize();
  let hovering = new AbortController();
  let hoveredId = null;
  function hover(id, x, y) {
    if (id !== null) tip.style.transform = `translate(${Math.min(x + 14, scatter.width - 150)}px, ${Math.min(y + 14, scatter.height - 170)}px)`;
    if (id === hoveredId) return;
    hoveredId = id;
    hovering.abort();
    hovering = new AbortController();
    tip.hidden = id === null;
    if (id !== null) put(tip, thumbnail(id, hovering.signal), h("span", null, shortName(id)));
  }
  lasso.addEventListener("click", () => {
    scatter.isLasso = !scatter.isLasso;
    lasso.setAttribute("aria-pressed", String(scatter.isLasso));
  });
  await colours(colouring, legend, scatter, values.get("by") ?? (gallery.items > COLOURED_AT_ONCE ? "" : null), (by) => history.replaceState(null, "", `#/map?${new URLSearchParams({ method, sample, by })}`), signal);
}

/** Ask for a map until it is computed. */
async function laidOut(method, sample, tally, signal) {
  for (let path = query("map", { method, sample }); ;) {
    const response = await request(path, { signal });
    if (response.status !== 202) return response.json();
    const wait = Number(response.headers.get("Retry-After")) || 1;
    path = response.headers.get("Location").replace(/^\//, "");
    tally.textContent = `${method} is being computed …`;
    await pause(wait, signal);
  }
}

/** Offer groupings and metadata fields to colour by; `by` null takes the first field of a few values. */
async function colours(slot, legend, scatter, by, changed, signal) {
  const { gallery_version: version } = await info();
  const cursors = Array.from({ length: SAMPLES }, (_, i) => (i ? String(Math.max(0, Math.round((version * i) / (SAMPLES - 1)) - SAMPLE)) : undefined));
  const [{ items: groupings }, ...pages] = await Promise.all([ask("groupings", { signal }), ...cursors.map((cursor) => ask(query("items", { limit: SAMPLE, cursor }), { signal }))]);
  const fields = new Map(); // name -> its values in this sample
  for (const { metadata } of pages.flatMap(({ items }) => items)) for (const [name, value] of Object.entries(metadata)) {
    if (typeof value !== "object") fields.set(name, (fields.get(name) ?? new Set()).add(value));
  }
  if (by === null) {
    const first = [...fields].find(([, seen]) => seen.size > 1 && seen.size <= OTHERS);
    by = first ? `field:${first[0]}` : "";
  }
  const options = [["", "one colour"], ...[...fields.keys()].map((name) => [`field:${name}`, name]),
    ...groupings.filter((g) => g.state === "succeeded" && g.groups).map((g) => [`group:${g.id}`, `groups: k ${g.k}, ${plural(g.steps, "step")}`])];
  let turn = new AbortController();
  signal.addEventListener("abort", () => turn.abort());
  const paint = async (value) => {
    turn.abort();
    turn = new AbortController();
    changed(value);
    const kind = value.slice(0, value.indexOf(":"));
    const name = value.slice(value.indexOf(":") + 1);
    if (!value) return apply(scatter, legend, new Map(), []);
    put(legend, h("li", { class: "soft" }, "colouring …"));
    if (kind === "field") await byField(scatter, legend, name, turn.signal);
    else await byGroup(scatter, legend, name, turn.signal);
  };
  put(slot, h("label", { class: "row" }, h("span", { class: "soft" }, "Colour by"), select("Colour by", options, by, paint)));
  if (by && options.some(([value]) => value === by)) await paint(by);
}

async function byField(scatter, legend, field, signal) {
  const wanted = new Map(scatter.ids.map((id) => [id, null]));
  const { max_page: most } = (await info()).limits;
  for (let cursor; cursor !== null;) {
    const page = await ask(query("items", { limit: most.limit, cursor }), { signal });
    for (const { id, metadata } of page.items) if (wanted.has(id)) wanted.set(id, metadata[field] ?? null);
    cursor = page.next;
  }
  const sizes = new Map();
  for (const value of wanted.values()) if (value !== null) sizes.set(value, (sizes.get(value) ?? 0) + 1);
  const named = [...sizes.entries()].sort((a, b) => b[1] - a[1]).slice(0, OTHERS).map(([value]) => value);
  const numbers = new Map(named.map((value, i) => [value, i]));
  for (const [id, value] of wanted) wanted.set(id, numbers.get(value) ?? OTHERS);
  apply(scatter, legend, wanted, named.map(String));
}

async function byGroup(scatter, legend, grouping, signal) {
  const path = `groupings/${encodeURIComponent(grouping)}/groups`;
  const { items } = await ask(query(path, { limit: GROUPS }), { signal });
  const numbers = new Map();
  for (const { group } of items) {
    for (let cursor; cursor !== null;) {
      const page = await ask(query(`${path}/${group}`, { limit: (await info()).limits.max_page.limit, cursor }), { signal });
      for (const { id } of page.items) numbers.set(id, group);
      cursor = page.next;
    }
  }
  apply(scatter, legend, numbers, items.map(({ group, size }) => `Group ${group + 1} (${count(size)})`));
}

/** Colour every point; without names all have the first colour. */
function apply(scatter, legend, numbers, names) {
  scatter.ids.forEach((id, i) => (scatter.colours[i] = names.length ? numbers.get(id) ?? OTHERS : 0));
  scatter.schedule();
  const swatch = (i) => h("span", { class: "swatch", "aria-hidden": "true", style: { "--light": COLOURS.light[i], "--dark": COLOURS.dark[i] } });
  put(legend, names.map((name, i) => h("li", null, swatch(i), name)), names.length && scatter.colours.includes(OTHERS) && h("li", null, swatch(OTHERS), "others"));
}

function showTray(tray, ids, scatter, signal) {
  tray.hidden = !ids.length;
  if (!ids.length) return;
  const open = () => (location.hash = `#/list/${rememberList(ids, "Selected on the map")}`);
  put(tray, h("div", { class: "row" }, h("h2", null, plural(ids.length, "item")), h("button", { type: "button", class: "quiet square", "aria-label": "Clear the selection", onclick: () => {
    scatter.clear();
    tray.hidden = true;
  } }, "×")),
    h("div", { class: "mosaic" }, ids.slice(0, 9).map((id) => h("a", { href: itemLink(id), "aria-label": id }, thumbnail(id, signal)))),
    h("div", { class: "stack" }, h("button", { type: "button", class: "button", onclick: open }, "Open as a list"),
      h("button", { type: "button", class: "button", onclick: () => around(ids, signal) }, "Neighbours of the centre"),
      h("button", { type: "button", class: "button", onclick: () => save("selection.txt", ids.join("\n") + "\n") }, "Save the ids")));
}

/** The items nearest to the mean of a selection (of a sample, where it is large). */
async function around(ids, signal) {
  const step = Math.max(1, ids.length / CENTROID_OF);
  const some = Array.from({ length: Math.min(ids.length, CENTROID_OF) }, (_, i) => ids[Math.floor(i * step)]);
  const items = await Promise.all(some.map((id) => ask(query(itemPath(id), { include: "vector" }), { signal })));
  const sum = items[0].vector.map((_, d) => items.reduce((total, { vector }) => total + vector[d], 0));
  const { results } = await ask("neighbours", { json: { vectors: [sum], k: 100 }, signal });
  location.hash = `#/list/${rememberList(results[0].map(({ id }) => id), "Nearest to the centre of the selection")}`;
}
