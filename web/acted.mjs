/** Below the pictures: what acted and what came of it, what was left as it was and why, memory, other packs' patches. */

import { bytes, el, list, number, object, text } from "./dom.mjs?v=0.1.0";
import { featureBlock } from "./feature.mjs?v=0.1.0";
import { meter } from "./strip.mjs?v=0.1.0";
import { sharesPicture } from "./timeline.mjs?v=0.1.0";

/** Every feature of a node, in the order in which they were put on the MODEL. */
function features(run) {
  return list(run.record.features).map(object).filter((feature) => text(feature.node));
}

/**
 * @param {import("./runs.mjs").Run} run
 * @param {(id: string) => void} show brings a node into view
 * @param {Record<string, any> | null} plan the report of a Plan node
 * @returns {HTMLElement[]}
 */
export function sections(run, show, plan) {
  return [
    section("What acted", acted(run, show)),
    section("Declined, and what helps", declined(run)),
    section("Memory", memory(run)),
    section("Others on this MODEL, says Plan", others(object(plan))),
  ].filter(Boolean);
}

function section(title, children) {
  return children.length ? el("section", { class: "tessera-section" }, el("h3", {}, title), ...children) : null;
}

function acted(run, show) {
  const all = features(run);
  if (!all.length) return [el("div", {}, "No Tessera node: this was a plain run.")];
  return all.map((feature) => {
    const block = featureBlock(feature, (id) => show(id));
    const shares = sharesPicture(list(feature.by_block).map(text), Math.max(1, run.columns.length));
    if (shares) {
      const caption = "Attention pairs that were computed: a row a block, a column a step, the stronger the more.";
      block.querySelector("details")?.before(el("figure", {}, shares, el("figcaption", { class: "tessera-dim" }, caption)));
    }
    return block;
  });
}

/** Reasons that ask for something come first; those which the settings asked for are not told here. */
function declined(run) {
  return features(run).flatMap((feature) => {
    const name = text(feature.name);
    const sentence = text(feature.inactive) || text(object(feature.facts).bypassed);
    const reasons = list(feature.declined).map(object).filter((entry) => text(entry.remedy) !== "As the node is set.");
    return [
      ...(sentence ? [el("p", { class: "tessera-declined" }, el("b", {}, `${name}: `), sentence)] : []),
      ...reasons.map((entry) => reason(name, entry)),
    ];
  });
}

function reason(name, { why, count, remedy }) {
  const calls = number(count) === 1 ? "1 attention call" : `${text(count)} attention calls`;
  return el(
    "p",
    { class: "tessera-declined" },
    el("b", {}, `${name}: `),
    `${calls} stayed dense, ${text(why)}. `,
    text(remedy) ? el("span", { class: "tessera-remedy" }, text(remedy)) : null,
  );
}

function memory(run) {
  const { peak, own, device } = object(run.record.memory);
  const held = features(run)
    .map((feature) => [text(feature.name), number(object(feature.facts).peak_bytes) ?? 0])
    .filter(([, size]) => size > 0);
  const top = number(peak) ?? Math.max(1, ...held.map(([, size]) => size));
  const place = text(device).startsWith("cuda") ? `Peak of ${text(device)}` : "Peak of the process";
  const rows = held.map(([name, size]) => amount(`${name} held`, bytes(size), size / top));
  if (number(peak) !== null) rows.push(amount(place, `${own === true ? "" : "at most "}${bytes(peak)}`));
  return rows;
}

/** A size; with a share of the peak a bar under it. */
function amount(label, size, share = null) {
  const bar = share === null ? null : meter(share, `${label}: ${size}`);
  return el("div", { class: "tessera-amount" }, el("span", {}, label), el("span", {}, size), bar);
}

/** What a Plan of this workflow found beside our nodes: conflicts, then the patches in the order of action. */
function others(plan) {
  const rows = list(plan.rows).map(object).filter((row) => text(row.owner) && text(row.owner) !== "Tessera");
  return [
    ...list(plan.conflicts).map(text).filter(Boolean).map((line) => el("p", { class: "tessera-conflict" }, line)),
    ...rows.map((row) => el("p", {}, el("b", {}, `${text(row.name)} `), `(${text(row.owner)}): ${text(row.does)}`, idle(row))),
  ];
}

function idle({ state, why }) {
  const words = [text(state), text(why)].filter(Boolean).join(": ");
  return words && text(state) !== "acts" ? el("span", { class: "tessera-remedy" }, ` (${words})`) : null;
}
