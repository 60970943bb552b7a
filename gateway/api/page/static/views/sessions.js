// Sessions: a list by state, each with its share of the context.

import { get, path } from "../api.js";
import { h, place, replace, said, table, to } from "../dom.js";
import { count } from "../format.js";
import { BEYOND, choice, moment, named, pageOf, pager, stateBadge } from "../parts.js";
import { contextShare } from "../plots.js";

const LIMIT = 25;
const REFRESH_MS = 10000;
const STATES = [["", "All"], ["active", "Active"], ["frozen", "Frozen"], ["thawed", "Thawed"], ["expired", "Expired"]];
const COLUMNS = ["Session", "State", { name: "Turns", number: true }, "Context", "From", "Model", { name: "Active", number: true }];

export async function sessions({ main, title, every, query, signal, failed }) {
  title("Sessions");
  const chosen = { state: query.get("state") ?? "", model: query.get("model") ?? "" };
  const page = pageOf(query, LIMIT);
  const list = h("div", { class: "list" });
  const filter = choice("State", "state", STATES, chosen.state, (state) => { location.hash = place(["sessions"], { ...chosen, state }); });
  main.append(h("h1", {}, "Sessions"), h("div", { class: "filters" }, filter), list);
  const limits = new Map();
  const load = async () => {
    const answer = await get("admin/sessions", { ...chosen, ...page }, signal);
    await learnLimits(answer.sessions, limits, signal);
    draw(list, answer, chosen, limits);
  };
  every(REFRESH_MS, load);
  await load().catch(failed);
}

/** Learn the context limit of each model, which one session of it says. */
async function learnLimits(rows, limits, signal) {
  for (const one of rows) {
    if (limits.has(one.model)) continue;
    limits.set(one.model, null);
    const found = await get(path("admin/sessions", one.id), {}, signal).catch(() => null);
    if (found) limits.set(one.model, found.context_limit);
  }
}

function draw(list, answer, chosen, limits) {
  const rows = answer.sessions.map((one) => [
    named("sessions", one.id, one.title), stateBadge(one.state), count(one.turn_count),
    contextShare(one.token_count, limits.get(one.model)), origin(one), said(one.model, "id"), moment(one.last_active_at),
  ]);
  replace(list, table("Sessions", COLUMNS, rows, answer.total ? BEYOND : "No session yet: point a client's base URL at this gateway."),
    pager(answer, ["sessions"], chosen, "session"));
}

function origin({ window, forked_from: parent }) {
  if (parent) return h("span", {}, "fork of ", h("a", { href: to("sessions", parent), class: "id" }, said(parent)));
  return window ? h("a", { href: to("windows", window), class: "id" }, said(window)) : h("span", { class: "aside" }, "–");
}
