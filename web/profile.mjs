/** The panel of Profile Model: the bottleneck, bars by class of operator, a strip of blocks, the steps, what to try. */

import { bytes, digits, el, list, number, object, percent, seconds, svg, text } from "./dom.mjs?v=0.1.0";
import { decisionStrip } from "./strip.mjs?v=0.1.0";

const MOST = 512; // blocks that are drawn
const NAMES = { outside: "outside the network", profiler: "the profiler itself" };

/** "Flux: attention is the bottleneck". @returns {string} */
export function profileHeadline(report) {
  const [model, slow] = [text(report.architecture) || "Profile", text(report.bottleneck)];
  return slow ? `${model}: ${slow} is the bottleneck` : model;
}

export function profileBody(report) {
  const timed = number(report.step_seconds) !== null;
  const how = [
    `${tera(report.step_flops)} a step`,
    timed ? seconds(report.plain_step_seconds ?? report.step_seconds) : "",
    text(report.conditions),
    text(report.device),
  ];
  return [
    el("div", {}, text(report.why)),
    el("div", { class: "tessera-dim" }, how.filter(Boolean).join(" · ")),
    classes(report, timed),
    blocks(report, timed),
    steps(report),
    lengths(report),
    memory(report),
    advice(report),
  ];
}

function tera(flops) {
  const n = number(flops);
  return n === null ? "" : n >= 1e12 ? `${digits(n / 1e12)} TFLOP` : `${digits(n / 1e9)} GFLOP`;
}

/** One row a class of operator; a bar under each number is its share. */
function classes(report, timed) {
  const rows = Object.entries(object(report.classes))
    .map(([kind, value]) => [kind, object(value)])
    .filter(([, row]) => row.seconds > 0 || row.flops > 0)
    .map(([kind, row]) =>
      el(
        "tr",
        { "data-kind": kind },
        el("th", { scope: "row" }, NAMES[kind] ?? kind),
        timed ? cell(row.share, seconds(row.seconds)) : null,
        cell(row.flops_share, tera(row.flops)),
      ),
    );
  if (!rows.length) return null;
  const head = el(
    "tr",
    {},
    el("td", {}),
    timed ? el("th", { scope: "col" }, "Time") : null,
    el("th", { scope: "col" }, "Arithmetic"),
  );
  return el("table", { class: "tessera-compare" }, el("thead", {}, head), el("tbody", {}, ...rows));
}

function cell(share, title) {
  const n = number(share);
  const bar = n > 0 ? el("span", { class: "tessera-bar" }) : null;
  if (bar) bar.style.width = `${100 * Math.min(1, n)}%`;
  return el("td", { title: title || null }, n > 0 ? percent(n) : "–", bar);
}

/** A cell for each block, the stronger the more of the time (of the arithmetic, where nothing was timed) it takes. */
function blocks(report, timed) {
  const rows = list(report.by_block).map(object);
  if (!rows.length || rows.length > MOST) return null;
  const clocked = timed && rows.some((row) => number(row.share) > 0);
  const values = rows.map((row) => number(clocked ? row.share : row.flops_share) ?? 0);
  const top = Math.max(...values) || 1;
  const what = clocked ? "time" : "arithmetic";
  const strip = svg("svg", {
    class: "tessera-strip",
    viewBox: `0 0 ${rows.length} 1`,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": `Share of the ${what} of ${rows.length} blocks, at most ${percent(top)} in block ${values.indexOf(top)}`,
  });
  values.forEach((value, i) => {
    const opacity = (0.08 + (0.92 * value) / top).toFixed(3);
    const rect = svg("rect", { class: "tessera-full", x: i + 0.05, width: 0.9, height: 1, "fill-opacity": opacity });
    rect.append(svg("title", {}, `block ${digits(rows[i].block)}: ${percent(value)} of the ${what}`));
    strip.append(rect);
  });
  const caption = `The ${what} by block, 0 to ${rows.length - 1}`;
  return el("figure", {}, el("figcaption", { class: "tessera-dim" }, caption), strip);
}

function steps(report) {
  const rows = list(report.steps).map(object);
  if (!rows.length) return null;
  const computed = number(report.computed_share);
  const saved = computed !== null && computed < 0.995 ? `; ${percent(computed)} of the arithmetic was computed` : "";
  const caption = `${digits(rows.length)} measured steps${saved}`;
  return el("figure", {}, el("figcaption", { class: "tessera-dim" }, caption), decisionStrip(rows));
}

function lengths(report) {
  const rows = list(report.attention).map(object).map((row) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, `${digits(row.queries)} × ${digits(row.keys)}`),
      el("td", {}, digits(row.calls)),
      el("td", {}, percent(row.share)),
    ),
  );
  if (!rows.length) return null;
  const names = ["queries × keys", "calls a step", "of its arithmetic"];
  const head = el("tr", {}, ...names.map((name) => el("th", { scope: "col" }, name)));
  const table = el("table", { class: "tessera-blocks" }, el("thead", {}, head), el("tbody", {}, ...rows));
  return el("details", {}, el("summary", {}, "Lengths of attention"), table);
}

function memory(report) {
  const { weights, peak } = object(report.memory);
  const parts = [`weights ${bytes(weights)}`, number(peak) === null ? "" : `peak ${bytes(peak)}`];
  const outside = Object.entries(object(report.outside)).map(([name, value]) => `${name} ${seconds(value)} a picture`);
  return el("div", { class: "tessera-dim" }, [...parts, ...outside].filter(Boolean).join(" · "));
}

function advice(report) {
  const items = list(report.advice)
    .map(object)
    .map((row) => el("li", {}, el("b", {}, text(row.node)), `: ${text(row.why)}`));
  return items.length ? el("section", {}, el("div", { class: "tessera-side-name" }, "Try"), el("ul", { class: "tessera-notes" }, ...items)) : null;
}
