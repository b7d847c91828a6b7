// What a report draws: lines over x, a confusion matrix, a value with its interval. SVG and tables.

import { h, percent, svg } from "./dom.js";

const WIDTH = 560;
const HEIGHT = 280;
const PAD = { left: 52, right: 16, top: 12, bottom: 36 };

/** A share as per cent, any other number with four digits. */
export const figure = (value) => (value === null || value === undefined ? "" : value >= 0 && value <= 1 ? percent(value) : String(Number(value.toPrecision(4))));

/** A metric as people say it: top1 is top-1, mean_per_class has blanks. */
export const metricName = (name) => name.replaceAll("_", " ").replace(/^top(\d)/, "top-$1");

/** [low, high] of figures. */
export const interval = (ends) => (ends ? `${figure(ends[0])} – ${figure(ends[1])}` : "");

/** Round steps between two values. */
export function ticks(low, high, about = 5, least = 0) {
  const raw = (high - low || 1) / about;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = Math.max(least, [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw));
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

/** Curves: {title, unit, x, lines: {name: [[x, y], ...]}}. */
export function lineChart({ title, unit, x: xName, lines }) {
  const all = Object.values(lines).flat();
  if (!all.length) return null;
  const [xs, ys] = [all.map((p) => p[0]), all.map((p) => p[1])];
  const [xLow, xHigh, yLow, yHigh] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const yPad = (yHigh - yLow) * 0.08 || 0.5;
  const x = (v) => PAD.left + ((v - xLow) / (xHigh - xLow || 1)) * (WIDTH - PAD.left - PAD.right);
  const y = (v) => HEIGHT - PAD.bottom - ((v - yLow + yPad) / (yHigh - yLow + 2 * yPad)) * (HEIGHT - PAD.top - PAD.bottom);
  const names = Object.keys(lines);
  return h("figure", { class: "chart" }, h("figcaption", null, h("h2", null, title), unit && h("small", { class: "soft" }, unit)),
    svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}: ${names.map((name) => `${name} ends at ${figure(lines[name].at(-1)?.[1])}`).join(", ")}` },
      ticks(yLow - yPad, yHigh + yPad, 4).map((v) => [svg("line", { class: "rule", x1: PAD.left, x2: WIDTH - PAD.right, y1: y(v), y2: y(v) }), svg("text", { x: PAD.left - 8, y: y(v) + 4, "text-anchor": "end" }, String(v))]),
      ticks(xLow, xHigh, 6, xs.every(Number.isInteger) ? 1 : 0).map((v) => svg("text", { x: x(v), y: HEIGHT - PAD.bottom + 18, "text-anchor": "middle" }, String(v))),
      svg("text", { x: (PAD.left + WIDTH - PAD.right) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, xName),
      names.map((name, i) => [svg("polyline", { class: `line n${i % 4}`, points: lines[name].map((p) => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" ") }),
        lines[name].length < 30 && lines[name].map((p) => svg("circle", { class: `spot n${i % 4}`, cx: x(p[0]), cy: y(p[1]), r: 3 }, svg("title", null, `${name}: ${p[0]}, ${p[1]}`)))])),
    names.length > 1 && h("ul", { class: "legend" }, names.map((name, i) => h("li", null, h("span", { class: `key n${i % 4}`, "aria-hidden": "true" }), name))));
}

/** A confusion matrix, rows the labels; `chosen(label, predicted)` when a cell is clicked. */
export function confusion(matrix, names, chosen) {
  const most = Math.max(...matrix.flatMap((row, i) => row.filter((_, j) => i !== j)), 1);
  return h("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": "Confusion matrix" }, h("p", { class: "soft small" }, "Rows: what it is. Columns: what was predicted."), h("table", { class: "confusion" },
    h("thead", null, h("tr", null, h("td"), names.map((name) => h("th", { scope: "col" }, h("span", null, name))))),
    h("tbody", null, matrix.map((row, i) => {
      const sum = row.reduce((a, b) => a + b, 0) || 1;
      return h("tr", null, h("th", { scope: "row" }, names[i]), row.map((n, j) => {
        const strength = i === j ? n / sum : n / most;
        return h("td", { class: i === j ? "right" : "wrongly", style: { "--strength": (n ? 0.08 + 0.5 * strength : 0).toFixed(3) } },
          n ? h("button", { type: "button", "aria-label": `${names[i]} predicted as ${names[j]}: ${n}`, onclick: () => chosen?.(i, j) }, n) : "");
      }));
    }))));
}

/** Values with intervals on one scale: [{name, value, interval}]. */
export function intervals(rows) {
  const ends = rows.flatMap((row) => [row.value, ...(row.interval ?? [])]);
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  const pad = (high - low) * 0.1 || 0.05;
  const at = (v) => `${((v - low + pad) / (high - low + 2 * pad)) * 100}%`;
  return h("div", { class: "intervals" }, rows.map((row) => h("div", null, h("span", { class: "wrap" }, row.name), h("span", { class: "track", "aria-hidden": "true" },
    row.interval && h("span", { class: "whisker", style: { left: at(row.interval[0]), right: `calc(100% - ${at(row.interval[1])})` } }), h("span", { class: "point", style: { left: at(row.value) } })),
  h("span", { class: "number" }, figure(row.value), row.interval && h("small", { class: "soft" }, ` ${interval(row.interval)}`)))));
}
