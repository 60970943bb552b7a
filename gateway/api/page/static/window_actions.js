// What can be done with a window: thaw, ask, clone, verify, load, evict and delete it.

import { ROOT, path, send } from "./api.js";
import { field, open, operation, result, select, tick } from "./dialog.js";
import { badge, fact, facts, h, said, table, to, warnings } from "./dom.js";
import { bytes, count, counted, took } from "./format.js";
import { copyButton, kvBadge, receiptFacts, savedLine } from "./parts.js";

const WARM = [["gpu", "into the engine, and count what hits"], ["cpu", "into the cache's memory"], ["none", "not now: with the first turn"]];
const SESSION = { maxlength: 128, pattern: "[A-Za-z0-9][A-Za-z0-9_.:\\-]*" };
const WINDOW = { maxlength: 128, pattern: "[A-Za-z0-9][A-Za-z0-9_.\\-]*", required: true };

const run = (name, verb) => (body, onProgress) => send("POST", path("admin/windows", name, verb), body, { onProgress });

/** The turn at which something begins, where the window has several. */
function turnField({ turns }, turn) {
  return turns > 1 ? field("At turn", "at_turn", { type: "number", min: 1, max: turns, value: turn ?? null }, `1 to ${turns}; all of it if empty`) : null;
}

/** Thaw a window into a new session, or take a session back to it. */
export function thaw(window, turn = null) {
  operation(`Thaw ${window.name}`, [
    field("New session", "new_session_id", SESSION, "Named by the gateway if empty"),
    select("Load its KV", "warm", WARM),
    turnField(window, turn),
    h("details", {}, h("summary", {}, "More"),
      window.turns == null ? null : [
        field("Take this session back instead", "into_session", SESSION, "It goes on from the window, under its own id"),
        field("And keep what it has as window", "keep_as", { ...WINDOW, required: false }),
      ],
      tick("Only the text: the model has changed", "as_text")),
  ], { label: "Thaw", run: async (given, onProgress) => thawed(await run(window.name, "thaw")(only(given), onProgress)) });
}

/** Without the boxes that are not ticked: an older gateway may not know them. */
function only(given) {
  return Object.fromEntries(Object.entries(given).filter(([, value]) => value !== false));
}

function thawed({ session_id: id, receipt, replaced, warnings: warned }) {
  const url = new URL(`s/${encodeURIComponent(id)}/v1`, ROOT).href;
  return result(["Session ", h("a", { href: to("sessions", id) }, said(id))],
    savedLine(receipt),
    h("p", {}, "Continue at ", h("code", {}, url), " ", copyButton(url, "Copy the base URL")),
    replaced ? h("p", {}, `${counted(replaced.turns_dropped, "turn")} dropped`, replaced.kept_in ? [", kept in ", h("a", { href: to("windows", replaced.kept_in) }, said(replaced.kept_in))] : "") : null,
    facts(receiptFacts(without(receipt, "saved"))), warned);
}

function without({ ...object }, name) {
  delete object[name];
  return object;
}

/** Ask a window a question. */
export function ask(window, turn = null) {
  operation(`Ask ${window.name}`, [
    field("Question", "question", { rows: 3, required: true, maxlength: 10000 }, "It knows nothing of what came later, and keeps neither question nor answer"),
    field("At most", "max_tokens", { type: "number", min: 1, max: 4096, placeholder: "512" }, "tokens of the answer"),
    turnField(window, turn),
  ], { label: "Ask", run: async (given, onProgress) => answered(await run(window.name, "ask")(given, onProgress)) });
}

/** An answer, with what it took. */
export function answered({ answer, reasoning, finish_reason: finish, receipt, warnings: warned }) {
  const { cached_tokens: cached, prompt_tokens: prompt, duration_ms: ms } = receipt;
  return result(h("span", { class: "said" }, said(answer)),
    reasoning ? h("details", {}, h("summary", {}, "Reasoning"), h("p", { class: "said" }, reasoning)) : null,
    finish === "length" ? h("p", { class: "warn" }, "Cut at the most tokens of an answer.") : null,
    savedLine(receipt) ?? h("p", { class: "aside" }, `${count(cached)} of ${counted(prompt, "prompt token")} cached, ${took(ms)}`), warned);
}

/** Clone a window. */
export function clone(window, turn = null) {
  operation(`Clone ${window.name}`, [
    field("Name of the clone", "target_window", WINDOW),
    field("Description", "description", { maxlength: 2000 }),
    turnField(window, turn),
    tick("Isolate it: under a cache salt of its own", "isolate"),
  ], {
    label: "Clone",
    about: h("p", { class: "aside" }, "A second name for the same bytes; nothing is copied."),
    run: async (given, onProgress) => {
      const made = await run(window.name, "clone")(given, onProgress);
      return result(["Cloned into ", h("a", { href: to("windows", made.target_window) }, said(made.target_window)), " ", kvBadge(made.kv)],
        h("p", {}, `${counted(made.shared_blocks, "object")} shared, 0 bytes copied`), made.warnings);
    },
  });
}

/** Check every byte of a window where it is pinned. */
export function verify(window) {
  operation(`Verify ${window.name}`, [tick("Deep: let the engine generate from each tier, and compare", "deep")], {
    label: "Verify",
    about: h("p", { class: "aside" }, "Reads every KV object in each tier: presence, size and checksum. Nothing is changed."),
    run: async (given, onProgress) => verified(await run(window.name, "verify")(given, onProgress)),
  });
}

function verified(found) {
  const rows = Object.entries(found.tiers).map(([name, tier]) => [said(name), count(tier.intact), count(tier.damaged), count(tier.missing), tier.checked ? "yes" : "no"]);
  const number = (name) => ({ name, number: true });
  return result([badge(found.ok ? "intact" : "not intact", found.ok ? "ok" : "bad"), ` ${count(found.chunks_usable)} of ${counted(found.chunks_expected, "chunk")} usable, ${took(found.duration_ms)}`],
    table("Tiers", ["Tier", number("Intact"), number("Damaged"), number("Missing"), "Read"], rows, "No tier holds it."),
    found.damaged.length ? table("Damage", ["Chunk", "Tier", "State"], found.damaged.slice(0, 50).map((one) => [count(one.chunk), said(one.tier ?? ""), one.state])) : null,
    found.deep?.map((one) => h("p", {}, said(one.tier), ": ", one.equal ? `equal over ${counted(one.tokens_compared, "token")}` : "differs")),
    found.warnings);
}

/** Load a window's KV into the cache's memory. */
export function prefetch(window) {
  operation(`Load ${window.name}`, [], {
    label: "Load", about: h("p", { class: "aside" }, "Loads its KV from disk or Redis into the cache's memory."),
    run: async (_, onProgress) => {
      const done = await run(window.name, "prefetch")({}, onProgress);
      return result(`${count(done.receipt.chunks_found)} of ${counted(done.receipt.chunks_expected, "chunk")} found`, facts(receiptFacts(done.receipt)), done.warnings);
    },
  });
}

/** Move a window's KV out of the cache's memory. */
export function evict(window) {
  operation(`Evict ${window.name}`, [], {
    label: "Evict", about: h("p", { class: "aside" }, "Moves its KV out of the cache's memory, down to disk and Redis. What neither has intact stays."),
    run: async (_, onProgress) => {
      const done = await run(window.name, "evict")({}, onProgress);
      return result(`${counted(done.objects, "object")}, ${took(done.duration_ms)}`,
        facts(Object.entries(done.tiers).map(([name, tier]) => fact(name, `${count(tier.before)} before, ${count(tier.after)} after`))), done.warnings);
    },
  });
}

/** Delete a window, once that was confirmed. */
export function remove(window) {
  operation("Delete the window?", [], {
    label: "Delete it for good", kind: "danger",
    about: h("p", {}, said(window.name, "id"), ` and its text are deleted, and what no other window uses of its ${bytes(window.size_bytes)} of KV. This cannot be undone.`),
    run: async () => {
      const done = await send("DELETE", path("admin/windows", window.name));
      location.hash = "#/windows";
      setTimeout(() => open("Deleted", h("p", {}, said(window.name, "id"), `: freed ${bytes(done.space_freed_bytes)}, ${counted(done.blocks_deleted, "object")}; ${count(done.blocks_kept)} kept.`), warnings(done.warnings)));
      return "";
    },
  });
}
