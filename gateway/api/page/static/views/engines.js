// Engines and health: every component, every engine, and the self-test.

import { get, send } from "../api.js";
import { badge, button, fact, facts, h, replace, said, table } from "../dom.js";
import { problem } from "../dialog.js";
import { span, took } from "../format.js";
import { section } from "../parts.js";

const REFRESH_MS = 10000;
const KIND = { healthy: "ok", degraded: "warn", unhealthy: "bad", ok: "ok", warning: "warn", failed: "bad", ejected: "bad" };

export async function engines({ main, title, every, signal, failed }) {
  title("Engines");
  const health = h("div", {});
  const doctor = h("div", { class: "list", role: "status" });
  const run = button("Run the self-test", async () => {
    run.disabled = true;
    replace(doctor, h("p", { class: "aside" }, "Working: the engine computes a few prompts, and the store is read whole."));
    try {
      replace(doctor, checks(await send("POST", "admin/doctor")));
    } catch (error) {
      replace(doctor, problem(error));
    }
    run.disabled = false;
  });
  main.append(h("h1", {}, "Engines and health"), health, section("Self-test", h("p", {}, run), doctor));
  const load = async () => replace(health, drawn(await get("admin/health", {}, signal)));
  every(REFRESH_MS, load);
  await load().catch(failed);
}

function drawn(found) {
  const rows = Object.entries(found.components).map(([name, one]) => [name, badge(one.status, KIND[one.status]), said(one.message), took(one.latency_ms)]);
  const members = (found.components.engine?.engines ?? []).map((one) =>
    [said(one.url, "id"), badge(one.state, KIND[one.state]), said(one.models.join(", ")), String(one.failures), one.last_error ? said(one.last_error) : h("span", { class: "aside" }, "–")]);
  const differ = Object.entries(found.components.engine?.models_differ ?? {});
  return [
    facts(fact("Gateway", badge(found.status, KIND[found.status])), fact("Version", found.version), fact("Process", String(found.pid)), fact("Up for", span(found.uptime_seconds))),
    section("Components", table("Components", ["Component", "State", "Message", { name: "Check took", number: true }], rows)),
    section("Engines", table("Engines", ["Engine", "State", "Models", { name: "Failures", number: true }, "Last error"], members, "None."),
      differ.map(([model, by]) => h("p", { class: "warn" }, said(model), " differs: ", said(Object.entries(by).map(([url, value]) => `${url} ${value}`).join("; ")))))];
}

function checks(found) {
  const keeps = found.keeps_kv == null ? "whether windows keep their KV could not be tested" : found.keeps_kv ? "windows keep their KV" : "windows keep text only";
  const rows = found.checks.map((one) => [said(one.name), badge(one.status, KIND[one.status]), [said(one.message), one.remedy ? h("small", {}, " ", said(one.remedy)) : null]]);
  return [h("p", { class: "done" }, badge(found.ok ? "ok" : "not ok", found.ok ? "ok" : "bad"), ` ${keeps}`), table("Checks", ["Check", "Result", "Message"], rows)];
}
