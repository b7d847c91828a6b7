// A grid of square thumbnails of which only those near the window are in the document.
// In: a list with `length`, `at(index)` (undefined while it loads) and `more()`; how to caption an
// item. Out: an element that follows the window's scrolling; keys walk in it.

import { ask, query } from "./api.js";
import { h, percent } from "./dom.js";
import { thumbnail } from "./pictures.js";

const WANTED_PX = 160;
const GAP_PX = 8;
const LEAST_COLUMNS = 3; // on a phone
const OVERSCAN_ROWS = 2;
const SETTLE_MS = 60; // a row that flies past is not asked for its pictures

/** A similarity as a number with two decimals and a thin bar. */
export function similarity(value) {
  const share = Math.max(0, Math.min(1, value));
  return h("span", { class: "similarity" }, h("span", { class: "number" }, value.toFixed(2)),
    h("span", { class: "gauge", "aria-hidden": "true" }, h("span", { style: { width: percent(share).replace(" ", "") } })));
}

/** The address of an item's view. */
export const itemLink = (id, tab) => `#/item/${encodeURIComponent(id)}${tab ? `?tab=${tab}` : ""}`;

/** A list that is there as a whole. */
export const wholeList = (items) => ({ length: items.length, at: (i) => items[i], more: async () => false });

/** GET /items by cursor. Every page's cursor is kept, the items of the last few pages alone. */
export class CursorList {
  static PAGE = 120;
  static KEPT_PAGES = 12;

  constructor({ filter, signal, changed }) {
    Object.assign(this, { filter, signal, changed, length: 0, ended: false });
    this.cursors = [undefined]; // of the page of the same number
    this.pages = new Map(); // number -> items, the least recently used first
    this.loading = new Map(); // number -> promise
  }

  at(index) {
    const number = Math.floor(index / CursorList.PAGE);
    const page = this.pages.get(number);
    if (page) {
      this.pages.delete(number);
      this.pages.set(number, page);
      return page[index % CursorList.PAGE];
    }
    this.load(number).then(() => this.changed(), () => {});
    return undefined;
  }

  /** Load the page after the last known one; false where there is none. */
  async more() {
    if (this.ended) return false;
    await this.load(this.cursors.length - 1);
    return true;
  }

  load(number) {
    if (!this.loading.has(number)) {
      const done = this.fetch(number).finally(() => this.loading.delete(number));
      this.loading.set(number, done);
    }
    return this.loading.get(number);
  }

  async fetch(number) {
    const answer = await ask(query("items", { limit: CursorList.PAGE, cursor: this.cursors[number], filter: this.filter }), { signal: this.signal });
    this.pages.set(number, answer.items);
    while (this.pages.size > CursorList.KEPT_PAGES) this.pages.delete(this.pages.keys().next().value);
    if (number === this.cursors.length - 1) {
      this.length = number * CursorList.PAGE + answer.items.length;
      if (answer.next === null) this.ended = true;
      else this.cursors.push(answer.next);
    }
  }
}

/** The grid of a list. `caption(item)` gives nodes below the picture, `mark(item)` a class. */
export class Grid {
  constructor({ list, signal, label, caption, captionPx = 0, mark, open, failed }) {
    Object.assign(this, { list, signal, caption, captionPx, mark, open, failed });
    this.cells = new Map(); // index -> {element, controller, item}
    this.focused = 0;
    this.element = h("div", { class: "grid", role: "list", "aria-label": label });
    const again = () => this.schedule();
    addEventListener("scroll", again, { passive: true, signal });
    const observer = new ResizeObserver(again);
    observer.observe(this.element);
    signal.addEventListener("abort", () => {
      observer.disconnect();
      this.clear();
    });
    this.element.addEventListener("keydown", (event) => this.key(event));
  }

  /** Draw again from another list, or the same list that has changed. */
  refresh(list = this.list) {
    this.list = list;
    this.clear();
    this.schedule();
  }

  schedule() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      if (!this.signal.aborted) this.draw();
    });
  }

  measure() {
    const width = this.element.clientWidth;
    const columns = Math.max(LEAST_COLUMNS, Math.floor((width + GAP_PX) / (WANTED_PX + GAP_PX)));
    const side = (width - GAP_PX * (columns - 1)) / columns;
    return { columns, side, row: side + this.captionPx + GAP_PX };
  }

  draw() {
    if (!this.element.isConnected || !this.element.clientWidth) return;
    const { columns, side, row } = this.measure();
    const rows = Math.ceil(this.list.length / columns);
    this.element.style.height = `${Math.max(0, rows * row - GAP_PX)}px`;
    const top = -this.element.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(top / row) - OVERSCAN_ROWS) * columns;
    const last = Math.min(this.list.length, (Math.ceil((top + innerHeight) / row) + OVERSCAN_ROWS) * columns);
    for (const [index, cell] of this.cells) {
      const item = this.list.at(index);
      if (index < first || index >= last || item !== cell.item) this.drop(index);
    }
    for (let index = first; index < last; index += 1) {
      const cell = this.cells.get(index) ?? this.make(index);
      const { style } = cell.element;
      style.width = `${side}px`;
      style.height = `${side + this.captionPx}px`;
      style.transform = `translate(${(index % columns) * (side + GAP_PX)}px, ${Math.floor(index / columns) * row}px)`;
    }
    if (rows * row - top < innerHeight * 2.5) this.fetchMore();
  }

  async fetchMore() {
    if (this.fetching) return;
    this.fetching = true;
    try {
      if (await this.list.more()) this.schedule();
    } catch (error) {
      if (!this.signal.aborted) this.failed?.(error);
    } finally {
      this.fetching = false;
    }
  }

  make(index) {
    const item = this.list.at(index);
    const controller = new AbortController();
    const element = h("div", { class: "cell", role: "listitem", "aria-posinset": index + 1, "aria-setsize": this.list.ended === false ? -1 : this.list.length });
    if (item) {
      const { id } = item;
      const link = h("a", { href: itemLink(id), title: id, tabindex: index === this.focused ? 0 : -1, class: this.mark?.(item), "aria-label": this.nameOf(item), onfocus: () => this.focusOn(index, false) });
      element.append(link);
      if (this.open) link.addEventListener("click", (event) => this.open(item, event));
      setTimeout(() => !controller.signal.aborted && link.prepend(thumbnail(id, controller.signal)), this.cells.size ? SETTLE_MS : 0);
      if (this.caption) link.append(h("span", { class: "caption" }, this.caption(item)));
    }
    this.element.append(element);
    const cell = { element, controller, item };
    this.cells.set(index, cell);
    return cell;
  }

  nameOf(item) {
    return item.similarity === undefined ? item.id : `${item.id}, similarity ${item.similarity.toFixed(2)}`;
  }

  drop(index) {
    const { element, controller } = this.cells.get(index);
    controller.abort();
    element.remove();
    this.cells.delete(index);
  }

  clear() {
    for (const index of [...this.cells.keys()]) this.drop(index);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { columns } = this.measure();
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -this.focused }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    this.focusOn(Math.max(0, Math.min(this.list.length - 1, this.focused + by)), true);
  }

  focusOn(index, move) {
    const link = (at) => this.cells.get(at)?.element.querySelector("a");
    link(this.focused)?.setAttribute("tabindex", "-1");
    this.focused = index;
    link(index)?.setAttribute("tabindex", "0");
    if (!move) return;
    const { columns, row } = this.measure();
    const at = this.element.getBoundingClientRect().top + Math.floor(index / columns) * row;
    const bar = 64; // the sticky bar, with some air
    if (at < bar) scrollBy(0, at - bar);
    else if (at + row > innerHeight) scrollBy(0, at + row - innerHeight);
    this.draw();
    link(index)?.focus({ preventScroll: true });
  }
}
