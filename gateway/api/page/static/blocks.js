// A window's KV objects: a strip of them all, and a table of a page.

import { button, h, replace, said, svg, table } from "./dom.js";
import { bytes, count, counted } from "./format.js";
import { legend } from "./plots.js";

const PAGE = 50;
const MOST = 240; // pieces of the strip
const COLUMNS = [{ name: "Object", number: true }, "Chunk hash", { name: "Rank", number: true }, { name: "Size", number: true }, "Pinned in", "Present in"];

/** Show them. */
export function blocks(place, all) {
  const list = h("div", { class: "list" });
  let at = 0;
  const draw = () => {
    const some = all.slice(at, at + PAGE);
    const go = (label, to) => button(label, () => { at = to; draw(); }, { class: "small", "data-key": label });
    replace(list, table("KV objects, in the order of the tokens", COLUMNS, some.map((one, index) => row(one, at + index)), "It holds no KV: a thaw computes it."),
      all.length > PAGE ? h("p", { class: "pager" }, h("span", {}, `${count(at + 1)} to ${count(at + some.length)} of ${counted(all.length, "object")}`),
        at > 0 ? go("Previous", at - PAGE) : null, at + PAGE < all.length ? go("Next", at + PAGE) : null) : null);
  };
  draw();
  replace(place, h("h2", {}, "KV objects ", h("small", {}, counted(all.length, "object"))), all.length ? strip(all) : null, list);
}

function row(one, index) {
  const pinned = Object.keys(one.pinned);
  const checksums = Object.entries(one.pinned).map(([tier, sum]) => `${tier} ${sum}`).join("\n");
  return [count(index + 1), said(one.hash.slice(0, 16), "id"), `0x${one.rank.toString(16)}`, bytes(one.size_bytes),
    h("span", { title: checksums }, said(pinned.join(", ") || "–")), one.present.length ? said(one.present.join(", ")) : h("span", { class: "warn" }, "evicted")];
}

/** All objects in a line, some together where there are many; the worst of them gives the colour. */
function strip(all) {
  const each = Math.ceil(all.length / MOST);
  const pieces = Array.from({ length: Math.ceil(all.length / each) }, (_, index) => kind(all.slice(index * each, (index + 1) * each)));
  const names = ["memory", "present", "evicted", "lost"];
  const label = names.map((name) => `${count(all.filter((one) => kind([one]) === name).length)} ${name}`).join(", ");
  return h("div", {},
    svg("svg", { class: "strip", viewBox: `0 0 ${pieces.length} 1`, preserveAspectRatio: "none", role: "img", "aria-label": label },
      pieces.map((name, index) => svg("rect", { class: name, x: index + 0.06, y: 0, width: 0.88, height: 1 }))),
    legend(["memory", "in memory too"], ["present", "present"], ["evicted", "evicted, and restored from its pin"], ["lost", "not pinned"]));
}

function kind(some) {
  if (some.some((one) => !Object.keys(one.pinned).length)) return "lost";
  if (some.some((one) => !one.present.length)) return "evicted";
  return some.every((one) => one.present.includes("cpu")) ? "memory" : "present";
}
