// The service as the page sees it: JSON in and out, problems as exceptions, keys, waiting out 429.
// In: paths relative to the page's own address, so that a path prefix needs no setting.

const ROOT = new URL(".", document.baseURI);
const KEY = "invprop.key"; // in sessionStorage: gone with the tab
const MAX_WAITS = 5; // times that one request waits out a 429 or a 503 with Retry-After

/** An error answer (RFC 9457), or a connection that failed (status 0). */
export class Problem extends Error {
  constructor(status, document) {
    super(document.detail);
    this.status = status;
    this.code = document.code;
    this.document = document;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** Told of what concerns the whole page: "key" (wanted or wrong), "wait", "lost", "well". */
export const events = new EventTarget();
const tell = (kind, detail) => events.dispatchEvent(new CustomEvent(kind, { detail }));

export const itemPath = (id) => `items/${encodeURIComponent(id)}`;
export const imagePath = (id) => `images/${encodeURIComponent(id)}?missing=empty`;
export const address = (path) => new URL(path, ROOT).href;

/** The headers that every request carries. */
export function credentials() {
  const value = key.get();
  return value ? { Authorization: `Bearer ${value}` } : {};
}

/** A pause that an abort ends. */
export function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, seconds * 1000);
    signal?.addEventListener("abort", stop, { once: true });
  });
}

/** The raw answer of a request; throws Problem, or the signal's reason when it was aborted. */
export async function request(path, { method = "GET", headers = {}, body, signal, waits = MAX_WAITS } = {}) {
  for (let waited = 0; ; waited += 1) {
    let response;
    try {
      response = await fetch(address(path), { method, body, signal, headers: { ...headers, ...credentials() } });
    } catch (error) {
      if (signal?.aborted) throw signal.reason;
      tell("lost");
      throw new Problem(0, { code: "connection_lost", detail: "The service cannot be reached. What is on screen stays; it is tried again." });
    }
    if (response.ok) {
      tell("well");
      return response;
    }
    const document = await response.json().catch(() => ({ code: "unknown", detail: `${response.status} ${response.statusText}: an answer that is not the service's own` }));
    const after = Number(response.headers.get("Retry-After"));
    if ((response.status === 429 || response.status === 503) && after > 0 && waited < waits) {
      tell("wait", { seconds: after, detail: document.detail });
      await pause(after, signal);
      continue;
    }
    if (response.status === 401) tell("key", document);
    throw new Problem(response.status, document);
  }
}

/** A JSON answer. */
export async function ask(path, options = {}) {
  const { json, ...rest } = options;
  if (json !== undefined) {
    rest.method ??= "POST";
    rest.body = JSON.stringify(json);
    rest.headers = { ...rest.headers, "Content-Type": "application/json" };
  }
  return (await request(path, rest)).json();
}

/** path?name=value...; what is undefined or null is left out. */
export function query(path, values) {
  const given = Object.entries(values).filter(([, value]) => value !== undefined && value !== null);
  return given.length ? `${path}?${new URLSearchParams(given)}` : path;
}

/** Server-sent events by fetch, because EventSource sends no key: yields each event's data. */
export async function* stream(path, signal) {
  const response = await request(path, { signal, headers: { Accept: "text/event-stream" } });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text = (text + value).replaceAll("\r\n", "\n");
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (data.length) yield JSON.parse(data.join("\n"));
    }
  }
}

/** An Idempotency-Key; randomUUID is missing on plain http. */
export function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");
}

let known = null;
/** GET /info, asked once; `fresh` asks again. */
export function info(fresh = false) {
  if (!known || fresh) {
    known = ask("info");
    known.catch(() => (known = null));
  }
  return known;
}

/** The limit of a setting, as /info tells it. */
export const limit = async (name) => (await info()).limits[name].limit;
