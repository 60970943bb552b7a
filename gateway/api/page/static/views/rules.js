// Automatic windows: the rules, where each comes from, and the most usual changes.

import { get, send } from "../api.js";
import { operation, field, result, tick } from "../dialog.js";
import { badge, button, h, place, replace, said, table, warnings } from "../dom.js";
import { count, percent, span } from "../format.js";

const MEANING = {
  enabled: "sessions are frozen automatically",
  idle_timeout_minutes: "freeze after this idle time",
  context_share: "freeze at this share of the context limit",
  token_threshold: "freeze at this many tokens",
  at_shutdown: "freeze every session when the gateway stops",
  policies: "further policies",
  naming_pattern: "names of the windows",
  tags: "tags of the windows",
  cooldown_seconds: "least time between two windows of a session",
  keep: "automatic windows of a session that are kept",
  ttl_seconds: "how long an automatic window is kept",
};

export async function rules({ main, title, signal, failed }) {
  title("Rules");
  const list = h("div", { class: "list" });
  main.append(h("h1", {}, "Automatic windows"),
    h("p", { class: "aside" }, "When sessions are frozen by themselves. ", h("a", { href: place(["windows"], { tags: "auto" }) }, "Windows that were made so")), list);
  const load = async () => draw(list, await get("admin/policies", {}, signal), load);
  await load().catch(failed);
}

function draw(list, found, load) {
  const set = new Set(found.set_at_run_time);
  const rows = Object.entries(MEANING).map(([name, meaning]) =>
    [said(name, "id"), value(name, found[name]), meaning, set.has(name) ? badge("set here", "cool") : h("span", { class: "aside" }, "settings")]);
  replace(list, table("Rules", ["Rule", "Value", "Meaning", "From"], rows),
    h("p", { class: "actions" }, button("Change…", () => change(found, load), { class: "main" }),
      set.size ? button("Back to the settings…", () => reset(load)) : null),
    warnings(found.warnings));
}

function value(name, rule) {
  if (rule == null) return h("span", { class: "aside" }, name === "ttl_seconds" ? "for ever" : "off");
  if (typeof rule === "boolean") return rule ? "yes" : "no";
  if (name === "context_share") return percent(rule, 0);
  if (name === "idle_timeout_minutes") return rule < 1 ? `${rule * 60} s` : `${count(rule)} min`;
  if (name.endsWith("_seconds")) return span(rule);
  if (typeof rule === "number") return count(rule);
  if (typeof rule === "string") return said(rule, "id");
  return rule.length ? said(rule.map((one) => (typeof one === "object" ? JSON.stringify(one) : one)).join(", ")) : h("span", { class: "aside" }, "none");
}

function change(found, load) {
  const number = (label, name, note, more = {}) => field(label, name, { type: "number", min: 0, step: "any", value: found[name], ...more }, note);
  operation("Change the rules", [
    tick("Freeze sessions automatically", "enabled", found.enabled),
    number("Idle minutes", "idle_timeout_minutes", "Off if empty"),
    number("Share of the context", "context_share", "From 0 to 1; off if empty", { max: 1 }),
    number("Tokens", "token_threshold", "Off if empty", { step: 1 }),
    number("Automatic windows kept of a session", "keep", "", { min: 1, max: 100, step: 1, required: true }),
    tick("Freeze every session when the gateway stops", "at_shutdown", found.at_shutdown),
  ], {
    label: "Change",
    run: async (given) => {
      const optional = { idle_timeout_minutes: null, context_share: null, token_threshold: null };
      const wanted = { ...optional, ...given };
      const changed = Object.fromEntries(Object.entries(wanted).filter(([name, one]) => one !== found[name]));
      if (!Object.keys(changed).length) return result("Nothing was changed.");
      const done = await send("PUT", "admin/policies", changed);
      await load();
      return result("Changed, and kept across restarts.", done.warnings);
    },
  });
}

function reset(load) {
  operation("Back to the settings?", [], {
    label: "Remove what was set here", kind: "danger", about: h("p", {}, "The rules of the gateway's settings apply again."),
    run: async () => {
      await send("DELETE", "admin/policies");
      await load();
      return result("The settings apply again.");
    },
  });
}
