// The gateway's admin API, as any client uses it. The key is kept in this tab only.

const KEY = "cwg-key";

/** The gateway's root, also where a proxy serves it under a path: this file is one level below it. */
export const ROOT = new URL("../", import.meta.url);

/** What the page hears of the connection: `key` (one is needed), `down` and `up`. */
export const events = new EventTarget();

let isDown = false;

/** An error of the API, with the gateway's words. */
export class ApiError extends Error {
  constructor(status, { code, message, hint }) {
    super(message);
    Object.assign(this, { status, code, hint: hint ?? "" });
  }
}

/** The gateway did not answer, or something in front of it did. */
export class Unreachable extends Error {}

/** The key of this tab, or "". */
export function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

/** Keep a key, or forget it. */
export function setKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** The path of an object: `path("admin/windows", name, "thaw")`. */
export function path(first, ...names) {
  return [first, ...names.map(encodeURIComponent)].join("/");
}

/** GET, with the parameters that are not empty. */
export function get(where, query = {}, signal = undefined) {
  const given = Object.entries(query).filter(([, value]) => value !== "" && value != null && value !== false);
  const text = new URLSearchParams(given).toString();
  return request("GET", text ? `${where}?${text}` : where, undefined, { signal });
}

/** Any other method, with a JSON body. `onProgress` gets `{stage, done, total}` while it runs. */
export function send(method, where, body = undefined, options = {}) {
  return request(method, where, body, options);
}

async function request(method, where, body, { signal, onProgress } = {}) {
  const sent = key();
  const headers = sent ? { "x-api-key": sent } : {};
  if (body !== undefined) headers["content-type"] = "application/json";
  if (onProgress) headers.accept = "application/x-ndjson";
  const response = await reach(where, { method, headers, body: body && JSON.stringify(body), signal });
  const answer = await read(response, onProgress);
  setDown(false);
  if (answer.status < 400) return answer.value;
  if (answer.status === 401 && sent === key()) events.dispatchEvent(new Event("key"));
  throw new ApiError(answer.status, answer.value.error);
}

async function reach(where, options) {
  try {
    return await fetch(new URL(where, ROOT), { cache: "no-store", credentials: "same-origin", ...options });
  } catch (error) {
    throw lost(error, options.signal);
  }
}

async function read(response, onProgress) {
  try {
    if (response.headers.get("content-type")?.startsWith("application/x-ndjson")) return await lines(response, onProgress);
    const value = await response.json();
    if (response.status < 400 || value?.error?.code) return { status: response.status, value };
  } catch (error) {
    throw lost(error);
  }
  throw lost(new Error(`${response.status} from something in front of the gateway`));
}

/** Read lines of JSON: progress, and the result last. */
async function lines(response, onProgress) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", last = null; ;) {
    const { value, done } = await reader.read();
    if (done) {
      if (!last) throw new Error("the answer ended early");
      return { status: last.status, value: last.result ?? last };
    }
    const whole = (rest + value).split("\n");
    rest = whole.pop();
    for (const line of whole.filter(Boolean).map((text) => JSON.parse(text))) {
      if (line.progress) onProgress(line.progress);
      else last = line;
    }
  }
}

function lost(error, signal) {
  if (error.name === "AbortError" || signal?.aborted) return error;
  setDown(true);
  return new Unreachable(error.message);
}

function setDown(value) {
  if (value === isDown) return;
  isDown = value;
  events.dispatchEvent(new Event(value ? "down" : "up"));
}
