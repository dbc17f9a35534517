/** Panels inside nodes: DOM widgets that work in the classic canvas and in Vue nodes, and finding the node to put them in. */

import { el } from "./dom.mjs?v=0.1.0";

const MARGIN = 6;
const SETTLED = 200; // milliseconds
const FIRST_HEIGHT = 24; // until the browser has laid the panel out once
const panels = new WeakMap(); // node -> Map(name -> Panel)

/**
 * The node of an execution id ("5", or "12:5" inside a subgraph) or of a locator id ("<subgraph uuid>:5").
 * Nodes that a graph expansion made ("5.0.0.3") resolve to the node that expanded.
 * @param {object} rootGraph
 * @param {unknown} id
 * @returns {object | null}
 */
export function findNode(rootGraph, id) {
  if (id === null || id === undefined) return null;
  let graph = rootGraph;
  let node = null;
  for (const part of String(id).split(":")) {
    const key = part.split(".")[0];
    const subgraph = rootGraph?.subgraphs?.get?.(key);
    node = subgraph ? null : (graph?.getNodeById?.(key) ?? null);
    graph = subgraph ?? node?.subgraph;
  }
  return node;
}

/** Selects a node and brings it into view, in its own graph where it is inside a subgraph. */
export function revealNode(app, node) {
  const { canvas } = app;
  const show = () => {
    canvas.selectNode(node);
    canvas.centerOnNode(node);
  };
  if (!node.graph || node.graph === canvas.graph) return show();
  if (node.graph.isRootGraph === false) canvas.openSubgraph(node.graph, node);
  else canvas.setGraph(node.graph);
  setTimeout(show, SETTLED); // the frontend moves the view of a graph that it opens, some frames later
}

/**
 * Shows `content` in a panel of the node, which is made the first time. Unfolded details stay unfolded.
 * @param {object} app the frontend's app
 * @param {object} node
 * @param {string} name of the panel; one node may have several
 * @param {HTMLElement} content
 * @param {number} [minWidth] the node is widened to it when the panel is made
 */
export function showPanel(app, node, name, content, minWidth = 0) {
  const mine = panels.get(node) ?? new Map();
  panels.set(node, mine);
  if (!mine.has(name)) mine.set(name, addPanel(app, node, name, minWidth));
  const { body } = mine.get(name);
  const open = [...body.querySelectorAll("details")].map((d) => d.open);
  content.querySelectorAll("details").forEach((d, i) => (d.open = open[i] ?? false));
  body.replaceChildren(content);
}

/** Takes the panel away again, if there is one. */
export function hidePanel(node, name) {
  const panel = panels.get(node)?.get(name);
  if (!panel) return;
  panels.get(node).delete(name);
  panel.observer.disconnect();
  if (node.widgets?.includes(panel.widget)) node.removeWidget(panel.widget);
  node.setDirtyCanvas?.(true, true);
}

function addPanel(app, node, name, minWidth) {
  const body = el("div", { class: "tessera-body" });
  const root = el("div", { class: "tessera-panel" }, body);
  const panel = { body, height: FIRST_HEIGHT, widget: null, observer: null };
  const height = () => panel.height + 2 * MARGIN;
  panel.widget = node.addDOMWidget(name, "tessera", root, {
    serialize: false,
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: height,
    getMaxHeight: height,
    getValue: () => "",
    setValue: () => {},
  });
  panel.widget.serialize = false; // options.serialize keeps it out of the prompt, this out of the workflow file
  if (node.size[0] < minWidth) node.setSize([minWidth, node.size[1]]);
  root.addEventListener("wheel", (event) => forwardWheel(app, event), { passive: false });
  panel.observer = new ResizeObserver(() => resized(node, panel));
  panel.observer.observe(body);
  return panel;
}

/** In the classic canvas the node follows the panel's height; Vue nodes are laid out by the browser. */
function resized(node, panel) {
  const height = panel.body.offsetHeight;
  if (!height || height === panel.height) return;
  const fitted = node.size[1] <= node.computeSize()[1] + 1;
  panel.height = height;
  if (globalThis.LiteGraph?.vueNodesMode || !node.graph) return;
  const needed = node.computeSize()[1];
  if (fitted || node.size[1] < needed) node.setSize([node.size[0], needed]);
  node.setDirtyCanvas(true, true);
}

/** Zooming goes on over a panel. Vue nodes hand the wheel to the canvas themselves. */
function forwardWheel(app, event) {
  if (globalThis.LiteGraph?.vueNodesMode) return;
  event.preventDefault();
  app.canvas?.processMouseWheel?.(event);
}
