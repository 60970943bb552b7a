// What several parts of the page show in the same way.

import { button, fact, h, place, said, to, badge } from "./dom.js";
import { bytes, count, counted, exactly, percent, seconds, took, when } from "./format.js";

const KV = { complete: "ok", partial: "warn", absent: "bad" };
const STATES = { active: "ok", frozen: "cool", thawed: "cool", expired: "bad" };

/** How much of a window's KV is pinned. */
export function kvBadge(kv) {
  return badge(kv, KV[kv]);
}

/** The state of a session or a window. */
export function stateBadge(state) {
  return badge(state, STATES[state]);
}

/** A moment, with the exact one where the pointer rests. */
export function moment(value) {
  return value ? h("time", { datetime: value, title: exactly(value) }, when(value)) : h("span", {}, "–");
}

/** A link to a window or a session: its title, and its name below. */
export function named(kind, name, title, more = null) {
  const link = h("a", { href: to(kind, name), class: title ? "" : "id" }, said(title || name));
  return h("div", { class: "named" }, link, title ? h("span", { class: "id" }, said(name)) : null, more);
}

/** What was saved: tokens, and the time that they would have taken, which is an estimate. */
export function savedText(saved) {
  if (!saved?.tokens) return "";
  return `${counted(saved.tokens, "token")} of ${count(saved.prompt_tokens)} from the cache${aboutSeconds(saved, ", ")}`;
}

/** The time that was saved: `about 113.2 s (± 8%)`. */
export function aboutSeconds(saved, before = "") {
  if (saved?.seconds_estimated == null) return "";
  const wrong = saved.error_share == null ? "" : ` (± ${percent(saved.error_share, 0)})`;
  return `${before}about ${seconds(saved.seconds_estimated)}${wrong}`;
}

/** A line on one thaw or ask: what came from the cache, how long it took, and how long computing would take. */
export function savedLine({ saved, duration_ms: ms }) {
  if (!saved?.tokens) return null;
  const instead = aboutSeconds(saved);
  return h("p", { class: "saved" }, `${counted(saved.tokens, "token")} from the cache in ${took(ms)}`,
    instead ? `; computing them takes ${instead} here` : "");
}

/** What a page of a list says that has become shorter meanwhile. */
export const BEYOND = "Nothing on this page: the list ends before it.";

/** Where a page of a list is, and links to the others. */
export function pager({ total, limit, offset }, parts, query, noun) {
  const last = Math.min(offset + limit, total);
  const link = (label, rel, at) => h("a", { rel, "data-key": `page-${rel}`, href: place(parts, { ...query, offset: at || "" }) }, label);
  return h("nav", { class: "pager", "aria-label": `Pages of ${noun}s` },
    h("span", {}, offset < last ? `${count(offset + 1)} to ${count(last)} of ${counted(total, noun)}` : total ? counted(total, noun) : `No ${noun}s`),
    offset > 0 ? link("First", "first", 0) : null,
    offset > 0 ? link("Previous", "prev", Math.max(offset - limit, 0)) : null,
    last < total ? link("Next", "next", offset + limit) : null,
    last < total ? link("Last", "last", Math.floor((total - 1) / limit) * limit) : null);
}

/** The page that a place names. */
export function pageOf(query, limit) {
  const offset = Number(query.get("offset"));
  return { limit, offset: Number.isSafeInteger(offset) && offset > 0 && offset < 2 ** 31 ? offset : 0 };
}

/** A select with its label. */
export function choice(label, id, options, chosen, onChange) {
  const select = h("select", { id, on: onChange ? { change: () => onChange(select.value) } : {} },
    options.map(([value, text]) => h("option", { value, selected: value === chosen }, text)));
  return h("div", { class: "field" }, h("label", { for: id }, label), select);
}

/** The tiers where a window's bytes are; memory too, where it is known. */
export function tierBadges(tiers, blocks) {
  const entries = Object.entries(tiers).filter(([, tier]) => tier.present || tier.pinned);
  if (!entries.length) return h("span", { class: "aside" }, "none");
  return h("span", { class: "badges" }, entries.map(([name, tier]) => {
    const held = tier.present || tier.pinned;
    const whole = held >= blocks;
    const title = `${counted(tier.present, "object")} present, ${count(tier.pinned)} pinned (${bytes(tier.pinned_bytes)}), of ${count(blocks)}`;
    return h("span", { class: `badge ${whole ? (name === "cpu" ? "cool" : "") : "warn"}`, title }, whole ? name : `${name} ${count(held)}/${count(blocks)}`);
  }));
}

/** The fields of a receipt as facts. */
export function receiptFacts(receipt) {
  return Object.entries(receipt).filter(([, value]) => value !== null && value !== "").map(([name, value]) => fact(name.replace(/_ms$/, "").replaceAll("_", " "), receiptValue(name, value)));
}

function receiptValue(name, value) {
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value === "number") return name.endsWith("_ms") ? took(value) : name.endsWith("bytes") ? bytes(value) : count(value);
  if (Array.isArray(value)) return value.length ? said(value.map((one) => (typeof one === "object" ? JSON.stringify(one) : one)).join(", ")) : "none";
  if (typeof value === "object") {
    const inner = Object.entries(value).map(([key, one]) => h("li", {}, said(key), " ", receiptValue(`${name}_${key}`, one)));
    return inner.length ? h("ul", { class: "plainlist" }, inner) : "none";
  }
  return said(value);
}

/** A button that copies some text. */
export function copyButton(text, label) {
  const copy = button("Copy", async () => {
    await navigator.clipboard?.writeText(text).catch(() => {});
    copy.textContent = "Copied";
  }, { class: "small", "aria-label": label });
  return copy;
}

/** A section with its heading. */
export function section(title, ...children) {
  return h("section", {}, h("h2", {}, title), children);
}
