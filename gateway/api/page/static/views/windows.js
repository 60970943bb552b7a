// Windows: search, tags, order, and pages of a list.

import { get, path } from "../api.js";
import { badge, h, place, replace, said, table } from "../dom.js";
import { bytes, count, cut } from "../format.js";
import { askMany } from "../ask.js";
import { BEYOND, choice, kvBadge, moment, named, pageOf, pager, tierBadges } from "../parts.js";

const LIMIT = 25;
const REFRESH_MS = 20000;
const AT_ONCE = 2; // questions for tiers, so that a page of windows does not crowd the gateway
const WORST = 60; // characters of a description
const SORTS = [["created_at", "Newest"], ["token_count", "Most tokens"], ["size", "Largest"], ["name", "Name"]];
const COLUMNS = ["Window", "KV", { name: "Tokens", number: true }, { name: "Size", number: true }, "Tiers", "Tags",
  { name: "Frozen", number: true }, { name: "Expires", number: true }];

export async function windows(context) {
  const { main, title, every, query, failed } = context;
  title("Windows");
  const chosen = Object.fromEntries(["search", "tags", "without_tags", "sort_by", "session_id", "model"].map((name) => [name, query.get(name) ?? ""]));
  const page = pageOf(query, LIMIT);
  const list = h("div", { class: "list" });
  main.append(h("h1", {}, "Windows"), ...filters(chosen), list);
  const known = new Map(); // tiers by window, so that a refresh does not ask again for what has not changed
  const load = async () => {
    const answer = await get("admin/windows", { ...chosen, ...page, sort_order: chosen.sort_by === "name" ? "asc" : "" }, context.signal);
    draw(list, answer, chosen, known);
    tiersOf(answer.windows, known, list, context);
  };
  every(REFRESH_MS, load);
  await load().catch(failed);
}

function go(chosen, changes) {
  location.hash = place(["windows"], { ...chosen, ...changes });
}

function filters(chosen) {
  const search = h("input", { id: "search", type: "search", value: chosen.search, maxlength: 10000, autocomplete: "off", placeholder: "Text, name or tag" });
  const form = h("form", { class: "filters", role: "search", on: { submit: (event) => {
    event.preventDefault();
    go(chosen, { search: search.value });
  } } },
    h("div", { class: "field grow" }, h("label", { for: "search" }, "Search"), search),
    choice("Order", "sort", SORTS, chosen.sort_by || "created_at", (value) => go(chosen, { sort_by: value === "created_at" ? "" : value })),
    choice("Automatic", "auto", [["", "All"], ["without", "Without automatic"], ["only", "Only automatic"]], automatic(chosen),
      (value) => go(chosen, { tags: value === "only" ? "auto" : "", without_tags: value === "without" ? "auto" : "" })),
    h("button", { class: "main" }, "Search"),
    askMany(chosen, () => search.value));
  return [form, active(chosen)].filter(Boolean);
}

function automatic({ tags, without_tags: without }) {
  return without === "auto" ? "without" : tags === "auto" ? "only" : "";
}

/** What the list is limited to, each with a link that takes it away. */
function active(chosen) {
  const one = (name, text, rest = "") => h("a", { class: "chip", href: place(["windows"], { ...chosen, [name]: rest }), "aria-label": `Remove: ${text}` }, said(text), " ×");
  const tags = chosen.tags.split(",").filter((tag) => tag && tag !== "auto");
  const chips = [
    ...tags.map((tag) => one("tags", `tag ${tag}`, chosen.tags.split(",").filter((other) => other !== tag).join(","))),
    chosen.session_id && one("session_id", `session ${chosen.session_id}`),
    chosen.model && one("model", `model ${chosen.model}`),
    chosen.search && one("search", `search “${cut(chosen.search, 40)}”`),
  ].filter(Boolean);
  return chips.length ? h("p", { class: "chips" }, "Only ", chips) : null;
}

function draw(list, answer, chosen, known) {
  const rows = answer.windows.map((one) => [
    named("windows", one.name, one.title, matched(one)),
    h("span", { class: "badges" }, kvBadge(one.kv), one.state === "expired" ? badge("expired", "bad") : null),
    count(one.token_count), bytes(one.size_bytes),
    h("span", { "data-tiers": one.name }, known.get(idOf(one)) ?? "…"),
    h("span", { class: "tags" }, one.tags.map((tag) => h("a", { href: place(["windows"], { ...chosen, tags: tag }) }, "#", said(tag)))),
    moment(one.created_at), one.expires_at ? moment(one.expires_at) : "never",
  ]);
  const none = answer.total ? BEYOND : Object.values(chosen).some(Boolean) ? "Nothing is like that." : "No window yet: freeze a session, or wait for the automatic rules.";
  replace(list, table("Windows", COLUMNS, rows, none),
    answer.truncated ? h("p", { class: "aside" }, "Many messages match; only the newest of them were looked at.") : null,
    pager(answer, ["windows"], chosen, "window"));
}

/** Where a search found its text, or what the window is described as. */
function matched({ match, description, title }) {
  if (match && match.field !== "name") {
    const where = match.field === "message" ? `${match.role ?? "message"} ${match.message + 1}` : match.field;
    return h("span", { class: "match" }, h("small", {}, where), " ", said(match.snippet));
  }
  return description && description !== title ? h("span", { class: "aside" }, said(cut(description, WORST))) : null;
}

const idOf = ({ name, created_at: created }) => `${name} ${created}`;

/** Ask where the bytes of each window are, a few at once, as long as this page is shown. */
async function tiersOf(rows, known, list, { signal }) {
  const open = rows.filter((one) => !known.has(idOf(one)));
  const work = async () => {
    for (let one = open.shift(); one && !signal.aborted; one = open.shift()) {
      const status = await get(path("admin/windows", one.name), {}, signal).catch(() => null);
      const cell = list.querySelector(`[data-tiers="${CSS.escape(one.name)}"]`);
      if (!status) cell?.replaceChildren("–");
      else {
        known.set(idOf(one), tierBadges(status.kv_cache.tiers, status.kv_cache.block_count));
        cell?.replaceChildren(known.get(idOf(one)));
      }
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
}
