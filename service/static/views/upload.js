// #/upload: many files or a folder into the gallery. Each file has a state of its own; what failed
// can be sent again, and the whole can be saved as a table.

import { Problem, ask, limit, newKey } from "../api.js";
import { count, h, labelled, plural, save, show as put } from "../dom.js";
import { itemLink } from "../grid.js";
import { forget } from "../pictures.js";

const BATCH_FILES = 16; // small, so that every file's state is soon known
const BATCH_BYTES = 8 * 2 ** 20;
const AT_ONCE = 2;
const SHOWN = 300; // rows in the document; failures first
const IMAGE = /\.(jpe?g|png|webp)$/i;
const STATES = { waiting: "waiting", sending: "sending", done: "stored", failed: "failed" };

export async function show(main, { signal }) {
  const most = Math.min(BATCH_FILES, await limit("max_images"));
  const files = []; // {id, file, state, reason}
  const tally = h("p", { class: "tally", role: "status" }, "JPEG, PNG or WebP; the name becomes the id.");
  const bar = h("span");
  const rows = h("tbody");
  const field = h("input", { type: "text", placeholder: "batch=autumn", "aria-label": "Metadata for all files, field=value", spellcheck: "false" });
  const retry = h("button", { type: "button", class: "button", hidden: true, onclick: () => again() }, "Retry failures");
  const report = h("button", { type: "button", class: "button", hidden: true, onclick: () => save("upload.csv", table(files), "text/csv") }, "Save summary");
  const target = h("section", { class: "target", "aria-label": "Files to upload" },
    h("p", null, "Drop images or a folder here"),
    h("p", { class: "row" }, picker("Choose files", {}), picker("Choose a folder", { webkitdirectory: true })));
  const list = h("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": "Files", hidden: true }, h("table", { class: "table" }, h("thead", null, h("tr", null, h("th", null, "File"), h("th", null, "Size"), h("th", null, "State"))), rows));
  put(main, h("div", { class: "head" }, h("h1", null, "Upload"), tally), target,
    h("div", { class: "controls" }, labelled("Metadata for all of them", field, "optional"), retry, report), h("div", { class: "progress", hidden: true }, bar), list);

  function picker(text, more) {
    const input = h("input", { type: "file", multiple: true, accept: "image/jpeg,image/png,image/webp", hidden: true, "aria-label": text, ...more, onchange: (event) => {
      take([...event.target.files].map((file) => [file.webkitRelativePath || file.name, file]));
      event.target.value = "";
    } });
    return [input, h("button", { type: "button", class: "button primary", onclick: () => input.click() }, text)];
  }
  addEventListener("drop", async (event) => {
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    target.classList.remove("over");
    take((await Promise.all(entries.map((entry) => filesOf(entry)))).flat());
  }, { signal });
  target.addEventListener("dragover", () => target.classList.add("over"));
  target.addEventListener("dragleave", () => target.classList.remove("over"));

  let running = 0;
  let started = 0;
  let stored = 0; // since it started
  function take(found) {
    const images = found.filter(([name, file]) => IMAGE.test(name) || file.type.startsWith("image/"));
    if (!running) [started, stored] = [performance.now(), 0];
    files.push(...images.map(([id, file]) => ({ id, file, state: "waiting", reason: "" })));
    if (images.length < found.length) tally.textContent = `${plural(found.length - images.length, "file")} left out: no images`;
    work();
    draw();
  }
  function again() {
    for (const entry of files) if (entry.state === "failed") Object.assign(entry, { state: "waiting", reason: "" });
    [started, stored] = [performance.now(), 0];
    work();
    draw();
  }
  function work() {
    while (running < AT_ONCE) {
      const batch = [];
      let bytes = 0;
      for (const entry of files) {
        if (entry.state !== "waiting") continue;
        if (batch.length === most || (batch.length && bytes + entry.file.size > BATCH_BYTES)) break;
        if (batch.some((other) => other.id === entry.id)) continue; // twice the same name: the next batch
        batch.push(entry);
        bytes += entry.file.size;
      }
      if (!batch.length) return;
      running += 1;
      for (const entry of batch) entry.state = "sending";
      send(batch).finally(() => {
        running -= 1;
        if (signal.aborted) return;
        work();
        draw();
      });
    }
  }
  async function send(batch) {
    const form = new FormData();
    const [name, ...value] = field.value.split("=");
    const metadata = value.length ? { [name.trim()]: value.join("=").trim() } : {};
    for (const { id, file } of batch) form.append("images", file, id);
    form.append("metadata", JSON.stringify(batch.map(() => metadata)));
    try {
      const answer = await ask("items", { method: "POST", body: form, headers: { "Idempotency-Key": newKey() }, signal, waits: 30 });
      const why = new Map(answer.rejected.map(({ id, reason }) => [id, reason]));
      for (const entry of batch) Object.assign(entry, why.has(entry.id) ? { state: "failed", reason: why.get(entry.id) } : { state: "done", file: { size: entry.file.size } });
      const good = batch.filter((entry) => entry.state === "done");
      stored += good.length;
      forget(good.map((entry) => entry.id));
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof Problem)) throw error;
      for (const entry of batch) Object.assign(entry, { state: "failed", reason: error.message });
    }
  }
  function draw() {
    const of = (state) => files.filter((entry) => entry.state === state);
    const [done, failed] = [of("done"), of("failed")];
    const ended = done.length + failed.length;
    const rate = stored / Math.max(0.001, (performance.now() - started) / 1000);
    if (files.length) tally.textContent = [`${count(done.length)} of ${plural(files.length, "file")} stored`, failed.length ? `${failed.length} failed` : "", ended < files.length && stored ? `${rate.toFixed(0)} a second` : ""].filter(Boolean).join(" · ");
    bar.style.width = `${(100 * ended) / Math.max(1, files.length)}%`;
    bar.parentElement.hidden = list.hidden = !files.length;
    retry.hidden = !failed.length || running > 0;
    report.hidden = !ended;
    const shown = [...failed, ...of("sending"), ...of("waiting"), ...done.reverse()].slice(0, SHOWN);
    put(rows, shown.map((entry) => h("tr", { class: entry.state },
      h("td", { class: "wrap" }, entry.state === "done" ? h("a", { href: itemLink(entry.id) }, entry.id) : entry.id),
      h("td", { class: "number" }, `${count(Math.ceil(entry.file.size / 1024))} kB`),
      h("td", null, h("span", { class: `state ${entry.state}` }, STATES[entry.state]), entry.reason && h("small", null, entry.reason)))),
      files.length > SHOWN && h("tr", null, h("td", { colspan: 3, class: "soft" }, `and ${count(files.length - SHOWN)} more`)));
  }
}

/** The files of a dropped entry, folders walked: [[path, file], ...]. */
async function filesOf(entry) {
  const path = entry.fullPath.replace(/^\//, "");
  if (entry.isFile) return [[path, await new Promise((resolve, reject) => entry.file(resolve, reject))]];
  const reader = entry.createReader();
  const found = [];
  for (;;) { // some hundred at a time, until there are none
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return found;
    for (const child of some) found.push(...(await filesOf(child)));
  }
}

const quoted = (text) => `"${String(text).replaceAll('"', '""')}"`;
const table = (files) => ["id,state,reason", ...files.map(({ id, state, reason }) => [quoted(id), state, quoted(reason)].join(","))].join("\n") + "\n";
