/** The mask of sparse attention as a small picture: rows are queries, columns keys, the more of a cell's pairs the stronger. */

import { el, number, object, text } from "./dom.mjs?v=0.1.0";

const MOST = 512; // cells a side; a picture of a newer server that has more is left out
const INK = [11, 140, 233]; // --tessera-full; a canvas knows no style sheet

/**
 * @param {unknown} data `mask` of a feature: rows, columns, cells (bytes in base64, row by row), caption
 * @returns {HTMLElement | null} null where there is nothing to draw
 */
export function maskPicture(data) {
  const mask = object(data);
  const [rows, columns] = [side(mask.rows), side(mask.columns)];
  const cells = rows && columns ? decoded(text(mask.cells)) : null;
  if (cells?.length !== rows * columns) return null;
  const caption = text(mask.caption);
  const canvas = el("canvas", {
    class: "tessera-mask",
    width: columns,
    height: rows,
    role: "img",
    "aria-label": `Attention mask. ${caption}`,
  });
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  cells.forEach((share, i) => image.data.set([...INK, strength(share)], 4 * i));
  context.putImageData(image, 0, 0);
  return el(
    "figure",
    { class: "tessera-mask-figure" },
    canvas,
    el("figcaption", { class: "tessera-dim" }, el("div", {}, caption), legend()),
  );
}

/** Few pairs still show: opacity is the root of the share. */
function strength(share) {
  return Math.round(Math.sqrt(share / 255) * 255);
}

function legend() {
  const swatches = [0, 0.1, 0.5, 1].map((share) => {
    const swatch = el("i", { class: "tessera-swatch" });
    swatch.style.background = `rgba(${INK.join(", ")}, ${Math.sqrt(share)})`;
    return el("span", {}, swatch, `${100 * share} %`);
  });
  return el("div", { class: "tessera-legend" }, "pairs looked at:", ...swatches);
}

function side(value) {
  const n = number(value);
  return Number.isInteger(n) && n > 0 && n <= MOST ? n : 0;
}

/** Bytes of a base64 text, null where it is none. */
function decoded(words) {
  try {
    return Uint8Array.from(atob(words), (c) => c.charCodeAt(0));
  } catch {
    return null;
  }
}
