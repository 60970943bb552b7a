// The page: which part is shown, the state of the gateway, the key, and the colours.

import { ApiError, Unreachable, events, get, key, setKey } from "./api.js";
import { badge, button, h, replace, said } from "./dom.js";
import { watch } from "./live.js";
import { cache } from "./views/cache.js";
import { engines } from "./views/engines.js";
import { overview } from "./views/overview.js";
import { rules } from "./views/rules.js";
import { session } from "./views/session.js";
import { sessions } from "./views/sessions.js";
import { tree } from "./views/tree.js";
import { window_ } from "./views/window.js";
import { windows } from "./views/windows.js";

const PARTS = { "": overview, windows, sessions, tree, cache, engines, rules };
const ONE = { windows: window_, sessions: session };
const KIND = { healthy: "ok", degraded: "warn", unhealthy: "bad" };
const HEALTH_EVERY_MS = 15000;
const RETRY_MS = 2000;

const main = document.getElementById("main");
const notice = document.getElementById("notice");
let shown = new AbortController(); // aborted when another part is shown
let first = true;
let version = "";

/** What a part gets: where to draw, what was chosen, and a signal that ends with it. */
function context(parts, query) {
  const { signal } = shown;
  return {
    main, query, signal, name: parts[1],
    title: (text) => { document.title = `${text} · Context Window Gateway`; },
    every: (ms, work) => every(ms, work, signal),
    failed: (error) => failed(error, signal),
  };
}

async function show() {
  shown.abort();
  shown = new AbortController();
  const { signal } = shown;
  const [where, search = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const parts = where.split("/").map(decoded);
  mark(parts[0]);
  document.title = "Context Window Gateway";
  document.getElementById("dialog").close();
  const known = parts[1] ? ONE : PARTS;
  const part = Object.hasOwn(known, parts[0]) ? known[parts[0]] : null;
  main.replaceChildren();
  try {
    if (part) await part(context(parts, new URLSearchParams(search)));
    else replace(main, h("h1", {}, "Nothing here"), h("p", {}, h("a", { href: "#/" }, "To the overview")));
  } catch (error) {
    failed(error, signal);
  }
  if (!first && !signal.aborted && !main.contains(document.activeElement)) main.focus({ preventScroll: true });
  if (!first && !signal.aborted) scrollTo(0, 0);
  first = false;
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function mark(part) {
  for (const link of document.querySelectorAll("nav a")) {
    if (link.getAttribute("href") === `#/${part}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

/** Say what went wrong. The key and a gateway that is away have their own notice. */
function failed(error, signal) {
  if (signal.aborted || error instanceof Unreachable || error.status === 401) return;
  if (!(error instanceof ApiError)) throw error;
  const old = main.querySelector(":scope > .failure");
  const line = h("div", { class: "failure", role: "alert" },
    h("p", {}, said(error.message)), error.hint ? h("p", {}, said(error.hint)) : null);
  if (old) old.replaceWith(line);
  else main.append(line);
}

/** Repeat some work while its part is shown and the tab is seen. */
function every(ms, work, signal) {
  const again = async () => {
    if (signal.aborted) return;
    if (!document.hidden) await work().catch((error) => failed(error, signal));
    setTimeout(again, ms);
  };
  setTimeout(again, ms);
}

function askForKey() {
  if (document.getElementById("key")) return;
  shown.abort();
  shown = new AbortController();
  const wrong = key() !== "";
  setKey("");
  const input = h("input", { id: "key", type: "password", autocomplete: "off", required: true, spellcheck: "false" });
  const problem = h("p", { class: "problem", role: "alert" }, wrong ? "That key was refused." : "");
  const form = h("form", { class: "panel key", on: { submit: (event) => {
    event.preventDefault();
    const given = input.value.trim();
    if (!/^[\x21-\x7e]+$/.test(given)) {
      problem.textContent = "A key has no blanks, and no characters beyond ASCII.";
      return;
    }
    setKey(given);
    begin();
  } } },
    h("h1", {}, "This gateway asks for a key"),
    h("label", { for: "key" }, "API key"), input,
    h("button", { class: "main" }, "Continue"), problem,
    h("p", { class: "aside" }, "It is kept in this tab until the tab is closed, and sent to this gateway only."));
  replace(main, form);
  input.focus();
}

function begin() {
  document.getElementById("forget").hidden = key() === "";
  show();
  checkHealth();
}

async function checkHealth() {
  if (document.hidden || document.getElementById("key")) return;
  try {
    const health = await get("admin/health");
    const place = document.getElementById("health");
    place.hidden = false;
    replace(place, badge(health.status, KIND[health.status]));
    if (version && version !== health.version) say(`The gateway is now version ${health.version}.`, "Reload", () => location.reload());
    version = health.version;
  } catch { /* the notice says it */ }
}

function say(text, action = "", work = null) {
  replace(notice, h("p", {}, text, action ? button(action, work) : null));
}

async function retry() {
  try {
    await get("healthz");
  } catch {
    setTimeout(retry, RETRY_MS);
  }
}

events.addEventListener("key", askForKey);
events.addEventListener("down", () => {
  document.body.classList.add("down");
  say("The gateway does not answer. Trying again every two seconds; what you see may be out of date.");
  setTimeout(retry, RETRY_MS);
});
events.addEventListener("up", () => {
  document.body.classList.remove("down");
  say("The gateway answers again.");
  setTimeout(() => replace(notice), 5000);
  if (!document.getElementById("dialog").open && !document.getElementById("key")) show();
});
addEventListener("hashchange", show);
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target.matches("input, textarea, select")) return;
  const search = document.getElementById("search");
  if (!search) return;
  event.preventDefault();
  search.focus();
});

const THEMES = { "": "Auto", light: "Light", dark: "Dark" };
const theme = document.getElementById("theme");
const named = () => {
  const name = THEMES[document.documentElement.dataset.theme ?? ""];
  theme.textContent = name;
  theme.setAttribute("aria-label", `Colours: ${name.toLowerCase()}; switch`);
};
theme.addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(document.documentElement.dataset.theme ?? "") + 1) % names.length];
  if (next) document.documentElement.dataset.theme = next;
  else delete document.documentElement.dataset.theme;
  try {
    localStorage.setItem("cwg-theme", next);
  } catch { /* then it lasts until the next load */ }
  named();
});
document.getElementById("forget").addEventListener("click", () => {
  setKey("");
  location.reload();
});
document.getElementById("skip").addEventListener("click", (event) => { // its target would be taken for a part
  event.preventDefault();
  main.focus();
});

named();
begin();
watch();
setInterval(checkHealth, HEALTH_EVERY_MS);
