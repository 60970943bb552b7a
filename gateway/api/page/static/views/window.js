// One window: what it holds, where its bytes are, and what can be done with it.

import { ApiError, get, path } from "../api.js";
import { blocks } from "../blocks.js";
import { button, fact, facts, h, place, replace, said, to, warnings } from "../dom.js";
import { bytes, count, counted } from "../format.js";
import { messages } from "../messages.js";
import { kvBadge, moment, receiptFacts, savedText, stateBadge, tierBadges } from "../parts.js";
import * as actions from "../window_actions.js";

const REFRESH_MS = 10000;
const TABS = [["", "Conversation"], ["kv", "KV objects"], ["receipt", "Receipt"], ["lineage", "Lineage"]];
const MORE = [["Verify…", "verify"], ["Load…", "prefetch"], ["Evict…", "evict"], ["Clone…", "clone"]];

/** The view; its name ends in _ because `window` is the browser's. */
export async function window_(context) {
  const { main, name, title, every, query, signal } = context;
  const tab = query.get("tab") ?? "";
  const [gone, head, body] = [h("div", {}), h("div", {}), h("section", { class: "tab" })];
  main.append(gone, head, tabs(name, tab), body);
  const status = (more = {}) => get(path("admin/windows", name), more, signal);
  const known = {}; // with `turns` once the conversation is shown, if this gateway can begin at one
  const draw = (found) => {
    title(found.title || found.name);
    replace(head, top(Object.assign(known, found)));
  };
  // Deleted or expired meanwhile: what is shown stays, and nothing more can be done with it.
  const lost = (error) => {
    if (!(error instanceof ApiError) || error.code !== "window_not_found") throw error;
    replace(gone, h("div", { class: "failure", role: "alert" }, h("p", {}, "There is no window ", said(name, "id"), " (any more): it was deleted, or has expired."),
      h("p", {}, h("a", { href: "#/windows" }, "All windows"))));
    for (const one of head.querySelectorAll("button")) one.disabled = true;
  };
  every(REFRESH_MS, () => status().then((found) => { replace(gone); draw(found); }).catch(lost));
  try {
    draw(await status());
    await { kv: showBlocks, receipt: showReceipt, lineage: showLineage, "": showText }[tab]?.({ body, status, known, signal, draw });
  } catch (error) {
    lost(error);
  }
}

function tabs(name, chosen) {
  return h("nav", { class: "tabs", "aria-label": "Parts of the window" }, TABS.map(([tab, label]) =>
    h("a", { href: place(["windows", name], { tab }), "aria-current": tab === chosen ? "page" : null }, label)));
}

function top(found) {
  const { tiers, block_count: blockCount } = found.kv_cache;
  const action = (label, name, kind = "") => button(label, () => actions[name](found), { class: kind, "data-key": label });
  return [
    h("header", { class: "top" },
      h("div", {}, h("p", { class: "over" }, "Window ", said(found.name, "id")), h("h1", {}, said(found.title || found.name))),
      h("div", { class: "actions" }, action("Thaw…", "thaw", "main"), action("Ask…", "ask"), MORE.map(([label, name]) => action(label, name)), action("Delete…", "remove", "danger"))),
    warnings(found.warnings),
    facts(
      fact("KV", kvBadge(found.kv)),
      fact("State", stateBadge(found.state)),
      fact("Tokens", count(found.token_count)),
      fact("Size", bytes(found.size_bytes), " in ", counted(blockCount, "object")),
      fact("Tiers", tierBadges(tiers, blockCount)),
      fact("Model", said(found.model, "id")),
      fact("Session", h("a", { href: to("sessions", found.session_id), class: "id" }, said(found.session_id))),
      fact("Parent", found.parent_window && link(found.parent_window)),
      fact("Tags", found.tags.length ? h("span", { class: "tags" }, found.tags.map((tag) => h("a", { href: place(["windows"], { tags: tag }) }, "#", said(tag)))) : null),
      fact("Description", found.description && said(found.description)),
      fact("Saved", savedText(found.saved)),
      fact("Frozen", moment(found.created_at)),
      fact("Expires", found.expires_at ? moment(found.expires_at) : "never"))];
}

function link(name) {
  return h("a", { href: to("windows", name), class: "id" }, said(name));
}

async function showText({ body, known, signal }) {
  const atTurn = (turn) => [h("span", {}, `End of turn ${turn}`),
    button("Thaw here…", () => actions.thaw(known, turn), { class: "small" }), button("Ask here…", () => actions.ask(known, turn), { class: "small" }), button("Clone here…", () => actions.clone(known, turn), { class: "small" })];
  const answer = await messages(body, path("admin/windows", known.name, "messages"), signal, atTurn);
  known.turns = answer?.turns;
}

async function showBlocks({ body, status, draw }) {
  const found = await status({ include_blocks: true });
  draw(found);
  blocks(body, found.blocks ?? []);
}

async function showReceipt({ body, known }) {
  replace(body, h("h2", {}, "Receipt"), h("p", { class: "aside" }, "What was seen when it was frozen or imported."), facts(receiptFacts(known.receipt)));
}

async function showLineage({ body, status }) {
  const { lineage, session_id: session } = await status({ include_lineage: true });
  const row = (names, none) => (names.length ? h("ul", { class: "plainlist" }, names.map((one) => h("li", {}, link(one)))) : h("p", { class: "empty" }, none));
  replace(body, h("h2", {}, "Ancestors, nearest first"), row(lineage.ancestors, "None."), h("h2", {}, "Clones"), row(lineage.clones, "None."),
    h("p", {}, h("a", { href: place(["tree"], { of: session }) }, "Its place among all windows and sessions")));
}
