/** The panel of Plan: every patch in the order of action, its blocks as a strip, then what is declined or in conflict. */

import { digits, el, list, number, object, percent, svg, text } from "./dom.mjs?v=0.1.0";

const MOST = 512; // blocks of a stack that are drawn
const PARTS = [["refused", "Refused"], ["conflicts", "In conflict"], ["declined", "Declined"]];

/** @returns {string} */
export function planHeadline(report) {
  return text(report.headline) || "Plan";
}

export function planBody(report) {
  const rows = list(report.rows).map(object);
  const groups = grouped(rows);
  const grid = list(report.grid).map(digits).join(" × ");
  const blocks = number(report.blocks);
  const model = [
    text(report.architecture) + (report.known === false ? " (unknown architecture)" : ""),
    blocks === null ? "" : `${digits(blocks)} blocks`,
    grid && `${grid} image tokens`,
  ];
  return [
    el("div", { class: "tessera-dim" }, model.filter(Boolean).join(" · ")),
    ...[...groups].map(([when, members]) => stage(when, members)),
    rows.length ? null : el("div", {}, "Nothing is on this MODEL: it runs as it was loaded."),
    ...PARTS.map(([key, title]) => sentences(title, list(report[key]).map(text).filter(Boolean), key)),
  ];
}

function grouped(rows) {
  const groups = new Map();
  for (const row of rows) groups.set(text(row.when), [...(groups.get(text(row.when)) ?? []), row]);
  return groups;
}

function stage(when, rows) {
  return el(
    "section",
    { class: "tessera-stage" },
    el("div", { class: "tessera-side-name" }, when),
    ...rows.map(entry),
  );
}

function entry(row) {
  const node = text(row.node);
  const state = text(row.state) || "acts";
  const [start, end] = list(row.percent).map(number);
  const whole = start === 0 && end === 1;
  const when = [start, end].includes(null) || start === undefined || whole ? "" : `, ${percent(start)} to ${percent(end)} of the schedule`;
  const head = el(
    "header",
    {},
    el("b", {}, `${digits(row.order)}. ${text(row.name)}`),
    el("span", { class: "tessera-dim" }, [text(row.owner), node && `node ${node}`].filter(Boolean).join(" · ")),
  );
  return el(
    "div",
    { class: "tessera-feature tessera-planned", "data-state": state },
    head,
    el("div", { class: "tessera-feature-line" }, `${text(row.does)}${when}`),
    state === "acts" ? null : el("div", {}, el("b", {}, `${state}: `), text(row.why)),
    blockStrip(row),
  );
}

/** A cell for each block of the stack, filled where the row acts. @returns {SVGElement | null} */
function blockStrip(row) {
  const count = number(row.of);
  if (count === null || !Number.isInteger(count) || count < 1 || count > MOST) return null;
  const chosen = numbers(text(row.blocks), count);
  const strip = svg("svg", {
    class: "tessera-meter tessera-block-strip",
    viewBox: `0 0 ${count} 4`,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": `blocks ${text(row.blocks) || "none"} of ${digits(count)}`,
  });
  for (let i = 0; i < count; i += 1) {
    const acts = chosen.has(i);
    const cell = svg("rect", { class: acts ? "tessera-full" : "tessera-track", x: i + 0.06, width: 0.88, height: 4 });
    cell.append(svg("title", {}, `block ${i}${acts ? "" : ": left alone"}`));
    strip.append(cell);
  }
  return strip;
}

/** The numbers of "2-18,25" below `count`. @returns {Set<number>} */
function numbers(words, count) {
  const found = new Set();
  for (const part of words.split(",")) {
    const match = /^(\d+)(?:-(\d+))?$/.exec(part.trim());
    if (!match) continue;
    const last = Math.min(Number(match[2] ?? match[1]), count - 1);
    for (let i = Number(match[1]); i <= last; i += 1) found.add(i);
  }
  return found;
}

function sentences(title, lines, key) {
  if (!lines.length) return null;
  const items = lines.map((line) => el("li", {}, line));
  return el(
    "section",
    { "data-part": key },
    el("div", { class: "tessera-side-name" }, title),
    el("ul", { class: "tessera-notes" }, ...items),
  );
}
