/** Drawings of a run: what a cache decided at each evaluation, and how far two runs drifted apart. */

import { digits, list, number, object, svg, text } from "./dom.mjs?v=0.1.0";

const HEIGHT = 18; // of a strip, in its own units; the style sheet scales it
const CELL = 10;
const WIDEST = 18; // pixels that a cell may take
const BARS = { full: 1, region: 0.75, forecast: 0.55, reuse: 0.3 };
const CURVE = { width: 300, height: 84, left: 40, right: 6, top: 8, bottom: 18 };

/**
 * One bar for each evaluation: its colour and its height say what was done. Kinds of newer servers draw as "other".
 * @param {{step?: number, sigma?: number, kind?: string}[]} decisions
 * @returns {SVGElement | null} null where there is nothing to draw
 */
export function decisionStrip(decisions) {
  const cells = list(decisions).map(object);
  if (!cells.length) return null;
  const width = cells.length * CELL;
  const strip = svg("svg", {
    class: "tessera-strip",
    viewBox: `0 0 ${width} ${HEIGHT}`,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": describe(cells),
  });
  strip.style.maxWidth = `${cells.length * WIDEST}px`;
  cells.forEach((cell, i) => {
    const kind = text(cell.kind) || "other";
    const tall = HEIGHT * (BARS[kind] ?? 0.4);
    const bar = svg("rect", {
      class: `tessera-cell tessera-${kind in BARS ? kind : "other"}`,
      "data-kind": kind,
      x: i * CELL + 0.75,
      y: HEIGHT - tall,
      width: CELL - 1.5,
      height: tall,
    });
    bar.append(svg("title", {}, title(cell, i, kind)));
    strip.append(bar);
  });
  return strip;
}

function title(cell, i, kind) {
  const step = number(cell.step);
  const sigma = number(cell.sigma);
  const place = step === null ? "" : `, step ${step + 1}`;
  return `evaluation ${i + 1}${place}${sigma === null ? "" : `, sigma ${digits(sigma)}`}: ${kind}`;
}

/** "25 evaluations: 1–3 full, 4–7 forecast, 8 full": what the picture shows, for those who cannot see it. */
function describe(cells) {
  const runs = [];
  cells.forEach((cell, i) => {
    const kind = text(cell.kind) || "other";
    const last = runs.at(-1);
    if (last && last.kind === kind) last.end = i + 1;
    else runs.push({ kind, start: i + 1, end: i + 1 });
  });
  const parts = runs.map((r) => `${r.start === r.end ? r.start : `${r.start}–${r.end}`} ${r.kind}`);
  return `${cells.length} evaluations: ${parts.join(", ")}`;
}

/**
 * A bar that is filled to `fraction`, 0 to 1.
 * @param {number} fraction
 * @param {string} label for screen readers
 * @returns {SVGElement | null}
 */
export function meter(fraction, label) {
  const share = number(fraction);
  if (share === null) return null;
  const width = 100 * Math.min(1, Math.max(0, share));
  return svg(
    "svg",
    { class: "tessera-meter", viewBox: "0 0 100 4", preserveAspectRatio: "none", role: "img", "aria-label": label },
    svg("rect", { class: "tessera-track", width: 100, height: 4 }),
    svg("rect", { class: "tessera-full", width, height: 4 }),
  );
}

/**
 * The error at each step as a curve over the steps, from zero up.
 * @param {number[]} errors one for each step; gaps (null) break the line
 * @param {number[]} [sigmas] the schedule, for the titles of the points
 * @returns {SVGElement | null} null for fewer than two numbers
 */
export function errorCurve(errors, sigmas) {
  const values = list(errors).map(number);
  const known = values.filter((v) => v !== null);
  if (known.length < 2) return null;
  const top = Math.max(...known, 0) || 1;
  const { width, height, left, right, top: above, bottom } = CURVE;
  const x = (i) => left + ((width - left - right) * i) / Math.max(1, values.length - 1);
  const y = (v) => above + (height - above - bottom) * (1 - Math.max(0, v) / top);
  const curve = svg("svg", {
    class: "tessera-curve",
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": `Latent error at each of ${values.length} steps, ${digits(known[0])} to ${digits(known.at(-1))}, at most ${digits(top)}`,
  });
  for (const level of [0, top / 2, top]) {
    curve.append(svg("line", { class: "tessera-grid", x1: left, x2: width - right, y1: y(level), y2: y(level) }));
    if (level !== top / 2) {
      curve.append(svg("text", { x: left - 4, y: y(level) + 3, "text-anchor": "end" }, digits(level)));
    }
  }
  curve.append(svg("text", { x: left, y: height - 4 }, "step 1"));
  curve.append(svg("text", { x: width - right, y: height - 4, "text-anchor": "end" }, String(values.length)));
  curve.append(svg("path", { class: "tessera-error", d: path(values, x, y) }));
  values.forEach((v, i) => v !== null && curve.append(point(v, i, x(i), y(v), number(list(sigmas)[i]))));
  return curve;
}

function path(values, x, y) {
  let pen = "M";
  let d = "";
  values.forEach((v, i) => {
    if (v !== null) d += `${pen}${x(i).toFixed(1)} ${y(v).toFixed(1)}`;
    pen = v === null ? "M" : "L";
  });
  return d;
}

function point(value, i, cx, cy, sigma) {
  const at = sigma === null ? "" : `, sigma ${digits(sigma)}`;
  return svg("circle", { class: "tessera-point", cx, cy, r: 2 }, svg("title", {}, `step ${i + 1}${at}: ${digits(value)}`));
}
