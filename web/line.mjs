/** The live line that a node shows after a run. */

import { el, object, text } from "./dom.mjs?v=0.1.0";
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
  if (!line && !strip) return null;
  const stopped = ended(run);
  return el(
    "div",
    { class: "tessera-line", role: "status", "data-ended": text(object(run).ended) },
    el("div", { class: "tessera-line-text", title: line }, stopped ? el("b", {}, `${stopped} `) : null, line),
    strip,
  );
}

/** "" for a finished run, else the word to show. @returns {string} */
export function ended(run) {
  const how = text(object(run).ended);
  return how === "" || how === "finished" ? "" : how === "error" ? "Failed" : how === "interrupted" ? "Interrupted" : how;
}
