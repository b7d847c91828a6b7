// The propagation view: the anchor in the middle, what it reaches in 1, 2, 3 hops on rings around
// it, each joined to the item through which it was reached. Ring by hop, angle by branch, size by
// similarity. "Hardest" moves the least similar members outward: the positives that training
// learns from.

import { ask, limit } from "../api.js";
import { choice, empty, h, plural, show as put, slider, svg } from "../dom.js";
import { itemLink, similarity } from "../grid.js";
import { picture, hash, shortName, thumbnail } from "../pictures.js";

const MOST_NODES = 300; // drawn; a picture each
const POSITIVES = 20; // as many hard positives as the paper takes
const RADIUS = 480; // of the outermost ring, in units of the drawing
const CENTRE = 46;
const SPREAD = 34; // how far a ring's members move outward or inward
const AIR = 5; // between two members
const ROUNDS = 24; // of moving members apart; a ring that is full stays as it is

const walks = (k, steps) => Array.from({ length: steps }, (_, i) => k ** (i + 1)).reduce((a, b) => a + b, 0);

/** Draw the group of an item, or of a searched image (`body`). */
export async function showPropagation(panel, { id, values, signal, moveTo, body }) {
  const most = await limit("max_group_walk");
  const state = { k: clamp(values.get("k2"), 2, 10, 4), steps: clamp(values.get("steps"), 1, 4, 3), order: values.get("order") === "hardest" ? "hardest" : "nearest" };
  const figure = h("figure", { class: "rings" });
  const side = h("div", { class: "positives" });
  const tally = h("p", { class: "soft", role: "status" });
  const redo = (change) => {
    Object.assign(state, change);
    while (walks(state.k, state.steps) > most && state.steps > 1) state.steps -= 1;
    moveTo?.("propagation", { k2: state.k, steps: state.steps, order: state.order });
    return draw();
  };
  panel.append(h("div", { class: "controls" },
    slider("k", { min: 2, max: 10, value: state.k, changed: (k) => redo({ k }) }),
    slider("hops", { min: 1, max: 4, value: state.steps, changed: (steps) => redo({ steps }) }),
    choice("Which positives", [["nearest", "Nearest", "The most similar members"], ["hardest", "Hardest", "The least similar members that still belong: the paper's hard positives"]], state.order, (order) => {
      state.order = order;
      moveTo?.("propagation", { order });
      drawn?.arrange(order);
    }), tally), h("div", { class: "propagation" }, figure, side));
  let drawn = null;
  let latest = 0;
  async function draw() {
    const turn = (latest += 1);
    const options = { k: state.k, steps: state.steps, order: "step", limit: MOST_NODES };
    const answer = body ? await body(options) : await ask("groups", { json: { ids: [id], ...options }, signal });
    if (turn !== latest) return;
    const [group] = answer.results;
    if (!group.members.length) return put(figure, empty("Nothing is reached", "The gallery holds no other item."));
    tally.textContent = group.truncated ? `The first ${group.members.length} of ${plural(group.reached, "member")}, by hop` : `${plural(group.reached, "member")} reached`;
    drawn = rings(figure, side, id ?? null, group.members, signal);
    drawn.arrange(state.order);
  }
  await redo({});
}

const clamp = (text, low, high, otherwise) => Math.min(high, Math.max(low, Math.round(Number(text)) || otherwise));

/** Lay out members as a tree: every branch gets an angle by the number of its leaves. */
export function layOut(members) {
  const nodes = new Map(members.map((member) => [member.id, { ...member, children: [] }]));
  const roots = [];
  for (const node of nodes.values()) {
    node.parent = node.step > 1 ? nodes.get(node.via) : undefined;
    (node.parent?.children ?? roots).push(node);
  }
  const leaves = (node) => (node.leaves = node.children.length ? node.children.reduce((sum, child) => sum + leaves(child), 0) : 1);
  const total = roots.reduce((sum, node) => sum + leaves(node), 0);
  const place = (node, from, to) => {
    node.angle = (from + to) / 2;
    let start = from;
    for (const child of node.children) {
      const end = start + ((to - from) * child.leaves) / node.leaves;
      place(child, start, end);
      start = end;
    }
  };
  let start = -Math.PI / 2;
  for (const root of roots) {
    const end = start + (2 * Math.PI * root.leaves) / total;
    place(root, start, end);
    start = end;
  }
  return [...nodes.values()];
}

/** Turn members that lie on each other apart: `turn` is where each stands in the end. */
function apart(nodes) {
  for (const node of nodes) node.turn = node.angle;
  for (let round = 0, moved = true; round < ROUNDS && moved; round += 1) {
    moved = false;
    nodes.forEach((a, i) => {
      for (let j = i + 1; j < nodes.length; j += 1) {
        const b = nodes[j];
        const room = a.size + b.size + AIR;
        const across = a.radius - b.radius;
        if (Math.abs(across) >= room) continue;
        const between = Math.atan2(Math.sin(b.turn - a.turn), Math.cos(b.turn - a.turn));
        const wanted = 2 * Math.asin(Math.min(1, Math.sqrt(room ** 2 - across ** 2) / (a.radius + b.radius)));
        const lack = wanted - Math.abs(between);
        if (lack < 1e-3) continue;
        const push = (between < 0 ? -1 : 1) * lack * 0.5;
        a.turn -= push;
        b.turn += push;
        moved = true;
      }
    });
  }
}

function rings(figure, side, anchor, members, signal) {
  const nodes = layOut(members);
  const hops = Math.max(...nodes.map((node) => node.step));
  const gap = (RADIUS - CENTRE) / hops;
  const low = Math.min(...nodes.map((n) => n.similarity));
  const high = Math.max(...nodes.map((n) => n.similarity));
  const closeness = (node) => (high > low ? (node.similarity - low) / (high - low) : 1); // 0..1 in this group
  const perRing = Array.from({ length: hops + 1 }, (_, hop) => nodes.filter((n) => n.step === hop).length);
  for (const node of nodes) {
    const room = (2 * Math.PI * node.step * gap) / Math.max(perRing[node.step], 1); // along the ring
    node.size = Math.max(9, Math.min(60, room * 0.4, gap * 0.42)) * (0.7 + 0.3 * closeness(node));
  }
  const edge = RADIUS + SPREAD + 44;
  const lines = svg("g", { class: "lines" });
  const dots = svg("g", { class: "dots" });
  const drawing = svg("svg", { viewBox: `${-edge} ${-edge} ${2 * edge} ${2 * edge}`, role: "group", "aria-label": `What propagates from the anchor, ${hops} hops` },
    svg("g", { class: "hops", "aria-hidden": "true" }, Array.from({ length: hops }, (_, i) => svg("circle", { r: CENTRE + (i + 1) * gap }))), lines, dots,
    svg("g", { class: "hops", "aria-hidden": "true" }, Array.from({ length: hops }, (_, i) => svg("text", { x: 0, y: -(CENTRE + (i + 1) * gap) - SPREAD - 10, "text-anchor": "middle" }, `hop ${i + 1}`))));
  const caption = h("figcaption", { "aria-live": "polite" });
  put(figure, drawing, caption);
  if (anchor !== null) dots.append(node(anchor, CENTRE, "The anchor: "));
  else dots.append(svg("circle", { class: "query", r: CENTRE - 8 }));
  for (const each of nodes) {
    each.line = svg("path", { "aria-hidden": "true" });
    each.group = node(each.id, each.size, "");
    each.group.setAttribute("aria-label", `${each.id}, hop ${each.step}, similarity ${each.similarity.toFixed(2)}`);
    each.group.addEventListener("pointerenter", () => light(each));
    each.group.addEventListener("focus", () => light(each));
    each.group.addEventListener("pointerleave", () => light(null));
    each.group.addEventListener("blur", () => light(null));
    lines.append(each.line);
    dots.append(each.group);
  }
  const quiet = "Point at a member to see the path on which it was reached.";
  function light(chosen) {
    drawing.classList.toggle("lit", chosen !== null);
    const path = [];
    for (let at = chosen; at; at = at.parent) path.unshift(at);
    for (const each of nodes) {
      const isOn = path.includes(each);
      each.line.classList.toggle("on", isOn);
      each.group.classList.toggle("on", isOn);
    }
    put(caption, chosen ? [h("b", null, shortName(chosen.id)), ` · hop ${chosen.step} · similarity ${chosen.similarity.toFixed(2)} · `, ["anchor", ...path.map((n) => shortName(n.id))].join(" → ")] : quiet);
  }
  function node(itemId, size, says) {
    const clip = `clip-${hash(itemId)}-${Math.round(size * 10)}`;
    const box = svg("a", { href: itemLink(itemId, "propagation"), "aria-label": says + itemId, class: says ? "anchor" : "node" },
      svg("clipPath", { id: clip }, svg("circle", { r: size })),
      svg("circle", { class: "face", r: size, style: { "--tint": String(hash(itemId) % 360) } }));
    picture(itemId, signal).then((url) => {
      if (url && !signal.aborted) box.insertBefore(svg("image", { href: url, x: -size, y: -size, width: 2 * size, height: 2 * size, preserveAspectRatio: "xMidYMid slice", "clip-path": `url(#${clip})` }), box.lastChild);
    }, () => {}); // the tinted face stays
    box.append(svg("circle", { class: "rim", r: size }));
    return box;
  }
  function arrange(order) {
    const isHardest = order === "hardest";
    const sorted = [...nodes].sort((a, b) => (isHardest ? a.similarity - b.similarity : b.similarity - a.similarity));
    const wanted = Math.min(POSITIVES, Math.ceil(sorted.length / 2)); // of a small group, its half
    const chosen = new Set(sorted.slice(0, wanted));
    drawing.classList.toggle("hardest", isHardest);
    for (const each of nodes) {
      const out = isHardest ? (chosen.has(each) ? SPREAD : -SPREAD * 0.6) : (0.5 - closeness(each)) * SPREAD;
      each.radius = CENTRE + each.step * gap + out;
    }
    apart(nodes);
    const at = (each) => [each.radius * Math.cos(each.turn), each.radius * Math.sin(each.turn)].map((v) => Math.round(v * 10) / 10);
    for (const each of nodes) {
      const [x, y] = at(each);
      const [px, py] = each.parent ? at(each.parent) : [0, 0];
      const middle = ((each.parent?.radius ?? 0) + each.radius) / 2;
      const bend = (angle) => `${(middle * Math.cos(angle)).toFixed(1)},${(middle * Math.sin(angle)).toFixed(1)}`;
      each.line.setAttribute("d", each.parent ? `M${px},${py}C${bend(each.parent.turn)} ${bend(each.turn)} ${x},${y}` : `M0,0L${x},${y}`);
      each.group.style.transform = `translate(${x}px, ${y}px)`;
      each.group.classList.toggle("chosen", chosen.has(each));
      each.line.classList.toggle("chosen", chosen.has(each));
    }
    put(side, h("h2", null, isHardest ? "Hardest positives" : "Nearest positives"),
      h("p", { class: "soft" }, isHardest ? "Reached by propagation, yet least similar: what training pulls together." : "Reached by propagation and most similar: what the encoder already knows."),
      h("ol", { class: "ranked" }, sorted.slice(0, wanted).map((each) => h("li", { onpointerenter: () => light(each), onpointerleave: () => light(null) },
        h("a", { href: itemLink(each.id, "propagation"), title: each.id, "aria-label": `${each.id}, hop ${each.step}`, onfocus: () => light(each), onblur: () => light(null) }, thumbnail(each.id, signal)),
        h("span", { class: "hop", title: `hop ${each.step}` }, each.step), similarity(each.similarity)))));
  }
  light(null);
  return { arrange };
}
