// The cache: what each tier holds and for whom, how much hits, and what it saved.

import { ApiError, get } from "../api.js";
import { badge, fact, facts, h, replace, said, table, to, warnings } from "../dom.js";
import { bytes, count, counted, percent } from "../format.js";
import { live } from "../live.js";
import { aboutSeconds, moment, section } from "../parts.js";
import { bar, legend } from "../plots.js";

const REFRESH_MS = 20000; // it lists every object of the tiers
const OWNERS = ["windows", "sessions", "forgotten", "unknown"];
const KIND = { healthy: "ok", unhealthy: "bad", unreachable: "bad", "not configured": "" };
const number = (name) => ({ name, number: true });

export async function cache({ main, title, every, signal, failed }) {
  title("Cache");
  const [tiers, misses, saved] = [h("div", {}), h("div", {}), h("div", {})];
  main.append(h("h1", {}, "Cache"), tiers, misses, saved);
  const load = async () => {
    const [found, sums] = await Promise.all([get("admin/cache", {}, signal), ledger(signal)]);
    replace(tiers, drawn(found));
    replace(saved, sums && savings(sums));
  };
  const draw = () => live.now && replace(misses, missesOf(live.now));
  live.addEventListener("sample", draw, { signal });
  draw();
  every(REFRESH_MS, load);
  await load().catch(failed);
}

async function ledger(signal) {
  try {
    return await get("admin/ledger", { limit: 5 }, signal);
  } catch (error) {
    if (error instanceof ApiError && error.status !== 401) return null; // this gateway keeps none
    throw error;
  }
}

function drawn(found) {
  const { lmcache } = found;
  return [warnings(found.warnings),
    facts(
      fact("LMCache", badge(lmcache.status, KIND[lmcache.status])),
      fact("Chunk", found.chunk_size && `${counted(found.chunk_size, "token")}`),
      fact("Hash", lmcache.hash_algorithm),
      fact("Adapters", lmcache.adapters && said(lmcache.adapters.join(", "))),
      fact("Hit rate", found.hit_rate == null ? null : `${percent(found.hit_rate)} of ${counted(found.prompt_tokens, "prompt token")} since the start`),
      fact("Windows", count(found.windows)),
      fact("Engines up", count(found.engines_up))),
    section("Bytes by tier and owner",
      legend(...OWNERS.map((owner) => [owner, owner])),
      table("Tiers", ["Tier", "Held", number("Bytes"), number("Objects"), ...OWNERS.map((owner) => number(owner[0].toUpperCase() + owner.slice(1))), number("Pinned")], rows(found.tiers), "No tier is configured."))];
}

function rows(tiers) {
  const most = Math.max(1, ...Object.values(tiers).map((tier) => tier.bytes ?? 0));
  return Object.entries(tiers).map(([name, tier]) => {
    if (tier.capacity_tokens != null) return engineRow(name, tier);
    return tier.capacity_bytes == null ? durableRow(name, tier, most) : memoryRow(name, tier);
  });
}

const blank = () => h("span", { class: "aside" }, "–");

function engineRow(name, tier) {
  const label = `${percent(tier.usage)} of ${counted(tier.capacity_tokens, "token")} used by running requests`;
  return [tierName(name, "the engines' own"), h("span", { class: "share" }, bar([[tier.usage, "running"]], 1, label), h("small", {}, label)), blank(), blank(), ...OWNERS.map(blank), blank()];
}

function memoryRow(name, tier) {
  const label = `${bytes(tier.bytes)} of ${bytes(tier.capacity_bytes)}`;
  return [tierName(name, "LMCache's memory"), h("span", { class: "share" }, bar([[tier.bytes, "running"]], tier.capacity_bytes, label), h("small", {}, `of ${bytes(tier.capacity_bytes)}`)),
    bytes(tier.bytes), count(tier.objects), ...OWNERS.map(blank), blank()];
}

function durableRow(name, tier, most) {
  const label = OWNERS.map((owner) => `${owner} ${bytes(tier[owner].bytes)}`).join(", ");
  return [tierName(name, tier.listed ? "durable" : "durable; only pins are counted"), h("span", { class: "share" }, bar(OWNERS.map((owner) => [tier[owner].bytes, owner]), most, label)),
    bytes(tier.bytes), count(tier.objects), ...OWNERS.map((owner) => h("span", { title: counted(tier[owner].objects, "object") }, bytes(tier[owner].bytes))), bytes(tier.pinned.bytes)];
}

function tierName(name, what) {
  return h("span", {}, h("strong", {}, said(name)), " ", h("small", {}, what));
}

function missesOf(now) {
  const most = Math.max(1, ...now.misses.map(([, value]) => value));
  const list = [...now.misses].sort((one, other) => other[1] - one[1]).map(([reason, value]) =>
    [reason.replaceAll("-", " "), h("span", { class: "share" }, bar([[value, "missed"]], most, `${count(value)} turns`)), count(value)]);
  return section("Why turns hit less than expected", table("Misses by reason", ["Reason", "Turns", number("Count")], list, "None since the gateway started."));
}

function savings({ total, turns, thaws, asks, held, windows, sessions, curves }) {
  const line = (name, saved) => [name, count(saved.requests), count(saved.tokens), aboutSeconds(saved) || blank()];
  const heads = [number("Requests"), number("Tokens"), number("Time")];
  const top = (kind, list, name) => table(`Most saved by ${kind}`, [kind, ...heads], list.map((one) => {
    const [, ...cells] = line("", one.saved);
    return [h("a", { href: to(`${kind}s`, one[name]) }, said(one[name])), ...cells];
  }), `No ${kind} yet.`);
  return section("What it saved",
    table("Saved", ["By", ...heads], [line("turns", turns), line("thaws", thaws), line("asks", asks), line("all", total)]),
    h("p", { class: "aside" }, "Tokens that came from the cache, and an estimate of the time that computing them would have taken. ", total.reason ? ["Not estimated: ", said(total.reason), "."] : null),
    facts(fact("Held for windows", `${bytes(held.bytes)} now`, held.since ? [`, ${(held.byte_hours / 2 ** 30).toFixed(2)} GiB hours since `, moment(held.since)] : null)),
    h("div", { class: "halves" }, h("div", { class: "half" }, top("window", windows, "name")), h("div", { class: "half" }, top("session", sessions, "id"))),
    curves.map(curve));
}

/** How long prefill takes here, as learned from cold turns. */
function curve(one) {
  const points = Object.entries(one.seconds_by_tokens).map(([tokens, time]) => `${count(Number(tokens))} tokens ${time.toFixed(1)} s`);
  const known = points.length ? `learned from ${counted(one.samples, "cold turn")}: ${points.join(", ")}` : one.reason ?? "not known yet";
  return h("p", { class: "aside" }, "Prefill of ", said(one.model, "id"), " at ", said(one.engine, "id"), one.current ? "" : " (before it changed)", ": ", said(known));
}
