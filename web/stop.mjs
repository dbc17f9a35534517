/** The button of block samplers: ends a run after the block in work, and keeps what is done. */

import { el, number, object, text } from "./dom.mjs?v=0.1.0";

export const SAMPLERS = ["TesseraBlockVideoSampler", "TesseraBlockLinearVideoSampler"]; // node ids that have the button
const ROUTE = "/tessera/stop_after_block";
const rows = new WeakMap(); // node -> {row, button, status, id}

/**
 * The row with the button, made once for a node.
 * @param {object} api the frontend's api
 * @param {object} node
 * @returns {HTMLElement}
 */
export function stopRow(api, node) {
  const known = rows.get(node);
  if (known) return known.row;
  const button = el("button", { type: "button", class: "tessera-button", disabled: true }, "Stop after this block");
  const status = el("span", { class: "tessera-dim", role: "status" }, "not running");
  const entry = { button, status, id: null, row: el("div", { class: "tessera-stop" }, button, status) };
  rows.set(node, entry);
  for (const event of ["pointerdown", "keydown"]) button.addEventListener(event, (e) => e.stopPropagation());
  button.addEventListener("click", () => ask(api, entry));
  return entry.row;
}

/** A message of the server about a run: where it stands, or that it is over. */
export function drawStop(node, message) {
  const entry = rows.get(node);
  if (!entry) return;
  const { running, stopping, block, blocks, node: id } = object(message);
  entry.id = running ? text(id) : null;
  entry.button.disabled = !running || Boolean(stopping);
  const at = number(block) === null ? "" : `block ${number(block) + 1} of ${text(blocks)}`;
  entry.status.textContent = !running ? "not running" : stopping ? `ends after ${at}` : at;
}

async function ask(api, entry) {
  if (entry.id === null) return;
  entry.button.disabled = true;
  try {
    const answer = await api.fetchApi(ROUTE, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ node: entry.id }),
    });
    const found = answer.ok && (await answer.json()).stopping.length > 0;
    entry.status.textContent = found ? `ends after ${entry.status.textContent}` : "no run to end";
  } catch {
    entry.status.textContent = "the server did not answer";
    entry.button.disabled = false;
  }
}
