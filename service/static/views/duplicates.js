// #/duplicates?at=0.98: pairs of the gallery above a similarity, side by side. What will go is only
// marked until it is committed; the last mark can be undone.

import { Problem, ask, info, newKey, query } from "../api.js";
import { count, dialog, empty, h, plural, show as put, slider } from "../dom.js";
import { itemLink, similarity } from "../grid.js";
import { forget, thumbnail } from "../pictures.js";

const BATCH = 256; // items asked for their neighbours at a time
const NEIGHBOURS = 4;
const LEAST = 0.8; // of the slider; pairs below are not kept
const MOST_PAIRS = 20_000;

export async function show(main, { values, signal, shown }) {
  const state = { threshold: Math.min(1, Math.max(LEAST, Number(values.get("at")) || 0.98)), pairs: [], at: 0, doomed: new Map(), done: [] };
  const { gallery, limits } = await info(true);
  const tally = h("p", { class: "tally", role: "status" });
  const bar = h("span");
  const stage = h("div", { class: "duel" });
  const commit = h("button", { type: "button", class: "button danger", disabled: true, onclick: () => confirm() }, "Delete 0 items");
  const undoing = h("button", { type: "button", class: "button", disabled: true, onclick: () => undo() }, "Undo");
  put(main, h("div", { class: "head" }, h("h1", null, "Duplicates"), tally),
    h("div", { class: "controls" }, slider("Similarity at least", { min: LEAST, max: 1, step: 0.005, value: state.threshold, format: (v) => v.toFixed(3), moved: (value) => {
      state.threshold = value;
      state.at = 0;
      history.replaceState(null, "", `#/duplicates?at=${value}`);
      draw();
    } }), undoing, commit), h("div", { class: "progress" }, bar), stage);

  const open = () => state.pairs.filter((pair) => Math.round(pair.similarity * 1000) / 1000 >= state.threshold && !pair.kept && !state.doomed.has(pair.a) && !state.doomed.has(pair.b));
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]") || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const act = { ArrowLeft: () => decide("b"), ArrowRight: () => decide("a"), ArrowDown: () => decide(null), u: undo }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }, { signal });

  /** Of the pair in front, mark `side` to go; null keeps both. */
  function decide(side) {
    const [pair] = open();
    if (!pair) return;
    if (side === null) pair.kept = true;
    else state.doomed.set(pair[side], pair);
    state.done.push({ pair, id: side === null ? null : pair[side] });
    draw();
  }
  function undo() {
    const last = state.done.pop();
    if (!last) return;
    if (last.id === null) last.pair.kept = false;
    else state.doomed.delete(last.id);
    draw();
  }
  function confirm() {
    const box = dialog("Delete for good?", h("p", null, `${plural(state.doomed.size, "item")} will be deleted from the gallery. This cannot be undone.`),
      h("p", { class: "row" }, h("button", { type: "button", class: "button danger", onclick: () => remove(box) }, `Delete ${plural(state.doomed.size, "item")}`), h("button", { type: "button", class: "button", onclick: () => box.close() }, "Not yet")));
  }
  async function remove(box) {
    const ids = [...state.doomed.keys()];
    const most = limits.max_rows.limit;
    try {
      for (let from = 0; from < ids.length; from += most) await ask("items/delete", { json: { ids: ids.slice(from, from + most) }, headers: { "Idempotency-Key": newKey() }, signal });
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      box.querySelector("p").textContent = `Not deleted: ${error.message}`;
      return;
    }
    const gone = new Set(ids);
    state.pairs = state.pairs.filter((pair) => !gone.has(pair.a) && !gone.has(pair.b));
    Object.assign(state, { doomed: new Map(), done: [] });
    forget(ids);
    box.close();
    draw();
  }
  let scanned = 0;
  let front = null;
  function draw() {
    const left = open();
    const isDone = scanned >= gallery.items;
    tally.textContent = `${plural(left.length, "pair")} to decide${isDone ? "" : ` · ${count(scanned)} of ${plural(gallery.items, "item")} compared`}`;
    bar.style.width = `${(100 * scanned) / Math.max(1, gallery.items)}%`;
    bar.parentElement.classList.toggle("over", isDone);
    commit.disabled = !state.doomed.size;
    commit.textContent = `Delete ${plural(state.doomed.size, "item")}`;
    undoing.disabled = !state.done.length;
    if (left[0] === front && left.length) return;
    front = left[0];
    if (!front) return put(stage, isDone ? empty(state.doomed.size ? "All decided" : "No pair above this similarity", state.doomed.size ? "Delete what is marked, or undo." : "Move the slider to the left to see less similar pairs.") : h("p", { class: "soft" }, "Comparing …"));
    put(stage, ["a", "b"].map((side, i) => h("figure", null,
      h("a", { href: itemLink(front[side]), title: front[side], "aria-label": front[side] }, thumbnail(front[side], signal, { whole: true })),
      h("figcaption", { class: "wrap" }, front[side]),
      h("button", { type: "button", class: "button", onclick: () => decide(side) }, h("kbd", { "aria-hidden": "true" }, i ? "←" : "→"), `Delete this, keep the ${i ? "left" : "right"} one`))),
      h("p", { class: "row verdict" }, similarity(front.similarity), h("button", { type: "button", class: "button", onclick: () => decide(null) }, h("kbd", { "aria-hidden": "true" }, "↓"), "Keep both")));
  }
  draw();
  shown();
  await scan(signal, limits, (found, many) => {
    scanned += many;
    state.pairs = state.pairs.concat(found).sort((a, b) => b.similarity - a.similarity).slice(0, MOST_PAIRS);
    draw();
  });
  scanned = gallery.items;
  draw();
}

/** Walk through the gallery by cursor; every pair is told once. */
async function scan(signal, limits, tell) {
  const size = Math.min(BATCH, limits.max_page.limit, limits.max_rows.limit, Math.floor(limits.max_results.limit / NEIGHBOURS));
  const seen = new Set(); // pairs
  for (let cursor; cursor !== null;) {
    const page = await ask(query("items", { limit: size, cursor }), { signal });
    const ids = page.items.map((item) => item.id);
    cursor = page.next;
    if (!ids.length) return;
    const { results } = await ask("neighbours", { json: { ids, k: NEIGHBOURS }, signal });
    const found = [];
    results.forEach((hits, i) => {
      for (const hit of hits) {
        const name = [ids[i], hit.id].sort().join("\0");
        if (hit.similarity < LEAST || seen.has(name)) continue;
        if (seen.size < 10 * MOST_PAIRS) seen.add(name);
        found.push({ a: ids[i], b: hit.id, similarity: hit.similarity, kept: false });
      }
    });
    tell(found, ids.length);
  }
}
