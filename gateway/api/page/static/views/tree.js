// Lineage: every window and session below what it came from.

import { get } from "../api.js";
import { button, h, place, replace, said, to } from "../dom.js";
import { count, counted } from "../format.js";
import { moment, stateBadge } from "../parts.js";

const LIMIT = 2000; // windows, and as many sessions
const ROOTS = 30; // of one page
const CHILDREN = 50; // of one node, before the others are asked for
const DEEP = 3; // levels that are open at first

export async function tree({ main, title, query, signal }) {
  title("Lineage");
  const list = h("div", {});
  main.append(h("h1", {}, "Lineage"), h("p", { class: "aside" }, "What was frozen, thawed, forked and cloned from what, newest lineage first."), list);
  const answer = await get("admin/tree", { limit: LIMIT }, signal);
  const { roots, children } = arrange(answer.nodes);
  const of = query.get("of");
  const chosen = of ? roots.filter((root) => holds(root, `session ${of}`, children)) : roots;
  let shown = 0;
  const items = h("ul", { class: "tree" });
  const more = h("p", {});
  const next = () => {
    items.append(...chosen.slice(shown, shown + ROOTS).map((root) => item(root, children, 0)));
    shown = Math.min(shown + ROOTS, chosen.length);
    replace(more, shown < chosen.length && button(`Show more of ${count(chosen.length - shown)}`, next));
  };
  next();
  replace(list,
    of ? h("p", { class: "chips" }, "Only ", h("a", { class: "chip", href: place(["tree"]) }, "lineage of ", said(of), " ×")) : null,
    chosen.length ? items : h("p", { class: "empty" }, "Nothing yet."), more,
    answer.truncated ? h("p", { class: "aside" }, `The newest ${count(LIMIT)} of ${counted(answer.windows, "window")} and of ${counted(answer.sessions, "session")}.`) : null);
}

const idOf = ({ kind, name }) => `${kind} ${name}`;

/** Roots, newest first, and the children of each node, oldest first. */
function arrange(nodes) {
  const children = Map.groupBy(nodes.filter((one) => one.parent), (one) => idOf(one.parent));
  return { roots: nodes.filter((one) => !one.parent).reverse(), children };
}

function holds(root, wanted, children) {
  for (const open = [root]; open.length;) {
    const one = open.pop();
    if (idOf(one) === wanted) return true;
    open.push(...(children.get(idOf(one)) ?? []));
  }
  return false;
}

/** A node. What is below it is made when it is opened: a lineage may be deep, and have thousands of branches. */
function item(node, children, depth) {
  const below = children.get(idOf(node)) ?? [];
  const line = h("span", { class: "node" },
    h("span", { class: `kind ${node.kind}` }, node.kind), " ",
    node.relation ? h("small", {}, node.relation.split(" ")[0], " ") : null,
    h("a", { href: to(`${node.kind}s`, node.name) }, said(node.title || node.name)), " ",
    node.title ? said(node.name, "id") : null, " ",
    stateBadge(node.state), h("small", {}, ` ${counted(node.token_count, "token")}, `, moment(node.created_at)),
    node.missing_parent ? h("small", {}, " from ", said(node.missing_parent.name), ", which is not here") : null);
  if (!below.length) return h("li", {}, h("span", { class: "leaf" }), line);
  const list = h("ul", {});
  const toggle = button("", () => open(list.hidden), { class: "quiet", "data-key": idOf(node), "aria-label": `What came from ${node.name}` });
  const open = (wanted) => {
    if (wanted && !list.childElementCount) grow(list, below, children, depth + 1);
    list.hidden = !wanted;
    toggle.setAttribute("aria-expanded", wanted);
    toggle.textContent = wanted ? "▾" : "▸";
  };
  open(depth < DEEP);
  return h("li", {}, toggle, line, list);
}

function grow(list, below, children, depth, from = 0) {
  list.append(...below.slice(from, from + CHILDREN).map((one) => item(one, children, depth)));
  const rest = below.length - from - CHILDREN;
  if (rest <= 0) return;
  const more = h("li", {}, button(`Show more of ${count(rest)}`, () => { more.remove(); grow(list, below, children, depth, from + CHILDREN); }, { class: "small" }));
  list.append(more);
}
