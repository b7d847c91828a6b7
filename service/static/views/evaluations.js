// #/evaluations, #/evaluations/ID and #/evaluations/compare?a=ID&b=ID: ask for an evaluation, watch
// it, read it, put two side by side.

import { Problem, ask, newKey, pause, query, stream } from "../api.js";
import { count, empty, h, labelled, moment, percent, plural, select, show as put } from "../dom.js";
import { figure, interval, intervals, metricName } from "../charts.js";
import { showReport } from "./report.js";

const ENDED = new Set(["succeeded", "failed", "cancelled", "lost"]);
const LOOK_EVERY_S = 2;
const PAGE = 50;
const AT_ONCE = 4; // reports that are asked for together
const headlines = new Map(); // id -> the headline of its report, which never changes
// Protocol -> its name, which kinds of data sets it takes, and the settings that are often changed:
// all others keep the defaults of the service.
const PROTOCOLS = {
  knn: ["kNN vote", "single_label", { k: ["k", "200, 20, 1", "list"], temperature: ["Temperature", "0.07", "number"] }],
  linear_probe: ["Linear probe", "single_label", { epochs: ["Epochs", "120", "number"], lr: ["Learning rate", "", "number"] }],
  semi_supervised: ["Few labels", "single_label", { epochs: ["Epochs", "30", "number"] }],
  transfer: ["Transfer", "single_label", { epochs: ["Epochs", "81", "number"] }],
  voc07_svm: ["VOC07 classifiers", "multi_label", {}],
  detection: ["Detection", "detection", {}],
};

export function show(main, route) {
  const [id] = route.parts;
  if (id === "compare") return showComparison(main, route);
  return id === undefined ? showAll(main, route) : showOne(main, id, route);
}

const path = (id) => `evaluations/${encodeURIComponent(id)}`;
const link = (id) => `#/${path(id)}`;
const protocolName = (protocol) => PROTOCOLS[protocol]?.[0] ?? protocol;
const share = ({ done = 0, total = 0 } = {}) => (total ? Math.min(1, done / total) : 0);

async function showAll(main, { signal, shown }) {
  const { items: datasets, problem } = await ask("datasets", { signal });
  const list = h("div", { class: "panel" });
  const asked = datasets.length ? form(datasets, signal) : empty("No labelled data sets", "The operator registers them: a YAML file given to the service.", h("pre", null, "python -m service.run --datasets FILE ..."));
  put(main, h("div", { class: "head" }, h("h1", null, "Evaluations"), h("p", { class: "tally" }, "How good the encoder is on labelled images.")),
    problem && h("p", { class: "wrong" }, problem),
    asked, list);
  const marked = new Set();
  let counting = datasets.some(({ state }) => state === "counting");
  for (;;) {
    const { items, next } = await ask(query("evaluations", { limit: PAGE }), { signal });
    const going = items.some((each) => !ENDED.has(each.status));
    if (!list.contains(document.activeElement) || going) put(list, items.length ? table(items, marked) : datasets.length && empty("No evaluations yet", "Choose a data set and a protocol above."), next && h("p", { class: "soft" }, `The newest ${PAGE} are listed.`));
    shown();
    await readHeadlines(list, items, signal);
    if (!going && !counting) return;
    await pause(LOOK_EVERY_S, signal);
    if (counting) {
      const now = (await ask("datasets", { signal })).items;
      counting = now.some(({ state }) => state === "counting");
      asked.tell(now);
    }
  }
}

/** A list leaves the reports out: each is asked for once, and its headline put into its row. */
async function readHeadlines(list, items, signal) {
  const left = items.filter(({ id, status: name }) => name === "succeeded" && !headlines.has(id));
  await Promise.all(Array.from({ length: AT_ONCE }, async () => {
    for (let each = left.shift(); each; each = left.shift()) {
      const { report } = await ask(path(each.id), { signal });
      headlines.set(each.id, report?.headline);
      const row = [...list.querySelectorAll("tr[data-id]")].find(({ dataset }) => dataset.id === each.id);
      row?.querySelectorAll("td.number").forEach((cell, i) => put(cell, headlineCells(each.id)[i]));
    }
  }));
}

/** What the two cells of a headline say. */
function headlineCells(id) {
  const head = headlines.get(id);
  return head ? [[figure(head.value), h("small", null, metricName(head.metric))], interval(head.interval)] : ["", ""];
}

/** The form, generated from the registered data sets. */
function form(datasets, signal) {
  const wrong = h("p", { class: "wrong", role: "alert" });
  const settings = h("div", { class: "row top" });
  const facts = h("p", { class: "soft" });
  const protocol = select("Protocol", [], "", () => fields());
  const dataset = select("Data set", datasets.map(({ name }) => [name, name]), datasets[0].name, () => choose());
  const seed = h("input", { type: "number", name: "seed", value: 0, min: 0, required: true });
  let known = datasets;
  const chosen = () => known.find(({ name }) => name === dataset.value);
  function describe() {
    const { kind, state, classes, counts, problem } = chosen();
    facts.textContent = problem ?? (state === "counting" ? `${kind}, being counted` : [kind, classes ? plural(classes, "class", "classes") : "", ...Object.entries(counts ?? {}).map(([name, n]) => `${count(n)} ${name}`)].filter(Boolean).join(" · "));
  }
  function choose() {
    describe();
    const { kind, task } = chosen();
    const fitting = Object.entries(PROTOCOLS).filter(([, [, wants]]) => !task || wants === task || (wants === "detection" && kind === "voc"));
    put(protocol, fitting.map(([name, [text]]) => h("option", { value: name }, text)));
    fields();
  }
  function fields() {
    put(settings, Object.entries(PROTOCOLS[protocol.value]?.[2] ?? {}).map(([name, [text, standard, kind]]) => labelled(text, h("input", { type: "text", name, inputmode: "decimal", placeholder: standard, "data-kind": kind }))));
  }
  choose();
  const box = h("form", { class: "controls form", onsubmit: async (event) => {
    event.preventDefault();
    const given = {};
    for (const { name, value, dataset: { kind } } of settings.querySelectorAll("input")) if (value.trim()) given[name] = kind === "list" ? value.split(/[\s,;]+/).map(Number) : Number(value);
    try {
      const made = await ask("evaluations", { json: { protocol: protocol.value, dataset: dataset.value, settings: given, seed: Number(seed.value) }, headers: { "Idempotency-Key": newKey() }, signal });
      location.hash = link(made.id);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      wrong.textContent = error.message;
    }
  } }, labelled("Data set", dataset), labelled("Protocol", protocol), settings, labelled("Seed", seed), h("button", { class: "button primary" }, "Evaluate"), facts, wrong);
  box.tell = (now) => {
    known = now;
    describe();
  };
  return box;
}

function table(items, marked) {
  const compare = h("button", { type: "button", class: "button", disabled: true, onclick: () => {
    const [a, b] = marked;
    location.hash = `#/evaluations/compare?${new URLSearchParams({ a, b })}`;
  } }, "Compare two");
  const count2 = () => (compare.disabled = marked.size !== 2);
  count2();
  return [h("p", { class: "row" }, compare, h("span", { class: "soft" }, "Mark two that have succeeded.")), h("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": "Evaluations" }, h("table", { class: "table" },
    h("thead", null, h("tr", null, h("th", null, h("span", { class: "hidden" }, "Marked")), ["Evaluation", "Status", "Result", "Interval", "Made"].map((text) => h("th", null, text)))),
    h("tbody", null, items.map((each) => {
      const [value, ends] = headlineCells(each.id);
      return h("tr", { "data-id": each.id },
        h("td", null, each.status === "succeeded" && h("input", { type: "checkbox", checked: marked.has(each.id), "aria-label": `Mark ${protocolName(each.protocol)} on ${each.dataset} of ${moment(each.created_at)}`, onchange: (event) => {
          if (event.target.checked) marked.add(each.id);
          else marked.delete(each.id);
          count2();
        } })),
        h("td", null, h("a", { href: link(each.id) }, `${protocolName(each.protocol)} · ${each.dataset}`)),
        h("td", null, status(each)),
        h("td", { class: "number" }, value),
        h("td", { class: "number" }, ends),
        h("td", { class: "keep" }, moment(each.created_at)));
    }))))];
}

function status({ status: name, progress, attempts }) {
  const detail = name === "running" && progress ? ` ${progress.stage} ${percent(share(progress))}` : attempts > 1 ? ` attempt ${attempts}` : "";
  return h("span", { class: `state ${name}` }, name + detail);
}

async function showOne(main, id, { signal, shown }) {
  let job = await ask(path(id), { signal });
  const draw = () => {
    put(main, h("a", { class: "back", href: "#/evaluations" }, "All evaluations"),
      h("div", { class: "head" }, h("h1", null, `${protocolName(job.protocol)} · ${job.dataset}`), h("p", { class: "tally", role: "status" }, status(job), ` · ${moment(job.created_at)}`)));
    if (job.status === "succeeded" && job.report) return showReport(main, job, signal);
    if (ENDED.has(job.status)) return main.append(empty(`It ${job.status === "cancelled" ? "was cancelled" : job.status === "lost" ? "was lost" : "failed"}`, job.error?.message ?? job.error?.detail ?? "", job.error?.log_tail && h("pre", null, job.error.log_tail)));
    const done = share(job.progress ?? {});
    return main.append(h("section", { class: "empty" }, h("h2", null, job.progress ? `${job.progress.stage} …` : job.status),
      h("div", { class: "progress", role: "progressbar", "aria-label": job.progress?.stage ?? job.status, "aria-valuenow": Math.round(done * 100) }, h("span", { style: { width: `${done * 100}%` } })),
      h("p", { class: "number" }, job.progress?.total ? `${count(job.progress.done)} of ${count(job.progress.total)}` : job.waiting_for ? `waiting for ${job.waiting_for}` : "waiting for a worker"),
      h("button", { type: "button", class: "button", onclick: async () => {
        await ask(path(id), { method: "DELETE", signal });
      } }, "Cancel")));
  };
  draw();
  shown();
  while (!ENDED.has(job.status)) {
    try {
      for await (const event of stream(`${path(id)}/events`, signal)) {
        job = { ...job, ...event };
        if (ENDED.has(job.status)) break;
        draw();
      }
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof Problem) && !(error instanceof TypeError)) throw error; // the stream broke
    }
    if (!ENDED.has(job.status)) await pause(LOOK_EVERY_S, signal);
    job = await ask(path(id), { signal }); // events may leave the report out
    draw();
  }
}

async function showComparison(main, { values, signal }) {
  const jobs = await Promise.all(["a", "b"].map((side) => ask(path(values.get(side) ?? ""), { signal })));
  const [a, b] = jobs.map((job) => job.report);
  put(main, h("a", { class: "back", href: "#/evaluations" }, "All evaluations"), h("h1", null, "Two evaluations"));
  if (!a || !b) return main.append(empty("Nothing to compare", "Both must have succeeded."));
  const name = (report, i) => `${"AB"[i]} · ${protocolName(report.protocol)} · ${report.dataset.name} · model ${report.model_id.slice(0, 8)} · seed ${report.seed}`;
  const [ha, hb] = [a.headline, b.headline];
  main.append(h("section", { class: "report" }, h("h2", null, metricName(ha.metric)), intervals([a, b].map((report, i) => ({ name: name(report, i), value: report.headline.value, interval: report.headline.interval }))), difference(ha, hb, a, b)));
  const rows = metricsOf(a).filter(([key]) => metricsOf(b).some(([other]) => other === key)).map(([key, value, ends]) => {
    const [, other, otherEnds] = metricsOf(b).find(([k]) => k === key);
    return h("tr", null, h("td", null, key), h("td", { class: "number" }, figure(value), h("small", null, interval(ends))), h("td", { class: "number" }, figure(other), h("small", null, interval(otherEnds))), h("td", { class: "number" }, signed(other - value)));
  });
  main.append(!rows.length ? h("p", { class: "soft" }, "The two have no other result in common.") : h("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": "All metrics" }, h("table", { class: "table" }, h("thead", null, h("tr", null, ["Result", "A", "B", "B − A"].map((text) => h("th", null, text)))), h("tbody", null, rows))));
}

const signed = (value) => `${value > 0 ? "+" : ""}${Math.abs(value) <= 1 ? `${(100 * value).toFixed(1)} points` : value.toPrecision(3)}`;
const metricsOf = (report) => report.results.flatMap((result) => Object.entries(result.metrics).map(([metric, value]) => [`${result.name} · ${metricName(metric)}`, value, result.intervals[metric]]));

/** B - A and its interval from the two intervals, as of independent samples. */
function difference(ha, hb, a, b) {
  if (ha.metric !== hb.metric) return h("p", { class: "soft" }, `A says ${metricName(ha.metric)}, B ${metricName(hb.metric)}: no difference is taken.`);
  const value = hb.value - ha.value;
  const half = ha.interval && hb.interval ? Math.hypot((ha.interval[1] - ha.interval[0]) / 2, (hb.interval[1] - hb.interval[0]) / 2) : null;
  const same = a.dataset.fingerprint === b.dataset.fingerprint;
  return [h("p", { class: "figure" }, h("b", { class: "number" }, signed(value)), half === null ? "" : ` B − A, ${signed(value - half)} to ${signed(value + half)}`),
    h("p", { class: "soft" }, half === null ? "Without intervals." : Math.abs(value) > half ? "More than chance explains." : "Chance may explain it.", " The interval takes the two as independent", same ? "; on the same images, as here, the true one is narrower." : ".", same ? "" : " They were made on different images.")];
}
