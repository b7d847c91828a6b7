// 100,000 points on a canvas, smooth to move: points are written into the pixels themselves, one
// pass over typed arrays a frame; from a few hundred in the window on they are drawn as pictures.
// In: coordinates (2n), a colour number for each point. Out: an element with zoom, pan and lasso.

import { h } from "./dom.js";
import { picture } from "./pictures.js";

const FEW = 160; // points in the window that are drawn as pictures
const PICTURE_PX = 44;
const MOST_ZOOM = 4000;
const MARGIN_PX = 28;

/** Categorical colours that can be told apart in light and dark; the last is for all others. */
export const COLOURS = {
  light: ["#2f57c9", "#b3541e", "#1d7a3f", "#8a3ea8", "#b3261e", "#0f7c86", "#7a6400", "#c0327c", "#4a5a00", "#5b4bd1", "#8c5a3c", "#3f6f9f", "#9a9da6"],
  dark: ["#8aa8ff", "#f2a270", "#6fd08f", "#d69bf0", "#ff8d85", "#5fd0da", "#e2cc5c", "#ff94c4", "#b6cc5a", "#b3a8ff", "#d9b08c", "#8fc1f0", "#5d616c"],
};
export const OTHERS = COLOURS.light.length - 1;
export const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen === "dark" || (chosen !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
};
/** #rrggbb as the pixel it is in memory (little-endian RGBA). */
const pixel = (colour) => (0xff000000 | (parseInt(colour.slice(5, 7), 16) << 16) | (parseInt(colour.slice(3, 5), 16) << 8) | parseInt(colour.slice(1, 3), 16)) >>> 0;

/** Whether a point lies inside a polygon [x0, y0, x1, y1, ...] (even-odd). */
export function inside(x, y, polygon) {
  let is = false;
  for (let i = 0, j = polygon.length - 2; i < polygon.length; j = i, i += 2) {
    const [xi, yi, xj, yj] = [polygon[i], polygon[i + 1], polygon[j], polygon[j + 1]];
    if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) is = !is;
  }
  return is;
}

export class Scatter {
  constructor({ ids, coordinates, signal, chosen, hovered, opened }) {
    Object.assign(this, { ids, signal, chosen, hovered, opened });
    this.count = ids.length;
    this.points = new Float32Array(2 * this.count);
    this.colours = new Uint8Array(this.count).fill(0);
    this.selected = new Uint8Array(this.count);
    this.fit(coordinates);
    this.view = { x: 0.5, y: 0.5, zoom: 1 };
    this.isLasso = false;
    this.frames = 0; // drawn; for the benchmark
    this.pictures = new Map(); // id -> ImageBitmap, null where it has none, undefined while it loads
    this.canvas = h("canvas", { tabindex: 0, role: "img", "aria-label": `Map of ${this.count} items. Plus and minus zoom, arrows move.` });
    this.context = this.canvas.getContext("2d", { alpha: false });
    this.element = h("div", { class: "scatter" }, this.canvas);
    this.listen();
  }

  /** Scale to 0..1 with one scale for both directions. */
  fit(coordinates) {
    const low = [Infinity, Infinity];
    const high = [-Infinity, -Infinity];
    for (const point of coordinates) for (const d of [0, 1]) {
      low[d] = Math.min(low[d], point[d]);
      high[d] = Math.max(high[d], point[d]);
    }
    const span = Math.max(high[0] - low[0], high[1] - low[1]) || 1;
    coordinates.forEach((point, i) => {
      this.points[2 * i] = 0.5 + (point[0] - (low[0] + high[0]) / 2) / span;
      this.points[2 * i + 1] = 0.5 - (point[1] - (low[1] + high[1]) / 2) / span;
    });
    this.aspect = [(high[0] - low[0]) / span, (high[1] - low[1]) / span];
  }

  listen() {
    const { canvas, signal } = this;
    const observer = new ResizeObserver(() => this.resize());
    observer.observe(this.element);
    addEventListener("themechange", () => this.schedule(), { signal });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.schedule(), { signal });
    signal.addEventListener("abort", () => {
      observer.disconnect();
      for (const bitmap of this.pictures.values()) bitmap?.close();
    });
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoomAt(event.offsetX, event.offsetY, Math.exp(-event.deltaY * 0.0016));
    }, { passive: false });
    const pointers = new Map();
    let moved = 0;
    let spread = 0;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
      moved = spread = 0;
      this.lasso = (this.isLasso || event.shiftKey) && pointers.size === 1 ? [event.offsetX, event.offsetY] : null;
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = pointers.get(event.pointerId);
      if (!before) return this.hover(event.offsetX, event.offsetY);
      const [dx, dy] = [event.offsetX - before[0], event.offsetY - before[1]];
      moved += Math.abs(dx) + Math.abs(dy);
      pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
      if (pointers.size === 2) {
        const [a, b] = [...pointers.values()];
        const now = Math.hypot(a[0] - b[0], a[1] - b[1]);
        if (spread) this.zoomAt((a[0] + b[0]) / 2, (a[1] + b[1]) / 2, now / spread);
        spread = now;
      } else if (this.lasso) this.lasso.push(event.offsetX, event.offsetY);
      else this.pan(dx, dy);
      this.schedule();
    });
    const ended = (event) => {
      pointers.delete(event.pointerId);
      if (this.lasso?.length > 6) this.select(this.lasso);
      else if (event.type === "pointerup" && moved < 5) {
        const at = this.nearest(event.offsetX, event.offsetY);
        if (at !== null) this.opened?.(this.ids[at]);
      }
      this.lasso = null;
      this.schedule();
    };
    canvas.addEventListener("pointerup", ended);
    canvas.addEventListener("pointercancel", ended);
    canvas.addEventListener("pointerleave", () => this.hovered?.(null));
    canvas.addEventListener("keydown", (event) => {
      const step = 60;
      const act = { "+": () => this.zoomAt(this.width / 2, this.height / 2, 1.5), "=": () => this.zoomAt(this.width / 2, this.height / 2, 1.5), "-": () => this.zoomAt(this.width / 2, this.height / 2, 1 / 1.5),
        ArrowLeft: () => this.pan(step, 0), ArrowRight: () => this.pan(-step, 0), ArrowUp: () => this.pan(0, step), ArrowDown: () => this.pan(0, -step), 0: () => this.home() }[event.key];
      if (!act) return;
      event.preventDefault();
      act();
    });
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.element;
    if (!width || !height) return;
    this.ratio = Math.min(devicePixelRatio, 2);
    Object.assign(this, { width, height });
    this.canvas.width = Math.round(width * this.ratio);
    this.canvas.height = Math.round(height * this.ratio);
    this.image = this.context.createImageData(this.canvas.width, this.canvas.height);
    this.pixels = new Uint32Array(this.image.data.buffer);
    this.draw();
  }

  /** Pixels of the window for the width of the whole map. */
  get scale() {
    const [wide, high] = this.aspect;
    return Math.min((this.width - 2 * MARGIN_PX) / Math.max(wide, 1e-3), (this.height - 2 * MARGIN_PX) / Math.max(high, 1e-3)) * this.view.zoom;
  }
  home() {
    this.view = { x: 0.5, y: 0.5, zoom: 1 };
    this.schedule();
  }
  pan(dx, dy) {
    this.view.x -= dx / this.scale;
    this.view.y -= dy / this.scale;
    this.schedule();
  }
  zoomAt(x, y, factor) {
    const before = this.scale;
    this.view.zoom = Math.min(MOST_ZOOM, Math.max(0.5, this.view.zoom * factor));
    const grown = 1 / before - 1 / this.scale;
    this.view.x += (x - this.width / 2) * grown;
    this.view.y += (y - this.height / 2) * grown;
    this.schedule();
  }
  schedule() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      if (!this.signal.aborted && this.pixels) this.draw();
    });
  }

  draw() {
    this.frames += 1;
    const dark = isDark();
    const { pixels, points, colours, selected, count, ratio } = this;
    const { width, height } = this.canvas;
    const paper = pixel(dark ? "#141518" : "#ffffff");
    const inks = COLOURS[dark ? "dark" : "light"].map(pixel);
    const marked = pixel(dark ? "#ffffff" : "#000000");
    pixels.fill(paper);
    const scale = this.scale * ratio;
    const left = width / 2 - this.view.x * scale;
    const top = height / 2 - this.view.y * scale;
    const size = Math.max(2, Math.round((count > 30_000 ? 2 : count > 8_000 ? 3 : count > 2_000 ? 4 : 6) * ratio * Math.min(2, Math.max(1, this.view.zoom ** 0.35))));
    const half = size >> 1;
    const visible = [];
    let seen = 0;
    for (let i = 0; i < count; i += 1) {
      const x = (points[2 * i] * scale + left - half) | 0;
      const y = (points[2 * i + 1] * scale + top - half) | 0;
      if (x < 0 || y < 0 || x + size >= width || y + size >= height) continue;
      if (seen < FEW) visible.push(i);
      seen += 1;
      const ink = selected[i] ? marked : inks[colours[i]];
      const side = selected[i] ? size + 1 : size;
      for (let row = 0, at = y * width + x; row < side; row += 1, at += width) {
        const cut = side > 3 && (row === 0 || row === side - 1) ? side >> 2 : 0; // round enough
        for (let column = cut; column < side - cut; column += 1) pixels[at + column] = ink;
      }
    }
    this.context.putImageData(this.image, 0, 0);
    this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    if (seen < FEW && this.view.zoom > 1) this.drawPictures(visible, dark);
    if (this.lasso) this.drawLasso();
  }

  drawPictures(visible, dark) {
    const inks = COLOURS[dark ? "dark" : "light"];
    for (const i of visible) {
      const id = this.ids[i];
      if (!this.pictures.has(id)) this.fetch(id);
      const bitmap = this.pictures.get(id);
      const [x, y] = this.place(i);
      this.context.fillStyle = this.selected[i] ? (dark ? "#fff" : "#000") : inks[this.colours[i]];
      const half = PICTURE_PX / 2;
      if (!bitmap) continue;
      this.context.fillRect(x - half - 2, y - half - 2, PICTURE_PX + 4, PICTURE_PX + 4);
      this.context.drawImage(bitmap, x - half, y - half, PICTURE_PX, PICTURE_PX);
    }
  }

  async fetch(id) {
    this.pictures.set(id, undefined);
    const url = await picture(id, this.signal);
    const bitmap = url === null ? null : await square(url);
    if (this.signal.aborted) return bitmap?.close();
    this.pictures.set(id, bitmap);
    if (this.pictures.size > 4 * FEW) {
      const [oldest, old] = this.pictures.entries().next().value;
      old?.close();
      this.pictures.delete(oldest);
    }
    this.schedule();
  }

  drawLasso() {
    const { context, lasso } = this;
    context.beginPath();
    for (let i = 0; i < lasso.length; i += 2) context.lineTo(lasso[i], lasso[i + 1]);
    context.closePath();
    context.strokeStyle = isDark() ? "#8aa8ff" : "#2f57c9";
    context.lineWidth = 1.5;
    context.stroke();
    context.fillStyle = "rgb(80 120 255 / 12%)";
    context.fill();
  }

  place(i) {
    const { scale } = this;
    return [this.width / 2 + (this.points[2 * i] - this.view.x) * scale, this.height / 2 + (this.points[2 * i + 1] - this.view.y) * scale];
  }
  nearest(x, y, within = 14) {
    let [best, least] = [null, within ** 2];
    for (let i = 0; i < this.count; i += 1) {
      const [px, py] = this.place(i);
      const far = (px - x) ** 2 + (py - y) ** 2;
      if (far < least) [best, least] = [i, far];
    }
    return best;
  }
  hover(x, y) {
    const at = this.nearest(x, y, 10);
    this.canvas.style.cursor = this.isLasso ? "crosshair" : at === null ? "grab" : "pointer";
    this.hovered?.(at === null ? null : this.ids[at], x, y);
  }
  select(polygon) {
    this.selected.fill(0);
    const found = [];
    for (let i = 0; i < this.count; i += 1) {
      const [x, y] = this.place(i);
      if (!inside(x, y, polygon)) continue;
      this.selected[i] = 1;
      found.push(this.ids[i]);
    }
    this.chosen(found);
    this.schedule();
  }
  clear() {
    this.selected.fill(0);
    this.schedule();
  }
}

/** The middle square of a picture, small. */
async function square(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const side = Math.min(image.naturalWidth, image.naturalHeight);
  return createImageBitmap(image, (image.naturalWidth - side) / 2, (image.naturalHeight - side) / 2, side, side, { resizeWidth: 2 * PICTURE_PX, resizeHeight: 2 * PICTURE_PX });
}
