/** The runs that the sidebar can show: what the server told of them while they lasted, and what it told at their end. */

import { list, number, object, text } from "./dom.mjs?v=0.1.0";

const MOST = 16; // runs remembered, and columns a run at most:
const COLUMNS = 512;

/**
 * A column is [step, sigma, kind, seconds], a word of `blocks` has a letter a block.
 * @typedef {{id: string, title: string, record: Record<string, any>, columns: any[][], blocks: string[], live: boolean, lost: boolean,
 *   heard: number, workflow: unknown, masks: string}} Run
 */
export class Runs {
  /**
   * @param {() => void} changed is called after every change
   * @param {(node: unknown) => string} titleOf a node, "" where it is not on the canvas
   */
  constructor(changed, titleOf) {
    this.changed = changed;
    this.titleOf = titleOf;
    this.all = new Map(); // id -> Run, oldest first
  }

  /** Newest first. @returns {Run[]} */
  newest() {
    return [...this.all.values()].reverse();
  }

  /** "tessera.step": more columns of a run that goes on. */
  step(detail, workflow) {
    const run = this.#run(detail, workflow);
    if (!run || (this.all.has(run.id) && !run.live)) return;
    this.#take(run, detail);
  }

  /** "tessera.run": the record of a run that has ended. */
  finish(detail, workflow) {
    const run = this.#run(detail, workflow);
    if (!run) return;
    run.live = false;
    this.#take(run, detail);
  }

  /** Records that the server kept, oldest first; runs that are known stay as they are. */
  restore(records) {
    const known = new Map(this.all);
    this.all.clear();
    for (const record of list(records)) {
      const mine = known.get(text(object(record).run));
      if (mine && !mine.live) this.all.set(mine.id, mine);
      else this.finish(record, mine?.workflow ?? null);
    }
    for (const [id, run] of known) if (!this.all.has(id)) this.all.set(id, run);
    this.#forget();
    this.changed();
  }

  /** The server is gone: what went on has no known end. */
  lose() {
    for (const run of this.all.values()) run.lost = run.live;
    this.changed();
  }

  #run(detail, workflow) {
    const id = text(object(detail).run);
    if (!id) return null;
    const known = this.all.get(id);
    if (known) return known;
    const title = this.titleOf(detail.sampler_node); // the canvas may show another workflow later
    return { id, title, record: {}, columns: [], blocks: [], live: true, lost: false, heard: 0, workflow, masks: "" };
  }

  #take(run, detail) {
    this.all.set(run.id, run);
    run.record = { ...run.record, ...detail };
    run.lost = false;
    run.heard = performance.now();
    const told = object(detail.timeline);
    const from = Math.min(number(told.from) ?? 0, run.columns.length, COLUMNS);
    const columns = list(told.columns).map(list).slice(0, COLUMNS - from);
    run.columns.splice(from, Infinity, ...columns);
    run.blocks.length = Math.min(run.blocks.length, from);
    list(told.blocks).slice(0, columns.length).forEach((word, i) => (run.blocks[from + i] = text(word)));
    this.#forget();
    this.changed();
  }

  #forget() {
    while (this.all.size > MOST) this.all.delete(this.all.keys().next().value);
  }
}

/** Where a run stands, for its headline. */
export function progress(run, now = performance.now()) {
  const { record, columns } = run;
  const steps = number(record.steps) ?? 0;
  const since = run.live && !run.lost ? (now - run.heard) / 1000 : 0;
  const expected = number(record.expected);
  const open = run.live ? 1 : 0; // the newest column goes on
  const done = expected ? (columns.length - open) / expected : steps ? (number(record.position) ?? 0) / steps : 0;
  const sampled = number(record.sampling);
  const left = done > 0 && sampled !== null ? Math.max(0, (sampled * (1 - done)) / done - since) : null;
  return {
    step: columns.length ? Math.min(steps, (number(columns.at(-1)[0]) ?? 0) + 1) : 0,
    steps,
    done: run.live ? Math.min(1, Math.max(0, done)) : 1,
    elapsed: run.live ? (number(record.elapsed) ?? 0) + since : (number(record.seconds) ?? 0),
    left,
    slots: slots(run, steps, expected),
  };
}

/** Columns that the run will have, as far as that is known. */
function slots(run, steps, expected) {
  const { columns } = run;
  if (!run.live && text(run.record.ended) === "finished") return Math.max(1, columns.length);
  const last = number(columns.at(-1)?.[0]) ?? 0;
  const each = last > 0 ? Math.max(1, columns.findLastIndex((c) => c[0] < last) + 1) / last : 1;
  return Math.max(1, columns.length, Math.min(COLUMNS, expected ?? Math.round(steps * each)));
}
