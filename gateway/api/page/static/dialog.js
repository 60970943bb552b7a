// The one dialog: forms of operations, their progress and results, and questions before something is deleted.

import { ApiError, Unreachable } from "./api.js";
import { button, h, replace, said, warnings } from "./dom.js";

const dialog = document.getElementById("dialog");

/** Show a dialog; Escape and Close end it. Returns its body. */
export function open(title, ...content) {
  const body = h("div", { class: "body" }, content);
  replace(dialog,
    h("header", {}, h("h2", { id: "dialog-title" }, title), button("Close", close, { class: "quiet" })), body);
  if (!dialog.open) dialog.showModal();
  return body;
}

/** Close it. */
export function close() {
  dialog.close();
}

/**
 * A form that runs an operation and shows its result. `fields` are elements of `field` and its kin; `run(values,
 * onProgress)` returns what to show.
 */
export function operation(title, fields, { label, kind = "main", about = null, run }) {
  const outcome = h("div", { class: "outcome", role: "status" });
  const submit = h("button", { class: kind }, label);
  const form = h("form", { on: { submit: async (event) => {
    event.preventDefault();
    submit.disabled = true;
    replace(outcome, h("p", { class: "aside" }, "Working…"));
    try {
      replace(outcome, await run(values(form), (step) => replace(outcome, progress(step))));
    } catch (error) {
      replace(outcome, problem(error));
    } finally {
      submit.disabled = false;
    }
  } } }, about, fields, h("p", { class: "actions" }, submit), outcome);
  const body = open(title, form);
  body.querySelector("input, textarea, select, button")?.focus();
}

/** What was typed: empty fields are left out, numbers are numbers, boxes are booleans. */
function values(form) {
  const given = {};
  for (const { name, type, value, checked } of form.elements) {
    if (!name) continue;
    if (type === "checkbox") given[name] = checked;
    else if (value.trim() !== "") given[name] = type === "number" ? Number(value) : value.trim();
  }
  return given;
}

function progress({ stage, done, total }) {
  return h("div", { class: "progress" }, h("span", {}, said(stage), total ? ` ${done} of ${total}` : ""),
    h("progress", { max: total || null, value: total ? done : null, "aria-label": stage }));
}

/** An error as the gateway words it. */
export function problem(error) {
  if (error instanceof Unreachable) return h("p", { class: "failure" }, "The gateway did not answer. Whether it was done is not known: look again when it is back.");
  if (!(error instanceof ApiError)) throw error;
  return h("div", { class: "failure" }, h("p", {}, said(error.message)), error.hint ? h("p", {}, said(error.hint)) : null);
}

/** A labelled input; `more` are its attributes. */
export function field(label, name, more = {}, note = "") {
  const id = `field-${name}`;
  const input = more.rows ? h("textarea", { id, name, ...more }) : h("input", { id, name, autocomplete: "off", ...more });
  return h("div", { class: "field" }, h("label", { for: id }, label), input, note ? h("small", {}, note) : null);
}

/** A labelled choice. */
export function select(label, name, options) {
  const id = `field-${name}`;
  return h("div", { class: "field" }, h("label", { for: id }, label),
    h("select", { id, name }, options.map(([value, text]) => h("option", { value }, text))));
}

/** A box to tick. */
export function tick(label, name, checked = false) {
  const id = `field-${name}`;
  return h("div", { class: "field tick" }, h("input", { id, name, type: "checkbox", checked }), h("label", { for: id }, label));
}

/** A result: a line that says it, what else there is, and warnings. */
export function result(line, ...more) {
  const last = more.at(-1);
  const warned = Array.isArray(last) && last.every((one) => typeof one === "string") ? warnings(more.pop()) : null;
  return h("div", { class: "result" }, h("p", { class: "done" }, line), more, warned);
}
