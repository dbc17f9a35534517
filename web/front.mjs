/** Speed against loss: one point a stack or a MODEL, and a line through those that none beats in both. */

import { digits, list, number, object, svg, text } from "./dom.mjs?v=0.1.0";

const BOX = { width: 300, height: 150, left: 42, right: 14, top: 10, bottom: 30 };

/**
 * @param {{name?: string, ratio?: number, loss?: number, front?: boolean, chosen?: boolean, abandoned?: boolean}[]} points
 * @param {string} lossOf what the loss is
 * @returns {SVGElement | null} null for fewer than two points
 */
export function frontChart(points, lossOf) {
  const known = list(points).map(object).filter((p) => number(p.ratio) !== null && number(p.loss) !== null && !p.abandoned);
  if (known.length < 2) return null;
  const high = Math.max(1, ...known.map((p) => p.ratio)) * 1.08;
  const worst = Math.max(1e-3, ...known.map((p) => p.loss)) * 1.08;
  const x = (ratio) => BOX.left + ((BOX.width - BOX.left - BOX.right) * ratio) / high;
  const y = (loss) => BOX.top + ((BOX.height - BOX.top - BOX.bottom) * Math.max(0, loss)) / worst;
  const chart = svg("svg", {
    class: "tessera-front",
    viewBox: `0 0 ${BOX.width} ${BOX.height}`,
    role: "img",
    "aria-label": `${lossOf} against speed: ${known.map((p) => `${text(p.name)} ${p.ratio.toFixed(2)}×, ${digits(p.loss)}`).join("; ")}`,
  });
  drawAxes(chart, { high, worst, x, y, lossOf });
  const leading = known.filter((p) => p.front).sort((a, b) => a.ratio - b.ratio);
  const d = leading.map((p, i) => `${i ? "L" : "M"}${x(p.ratio).toFixed(1)} ${y(p.loss).toFixed(1)}`).join("");
  chart.append(svg("path", { class: "tessera-front-line", d }));
  known.forEach((p, i) => chart.append(...point(p, i, x(p.ratio), y(p.loss))));
  return chart;
}

function drawAxes(chart, { high, worst, x, y, lossOf }) {
  for (const part of [0, 0.5, 1]) {
    const loss = part * worst;
    chart.append(svg("line", { class: "tessera-grid", x1: BOX.left, x2: x(high), y1: y(loss), y2: y(loss) }));
    chart.append(svg("text", { x: BOX.left - 4, y: y(loss) + 3, "text-anchor": "end" }, digits(loss)));
    const label = `${(part * high).toFixed(1)}×`;
    chart.append(svg("text", { x: x(part * high), y: BOX.height - 18, "text-anchor": "middle" }, label));
  }
  const caption = `times faster → · ${lossOf} ↓ is worse`;
  chart.append(svg("text", { x: BOX.left, y: BOX.height - 5 }, caption));
}

/** Its number stands in the list under the chart. */
function point(p, i, cx, cy) {
  const kind = p.chosen ? "tessera-chosen" : p.front ? "tessera-leading" : "tessera-beaten";
  const title = svg("title", {}, `${text(p.name)}: ${p.ratio.toFixed(2)}× faster, loss ${digits(p.loss)}${p.chosen ? ", chosen" : ""}`);
  const dot = svg("circle", { class: `tessera-stack ${kind}`, cx, cy, r: p.chosen ? 5 : 3.5 }, title);
  return [dot, svg("text", { x: cx + 6, y: cy - 4 }, String(i + 1))];
}

/**
 * The names behind the numbers.
 * @param {object[]} points as in frontChart
 * @returns {string[]}
 */
export function frontLines(points) {
  const known = list(points).map(object).filter((p) => number(p.ratio) !== null && number(p.loss) !== null);
  const shown = known.filter((p) => !p.abandoned);
  const left = known.filter((p) => p.abandoned).map((p) => `${text(p.name)}: slower than the plain run, ended early`);
  const lines = shown.map((p, i) => `${i + 1} ${text(p.name)}: ${p.ratio.toFixed(2)}×, loss ${digits(p.loss)}${p.chosen ? " (chosen)" : ""}`);
  return [...lines, ...left];
}
