// #/groups, #/groups/GROUPING, #/groups/GROUPING/GROUP: partitions of the whole gallery.

import { Problem, ask, pause, query } from "../api.js";
import { count, empty, h, labelled, moment, percent, plural, show as put } from "../dom.js";
import { Grid, itemLink, similarity } from "../grid.js";
import { thumbnail } from "../pictures.js";

const PAGE = 30;
const LOOK_EVERY_S = 0.7;

export function show(main, route) {
  const [grouping, group] = route.parts;
  if (group !== undefined) return showGroup(main, grouping, group, route);
  return grouping === undefined ? showAll(main, route) : showGrouping(main, grouping, route);
}

const link = (...parts) => `#/groups/${parts.map(encodeURIComponent).join("/")}`;
const ended = ({ state }) => state === "succeeded" || state === "failed";
const named = ({ k, steps, min_size: least }) => `k ${k} · ${plural(steps, "step")} · at least ${least}`;

/** Ask for a grouping and go to it. */
async function begin(options, signal) {
  const made = await ask("groupings", { json: options, signal });
  location.hash = link(made.id);
}

async function showAll(main, { signal, shown }) {
  const number = (name, value, min, max) => h("input", { type: "number", name, value, min, max, required: true });
  const wrong = h("p", { class: "wrong", role: "alert" });
  const form = h("form", { class: "controls form", onsubmit: async (event) => {
    event.preventDefault();
    const values = Object.fromEntries([...new FormData(form)].map(([name, value]) => [name, Number(value)]));
    try {
      await begin(values, signal);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      wrong.textContent = error.message;
    }
  } },
    labelled("k", number("k", 4, 1, 50), "neighbours of each"), labelled("Steps", number("steps", 3, 1, 6), "hops"),
    labelled("Least size", number("min_size", 3, 1, 1e6), "smaller stay alone"), h("button", { class: "button primary" }, "Group the gallery"));
  const list = h("div", { class: "panel" });
  put(main, h("div", { class: "head" }, h("h1", null, "Groups"), h("p", { class: "tally" }, "What reaches each other by propagation belongs together.")), form, wrong, list);
  for (;;) {
    const { items } = await ask("groupings", { signal });
    put(list, items.length ? table(items) : empty("No groupings yet", "Group the gallery with the values above: a larger k or more steps give fewer and larger groups."));
    shown();
    if (items.every(ended)) return;
    await pause(LOOK_EVERY_S, signal);
  }
}

function table(items) {
  return h("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": "Groupings" }, h("table", { class: "table" },
    h("thead", null, h("tr", null, ["Grouping", "State", "Groups", "Grouped", "Gallery", "Made"].map((text) => h("th", null, text)))),
    h("tbody", null, items.map((each) => h("tr", null,
      h("td", null, h("a", { href: link(each.id) }, named(each))),
      h("td", null, h("span", { class: `state ${each.state}` }, each.state)),
      h("td", { class: "number" }, each.groups === null ? "" : count(each.groups)),
      h("td", { class: "number" }, each.grouped === null || !each.items ? "" : percent(each.grouped / each.items)),
      h("td", { class: "number" }, `version ${count(each.gallery_version)}`),
      h("td", { class: "keep" }, moment(each.created_at)))))));
}

async function showGrouping(main, id, { signal, shown }) {
  let grouping;
  for (;;) {
    grouping = await ask(`groupings/${encodeURIComponent(id)}`, { signal });
    if (ended(grouping)) break;
    const { stage = grouping.state, done = 0, total = 0 } = grouping.progress ?? {};
    const share = total ? done / total : 0;
    put(main, h("h1", null, named(grouping)), h("section", { class: "empty" }, h("h2", null, `${stage} …`),
      h("div", { class: "progress", role: "progressbar", "aria-label": stage, "aria-valuenow": Math.round(share * 100) }, h("span", { style: { width: `${share * 100}%` } })),
      h("p", { class: "number" }, total ? `${count(done)} of ${count(total)}` : "waiting")));
    shown();
    await pause(LOOK_EVERY_S, signal);
  }
  const finer = grouping.steps > 1 && h("button", { type: "button", class: "button", onclick: () => begin({ k: grouping.k, steps: grouping.steps - 1, min_size: grouping.min_size }, signal) }, `Split at ${plural(grouping.steps - 1, "step")}`);
  const head = h("div", { class: "head" }, h("h1", null, named(grouping)), h("p", { class: "tally" }, grouping.state === "failed" ? grouping.error : `${plural(grouping.groups, "group")} hold ${count(grouping.grouped)} of ${plural(grouping.items, "item")}`));
  put(main, h("a", { class: "back", href: "#/groups" }, "All groupings"), head);
  if (grouping.state === "failed") return main.append(empty("This grouping failed", grouping.error ?? ""));
  if (!grouping.groups) return main.append(empty("No group", grouping.message ?? "Nothing reaches enough others; try a larger k, more steps or a smaller least size."));
  main.append(h("div", { class: "controls" }, sizes(grouping), finer));
  const cards = h("ul", { class: "cards" });
  const more = h("button", { type: "button", class: "button", onclick: () => load() }, "More groups");
  main.append(cards, more);
  let cursor;
  async function load() {
    const page = await ask(query(`groupings/${encodeURIComponent(id)}/groups`, { limit: PAGE, cursor }), { signal });
    cards.append(...page.items.map((each) => card(id, each, signal)));
    cursor = page.next;
    more.hidden = cursor === null;
  }
  await load();
}

/** The sizes of all groups as bars, the largest first. */
function sizes({ sizes: all }) {
  const shown = all.slice(0, 120);
  return h("div", { class: "sizes", role: "img", "aria-label": `Sizes of the groups: the largest ${count(all[0])}, the median ${count(all[all.length >> 1])}` },
    shown.map((size) => h("span", { style: { height: `${Math.max(4, (100 * size) / all[0])}%` } })));
}

function card(grouping, { group, size, representative, members }, signal) {
  return h("li", null, h("a", { class: "card", href: link(grouping, String(group)), "aria-label": `Group ${group + 1}, ${plural(size, "item")}, representative ${representative}` },
    h("span", { class: "mosaic" }, members.map(({ id }) => thumbnail(id, signal)), Array.from({ length: Math.max(0, 9 - members.length) }, () => h("span", { class: "picture none" }))),
    h("span", { class: "row" }, h("b", null, `Group ${group + 1}`), h("span", { class: "soft number" }, plural(size, "item")))));
}

async function showGroup(main, grouping, group, { signal }) {
  const path = `groupings/${encodeURIComponent(grouping)}/groups/${encodeURIComponent(group)}`;
  const list = { length: 0, ended: false, items: [], at: (i) => list.items[i], async more() {
    if (list.ended) return false;
    const page = await ask(query(path, { limit: 200, cursor: list.cursor }), { signal });
    list.items.push(...page.items);
    Object.assign(list, { page, cursor: page.next, length: list.items.length, ended: page.next === null });
    return true;
  } };
  await list.more();
  const { size, representative } = list.page;
  const grid = new Grid({ list, signal, label: `Members of group ${Number(group) + 1}`, captionPx: 26, caption: (item) => similarity(item.similarity) });
  put(main, h("a", { class: "back", href: link(grouping) }, "The grouping"),
    h("div", { class: "head" }, h("h1", null, `Group ${Number(group) + 1}`), h("p", { class: "tally" }, `${plural(size, "item")}, by closeness to the representative`)),
    h("p", { class: "row" }, h("a", { class: "button", href: itemLink(representative, "propagation") }, "Propagation from the representative")), grid.element);
  grid.draw();
}
