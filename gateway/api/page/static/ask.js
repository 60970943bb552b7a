// Ask without naming a window: the best of those that a search finds are asked.

import { send } from "./api.js";
import { field, operation, result } from "./dialog.js";
import { button, h, said, to } from "./dom.js";
import { took } from "./format.js";
import { answered } from "./window_actions.js";

/** The button for it. `searched` says what the search field has. */
export function askMany(chosen, searched) {
  return button("Ask…", () => open(searched()));
}

function open(search) {
  operation("Ask the best windows", [
    field("Question", "question", { rows: 3, required: true, maxlength: 10000 }),
    field("Of windows with", "search", { value: search, maxlength: 10000 }, "The words of the question if empty"),
    field("Windows", "max_windows", { type: "number", min: 1, max: 10, placeholder: "3" }),
    field("At most", "max_tokens", { type: "number", min: 1, max: 4096, placeholder: "512" }, "tokens of each answer"),
  ], {
    label: "Ask",
    run: async (given, onProgress) => {
      const done = await send("POST", "admin/ask", given, { onProgress });
      return result(done.answers.length ? "" : "No window was found to ask.", done.answers.map(one),
        h("p", { class: "aside" }, took(done.duration_ms)), done.warnings);
    },
  });
}

function one(answer) {
  return h("article", { class: "answer" },
    h("h3", {}, h("a", { href: to("windows", answer.window_name) }, said(answer.title || answer.window_name)), " ", h("small", { class: "id" }, said(answer.window_name))),
    answer.error ? h("p", { class: "bad" }, said(answer.error.message)) : answered(answer));
}
