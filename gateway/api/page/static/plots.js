// Small plots, as SVG made here. Each has its numbers beside it or in its label.

import { h, svg } from "./dom.js";
import { count, percent } from "./format.js";

const WIDTH = 160;
const HEIGHT = 34;

/** A line of the last values, oldest first; null is a gap. `most` fixes the top of the scale. */
export function sparkline(values, label, most = 0) {
  const top = Math.max(most, ...values.map((value) => value ?? 0)) || 1;
  const step = WIDTH / Math.max(values.length - 1, 1);
  const points = values.map((value, index) => value == null ? null : [index * step, HEIGHT - 2 - (value / top) * (HEIGHT - 6)]);
  const pieces = runs(points);
  return svg("svg", { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label },
    svg("path", { class: "base", d: `M0 ${HEIGHT - 1.5}H${WIDTH}` }),
    pieces.map((run) => svg("path", { class: "area", d: `${line(run)}V${HEIGHT - 2}H${run[0][0].toFixed(1)}Z` })),
    pieces.map((run) => svg("path", { class: "line", d: line(run) })));
}

function runs(points) {
  const found = [];
  for (let index = 0; index < points.length; index++) {
    if (!points[index]) continue;
    if (!points[index - 1]) found.push([]);
    found.at(-1).push(points[index]);
  }
  return found;
}

function line(run) {
  const drawn = run.length > 1 ? run : [run[0], [run[0][0] + 1.5, run[0][1]]];
  return `M${drawn.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}`;
}

/** A bar of parts `[value, class, name]` of a whole, with a mark at one value. */
export function bar(parts, whole, label, mark = null) {
  let at = 0;
  const share = (value) => (whole ? Math.min(value / whole, 1) * 100 : 0);
  const pieces = parts.filter(([value]) => value > 0).map(([value, name]) => {
    const piece = svg("rect", { class: name, x: share(at).toFixed(3), y: 0, width: Math.max(share(value), 0.4).toFixed(3), height: 10 });
    at += value;
    return piece;
  });
  return svg("svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": label },
    svg("rect", { class: "empty", x: 0, y: 0, width: 100, height: 10 }),
    pieces,
    mark == null ? null : svg("path", { class: "mark", d: `M${share(mark).toFixed(2)} 0V10` }));
}

/** How much of the context a conversation fills; without a limit, only its tokens. */
export function contextShare(tokens, limit) {
  if (!limit) return h("span", {}, count(tokens));
  const share = tokens / limit;
  const kind = share >= 0.95 ? "bad" : share >= 0.8 ? "warn" : "cached";
  const label = `${count(tokens)} of ${count(limit)} tokens, ${percent(share)}`;
  return h("span", { class: "share", title: label },
    bar([[tokens, kind]], limit, label), h("span", {}, count(tokens)), h("small", {}, percent(share, 0)));
}

/** The names of a plot's colours. */
export function legend(...entries) {
  return h("ul", { class: "legend" }, entries.map(([name, text]) => h("li", { class: name }, text)));
}
