/** Entry of the canvas extension: live lines in the nodes after each run, report panels in the nodes that return one. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { list, object } from "./dom.mjs?v=0.1.0";
import { featureLine } from "./line.mjs?v=0.1.0";
import { buildReport } from "./report.mjs?v=0.1.0";
import { SAMPLERS, drawStop, stopRow } from "./stop.mjs?v=0.1.0";
import { findNode, hidePanel, showPanel } from "./widget.mjs?v=0.1.0";

const PREFIX = "Tessera"; // of every node id of the pack
const REPORT = "tessera_report"; // in a node's ui output
const REPORT_WIDTH = 380;
const REMEMBERED = 16; // workflows whose lines survive undo and tab changes
const runs = new Map(); // workflow id -> Map(node id -> {feature, run})

const style = document.createElement("link");
style.rel = "stylesheet";
style.href = new URL("./tessera.css", import.meta.url).href;
document.head.append(style);

function isOurs(node) {
  return String(node?.comfyClass ?? node?.type ?? "").startsWith(PREFIX);
}

function graph() {
  return app.rootGraph ?? app.graph;
}

function drawLine(id, { feature, run }) {
  const node = findNode(graph(), id);
  if (!isOurs(node)) return;
  const line = featureLine(feature, run);
  if (line) showPanel(app, node, "tessera_line", line);
  else hidePanel(node, "tessera_line");
}

/** The lines of this workflow, which becomes the newest one that is remembered. */
function remembered() {
  const workflow = graph().id;
  const lines = runs.get(workflow) ?? new Map();
  runs.delete(workflow);
  runs.set(workflow, lines);
  if (runs.size > REMEMBERED) runs.delete(runs.keys().next().value);
  return lines;
}

function drawLines(run, keep) {
  const lines = remembered();
  for (const feature of list(object(run).features)) {
    const id = object(feature).node;
    if (id === null || id === undefined || (keep && lines.has(String(id)))) continue;
    lines.set(String(id), { feature, run });
    drawLine(id, { feature, run });
  }
}

/** A report that comes from the server's cache, after a reload say, also brings back the lines of its run. */
function drawReport(node, output) {
  const report = list(object(output)[REPORT]).at(-1);
  if (report === undefined || !isOurs(node)) return;
  showPanel(app, node, "tessera_report", buildReport(report), REPORT_WIDTH);
  const sides = list(object(report).models);
  for (const run of [report, ...(sides.length ? sides : [object(report).a, object(report).b])]) drawLines(run, true);
}

app.registerExtension({
  name: "tessera.reports",

  setup() {
    api.addEventListener("tessera.run", (event) => drawLines(event.detail, false));
    api.addEventListener("tessera.blocks", (event) => {
      const node = findNode(graph(), object(event.detail).node);
      if (node) drawStop(node, event.detail);
    });
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith(PREFIX)) return;
    const earlier = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      earlier?.apply(this, arguments);
      drawReport(this, output);
    };
  },

  nodeCreated(node) {
    if (SAMPLERS.includes(node.comfyClass)) showPanel(app, node, "tessera_stop", stopRow(api, node));
  },

  /** A workflow was loaded, or an undo rebuilt its nodes. */
  afterConfigureGraph() {
    for (const [id, entry] of runs.get(graph().id) ?? []) drawLine(id, entry);
  },

  /** Outputs came back with a workflow: from the history, or on return to its tab. */
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(object(outputs))) {
      if (output && REPORT in output) drawReport(findNode(graph(), id), output);
    }
  },
});
