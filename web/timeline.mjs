/** The pictures of a run's evaluations, one column each: seconds and what was decided, and under it every block. */

import { digits, el, list, number, seconds, svg, text } from "./dom.mjs?v=0.1.0";

const CELL = 10; // width of a column, in the pictures' own units
const WIDEST = 40; // pixels that a column may take
const TALL = 64; // pixels of the longest bar
const STRIP = { full: 14, region: 10, partial: 10, merged: 10, forecast: 7, reuse: 4 };
export const WORDS = {
  full: "computed",
  forecast: "forecast",
  reuse: "reused",
  region: "part of the picture",
  partial: "part of the tokens",
  merged: "merged tokens",
  elsewhere: "another pack's node",
};
const BLOCKS = {
  c: ["full", "computed"],
  m: ["mixed", "computed in some calls"],
  f: ["forecast", "forecast or reused"],
  p: ["passed", "skipped"],
};

/** A name for the style sheet and for people; kinds of newer servers are drawn as "other". */
export function kindOf(column) {
  const kind = text(list(column)[2]);
  return Object.hasOwn(WORDS, kind) ? kind : "other";
}

/** Seconds of every evaluation as bars, and under them a strip that says what each was. */
export function stepsPicture(columns, slots, live) {
  const longest = Math.max(...columns.map((c) => number(c[3]) ?? 0), 0);
  const picture = frame(slots, TALL + 18, "tessera-steps");
  columns.forEach((column, i) => {
    const kind = kindOf(column);
    const took = number(column[3]);
    const goesOn = live && i === columns.length - 1;
    const tall = took === null || !longest ? (goesOn ? TALL : 0) : Math.max(1.5, (TALL * took) / longest);
    picture.append(cell(i, TALL - tall, tall, goesOn ? "tessera-going" : `tessera-${kind}`, kind));
    const strip = STRIP[kind] ?? 6;
    picture.append(cell(i, TALL + 18 - strip, strip, goesOn ? "tessera-going" : `tessera-${kind}`));
  });
  return { picture, longest };
}

/** One row a block; null where no block was told apart. */
export function blocksPicture(words, slots, letters = BLOCKS) {
  const count = blockCount(words);
  if (!count) return null;
  const picture = frame(slots, count, "tessera-blocks-map");
  picture.style.height = `${Math.min(220, Math.max(40, 6 * count))}px`;
  for (const [letter, [name]] of Object.entries(letters)) {
    const path = squares(words, (word, b) => word[b] === letter);
    if (path) picture.append(svg("path", { class: `tessera-${name}`, "data-kind": letter, d: path }));
  }
  return picture;
}

/** The same of attention: the darker, the more of a block's pairs were computed; "." is dense. */
export function sharesPicture(words, slots) {
  const count = blockCount(words);
  if (!count) return null;
  const picture = frame(slots, count, "tessera-blocks-map");
  picture.style.height = `${Math.min(160, Math.max(30, 5 * count))}px`;
  const full = words.map((word) => word || ".".repeat(count));
  for (const letter of ".9876543210") {
    const path = squares(full, (word, b) => word[b] === letter);
    const strength = letter === "." ? 1 : 0.12 + 0.07 * Number(letter);
    if (path) picture.append(svg("path", { class: "tessera-full", "fill-opacity": strength, d: path }));
  }
  return picture;
}

export function blockCount(words) {
  return Math.max(0, ...list(words).map((word) => text(word).length));
}

/** Neighbouring blocks of a column become one rectangle: a long run of a deep model stays a few paths. */
function squares(words, is) {
  let d = "";
  words.forEach((word, i) => {
    for (let b = 0; b < (word?.length ?? 0); b++) {
      if (!is(word, b)) continue;
      const first = b;
      while (b + 1 < word.length && is(word, b + 1)) b++;
      d += `M${i * CELL + 0.5} ${first + 0.04}h${CELL - 1}v${b - first + 0.92}h${1 - CELL}z`;
    }
  });
  return d;
}

function frame(slots, height, name) {
  const picture = svg("svg", {
    class: `tessera-columns ${name}`,
    viewBox: `0 0 ${slots * CELL} ${height}`,
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  });
  picture.style.maxWidth = `${slots * WIDEST}px`;
  picture.append(svg("rect", { class: "tessera-ground", width: slots * CELL, height }));
  return picture;
}

function cell(i, y, height, name, kind) {
  const place = { x: i * CELL + 0.75, y, width: CELL - 1.5, height };
  return svg("rect", { class: `tessera-cell ${name}`, "data-kind": kind, ...place });
}

/** Marks a column in every picture of the figure; -1 marks none. */
export function mark(figure, index) {
  for (const picture of figure.querySelectorAll(".tessera-columns")) {
    picture.querySelector(".tessera-marked")?.remove();
    const height = picture.viewBox.baseVal.height;
    if (index >= 0) picture.append(svg("rect", { class: "tessera-marked", x: index * CELL, width: CELL, height }));
  }
}

/** "Step 5 of 8: forecast, 12 ms, sigma 0.43, 0 of 4 blocks computed". */
export function spoken(run, index, steps) {
  const column = run.columns[index];
  if (!column) return "";
  const [step, sigma, , took] = column;
  const kind = kindOf(column);
  const goesOn = run.live && index === run.columns.length - 1;
  const word = text(run.blocks[index]);
  const computed = [...word].filter((letter) => letter === "c" || letter === "m").length;
  const again = run.columns.filter((c) => c[0] === step).length > 1 ? `, evaluation ${index + 1}` : "";
  const parts = [
    goesOn ? "being computed" : (WORDS[kind] ?? text(column[2])),
    number(took) === null ? "" : seconds(took),
    number(sigma) === null ? "" : `sigma ${digits(sigma)}`,
    word ? `${computed} of ${word.length} blocks computed` : "",
  ];
  return `Step ${(number(step) ?? 0) + 1} of ${steps}${again}: ${parts.filter(Boolean).join(", ")}`;
}

/** "computed 5 × 160 ms": every kind that occurs, its swatch, how often and how long it took on average. */
export function kindsLegend(columns) {
  const kinds = new Map();
  for (const column of columns) {
    const took = number(column[3]);
    const entry = kinds.get(kindOf(column)) ?? { count: 0, timed: 0, sum: 0 };
    kinds.set(kindOf(column), entry);
    entry.count += 1;
    if (took !== null) (entry.timed += 1), (entry.sum += took);
  }
  const entries = [...kinds].map(([kind, { count, timed, sum }]) =>
    item(kind, `${WORDS[kind] ?? "other"} ${count}${timed ? ` × ${seconds(sum / timed)}` : ""}`),
  );
  return el("div", { class: "tessera-legend" }, ...entries);
}

export function blocksLegend(words) {
  const all = words.join("");
  const entries = Object.entries(BLOCKS).filter(([letter]) => all.includes(letter));
  return el("div", { class: "tessera-legend" }, ...entries.map(([, [name, label]]) => item(name, label)));
}

function item(name, label) {
  const swatch = svg("svg", { class: "tessera-key", viewBox: "0 0 10 10", "aria-hidden": "true" });
  swatch.append(svg("rect", { class: `tessera-${name}`, width: 10, height: 10 }));
  return el("span", {}, swatch, label);
}
