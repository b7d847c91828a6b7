// #/gallery?filter={"field": "value"}: all items, in endless scrolling, narrowed by metadata.

import { info, ask, query } from "../api.js";
import { count, empty, h, plural } from "../dom.js";
import { CursorList, Grid } from "../grid.js";
import { picture } from "../pictures.js";

const SAMPLED = 500; // items whose metadata are looked at for the fields that can be chosen
const MOST_VALUES = 24;
const LOOKED_AT = 6; // items of the first page: when none of them has a picture, it is said why

export async function show(main, { values, signal }) {
  const given = values.get("filter");
  const filter = given ? JSON.parse(given) : {};
  const facts = await info(true);
  const total = facts.gallery.items;
  const tally = h("p", { class: "tally", role: "status" });
  const list = new CursorList({ filter: given ?? undefined, signal, changed: () => grid.schedule() });
  const grid = new Grid({ list, signal, label: "Items of the gallery", failed: (error) => (tally.textContent = error.message) });
  const say = () => {
    const seen = list.length;
    tally.textContent = list.ended ? plural(seen, "item") : given ? `${count(seen)} so far` : `${count(seen)} of ${count(total)} items`;
  };
  const more = list.more.bind(list);
  list.more = async () => {
    const was = await more();
    say();
    return was;
  };
  await list.more();
  main.append(h("div", { class: "head" }, h("h1", null, "Gallery"), tally), chips(filter), grid.element);
  if (!list.length && given) grid.element.replaceWith(empty("Nothing matches", "No item has these metadata.", h("a", { class: "button", href: "#/gallery" }, "Show all items")));
  else if (!list.length) grid.element.replaceWith(empty("The gallery is empty", "Add images to see what the encoder thinks belongs together.", h("a", { class: "button primary", href: "#/upload" }, "Upload images"), h("pre", null, "invprop add FOLDER")));
  grid.draw();
  if (list.length) explainMissing(main, list, grid, signal);
  offer(main, filter, signal);
}

/** A gallery that training left holds vectors alone: say how its pictures come in. */
async function explainMissing(main, list, grid, signal) {
  const some = Array.from({ length: LOOKED_AT }, (_, i) => list.at(Math.floor((i * list.length) / LOOKED_AT)));
  const found = await Promise.all(some.map(({ id }) => picture(id, signal).catch(() => "unknown")));
  if (signal.aborted || found.some((url) => url !== null)) return;
  const here = new URL(".", document.baseURI).href.replace(/\/$/, "");
  main.insertBefore(h("section", { class: "hint" },
    h("p", null, h("b", null, "These items have no pictures."), " They came from training as vectors alone. Add the folder that was trained on: under the same ids they get them."),
    h("pre", null, `invprop --url ${here} add FOLDER`)), grid.element);
  grid.schedule();
}

const link = (filter) => (Object.keys(filter).length ? `#/gallery?${new URLSearchParams({ filter: JSON.stringify(filter) })}` : "#/gallery");

function chips(filter) {
  return h("div", { class: "chips", "aria-label": "Filters", role: "group" },
    Object.entries(filter).map(([field, value]) => {
      const rest = { ...filter };
      delete rest[field];
      return h("a", { class: "chip on", href: link(rest), "aria-label": `Remove the filter ${field} = ${value}` }, h("span", null, `${field} = ${[value].flat().join(" or ")}`), h("span", { "aria-hidden": "true" }, "×"));
    }));
}

/** The fields and values of a sample of the gallery, as filters to choose. */
async function offer(main, filter, signal) {
  const { items } = await ask(query("items", { limit: Math.min(SAMPLED, (await info()).limits.max_page.limit) }), { signal });
  const fields = new Map(); // field -> Map of value -> count
  for (const { metadata } of items) {
    for (const [field, value] of Object.entries(metadata)) {
      if (typeof value === "object" && value !== null) continue;
      if (!fields.has(field)) fields.set(field, new Map());
      const seen = fields.get(field);
      seen.set(value, (seen.get(value) ?? 0) + 1);
    }
  }
  document.getElementById("search-fields").replaceChildren(...[...fields.keys()].map((field) => h("option", { value: `${field}=` })));
  const bar = main.querySelector(".chips");
  for (const [field, seen] of fields) {
    if (field in filter || seen.size > MOST_VALUES) continue;
    const options = [...seen.keys()].sort((a, b) => String(a).localeCompare(String(b), undefined, { numeric: true }));
    bar.append(h("label", { class: "chip select" }, h("span", null, field), h("select", { "aria-label": `Filter by ${field}`, onchange: (event) => {
      if (event.target.value) location.hash = link({ ...filter, [field]: options[Number(event.target.value)] });
    } }, h("option", { value: "" }, "any"), options.map((value, i) => h("option", { value: i }, String(value))))));
  }
}
