/** The panels of Run Report and Compare; probe.mjs has Attention Probe's. Whatever a newer server adds is passed over; what an older one lacks is left out. */

import { bytes, digits, el, list, number, object, percent, seconds, text } from "./dom.mjs?v=0.1.0";
import { featureBlock } from "./feature.mjs?v=0.1.0";
import { ended } from "./line.mjs?v=0.1.0";
import { probeBody, probeHeadline } from "./probe.mjs?v=0.1.0";
import { errorCurve } from "./strip.mjs?v=0.1.0";

/**
 * A report as a panel.
 * @param {unknown} data what a node put in `ui.tessera_report`: a run, or a comparison of two
 * @returns {HTMLElement}
 */
export function buildReport(data) {
  const report = object(data);
  const kind = Object.hasOwn(KINDS, text(report.kind)) ? text(report.kind) : "run";
  const [headlineOf, bodyOf] = KINDS[kind];
  const headline = headlineOf(report);
  return el(
    "div",
    { class: "tessera-report", role: "region", "aria-label": headline, tabindex: 0, "data-kind": kind },
    el("div", { class: "tessera-headline" }, headline),
    ...bodyOf(report),
    notes(report),
  );
}

const KINDS = {
  run: [runHeadline, runBody],
  compare: [compareHeadline, compareBody],
  probe: [probeHeadline, probeBody],
  lines: [linesHeadline, linesBody],
};

/** Anything that lines of text tell whole. @returns {string} */
function linesHeadline(report) {
  return text(list(report.lines)[0]) || "Report";
}

function linesBody(report) {
  return list(report.lines).slice(1).map(text).filter(Boolean).map((line) => el("div", {}, line));
}

function runHeadline(run) {
  const stopped = ended(run);
  const steps = number(run.steps);
  const took = number(run.seconds) === null ? "" : ` in ${seconds(run.seconds)}`;
  const what = steps === null ? "Run" : `${digits(steps)} step${steps === 1 ? "" : "s"}`;
  return `${stopped ? `${stopped}: ` : ""}${what}${took}`;
}

function runBody(run) {
  const features = list(run.features);
  const model = text(run.architecture);
  const parts = [
    model && (run.known === false ? `${model} (unknown architecture)` : model),
    counted(run.evaluations, "evaluation"),
    counted(run.forwards, "model call"),
  ];
  return [
    el("div", { class: "tessera-dim" }, parts.filter(Boolean).join(" · ")),
    ...(features.length ? features.map(featureBlock) : [el("div", {}, "No Tessera node took part in this run.")]),
  ];
}

function counted(value, noun) {
  const n = number(value);
  return n === null ? "" : `${digits(n)} ${noun}${n === 1 ? "" : "s"}`;
}

/** "b is 1.83× faster; SSIM 0.97, latent error 4 %". @returns {string} */
function compareHeadline(report) {
  const [a, b] = labels(report);
  const speed = number(report.speedup);
  const quality = [
    report.identical === true ? "identical latents" : "",
    number(report.ssim) === null ? "" : `SSIM ${digits(report.ssim)}`,
    number(report.psnr) === null ? "" : `PSNR ${digits(report.psnr)} dB`,
    number(report.latent_error) === null || report.identical === true ? "" : `latent error ${percent(report.latent_error)}`,
  ];
  const loss = quality.filter(Boolean).join(", ");
  return [pace(a, b, speed), loss].filter(Boolean).join("; ");
}

function pace(a, b, speed) {
  if (speed === null || speed <= 0) return `${a} and ${b}`;
  if (Math.abs(speed - 1) < 0.005) return `${b} is as fast as ${a}`;
  return speed > 1 ? `${b} is ${speed.toFixed(2)}× faster` : `${b} is ${(1 / speed).toFixed(2)}× slower`;
}

function labels(report) {
  return [text(object(report.a).label) || "a", text(object(report.b).label) || "b"];
}

function compareBody(report) {
  const sides = [object(report.a), object(report.b)];
  const curve = errorCurve(report.per_step_error, report.sigmas);
  const blocks = sides.map((side, i) =>
    list(side.features).length
      ? el(
          "div",
          { class: "tessera-side" },
          el("div", { class: "tessera-side-name" }, labels(report)[i]),
          ...list(side.features).map(featureBlock),
        )
      : null,
  );
  const how = [
    number(report.repeats) === null ? "" : `median of ${digits(report.repeats)}`,
    text(report.device),
  ].filter(Boolean);
  return [
    table(report, sides),
    how.length ? el("div", { class: "tessera-dim" }, how.join(" · ")) : null,
    curve ? el("figure", {}, el("figcaption", { class: "tessera-dim" }, "Latent error at each step"), curve) : null,
    ...blocks,
  ];
}

function table(report, sides) {
  const rows = [
    row("Time", sides.map((s) => number(object(s.seconds).median)), seconds, sides.map((s) => spread(s.seconds))),
    row("Evaluations", sides.map((s) => number(s.evaluations)), digits),
    row("Blocks", sides.map((s) => number(s.blocks_computed)), digits, sides.map(blocksOf)),
    row("Attention pairs", sides.map((s) => number(s.pairs_fraction)), percent),
    row("Cache held", sides.map((s) => number(s.held_bytes)), bytes),
    row("Peak memory", sides.map((s) => number(s.peak_bytes)), bytes),
  ];
  const names = labels(report).map((name) => el("th", { scope: "col", title: name }, name));
  return el(
    "table",
    { class: "tessera-compare" },
    el("thead", {}, el("tr", {}, el("td", {}), ...names)),
    el("tbody", {}, ...rows.filter(Boolean)),
  );
}

/** A row of two numbers; a bar under each tells its share of the larger one. null where neither has one above zero. */
function row(name, values, format, titles = []) {
  const largest = Math.max(...values.map((v) => v ?? 0));
  if (largest <= 0) return null;
  const cells = values.map((value, i) => {
    const bar = value > 0 ? el("span", { class: "tessera-bar" }) : null;
    if (bar) bar.style.width = `${(100 * value) / largest}%`;
    return el("td", { title: titles[i] || null }, format(value), bar);
  });
  return el("tr", {}, el("th", { scope: "row" }, name), ...cells);
}

function spread(value) {
  const { min, max } = object(value);
  return number(min) === null || number(max) === null ? "" : `${seconds(min)} to ${seconds(max)}`;
}

function blocksOf(side) {
  const [done, all] = [number(side.blocks_computed), number(side.blocks_total)];
  return done === null || all === null ? "" : `${digits(done)} of ${digits(all)} blocks computed`;
}

function notes(report) {
  const lines = list(report.notes).map(text).filter(Boolean);
  return lines.length ? el("ul", { class: "tessera-notes" }, ...lines.map((line) => el("li", {}, line))) : null;
}
