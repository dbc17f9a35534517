/** The panel of Attention Probe: the value to set, the map of blocks and steps, what each density keeps. */

import { digits, el, list, number, object, percent, svg, text } from "./dom.mjs?v=0.1.0";

const CELL = { width: 10, height: 12, gap: 0.75 };
const TALL = 16; // pixels of a row of the map at the most, WIDE of a cell
const WIDE = 26;
const KEEPS = [0.5, 0.8, 0.9, 0.95]; // bounds of the map's colours, as in the picture `map`

/** "Set density 0.24 to keep 90 % of the attention". @returns {string} */
export function probeHeadline(report) {
  const wanted = number(report.wanted);
  if (wanted === null) return text(list(report.lines)[0]) || "Attention Probe";
  const found = setting(report, report.suggested);
  const share = `${percent(wanted)} of the attention`;
  return found ? `Set ${found} to keep ${share}` : `No ${name(report)} of this pattern keeps ${share}`;
}

export function probeBody(report) {
  const grid = list(report.grid).map(digits).join(" × ");
  const how = [
    `pattern ${text(report.pattern)}`,
    grid && `grid ${grid}`,
    counted(report.tokens, "image token"),
    counted(report.others, "other token"),
    counted(list(report.steps).length, "measured step"),
  ];
  return [
    el("div", { class: "tessera-dim" }, how.filter(Boolean).join(" · ")),
    ...besides(report).map((line) => el("div", {}, line)),
    map(report),
    ladder(report),
    table(report),
  ];
}

/** The lines that say more than the headline; the second one is the same in other words. */
function besides(report) {
  const known = number(report.wanted) !== null;
  return list(report.lines).map(text).filter((line, i) => line && i !== (known ? 1 : 0));
}

function counted(value, noun) {
  const n = number(value);
  return n === null ? "" : `${digits(n)} ${noun}${n === 1 ? "" : "s"}`;
}

function name(report) {
  return text(report.setting) || "density";
}

/** "density 0.24", or "radius 12 (density 0.227)"; "" where nothing was found. */
function setting(report, entry) {
  const { value, density } = object(entry);
  if (number(value) === null) return "";
  const beside = name(report) === "density" || number(density) === null ? "" : ` (density ${digits(density)})`;
  return `${name(report)} ${digits(value)}${beside}`;
}

/** One column a block, one row a measured step, coloured by the share that is kept. */
function map(report) {
  const blocks = list(report.blocks).map(object);
  const steps = list(report.steps);
  if (!blocks.length || !steps.length) return null;
  const [width, height] = [blocks.length * CELL.width, steps.length * CELL.height];
  const [first, last] = [blocks[0].block, blocks.at(-1).block].map(digits);
  const picture = svg("svg", {
    class: "tessera-map",
    viewBox: `0 0 ${width} ${height}`,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": `Attention kept in blocks ${first} to ${last}, at ${counted(steps.length, "step")}; the table below has the numbers`,
  });
  picture.style.maxWidth = `${blocks.length * WIDE}px`;
  picture.style.height = `${steps.length * TALL}px`;
  blocks.forEach((block, x) => steps.forEach((step, y) => picture.append(cell(block, step, x, y))));
  const rows = el("div", { class: "tessera-map-steps", "aria-hidden": "true" }, ...steps.map((s) => el("span", {}, `step ${digits(s)}`)));
  const columns = el("div", { class: "tessera-map-blocks", "aria-hidden": "true" }, el("span", {}, `block ${first}`), el("span", {}, blocks.length > 1 ? last : ""));
  columns.style.maxWidth = picture.style.maxWidth;
  const chosen = setting(report, report.chosen);
  return el(
    "figure",
    {},
    el("figcaption", { class: "tessera-dim" }, `Attention kept by each block and step${chosen ? `, ${chosen}` : ""}`),
    el("div", { class: "tessera-map-frame" }, rows, el("div", {}, picture, columns)),
    legend(),
  );
}

function cell(block, step, x, y) {
  const kept = number(list(block.by_step)[y]);
  const rect = svg("rect", {
    class: "tessera-kept",
    "data-keeps": level(kept),
    x: x * CELL.width + CELL.gap,
    y: y * CELL.height + CELL.gap,
    width: CELL.width - 2 * CELL.gap,
    height: CELL.height - 2 * CELL.gap,
  });
  rect.append(svg("title", {}, `block ${digits(block.block)}, step ${digits(step)}: ${kept === null ? "not measured" : percent(kept)}`));
  return rect;
}

/** 0 for less than the first bound, up to the number of bounds; "none" where nothing was measured. */
function level(kept) {
  return kept === null ? "none" : KEEPS.filter((bound) => kept >= bound).length;
}

function legend() {
  const words = [`< ${percent(KEEPS[0])}`, ...KEEPS.map((bound) => `≥ ${percent(bound)}`)];
  const swatches = words.map((word, i) => el("span", {}, el("i", { class: "tessera-swatch", "data-keeps": i }), word));
  return el("div", { class: "tessera-legend tessera-dim" }, ...swatches);
}

/** What each density keeps, all blocks and steps together; marks the one that is asked for. */
function ladder(report) {
  const entries = [...list(report.ladder), object(report.suggested), object(report.chosen)].map(object);
  const rungs = entries.filter((e) => number(e.recall) !== null && number(e.value) !== null);
  const steps = [...new Map(rungs.map((rung) => [rung.value, rung])).values()].sort((a, b) => a.value - b.value);
  if (!steps.length) return null;
  const rows = steps.map((rung) => {
    const marks = [
      rung.value === object(report.suggested).value ? "suggested" : "",
      rung.value === object(report.chosen).value ? "in the map" : "",
    ].filter(Boolean);
    const bar = el("span", { class: "tessera-bar" });
    bar.style.width = `${100 * Math.min(1, Math.max(0, rung.recall))}%`;
    const where = marks.length ? el("span", { class: "tessera-dim" }, ` ${marks.join(", ")}`) : null;
    return el(
      "tr",
      { class: marks.includes("suggested") ? "tessera-suggested" : null },
      el("th", { scope: "row" }, digits(rung.value), where),
      el("td", {}, percent(rung.recall), bar),
    );
  });
  const head = el("tr", {}, el("th", { scope: "col" }, name(report)), el("th", { scope: "col" }, "Attention kept"));
  return el("table", { class: "tessera-compare tessera-ladder" }, el("thead", {}, head), el("tbody", {}, ...rows));
}

/** All numbers of the map, folded away. */
function table(report) {
  const blocks = list(report.blocks).map(object);
  if (!blocks.length) return null;
  const steps = list(report.steps);
  const wanted = number(report.wanted) === null ? "" : ` for ${percent(report.wanted)}`;
  const names = ["block", ...steps.map((s) => `step ${digits(s)}`), "mean", `${name(report)}${wanted}`];
  const rows = blocks.map((block) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, digits(block.block)),
      ...steps.map((_, i) => el("td", {}, percent(list(block.by_step)[i]))),
      el("td", {}, percent(block.recall)),
      el("td", {}, digits(object(block.suggested).value)),
    ),
  );
  const head = el("tr", {}, ...names.map((word) => el("th", { scope: "col" }, word)));
  const body = el("table", { class: "tessera-blocks" }, el("thead", {}, head), el("tbody", {}, ...rows));
  return el("details", {}, el("summary", {}, "Numbers of each block"), body);
}
