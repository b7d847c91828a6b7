// The report of one evaluation: the headline with its interval, results, curves, the confusion
// matrix with the mistakes behind a cell, and the whole report to save.

import { request } from "../api.js";
import { count, h, moment, plural, save, show as put } from "../dom.js";
import { itemLink } from "../grid.js";
import { confusion, figure, interval, intervals, lineChart, metricName } from "../charts.js";

const MOST_CLASSES = 40; // of a matrix that is drawn

export function showReport(main, job, signal) {
  const { report } = job;
  const { headline, dataset } = report;
  const rows = [{ name: "this encoder", value: headline.value, interval: headline.interval }];
  if (headline.untrained !== null && headline.untrained !== undefined) rows.push({ name: "untrained", value: headline.untrained, interval: null });
  main.append(
    h("section", { class: "report" },
      h("p", { class: "figure" }, h("b", { class: "number" }, figure(headline.value)), ` ${metricName(headline.metric)} · ${headline.result}`),
      intervals(rows),
      headline.gain && h("p", { class: "soft" }, `Gain over the untrained network: ${interval(headline.gain).replaceAll(" %", "")} points.`),
      h("p", { class: "soft" }, `${dataset.name}: ${Object.entries(dataset.splits).map(([name, n]) => `${count(n)} ${name}`).join(", ")}, ${plural(dataset.class_names.length, "class", "classes")}. Model ${report.model_id.slice(0, 12)}, seed ${report.seed}${job.finished_at ? `, ${moment(job.finished_at)}` : ""}.`),
      h("p", { class: "row" },
        h("button", { type: "button", class: "button", onclick: () => save(`evaluation-${job.id}.json`, JSON.stringify(report, null, 1), "application/json") }, "Save report.json"),
        h("button", { type: "button", class: "button", onclick: async () => save(`evaluation-${job.id}.html`, await (await request(`evaluations/${encodeURIComponent(job.id)}/report`, { signal })).blob()) }, "Save report.html"))),
    results(report.results),
    h("div", { class: "charts" }, report.curves.map(lineChart)));
  for (const result of report.results) {
    if (!result.confusion || dataset.class_names.length > MOST_CLASSES) continue;
    main.append(matrixOf(result, dataset.class_names));
    break; // of the first that has one: the headline's
  }
  main.append(h("details", null, h("summary", null, "Settings and environment"), h("pre", null, JSON.stringify({ settings: report.settings, facts: report.facts, durations_s: report.durations_s, environment: report.environment }, null, 2))));
}

function results(all) {
  const metrics = [...new Set(all.flatMap((result) => Object.keys(result.metrics)))];
  return h("div", { class: "scrolls", tabindex: "0", role: "region", "aria-label": "Results" }, h("table", { class: "table" },
    h("thead", null, h("tr", null, h("th", null, "Result"), metrics.map((metric) => h("th", null, metricName(metric))))),
    h("tbody", null, all.map((result) => h("tr", null, h("td", null, result.name), metrics.map((metric) => h("td", { class: "number" }, figure(result.metrics[metric]), h("small", null, interval(result.intervals[metric])))))))));
}

function matrixOf(result, names) {
  const pictures = h("div", { class: "panel" }, h("p", { class: "soft" }, "Click a cell for its mistakes."));
  return h("section", { class: "report" }, h("h2", null, `Confusion · ${result.name}`), confusion(result.confusion, names, (label, predicted) => {
    const of = result.mistakes.filter((each) => each.label === names[label] && each.predicted === names[predicted]);
    put(pictures, h("h3", null, `${names[label]} predicted as ${names[predicted]}`),
      h("p", { class: "soft" }, label === predicted ? "These are right; only mistakes are listed one by one." : of.length ? `${plural(of.length, "mistake")} of ${result.confusion[label][predicted]} listed in the report.` : "None of these is among the mistakes that the report lists."),
      h("ul", { class: "mistakes" }, of.map(({ id, margin }) => h("li", null, h("a", { class: "wrap", href: itemLink(id), title: "Open it, where the gallery holds it" }, id), h("span", { class: "number soft" }, `margin ${Number(margin).toPrecision(3)}`)))));
  }), pictures);
}
