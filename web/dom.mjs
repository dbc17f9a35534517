/** Small builders shared by the panels. Data reaches the page as text and attributes only, never as markup. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * An HTML element.
 * @param {string} tag
 * @param {Record<string, unknown>} [attributes] null, undefined and false are left out
 * @param {...(Node | string | null | undefined)} children strings become text nodes
 * @returns {HTMLElement}
 */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/**
 * An SVG element; same arguments as `el`.
 * @returns {SVGElement}
 */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, String(value));
  }
  for (const child of children) {
    if (child !== null && child !== undefined && child !== "") element.append(child);
  }
  return element;
}

/** The finite number in `value`, or null. @returns {number | null} */
export function number(value) {
  return typeof value === "number" && Number.isFinite(value) ? value : null;
}

/** `value` where it is a plain object, else an empty one. @returns {Record<string, any>} */
export function object(value) {
  return value !== null && typeof value === "object" && !Array.isArray(value) ? value : {};
}

/** `value` where it is an array, else an empty one. @returns {any[]} */
export function list(value) {
  return Array.isArray(value) ? value : [];
}

/** `value` as text; "" for what has none. @returns {string} */
export function text(value) {
  return typeof value === "string" || typeof value === "number" || typeof value === "boolean" ? String(value) : "";
}

/** Three significant digits, no exponent between 1e-4 and 1e6. @returns {string} */
export function digits(value) {
  const n = number(value);
  if (n === null) return "–";
  if (Number.isInteger(n)) return n.toLocaleString("en");
  const size = Math.abs(n);
  if (size >= 1e6 || size < 1e-4) return n.toExponential(1);
  return size >= 100 ? n.toFixed(0) : String(Number(n.toPrecision(3)));
}

/** A duration in seconds. @returns {string} */
export function seconds(value) {
  const n = number(value);
  if (n === null) return "–";
  if (n < 1) return `${digits(n * 1000)} ms`;
  return n < 120 ? `${digits(n)} s` : `${Math.floor(n / 60)} min ${Math.round(n % 60)} s`;
}

/** A fraction as a percentage. @returns {string} */
export function percent(value) {
  const n = number(value);
  return n === null ? "–" : `${digits(n * 100)} %`;
}

/** A size in bytes. @returns {string} */
export function bytes(value) {
  const n = number(value);
  if (n === null) return "–";
  if (n === 0) return "0";
  const unit = n >= 2 ** 30 ? ["GiB", 2 ** 30] : n >= 2 ** 20 ? ["MiB", 2 ** 20] : ["KiB", 2 ** 10];
  return `${digits(n / unit[1])} ${unit[0]}`;
}
