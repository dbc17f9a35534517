/** The sidebar: one run at a time, the newest unless an earlier one is chosen. */

import { el, list, number, object, seconds, text } from "./dom.mjs?v=0.1.0";
import { sections } from "./acted.mjs?v=0.1.0";
import { Figure } from "./figure.mjs?v=0.1.0";
import { ended } from "./line.mjs?v=0.1.0";
import { progress, Runs } from "./runs.mjs?v=0.1.0";

export const TAB = "tessera";
const EMPTY =
  "Drag a Tessera node, for example Accelerate (Tessera / measure), between Load Diffusion Model and KSampler, and run the " +
  "workflow: what it did at every step shows here.";

export class Sidebar {
  /**
   * @param {object} host
   * @param {(id: string) => string} host.title of a node, "" where it is not on the canvas
   * @param {(id: string, run: object) => void} host.show brings a node into view
   * @param {(path: string) => Promise<any>} host.ask a GET route of ours
   */
  constructor(host) {
    this.host = host;
    this.runs = new Runs(() => this.#changed(), host.title);
    this.chosen = ""; // id of an earlier run; "" follows the newest
    this.plan = null;
    this.figure = new Figure();
    this.picker = el("select", { "aria-label": "Run to show" });
    this.picker.addEventListener("change", () => this.#choose(this.picker.value));
    this.headline = el("div", { class: "tessera-headline" });
    this.bar = el("progress", { max: 1, "aria-label": "Progress of the run" });
    this.about = el("div", { class: "tessera-dim" });
    this.below = el("div", {});
    const shown = [this.picker, this.headline, this.bar, this.about, this.figure.element, this.below];
    this.filled = el("div", {}, ...shown);
    this.empty = el("p", { class: "tessera-empty" }, EMPTY);
    this.told = el("p", { class: "tessera-told", role: "status", hidden: true });
    const head = el("h2", {}, "Tessera");
    this.root = el("div", { class: "tessera-panel tessera-sidebar", role: "region", "aria-label": "Tessera runs", tabindex: -1 }, head, this.told, this.empty, this.filled);
    this.#changed();
  }

  /** The tab is opened; its element is new each time. */
  render(element) {
    element.replaceChildren(this.root);
    const { activeElement } = document; // a click has put the focus on the tab's button, a key has not
    const byKey = !activeElement || activeElement === document.body || activeElement.tagName === "CANVAS";
    if (byKey) requestAnimationFrame(() => this.root.focus()); // the tab is not in the page yet
    this.#draw();
  }

  get visible() {
    return this.root.isConnected;
  }

  /** What goes on before a run that shows here; "" for nothing. */
  tell(words) {
    this.told.textContent = words;
    this.told.hidden = !words;
    if (this.visible) this.#draw(); // with what it replaces, in one frame
  }

  #choose(id) {
    this.chosen = id === this.runs.newest()[0]?.id ? "" : id;
    this.#draw();
  }

  /** Drawn once a frame at the most, and not where nobody looks. */
  #changed() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      if (this.visible) this.#draw();
    });
  }

  #draw() {
    const newest = this.runs.newest();
    const run = newest.find((r) => r.id === this.chosen) ?? newest[0];
    this.empty.hidden = Boolean(run) || !this.told.hidden;
    this.filled.hidden = !run;
    if (!run) return;
    const options = newest.map((r) => el("option", { value: r.id }, this.#name(r)));
    if (options.map((o) => o.textContent).join() !== [...this.picker.options].map((o) => o.textContent).join()) {
      this.picker.replaceChildren(...options);
    }
    this.picker.value = run.id;
    this.#drawHead(run);
    this.figure.update(run);
    this.#drawBelow(run);
    this.#fetchMasks(run);
  }

  #name(run) {
    const { record } = run;
    const at = number(record.at);
    const time = at === null ? "" : new Date(at * 1000).toLocaleTimeString();
    const node = text(record.sampler_node);
    const steps = number(record.steps);
    const whole = `${steps} step${steps === 1 ? "" : "s"}, ${seconds(record.seconds)}`;
    const state = run.lost ? "connection lost" : run.live ? "running" : ended(record).toLowerCase() || whole;
    return [time, node && (run.title || this.host.title(node) || `node ${node}`), state].filter(Boolean).join(" · ");
  }

  #drawHead(run) {
    const { step, steps, done, elapsed, left } = progress(run);
    const stopped = run.lost ? "Connection lost" : ended(run.record);
    const at = `step ${step} of ${steps}`;
    const rest = left === null ? "" : `, about ${seconds(Math.max(1, Math.round(left)))} left`;
    const live = step ? `Step ${step} of ${steps}: ${spent(elapsed)}${rest}` : `Loading the model: ${spent(elapsed)}`;
    const whole = `${steps} step${steps === 1 ? "" : "s"} in ${seconds(elapsed)}`;
    this.headline.textContent = stopped ? `${stopped} at ${at} after ${seconds(elapsed)}` : run.live ? live : whole;
    this.headline.dataset.ended = run.lost ? "error" : text(run.record.ended) || "running";
    this.bar.hidden = !run.live || run.lost;
    this.bar.value = done;
    const { architecture, known, sampling } = run.record;
    const loading = run.live || number(sampling) === null ? null : elapsed - sampling;
    this.about.textContent = [
      known === false ? `${text(architecture)} (unknown architecture)` : text(architecture),
      loading !== null && loading > 0.05 * elapsed ? `${seconds(loading)} before the first step` : "",
      saved(run),
    ].filter(Boolean).join(" · ");
    clearTimeout(this.ticking);
    if (run.live && !run.lost) this.ticking = setTimeout(() => this.visible && this.#drawHead(run), 500);
  }

  #drawBelow(run) {
    const plan = this.plan && this.plan.workflow === run.workflow ? this.plan.report : null;
    const fresh = el("div", {}, ...sections(run, (id) => this.host.show(id, run), plan));
    const key = fresh.textContent + fresh.querySelectorAll("canvas").length + run.id;
    if (key === this.belowKey) return; // what is open and focused stays so
    const open = [...this.below.querySelectorAll("details")].map((d) => d.open);
    fresh.querySelectorAll("details").forEach((d, i) => (d.open = open[i] ?? false));
    const focused = [...this.below.querySelectorAll("button, summary")].indexOf(document.activeElement);
    this.below.replaceChildren(fresh);
    this.belowKey = key;
    if (focused >= 0) this.below.querySelectorAll("button, summary")[focused]?.focus();
  }

  /** Masks of attention are drawn by the server when somebody looks. */
  async #fetchMasks(run) {
    const wanted = !run.live && !run.masks && list(run.record.features).some((f) => object(f).mask_kept === true);
    if (!wanted) return;
    run.masks = "asked";
    const masks = object(await this.host.ask(`/tessera/masks?run=${encodeURIComponent(run.id)}`));
    for (const [number, mask] of Object.entries(masks)) Object.assign(object(run.record.features[number]), { mask });
    this.#changed();
  }
}

function spent(value) {
  return value < 10 ? `${value.toFixed(1)} s` : value < 60 ? `${Math.floor(value)} s` : seconds(value);
}

/** "4 of 8 evaluations computed whole". */
function saved(run) {
  const whole = run.columns.filter((c) => c[2] === "full").length;
  const ran = run.live ? 0 : run.columns.length;
  return ran && whole < ran ? `${whole} of ${ran} evaluations computed whole` : "";
}
