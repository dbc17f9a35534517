/** The figure of a run's steps and blocks: stays in the page while its pictures grow, so that the keyboard keeps its place. */

import { el, number, seconds, text } from "./dom.mjs?v=0.1.0";
import { progress } from "./runs.mjs?v=0.1.0";
import { blockCount, blocksLegend, blocksPicture, kindsLegend, mark, spoken, stepsPicture } from "./timeline.mjs?v=0.1.0";

const HINT = "Point at a column, or move with the arrow keys.";
const MOVES = { ArrowLeft: -1, ArrowRight: 1, PageUp: -8, PageDown: 8, Home: -Infinity, End: Infinity };

export class Figure {
  constructor() {
    this.run = null;
    this.index = -1; // the column that is read
    this.pictures = el("div", {
      class: "tessera-pictures",
      role: "slider",
      tabindex: 0,
      "aria-label": "Time line of the evaluations",
      "aria-describedby": "tessera-readout",
      "aria-orientation": "horizontal",
    });
    this.readout = el("output", { id: "tessera-readout", class: "tessera-readout", "aria-live": "polite" }, HINT);
    this.element = el("section", { class: "tessera-figure" }, this.pictures, this.readout);
    this.pictures.addEventListener("keydown", (event) => this.#key(event));
    this.pictures.addEventListener("pointermove", (event) => this.#point(event));
    this.pictures.addEventListener("pointerdown", (event) => this.#point(event));
  }

  /** @param {import("./runs.mjs").Run} run */
  update(run) {
    if (run.id !== this.run?.id) this.index = -1;
    this.run = run;
    const { steps, slots } = progress(run);
    const { picture, longest } = stepsPicture(run.columns, slots, run.live);
    const ends = el("div", { class: "tessera-ends" }, el("span", {}, "step 1"), steps > 1 ? el("span", {}, String(steps)) : null);
    ends.style.maxWidth = picture.style.maxWidth;
    const blocks = blocksPicture(run.blocks, slots);
    const last = blockCount(run.blocks) - 1;
    this.pictures.replaceChildren(
      wide("h3", "Time of each step, and what it did"),
      scale(longest ? seconds(longest) : "", "", ""),
      picture,
      el("span", {}),
      ends,
      wide("div", kindsLegend(run.live ? run.columns.slice(0, -1) : run.columns), missed(run)),
      ...(blocks ? [wide("h3", "Blocks of the model at each step")] : []),
      ...(blocks ? [scale("block 0", last > 0 ? `${last}` : ""), blocks, wide("div", blocksLegend(run.blocks))] : []),
    );
    this.#read(this.index, true);
  }

  #key(event) {
    if (!Object.hasOwn(MOVES, event.key) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation(); // the canvas has its own use for arrows
    const last = this.run.columns.length - 1;
    const from = this.index < 0 ? (event.key === "ArrowLeft" ? last + 1 : -1) : this.index;
    this.#read(Math.min(last, Math.max(0, from + MOVES[event.key])));
  }

  #point(event) {
    const box = this.pictures.querySelector(".tessera-columns")?.getBoundingClientRect();
    if (!box?.width) return;
    const column = Math.floor(((event.clientX - box.left) / box.width) * progress(this.run).slots);
    if (column >= 0 && column < this.run.columns.length && column !== this.index) this.#read(column);
  }

  /** Marks a column and says what it was. quiet: where only the run has grown, a screen reader is not told again. */
  #read(index, quiet = false) {
    const { run } = this;
    this.index = Math.min(index, run.columns.length - 1);
    mark(this.pictures, this.index);
    const words = this.index < 0 ? HINT : spoken(run, this.index, number(run.record.steps) ?? run.columns.length);
    this.pictures.setAttribute("aria-valuemin", "1");
    this.pictures.setAttribute("aria-valuemax", String(Math.max(1, run.columns.length)));
    this.pictures.setAttribute("aria-valuenow", String(Math.max(1, this.index + 1)));
    this.pictures.setAttribute("aria-valuetext", this.index < 0 ? "none" : `evaluation ${this.index + 1}`);
    if (!quiet || this.readout.textContent !== words) this.readout.textContent = words;
  }
}

/** Labels at the left of a picture, from top to bottom. */
function scale(...labels) {
  return el("div", { class: "tessera-scale" }, ...labels.map((label) => el("span", {}, label)));
}

/** Over the labels and the pictures. */
function wide(tag, ...children) {
  return el(tag, { class: "tessera-wide" }, ...children);
}

function missed(run) {
  const count = number(run.record.timeline?.missed);
  return count ? el("div", { class: "tessera-dim" }, `${text(count)} more evaluations are not drawn.`) : null;
}
