// The overview: live numbers with their last minutes, and what is newest.

import { ApiError, get } from "../api.js";
import { h, replace, table, to } from "../dom.js";
import { count, percent, seconds, short } from "../format.js";
import { live, series } from "../live.js";
import { kvBadge, moment, named, stateBadge } from "../parts.js";
import { sparkline } from "../plots.js";

const REFRESH_MS = 12000;
const ROWS = 6;

export async function overview({ main, title, every, signal, failed }) {
  title("Overview");
  const tiles = h("div", { class: "tiles" });
  const sessions = h("section", { class: "half" });
  const windows = h("section", { class: "half" });
  main.append(h("h1", { class: "unseen" }, "Overview"), tiles, h("div", { class: "halves" }, sessions, windows));
  let ledger = null;
  const draw = () => live.now && replace(tiles, tilesOf(live.now, ledger));
  live.addEventListener("sample", draw, { signal });
  draw();
  const load = async () => {
    const [some, others, sums] = await Promise.all([
      get("admin/sessions", { limit: ROWS }, signal), get("admin/windows", { limit: ROWS }, signal), total(signal)]);
    ledger = sums;
    draw();
    drawSessions(sessions, some);
    drawWindows(windows, others);
  };
  every(REFRESH_MS, load);
  await load().catch(failed);
}

/** What was saved in all; null where this gateway keeps no ledger. */
async function total(signal) {
  try {
    return (await get("admin/ledger", { limit: 1 }, signal)).total;
  } catch (error) {
    if (error instanceof ApiError && error.status !== 401) return null;
    throw error;
  }
}

function tilesOf(now, saved) {
  const last = live.samples.at(-1);
  const rate = now.prompt ? now.cached / now.prompt : null;
  const failed = now.failed ? `, ${count(now.failed)} not completed` : "";
  return [
    tile("Turns", last ? short(last.turns) : "–", "a second", series("turns"), `${count(now.turns)} since the start${failed}`),
    tile("Cache hit rate", percent(rate), "of prompts", series("hitRate"), `${short(now.cached)} of ${short(now.prompt)} tokens`, 1),
    savedTile(now, saved),
    tile("Freezes", count(now.freezes), "since the start", series("freezes"), `${count(now.thaws)} thaws, ${count(now.asks)} asks`),
    tile("In flight", count(now.inFlight), "turns", series("inFlight"), `event loop ${Math.round(now.lag * 1000)} ms late`),
    tile("Replies", last ? short(last.completion) : "–", "tokens/s", series("completion"), `${short(now.completion)} tokens since the start`),
  ];
}

function savedTile(now, saved) {
  if (saved?.seconds_estimated == null) {
    return tile("Saved", short(now.cached), "tokens", series("cached"), saved?.reason ?? "not computed, since the start");
  }
  const wrong = saved.error_share == null ? "" : `± ${percent(saved.error_share, 0)}`;
  return tile("Saved", `about ${seconds(saved.seconds_estimated)}`, wrong, series("cached"), `estimated for ${short(saved.tokens)} tokens from the cache`);
}

function tile(name, value, unit, values, note, most = 0) {
  const seen = values.filter((one) => one != null);
  const label = seen.length ? `${name}, the last minutes: from ${short(Math.min(...seen))} to ${short(Math.max(...seen))}` : `${name}: nothing yet`;
  return h("div", { class: "tile" }, h("h2", {}, name),
    h("p", { class: "value" }, value, " ", h("small", {}, unit)), sparkline(values, label, most), h("p", { class: "aside" }, note));
}

function drawSessions(place, { sessions, total: all }) {
  const rows = sessions.map((one) => [named("sessions", one.id, one.title), stateBadge(one.state), count(one.token_count), moment(one.last_active_at)]);
  replace(place, h("h2", {}, "Sessions, last active first"),
    table("Sessions", ["Session", "State", { name: "Tokens", number: true }, { name: "Active", number: true }], rows,
      "No conversation yet: point a client's base URL at this gateway."),
    more("sessions", all));
}

function drawWindows(place, { windows, total: all }) {
  const rows = windows.map((one) => [named("windows", one.name, one.title), kvBadge(one.kv), count(one.token_count), moment(one.created_at)]);
  replace(place, h("h2", {}, "Windows, newest first"),
    table("Windows", ["Window", "KV", { name: "Tokens", number: true }, { name: "Frozen", number: true }], rows,
      "No window yet: freeze a session, or wait for the automatic rules."),
    more("windows", all));
}

function more(kind, all) {
  return all > ROWS ? h("p", {}, h("a", { href: to(kind) }, `All ${count(all)} ${kind}`)) : null;
}
