// A conversation, as text: nothing in it is interpreted, no picture is loaded, no link can be followed.

import { ApiError, get } from "./api.js";
import { button, h, replace, said } from "./dom.js";
import { count, counted, cut } from "./format.js";

const AT_ONCE = 40; // messages; a long conversation has thousands
const LONGEST = 4000; // characters of a message, before it is opened
const ROLES = new Set(["system", "developer", "user", "assistant", "tool"]);

/** Fetch and show messages. `atTurn(turn)` makes what stands at the end of a turn. Returns the answer. */
export async function messages(place, where, signal, atTurn = null) {
  try {
    const answer = await get(where, {}, signal);
    show(place, answer.messages, atTurn);
    return answer;
  } catch (error) {
    // A gateway without messages of sessions; what else is wrong is for the caller.
    if (error instanceof ApiError && (error.code === "not_found" || error.code === "method_not_allowed")) return null;
    throw error;
  }
}

function show(place, rows, atTurn) {
  const list = h("ol", { class: "messages" });
  const more = h("p", {});
  let shown = 0;
  const next = (upTo) => {
    for (; shown < Math.min(upTo, rows.length); shown++) {
      list.append(message(rows[shown], shown));
      if (atTurn && ends(rows, shown)) list.append(h("li", { class: "turn" }, atTurn(rows[shown].turn)));
    }
    replace(more, shown < rows.length && button(`Show ${counted(Math.min(AT_ONCE, rows.length - shown), "more message")} of ${count(rows.length - shown)}`, () => next(shown + AT_ONCE)));
  };
  next(AT_ONCE);
  replace(place, h("h2", {}, "Conversation ", h("small", {}, counted(rows.length, "message"))), rows.length ? list : h("p", { class: "empty" }, "No text."), more);
}

/** Whether a finished turn ends with this message. */
function ends(rows, index) {
  const { turn, role } = rows[index];
  return turn != null && role === "assistant" && !rows[index].tool_calls?.length && rows[index + 1]?.turn !== turn;
}

function message(row, index) {
  const role = String(row.role ?? "unknown");
  return h("li", { class: `message ${ROLES.has(role) ? role : "other"}`, id: `message-${index}` },
    h("div", { class: "role" }, said(role), row.name ? h("small", {}, said(row.name)) : null),
    h("div", { class: "text" },
      reasoning(row.reasoning ?? row.reasoning_content),
      contents(row.content),
      (row.tool_calls ?? []).map(toolCall)));
}

function contents(content) {
  if (content == null || content === "") return null;
  if (typeof content === "string") return long(content);
  if (!Array.isArray(content)) return long(JSON.stringify(content, null, 2));
  if (content.every((one) => typeof one === "number")) return h("p", { class: "aside" }, counted(content.length, "token id"));
  return content.map((part) => (typeof part?.text === "string" ? long(part.text) : h("p", { class: "aside" }, "[", said(part?.type ?? typeof part), "]")));
}

/** Text, of a long one the beginning until it is opened. */
function long(text) {
  const body = h("p", { class: "said", dir: "auto" }, text.length > LONGEST ? cut(text, LONGEST) : text);
  if (text.length <= LONGEST) return body;
  const all = button(`Show all ${count(text.length)} characters`, () => {
    replace(body, text);
    all.remove();
  }, { class: "small" });
  return [body, all];
}

function reasoning(text) {
  return text ? h("details", {}, h("summary", {}, "Reasoning"), long(String(text))) : null;
}

function toolCall(call) {
  const { name = "", arguments: given = "" } = call?.function ?? {};
  return h("details", { class: "call" }, h("summary", {}, "Calls ", said(name, "id")),
    long(typeof given === "string" ? given : JSON.stringify(given, null, 2)));
}
