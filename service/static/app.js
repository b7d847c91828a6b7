// The frame: addresses to views, the bar, the state of the service, keys, and what is dropped.
// Views are modules loaded when they are first asked for. A view is show(main, route) where route
// has {parts, values, signal, shown}: the signal aborts when the view is left, and with it its
// requests; shown() is called by a view that goes on after it is there.

import { Problem, address, ask, credentials, events, info, key, pause } from "./api.js";
import { count, dialog, emptyPage, h, show } from "./dom.js";
import { openFacts, openHelp } from "./panels.js";

const VIEWS = {
  gallery: () => import("./views/gallery.js"),
  item: () => import("./views/item.js"),
  search: () => import("./views/search.js"),
  list: () => import("./views/search.js"),
  groups: () => import("./views/groups.js"),
  map: () => import("./views/map.js"),
  duplicates: () => import("./views/duplicates.js"),
  evaluations: () => import("./views/evaluations.js"),
  upload: () => import("./views/upload.js"),
};
const LOOK_EVERY_S = 15; // at /readyz
const THEMES = ["auto", "light", "dark"];

const at = (id) => document.getElementById(id);
const main = at("main");
let leaving = new AbortController();
const places = new Map(); // address -> how far it was scrolled

/** #/item/a%2Fb?tab=x -> {name, parts: ["a/b"], values} */
export function parse(hash) {
  const [path, search = ""] = hash.replace(/^#\/?/, "").split("?");
  const [name, ...parts] = path.split("/").map((part) => decodeURIComponent(part));
  return { name: name || "gallery", parts, values: new URLSearchParams(search) };
}

async function navigate() {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const here = location.hash;
  let route;
  try {
    route = parse(here);
  } catch {
    route = { name: "", parts: [], values: new URLSearchParams() }; // a % that encodes nothing
  }
  for (const link of at("views").children) {
    const isHere = link.getAttribute("href") === `#/${route.name}`;
    if (isHere) {
      link.setAttribute("aria-current", "page");
      link.parentElement.scrollLeft = link.offsetLeft - 24; // on a phone not all views fit
    } else link.removeAttribute("aria-current");
  }
  const load = VIEWS[route.name];
  main.className = `view ${load ? route.name : ""}`;
  main.setAttribute("aria-busy", "true");
  try {
    if (!load) {
      show(main, emptyPage("There is no such page", h("a", { class: "button", href: "#/gallery" }, "Go to the gallery")));
      return;
    }
    const view = await load();
    if (signal.aborted) return;
    show(main);
    document.title = `${route.name[0].toUpperCase()}${route.name.slice(1)} · invprop`;
    const shown = () => !signal.aborted && main.removeAttribute("aria-busy");
    await view.show(main, { ...route, signal, shown });
    if (!signal.aborted && places.has(here)) scrollTo(0, places.get(here));
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Problem)) throw error;
    show(main, failure(error));
  } finally {
    if (!signal.aborted) main.removeAttribute("aria-busy");
  }
}

/** An error as the person should read it. */
function failure(problem) {
  const again = h("button", { type: "button", class: "button", onclick: navigate }, "Try again");
  if (problem.status === 401) return emptyPage("An API key is needed", "Enter it to go on; it is kept until this tab is closed.", h("button", { type: "button", class: "button", onclick: () => askForKey(problem.document) }, "Enter the key"));
  if (problem.status === 404) return emptyPage("Not found", problem.message, h("a", { class: "button", href: "#/gallery" }, "Go to the gallery"));
  if (problem.code === "not_ready") return emptyPage("The service is not ready yet", problem.message, "The page goes on by itself when it is.");
  return emptyPage(problem.status ? problem.document.title ?? "That did not work" : "No connection", problem.message, again);
}

let asking = null;
function askForKey(problem) {
  if (asking) return;
  const input = h("input", { type: "password", name: "key", autocomplete: "off", "aria-label": "API key", required: true });
  asking = dialog("API key", h("p", null, key.get() ? problem.detail : "This service wants an API key. It is kept in this tab alone and sent with each request."),
    h("form", { class: "stack", onsubmit: (event) => {
      event.preventDefault();
      key.set(input.value.trim());
      asking.close();
      info(true).then(start, () => {});
    } }, input, h("button", { class: "button primary" }, "Use this key")));
  asking.addEventListener("close", () => (asking = null));
  input.focus();
}

// ---- the bar

async function describe() {
  const facts = await info(true);
  at("model").textContent = `${facts.model.slice(0, 8)} · ${facts.dims.embedding} d · ${facts.execution_provider.replace("ExecutionProvider", "")} · ${count(facts.gallery.items)} items`;
}

function state(kind, text) {
  at("status").className = `dot ${kind}`;
  at("status").setAttribute("aria-label", text);
  at("facts").title = `${text}; click for the facts`;
}

let noticeTimer;
export function notice(text, seconds = 0) {
  clearTimeout(noticeTimer);
  at("notice").textContent = text;
  at("notice").hidden = !text;
  if (seconds) noticeTimer = setTimeout(() => (at("notice").hidden = true), seconds * 1000);
}

/** Look at /readyz for ever; when the service has become ready, go on where we were. */
async function watch() {
  for (let wasReady = null; ; ) {
    let isReady = false;
    try {
      const response = await fetch(address("readyz"), { headers: credentials() });
      const found = await response.json();
      isReady = response.ok;
      state(isReady ? "ready" : "waiting", isReady ? "ready" : `not ready: ${found.detail}`);
      if (!isReady) notice(`The service is not ready: ${found.detail}`);
    } catch {
      state("gone", "no connection to the service");
      notice("No connection to the service. What is on screen stays; trying again.");
    }
    if (isReady && wasReady === false) {
      notice("");
      await start();
    }
    wasReady = isReady;
    await pause(isReady ? LOOK_EVERY_S : 2);
  }
}

async function start() {
  await Promise.all([describe().catch((error) => { if (!(error instanceof Problem)) throw error; }), navigate()]);
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  try {
    localStorage.setItem("invprop.theme", name);
  } catch {
    // a browser that keeps nothing: the theme lasts until the page is left
  }
  at("theme").setAttribute("aria-label", `Theme: ${name === "auto" ? "automatic" : name}`);
  at("theme").title = at("theme").getAttribute("aria-label");
  dispatchEvent(new Event("themechange"));
}

// ---- searching

async function searchWith(files) {
  const images = [...files].filter((file) => file.type.startsWith("image/"));
  if (!images.length) return notice("That is no image: drop or paste JPEG, PNG or WebP files.", 6);
  const { remember } = await import("./views/search.js");
  location.hash = `#/search/image/${remember(images)}`;
}

at("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("search-text").value.trim();
  const [field, ...value] = text.split("=");
  if (!text) location.hash = "#/gallery";
  else if (value.length) location.hash = `#/gallery?${new URLSearchParams({ filter: JSON.stringify({ [field.trim()]: literal(value.join("=").trim()) }) })}`;
  else location.hash = `#/item/${encodeURIComponent(text)}`;
});

/** 5, true and null as JSON has them; everything else is text. A text of digits wants quotes. */
export function literal(text) {
  try {
    const value = JSON.parse(text);
    return typeof value === "object" && value !== null ? text : value;
  } catch {
    return text;
  }
}

at("choose").addEventListener("click", () => at("chosen").click());
at("chosen").addEventListener("change", (event) => {
  searchWith(event.target.files);
  event.target.value = "";
});
addEventListener("paste", (event) => event.clipboardData.files.length && searchWith(event.clipboardData.files));

const carriesFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
const isUpload = () => parse(location.hash).name === "upload"; // it has a target of its own
addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  at("drop").hidden = isUpload();
});
addEventListener("dragleave", (event) => event.relatedTarget === null && (at("drop").hidden = true));
addEventListener("drop", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  at("drop").hidden = true;
  if (!isUpload()) searchWith(event.dataTransfer.files);
});

// ---- keys

addEventListener("keydown", (event) => {
  const { target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (document.querySelector("dialog[open]") || target.isContentEditable || /^(INPUT|SELECT|TEXTAREA)$/.test(target.tagName)) return;
  const act = {
    "/": () => at("search-text").focus(),
    "?": openHelp,
    Backspace: () => history.back(),
    g: () => {
      const { name, parts } = parse(location.hash);
      location.hash = name === "item" ? `#/item/${encodeURIComponent(parts.join("/"))}?tab=propagation` : "#/groups";
    },
  }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

// ---- begin

events.addEventListener("key", ({ detail }) => askForKey(detail));
events.addEventListener("wait", ({ detail }) => notice(`The service is busy; going on in ${detail.seconds} s. ${detail.detail}`, detail.seconds + 1));
events.addEventListener("lost", () => notice("No connection to the service. What is on screen stays; trying again."));
at("facts").addEventListener("click", () => openFacts(askForKey));
at("help").addEventListener("click", openHelp);
at("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]));
addEventListener("hashchange", (event) => {
  places.set(new URL(event.oldURL).hash, scrollY);
  if (places.size > 100) places.delete(places.keys().next().value);
  navigate();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the hash is the view's
  main.focus();
});
addEventListener("unhandledrejection", (event) => {
  if (event.reason instanceof Problem || event.reason?.name === "AbortError") {
    event.preventDefault();
    if (event.reason instanceof Problem) notice(event.reason.message, 8);
  }
});
setTheme(document.documentElement.dataset.theme);
start();
watch();
