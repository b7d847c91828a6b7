// Elements from data. Data only ever becomes text, attributes and properties: there is no markup
// from strings anywhere in the page, and the content policy forbids it.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, to] of Object.entries(value)) element.style.setProperty(key, to);
    else if (name === "value" || name === "checked" || name === "selected") element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === undefined || child === null || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

/** An HTML element: h("p", {class: "x", onclick: f}, "text", node, ...). */
export const h = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);

/** An SVG element, in the same way. */
export const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

/** Put `children` in the place of what an element holds. */
export function show(element, ...children) {
  element.replaceChildren();
  return fill(element, null, children);
}

/** A labelled form control. */
export const labelled = (text, control, hint) =>
  h("label", { class: "field" }, h("span", { class: "name" }, text), control, hint && h("small", null, hint));

/** A slider that says its value; `changed` is called when it is let go, `moved` on the way. */
export function slider(text, { min, max, value, step = 1, changed, moved, format = String }) {
  const output = h("output", { class: "number" }, format(value));
  const input = h("input", { type: "range", min, max, step, value, "aria-label": text });
  input.value = value; // after min and max
  input.addEventListener("input", () => {
    output.textContent = format(Number(input.value));
    moved?.(Number(input.value));
  });
  input.addEventListener("change", () => changed?.(Number(input.value)));
  return h("label", { class: "slider" }, h("span", { class: "name" }, text), input, output);
}

/** A row of buttons of which one is pressed. */
export function choice(label, options, current, chosen) {
  const buttons = options.map(([value, text, title]) =>
    h("button", { type: "button", title, "aria-pressed": String(value === current), onclick: () => {
      buttons.forEach((b, i) => b.setAttribute("aria-pressed", String(options[i][0] === value)));
      chosen(value);
    } }, text));
  return h("div", { class: "choice", role: "group", "aria-label": label }, buttons);
}

/** A select of [value, text]. */
export const select = (label, options, current, chosen) =>
  h("select", { "aria-label": label, onchange: (event) => chosen?.(event.target.value) },
    options.map(([value, text]) => h("option", { value, selected: value === current }, text)));

const counted = new Intl.NumberFormat("en");
export const count = (number) => counted.format(number);
export const plural = (number, one, many = one + "s") => `${count(number)} ${number === 1 ? one : many}`;
export const percent = (share) => `${(100 * share).toFixed(1)} %`;

/** A moment as people of this computer write it; seconds since 1970, or an ISO text. */
export function moment(value) {
  if (value === null || value === undefined) return "";
  const date = new Date(typeof value === "number" ? value * 1000 : value);
  return date.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

/** Let the person save a text or blob as a file. */
export function save(name, content, type = "text/plain;charset=utf-8") {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** What stands where nothing is: a sentence, and what to do. */
export const empty = (title, ...more) => emptyUnder("h2", title, more);
/** The same as all there is of a view. */
export const emptyPage = (title, ...more) => emptyUnder("h1", title, more);

const emptyUnder = (heading, title, more) =>
  h("section", { class: "empty" }, h(heading, null, title), more.map((m) => (typeof m === "string" ? h("p", null, m) : m)));

/** A modal dialog with a title; closed by Escape, its button, or a click beside it. */
export function dialog(title, ...content) {
  const box = h("dialog", { "aria-label": title },
    h("header", null, h("h2", null, title),
      h("button", { type: "button", class: "quiet square", "aria-label": "Close", onclick: () => box.close() }, "×")),
    h("div", { class: "content", tabindex: "0", role: "region", "aria-label": title }, content));
  box.addEventListener("click", (event) => event.target === box && box.close());
  box.addEventListener("close", () => box.remove());
  document.body.append(box);
  box.showModal();
  return box;
}
