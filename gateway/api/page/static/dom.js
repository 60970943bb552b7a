// Elements from code. All text reaches the page here, as text nodes: nothing is ever parsed as markup.

// Control characters, half surrogate pairs, and what turns the direction of a line or is a tag that nobody sees.
// Newline and tab stay. The plain list has the same set (plain.py).
const UNSEEN =
  /[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\u{e0000}-\u{e007f}]|\p{Surrogate}/gu;

/** Text with each character that would not be seen, or would turn others around, as its number. */
export function visible(text) {
  return String(text).replaceAll("\r\n", "\n").replace(UNSEEN, (found) => {
    const number = found.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    return `[U+${number}]`;
  });
}

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. `on` has its listeners; false, null and undefined leave an attribute or a child out. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, { on = {}, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value == null) continue;
    element.setAttribute(name, value === true ? "" : visible(value));
  }
  for (const [event, listener] of Object.entries(on)) element.addEventListener(event, listener);
  element.append(...nodes(children));
  return element;
}

function nodes(children) {
  return children.flat(Infinity).filter((child) => child != null && child !== false)
    .map((child) => (child instanceof Node ? child : document.createTextNode(visible(child))));
}

/** Text of other people, apart from the direction of what is around it. */
export function said(text, className) {
  return h("bdi", { class: className }, text);
}

/** Replace what is in an element, and give the focus back to what has the same key, if it was in there. */
export function replace(element, ...children) {
  const active = document.activeElement;
  const key = element.contains(active) && active !== element ? keyOf(active) : "";
  element.replaceChildren(...nodes(children));
  if (!key) return;
  const same = [...element.querySelectorAll("a, button, input, select, textarea, summary, [tabindex]")]
    .find((other) => keyOf(other) === key);
  same?.focus({ preventScroll: true });
}

function keyOf(element) {
  return element.dataset.key || element.id || element.getAttribute("href") || "";
}

/** A link to a place of the page: `to("windows", name)`. */
export function to(...parts) {
  return `#/${parts.map(encodeURIComponent).join("/")}`;
}

/** A place with what is chosen there; what is empty is left out. */
export function place(parts, query = {}) {
  const chosen = Object.entries(query).filter(([, value]) => value !== "" && value != null && value !== false);
  const text = new URLSearchParams(chosen).toString();
  return to(...parts) + (text ? `?${text}` : "");
}

/** A button. */
export function button(label, onClick, attributes = {}) {
  return h("button", { type: "button", ...attributes, on: { click: onClick } }, label);
}

/** A fact and its name, for a list of them; without a value, nothing. */
export function fact(name, ...value) {
  const shown = value.flat().filter((one) => one != null && one !== "" && one !== false);
  return shown.length ? h("div", {}, h("dt", {}, name), h("dd", {}, shown)) : null;
}

/** A list of facts. */
export function facts(...rows) {
  return h("dl", { class: "facts" }, rows);
}

/** A table with a head; `columns` are names, or `{name, number, wide}`. Rows are lists of cells, or <tr>. */
export function table(caption, columns, rows, empty = "None.") {
  const heads = columns.map((one) => (typeof one === "string" ? { name: one } : one));
  const body = rows.map((row) => (row instanceof Node ? row : h("tr", { role: "row" }, cells(heads, row))));
  if (!body.length) return h("p", { class: "empty" }, empty);
  // The roles are what they are anyway, until narrow screens show rows as blocks.
  return h("table", { role: "table" },
    h("caption", { class: "unseen" }, caption),
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, heads.map((one) =>
      h("th", { scope: "col", role: "columnheader", class: one.number ? "number" : null }, one.name)))),
    h("tbody", { role: "rowgroup" }, body));
}

/** The cells of a row; narrow screens show each with the name of its column. */
export function cells(heads, row) {
  return row.map((cell, index) => {
    const head = heads[index];
    return h("td", { role: "cell", class: head.number ? "number" : null, "data-head": head.name }, cell);
  });
}

/** A short word with a colour of its meaning: ok, warn, bad or none. */
export function badge(text, kind = "") {
  return h("span", { class: `badge ${kind}` }, text);
}

/** Lines of warnings, if there are any. */
export function warnings(list) {
  return list?.length ? h("ul", { class: "warnings" }, list.map((one) => h("li", {}, said(one)))) : null;
}
