// Thumbnails of items. Behind an API key a plain <img src> would carry no key, so pictures are
// fetched, kept as blob addresses in a bounded cache, and their memory is given back.

import { imagePath, request } from "./api.js";
import { h } from "./dom.js";

const KEPT = 600; // pictures, some 10 kB each
const AT_ONCE = 6; // requests, as many as a browser opens to one host

const cache = new Map(); // id -> {url} | {url: null}: has none; the least recently used first
const waiting = []; // [{id, signal, resolve, reject}]
let running = 0;

/** The blob address of an item's thumbnail; null where the item has none. */
export function picture(id, signal) {
  const found = cache.get(id);
  if (found) {
    cache.delete(id);
    cache.set(id, found);
    return Promise.resolve(found.url);
  }
  return new Promise((resolve, reject) => {
    waiting.push({ id, signal, resolve, reject });
    next();
  });
}

/** Forget the pictures of items that were written anew or deleted. */
export function forget(ids) {
  for (const id of ids) {
    const found = cache.get(id);
    if (found?.url) URL.revokeObjectURL(found.url);
    cache.delete(id);
  }
}

function next() {
  while (running < AT_ONCE && waiting.length) {
    const job = waiting.shift();
    if (job.signal?.aborted) {
      job.reject(job.signal.reason);
      continue;
    }
    running += 1;
    load(job).finally(() => {
      running -= 1;
      next();
    });
  }
}

async function load({ id, signal, resolve, reject }) {
  try {
    if (!cache.has(id)) {
      const response = await request(imagePath(id), { signal });
      const url = response.status === 204 ? null : URL.createObjectURL(await response.blob());
      if (cache.has(id) && url) URL.revokeObjectURL(url); // another request was quicker
      else cache.set(id, { url });
      while (cache.size > KEPT) forget([cache.keys().next().value]);
    }
    resolve(cache.get(id).url);
  } catch (error) {
    reject(error);
  }
}

/** A number of 0..2^32 that is the same for the same text (FNV-1a). */
export function hash(text) {
  let value = 0x811c9dc5;
  for (let i = 0; i < text.length; i += 1) value = Math.imul(value ^ text.charCodeAt(i), 0x01000193);
  return value >>> 0;
}

/** The last part of an id, for a label. */
export const shortName = (id) => id.split("/").filter(Boolean).pop() ?? id;

/** What stands for an item that has no picture: a tint and the id, neither pretends to be one. */
export function placeholder(id) {
  const tint = hash(id) % 360;
  return h("span", { class: "placeholder", style: { "--tint": String(tint) }, title: `${id} came as a vector: no picture is kept` }, h("span", null, shortName(id)));
}

const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    near.unobserve(target);
    loaders.get(target)?.();
  }
}, { rootMargin: "400px" });
const loaders = new WeakMap(); // element -> what loads its picture

/** A square (or, with `whole`, uncut) thumbnail that loads when it is near the window, until `signal` aborts. */
export function thumbnail(id, signal, { whole = false } = {}) {
  const box = h("span", { class: whole ? "picture whole" : "picture", "aria-hidden": "true" });
  loaders.set(box, () => picture(id, signal).then(
    (url) => {
      if (signal?.aborted) return;
      if (url === null) box.append(placeholder(id));
      else box.append(h("img", { src: url, alt: "", draggable: "false" }));
      box.classList.add("there");
    },
    () => !signal?.aborted && box.classList.add("failed"),
  ));
  near.observe(box);
  signal?.addEventListener("abort", () => near.unobserve(box));
  return box;
}
