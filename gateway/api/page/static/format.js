// Numbers, sizes and times as people read them, with the CLI's words.

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const SIZES = ["KiB", "MiB", "GiB", "TiB"];
const SPANS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
const LONG_AGO_S = 60 * 86400; // from then on a date says more

/** A count: `14,176`. */
export function count(number) {
  return number == null ? "–" : WHOLE.format(number);
}

/** A number of things: `1 chunk`, `1,024 chunks`. */
export function counted(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

/** A count in few characters: `12.4k`. */
export function short(number) {
  if (number == null) return "–";
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (number >= size) return `${(number / (unit === "k" ? 1e3 : size)).toFixed(1)}${unit}`;
  }
  return Number.isInteger(number) ? count(number) : number.toFixed(number < 10 ? 1 : 0);
}

/** Bytes: `720.0 KiB`. */
export function bytes(number) {
  if (number == null) return "–";
  let [value, unit] = [number, "B"];
  for (const next of SIZES) {
    if (value < 1024) break;
    [value, unit] = [value / 1024, next];
  }
  return unit === "B" ? `${count(value)} B` : `${value.toFixed(1)} ${unit}`;
}

/** A share of one: `64.2%`. */
export function percent(share, digits = 1) {
  return share == null ? "–" : `${(share * 100).toFixed(digits)}%`;
}

/** Milliseconds: `78 ms`, `1.2 s`. */
export function took(ms) {
  return ms == null ? "–" : ms < 1000 ? `${Math.round(ms)} ms` : seconds(ms / 1000);
}

/** Seconds: `9.5 s`, `4 min 10 s`, `3 h 2 min`. */
export function seconds(value) {
  if (value == null) return "–";
  if (value < 60) return `${value.toFixed(1)} s`;
  const whole = Math.round(value);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${count(Math.floor(whole / 3600))} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** A longer time in its largest unit, rounded down: `5 s`, `2 d`. */
export function span(value) {
  const [length, unit] = SPANS.find(([one]) => value >= one) ?? SPANS.at(-1);
  return `${Math.floor(value / length)} ${unit}`;
}

/** How long ago or away a moment is; a date for one long ago. */
export function when(moment) {
  if (!moment) return "–";
  const passed = (Date.now() - Date.parse(moment)) / 1000;
  if (Math.abs(passed) < 1) return "now";
  if (passed < 0) return `in ${span(-passed)}`;
  return passed > LONG_AGO_S ? moment.slice(0, 10) : `${span(passed)} ago`;
}

/** A moment in full. */
export function exactly(moment) {
  return moment ? `${moment.slice(0, 10)} ${moment.slice(11, 19)} UTC` : "";
}

/** The first so many characters, without half a pair at the end. */
export function cut(text, length) {
  const whole = [...String(text).slice(0, length * 2)];
  return whole.length > length ? `${whole.slice(0, length - 1).join("")}…` : whole.join("");
}
