/** The panels of Run Report and Compare; probe.mjs has Attention Probe's. Whatever a newer server adds is passed over; what an older one lacks is left out. */

import { bytes, digits, el, list, number, object, percent, seconds, text } from "./dom.mjs?v=0.1.0";
import { featureBlock } from "./feature.mjs?v=0.1.0";
import { frontChart } from "./front.mjs?v=0.1.0";
import { ended, frontList } from "./line.mjs?v=0.1.0";
import { planBody, planHeadline } from "./plan.mjs?v=0.1.0";
import { probeBody, probeHeadline } from "./probe.mjs?v=0.1.0";
import { profileBody, profileHeadline } from "./profile.mjs?v=0.1.0";
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
  plan: [planHeadline, planBody],
  profile: [profileHeadline, profileBody],
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

/** "b is 1.83× faster; SSIM 0.97, latent error 4 %"; of more than two the fastest one. @returns {string} */
function compareHeadline(report) {
  const sides = sidesOf(report);
  const speed = (side) => number(side.speedup) ?? number(report.speedup);
  const b = sides.slice(1).reduce((best, side) => ((speed(side) ?? 0) > (speed(best) ?? 0) ? side : best), sides[1]);
  const told = "ssim" in b ? b : report;
  const quality = [
    told.identical === true ? "identical latents" : "",
    number(told.ssim) === null ? "" : `SSIM ${digits(told.ssim)}`,
    number(told.psnr) === null ? "" : `PSNR ${digits(told.psnr)} dB`,
    number(told.latent_error) === null || told.identical === true ? "" : `latent error ${percent(told.latent_error)}`,
  ];
  const loss = quality.filter(Boolean).join(", ");
  const headline = [pace(labelOf(sides[0], 0), labelOf(b, sides.indexOf(b)), speed(b)), loss].filter(Boolean).join("; ");
  return sides.length > 2 ? `Fastest of ${sides.length}: ${headline}` : headline;
}

function pace(a, b, speed) {
  if (speed === null || speed <= 0) return `${a} and ${b}`;
  if (Math.abs(speed - 1) < 0.005) return `${b} is as fast as ${a}`;
  return speed > 1 ? `${b} is ${speed.toFixed(2)}× faster` : `${b} is ${(1 / speed).toFixed(2)}× slower`;
}

/** Every MODEL that was compared; a report of an older server has two. */
function sidesOf(report) {
  const models = list(report.models).map(object);
  return models.length > 1 ? models : [object(report.a), object(report.b)];
}

function labelOf(side, n) {
  return text(side.label) || "abcdefghijklmnopqrstuvwxyz"[n];
}

function compareBody(report) {
  const sides = sidesOf(report);
  const blocks = sides.map((side, i) =>
    list(side.features).length
      ? el(
          "div",
          { class: "tessera-side" },
          el("div", { class: "tessera-side-name" }, labelOf(side, i)),
          ...list(side.features).map(featureBlock),
        )
      : null,
  );
  const how = [
    number(report.repeats) === null ? "" : `median of ${digits(report.repeats)}`,
    text(report.device),
    list(report.files).length ? `saved as ${list(report.files).map(text).join(", ")}` : "",
  ].filter(Boolean);
  const front = sides.length > 2 ? frontChart(report.points, text(report.loss_of) || "loss") : null;
  return [
    el("div", { class: "tessera-scroll" }, table(sides)),
    how.length ? el("div", { class: "tessera-dim" }, how.join(" · ")) : null,
    front ? el("figure", {}, el("figcaption", { class: "tessera-dim" }, "Speed against loss"), front) : null,
    front ? frontList(report.points) : null,
    ...curves(report, sides),
    ...blocks,
  ];
}

/** One curve a MODEL that differs from the first. */
function curves(report, sides) {
  const told = sides.map((side, i) => [labelOf(side, i), side.per_step_error ?? (i === 1 ? report.per_step_error : null)]);
  return told.slice(1).map(([label, errors]) => {
    const curve = errorCurve(errors, report.sigmas);
    const of = sides.length > 2 ? ` of ${label}` : "";
    return curve ? el("figure", {}, el("figcaption", { class: "tessera-dim" }, `Latent error at each step${of}`), curve) : null;
  });
}

function table(sides) {
  const quality = sides.length > 2;
  const rows = [
    row("Time", sides.map((s) => number(object(s.seconds).median)), seconds, sides.map((s) => spread(s.seconds))),
    quality ? row("Times faster", sides.map((s) => number(s.speedup)), times) : null,
    quality ? row("SSIM", sides.map((s) => number(s.ssim)), digits) : null,
    quality ? row("Latent error", sides.map((s) => number(s.latent_error)), percent) : null,
    row("Evaluations", sides.map((s) => number(s.evaluations)), digits),
    row("Blocks", sides.map((s) => number(s.blocks_computed)), digits, sides.map(blocksOf)),
    row("Attention pairs", sides.map((s) => number(s.pairs_fraction)), percent),
    row("Cache held", sides.map((s) => number(s.held_bytes)), bytes),
    row("Peak memory", sides.map((s) => number(s.peak_bytes)), bytes),
  ];
  const names = sides.map((side, i) => el("th", { scope: "col", title: labelOf(side, i) }, labelOf(side, i)));
  return el(
    "table",
    { class: "tessera-compare" },
    el("thead", {}, el("tr", {}, el("td", {}), ...names)),
    el("tbody", {}, ...rows.filter(Boolean)),
  );
}

function times(value) {
  return number(value) === null ? "–" : `${value.toFixed(2)}×`;
}

/** A row of numbers; a bar under each tells its share of the larger one. null where none is above zero. */
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
