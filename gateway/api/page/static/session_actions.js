// What can be done with a session: freeze it, see what the automatic rules say, delete it.

import { path, send } from "./api.js";
import { field, open, operation, problem, result } from "./dialog.js";
import { badge, fact, facts, h, said, table, to, warnings } from "./dom.js";
import { bytes, count, counted, percent, seconds } from "./format.js";
import { kvBadge, receiptFacts } from "./parts.js";

/** Freeze a session into a window. */
export function freezeSession({ id }) {
  operation("Freeze the session", [
    field("Name of the window", "window_name", { required: true, maxlength: 128, pattern: "[A-Za-z0-9][A-Za-z0-9_.\\-]*" }, "Letters, digits, _ . and -"),
    field("Description", "description", { maxlength: 2000 }),
    field("Tags", "tags", {}, "Separated by commas"),
  ], {
    label: "Freeze",
    run: async ({ tags = "", ...given }, onProgress) => {
      const body = { session_id: id, ...given, tags: tags.split(",").map((tag) => tag.trim()).filter(Boolean) };
      const made = await send("POST", "admin/windows", body, { onProgress });
      return result(["Frozen into ", h("a", { href: to("windows", made.name) }, said(made.name)), " ", kvBadge(made.kv)],
        facts(receiptFacts(made.receipt)), made.warnings);
    },
  });
}

/** What would the automatic rules do now? */
export async function checkRules({ id }) {
  const body = open("What the automatic rules say", h("p", { class: "aside" }, "Working…"));
  try {
    const check = await send("POST", "admin/policies/check", { session_id: id });
    body.replaceChildren(verdict(check));
  } catch (error) {
    body.replaceChildren(problem(error));
  }
}

function verdict(check) {
  const words = check.triggered ? ["Would be frozen now, as ", said(check.window_name, "id")] : ["Would not be frozen now"];
  const rows = check.policies.map((one) => [said(one.policy), one.error ? badge(one.error, "bad") : one.reason ? said(one.reason) : h("span", { class: "aside" }, "no")]);
  return h("div", {}, h("p", { class: "done" }, words),
    facts(fact("Reason", check.reason && said(check.reason)), fact("Held back", check.held_back && said(check.held_back)),
      fact("Tokens", `${count(check.token_count)}, of them in a window ${count(check.covered_tokens)}`),
      fact("Of the context", check.threshold_percent == null ? null : percent(check.threshold_percent / 100)),
      fact("Idle", seconds(check.idle_seconds))),
    table("What each policy says", ["Policy", "Freezes"], rows, "No policy is on."));
}

/** Delete a session, once that was confirmed. */
export function deleteSession({ id, windows }) {
  const kept = windows.length ? `Its ${counted(windows.length, "window")} stay.` : "No window holds it: its text will be gone.";
  operation("Delete the session?", [], {
    label: "Delete it", kind: "danger",
    about: h("p", {}, "The session ", said(id, "id"), " is deleted, with its turns, its text, and the KV that only it needs. ", kept),
    run: async () => {
      const done = await send("DELETE", path("admin/sessions", id));
      location.hash = "#/sessions";
      setTimeout(() => open("Deleted", h("p", {}, `Freed ${bytes(done.space_freed_bytes)}, ${counted(done.blocks_deleted, "object")}.`), warnings(done.warnings)));
      return "";
    },
  });
}

