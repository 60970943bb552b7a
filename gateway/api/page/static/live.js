// Live numbers: the gateway's counters, read every few seconds while the page is seen, and kept for the plots.

import { get } from "./api.js";

const FIRST_MS = 1500; // so that rates are there soon
const EVERY_MS = 4000;
const KEPT = 150; // ten minutes

/** Says `sample` after each reading. */
export const live = Object.assign(new EventTarget(), { samples: [], now: null });

/** Read for as long as the page is open. */
export function watch() {
  const read = async () => {
    if (!document.hidden) await sample().catch(() => {}); // what is wrong, the banner says
    setTimeout(read, live.samples.length ? EVERY_MS : FIRST_MS);
  };
  read();
}

async function sample() {
  const { metrics } = await get("admin/metrics");
  const before = live.now;
  live.now = { at: performance.now(), ...totals(metrics) };
  if (before) live.samples = [...live.samples, rates(before, live.now)].slice(-KEPT);
  live.dispatchEvent(new Event("sample"));
}

function totals(metrics) {
  const sum = (name, labels = {}) => metrics
    .filter((one) => one.name === name && Object.entries(labels).every(([label, value]) => one.labels[label] === value))
    .reduce((total, one) => total + one.value, 0);
  const verb = (name) => sum("cwg_verbs_total", { verb: name, result: "ok" });
  return {
    turns: sum("cwg_turns_total"),
    failed: sum("cwg_turns_total") - sum("cwg_turns_total", { outcome: "completed" }),
    prompt: sum("cwg_prompt_tokens_total"),
    completion: sum("cwg_completion_tokens_total"),
    cached: sum("cwg_cached_tokens_total"),
    misses: metrics.filter((one) => one.name === "cwg_misses_total").map((one) => [one.labels.reason, one.value]),
    freezes: verb("freeze"),
    thaws: verb("thaw"),
    asks: verb("ask"),
    windows: sum("cwg_windows"),
    pinned: sum("cwg_pinned_bytes"),
    inFlight: sum("cwg_turns_in_flight"),
    lag: Math.max(0, ...metrics.filter((one) => one.name === "cwg_event_loop_lag_seconds").map((one) => one.value)),
  };
}

/** What came between two readings; counters that went back were restarted with the gateway. */
function rates(before, now) {
  const passed = (now.at - before.at) / 1000;
  const more = (name) => (now[name] >= before[name] ? now[name] - before[name] : now[name]);
  const prompt = more("prompt");
  return {
    turns: more("turns") / passed,
    hitRate: prompt ? more("cached") / prompt : null,
    cached: more("cached") / passed,
    completion: more("completion") / passed,
    freezes: more("freezes"),
    thaws: more("thaws"),
    inFlight: now.inFlight,
  };
}

/** One of the numbers over time, oldest first. */
export function series(name) {
  return live.samples.map((one) => one[name]);
}
