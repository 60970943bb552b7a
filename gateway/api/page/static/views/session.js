// One session: how full it is, its turns with what the cache gave them, and its messages.

import { ApiError, get, path } from "../api.js";
import { button, fact, facts, h, place, replace, said, table, to, warnings } from "../dom.js";
import { count, percent, took } from "../format.js";
import { messages } from "../messages.js";
import { moment, savedText, stateBadge } from "../parts.js";
import { bar, contextShare, legend } from "../plots.js";
import { checkRules, deleteSession, freezeSession } from "../session_actions.js";

const REFRESH_MS = 6000;
const COLUMNS = [{ name: "Turn", number: true }, "Prompt tokens", { name: "Cached", number: true }, { name: "Expected", number: true },
  "Why less", { name: "Reply", number: true }, { name: "Took", number: true }, { name: "Began", number: true }];

export async function session(context) {
  const { main, name, title, every, signal } = context;
  const head = h("div", {});
  const gone = h("div", {});
  const turns = h("section", {});
  const text = h("section", {});
  main.append(gone, head, turns, text);
  const load = async () => {
    const found = await get(path("admin/sessions", name), {}, signal);
    title(found.title || found.id);
    replace(head, top(found, context));
    replace(turns, turnsOf(found));
    return found;
  };
  every(REFRESH_MS, () => load().catch((error) => goneOr(error, gone, name)));
  try {
    await load();
    await messages(text, path("admin/sessions", name, "messages"), signal);
  } catch (error) {
    goneOr(error, gone, name);
  }
}

function goneOr(error, place_, name) {
  if (!(error instanceof ApiError) || error.code !== "session_not_found") throw error;
  replace(place_, h("div", { class: "failure", role: "alert" }, h("p", {}, "There is no session ", said(name, "id"), " (any more)."),
    h("p", {}, h("a", { href: "#/sessions" }, "All sessions"))));
}

function top(found, context) {
  const action = (label, work, kind = "") => button(label, () => work(found, context), { class: kind, "data-key": label });
  return [
    h("header", { class: "top" },
      h("div", {}, h("p", { class: "over" }, "Session ", said(found.id, "id")), h("h1", {}, said(found.title || found.id))),
      h("div", { class: "actions" }, action("Freeze…", freezeSession, "main"), action("Check rules", checkRules), action("Delete…", deleteSession, "danger"))),
    warnings(found.warnings),
    facts(
      fact("State", stateBadge(found.state)),
      fact("Context", contextShare(found.token_count, found.context_limit)),
      fact("Turns", count(found.turn_count)),
      fact("Model", said(found.model, "id")),
      fact("Recognised by", said(found.recognised_by)),
      fact("Forked from", found.forked_from && link("sessions", found.forked_from)),
      fact("Thawed from", found.window && link("windows", found.window)),
      fact("Goes on in", found.successor && link("sessions", found.successor)),
      fact("Windows", windowsOf(found)),
      fact("Saved", savedText(found.saved)),
      fact("Estimates", estimates(found.estimates)),
      fact("Last active", moment(found.last_active_at)),
      fact("Began", moment(found.created_at)))];
}

function link(kind, name) {
  return h("a", { href: to(kind, name), class: "id" }, said(name));
}

function windowsOf({ id, windows }) {
  if (windows.length > 4) return h("a", { href: place(["windows"], { session_id: id }) }, `${count(windows.length)} windows`);
  return windows.map((one, index) => [index ? ", " : "", link("windows", one)]).flat();
}

function estimates(found) {
  if (found?.mean_error == null) return null;
  return `${found.exact ? "exact" : found.source}, ${percent(found.mean_error)} off on average`;
}

function turnsOf(found) {
  const most = Math.max(1, ...found.turns.map((one) => one.prompt_tokens ?? 0));
  const rows = found.turns.map((one, index) => row(one, found.turn_count - index, most));
  return [h("h2", {}, "Turns"),
    legend(["cached", "cached"], ["computed", "computed"], ["missed", "expected in the cache, computed"], ["tick", "expected"]),
    table("Turns, newest first", COLUMNS, rows, "No turn is recorded yet."),
    found.turn_count > found.turns.length ? h("p", { class: "aside" }, `The last ${count(found.turns.length)} of ${count(found.turn_count)} turns.`) : null];
}

function row(turn, number, most) {
  const { prompt_tokens: prompt, cached_tokens: cached, expected_cached_tokens: expected } = turn;
  const missed = Math.max(0, Math.min(expected ?? 0, prompt ?? 0) - (cached ?? 0));
  const label = `${count(prompt)} prompt tokens, ${count(cached)} cached, ${count(expected)} expected`;
  const parts = [[cached ?? 0, "cached"], [missed, "missed"], [(prompt ?? 0) - (cached ?? 0) - missed, "computed"]];
  return [
    count(number),
    h("span", { class: "share" }, bar(parts, most, label, expected || null), h("span", {}, count(prompt))),
    count(cached), count(expected), why(turn), count(turn.completion_tokens),
    h("span", { title: turn.first_token_ms == null ? null : `first token after ${took(turn.first_token_ms)}` }, took(turn.duration_ms)),
    moment(turn.started_at)];
}

function why({ miss, outcome, detail, status }) {
  if (outcome !== "completed") return h("span", { class: "bad" }, outcome.replaceAll("_", " "), " ", said(detail || `${status}`));
  if (!miss || miss === "none") return h("span", { class: "aside" }, "–");
  const [reason, ...rest] = miss.split(": ");
  const usual = reason === "first-turn" || reason === "shorter-than-chunk";
  return h("span", { class: usual ? "aside" : "warn" }, reason.replaceAll("-", " "), rest.length ? h("small", {}, said(rest.join(": "))) : null);
}

