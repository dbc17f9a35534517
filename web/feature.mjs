/** One node's part of a report: its line, its decisions, its mask, its facts to unfold. */

import { bytes, digits, el, list, number, object, percent, text } from "./dom.mjs?v=0.1.0";
import { frontChart } from "./front.mjs?v=0.1.0";
import { frontList } from "./line.mjs?v=0.1.0";
import { maskPicture } from "./mask.mjs?v=0.1.0";
import { decisionStrip, meter } from "./strip.mjs?v=0.1.0";

/**
 * A feature in a report.
 * @param {Record<string, any>} feature
 * @param {((id: string) => void) | unknown} [show] brings its node into view; anything but a function is left out
 * @returns {HTMLElement}
 */
export function featureBlock(feature, show) {
  const { name, node, line, mask } = object(feature);
  const facts = object(object(feature).facts);
  const where = text(node) ? `node ${text(node)}` : "";
  return el(
    "section",
    { class: "tessera-feature", "data-feature": text(name) },
    el("header", {}, title(text(name) || "Unnamed", text(node), show), el("span", { class: "tessera-dim" }, where)),
    el("div", { class: "tessera-feature-line" }, text(line)),
    decisionStrip(facts.decisions),
    number(facts.pairs_fraction) === null
      ? null
      : meter(facts.pairs_fraction, `${percent(facts.pairs_fraction)} of the attention pairs were computed`),
    maskPicture(mask),
    ...frontOf(facts),
    factsTable(facts),
  );
}

/** What Accelerate tried. @returns {(Element | null)[]} */
function frontOf(facts) {
  const front = frontChart(facts.front, text(facts.judged) ? `1 − SSIM of the ${text(facts.judged)}` : "loss");
  return front ? [front, frontList(facts.front)] : [];
}

function title(name, node, show) {
  if (typeof show !== "function" || !node) return el("b", {}, name);
  const button = el("button", { type: "button", class: "tessera-show", title: "Show this node on the canvas" }, name);
  button.addEventListener("click", () => show(node));
  return button;
}

/** The numbers of a feature, folded away. @returns {HTMLElement | null} */
function factsTable(facts) {
  const rows = Object.entries(facts).flatMap(([key, value]) => factRows(key, value));
  if (!rows.length) return null;
  const body = rows.map(([key, value]) => el("tr", {}, el("th", { scope: "row" }, key), el("td", {}, value)));
  return el("details", {}, el("summary", {}, "Facts"), el("table", {}, el("tbody", {}, ...body)));
}

function factRows(key, value) {
  const label = key.replaceAll("_", " ");
  if (number(value) !== null) return [[label, shown(key, value)]];
  if (text(value)) return [[label, text(value)]];
  if (Array.isArray(value)) return ["decisions", "front"].includes(key) ? [] : [[label, list(value).map(short).join(", ")]];
  return Object.entries(object(value)).map(([inner, v]) => [`${label}: ${inner}`, short(object(v).name ?? v)]);
}

function short(value) {
  return number(value) === null ? text(value) : digits(value);
}

function shown(key, value) {
  if (key.endsWith("bytes")) return bytes(value);
  return key.endsWith("fraction") ? percent(value) : digits(value);
}
