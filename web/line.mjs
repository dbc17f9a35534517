/** The live line that a node shows after a run. */

import { el, object, text } from "./dom.mjs?v=0.1.0";
import { frontChart, frontLines } from "./front.mjs?v=0.1.0";
import { decisionStrip } from "./strip.mjs?v=0.1.0";

/**
 * The live line of a node: what it did in the run, its strip of decisions under it.
 * @param {Record<string, any>} feature an entry of a run's `features`
 * @param {Record<string, any>} run the run, for how it ended
 * @returns {HTMLElement | null} null where the feature has nothing to tell
 */
export function featureLine(feature, run) {
  const facts = object(object(feature).facts);
  const line = text(object(feature).line);
  const strip = decisionStrip(facts.decisions);
  const front = frontChart(facts.front, text(facts.judged) ? `1 − SSIM of the ${text(facts.judged)}` : "loss");
  if (!line && !strip && !front) return null;
  const stopped = ended(run);
  return el(
    "div",
    { class: "tessera-line", role: "status", "data-ended": text(object(run).ended) },
    el("div", { class: "tessera-line-text", title: line }, stopped ? el("b", {}, `${stopped} `) : null, line),
    strip,
    front,
    front ? frontList(facts.front) : null,
  );
}

/** What a measurement of Accelerate is at: {trial, of, name, best, ended}. @returns {string} */
export function trialWords(trial) {
  const best = text(trial.best) ? `; best so far: ${text(trial.best)}` : "";
  const at = text(trial.ended) ? `${text(trial.ended)} at trial` : "Trial";
  return `${at} ${text(trial.trial)} of at most ${text(trial.of)}: ${text(trial.name)}${best}`;
}

/** The same with its chart. @returns {HTMLElement} */
export function trialLine(trial) {
  const words = trialWords(trial);
  return el("div", { class: "tessera-line", role: "status" }, el("div", { class: "tessera-line-text" }, words), frontChart(trial.front, "loss"));
}

/** What the numbers in a front chart mean, folded away. @returns {HTMLElement} */
export function frontList(points) {
  const rows = frontLines(points).map((line) => el("li", {}, line));
  return el("details", {}, el("summary", {}, "What was tried"), el("ul", { class: "tessera-tried" }, ...rows));
}

/** "" for a finished run, else the word to show. @returns {string} */
export function ended(run) {
  const how = text(object(run).ended);
  return how === "" || how === "finished" ? "" : how === "error" ? "Failed" : how === "interrupted" ? "Interrupted" : how;
}
