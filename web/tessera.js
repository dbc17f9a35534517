/** Entry of the canvas extension: lines in the nodes after each run, panels in the nodes that return a report, the sidebar. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { list, object } from "./dom.mjs?v=0.1.0";
import { featureLine, trialLine, trialWords } from "./line.mjs?v=0.1.0";
import { buildReport } from "./report.mjs?v=0.1.0";
import { Sidebar, TAB } from "./sidebar.mjs?v=0.1.0";
import { SAMPLERS, drawStop, stopRow } from "./stop.mjs?v=0.1.0";
import { findNode, hidePanel, revealNode, showPanel } from "./widget.mjs?v=0.1.0";

const PREFIX = "Tessera"; // of every node id of the pack
const REPORT = "tessera_report"; // in a node's ui output
const REPORT_WIDTH = 380;
const REMEMBERED = 16; // workflows whose lines survive undo and tab changes
const runs = new Map(); // workflow id -> Map(node id -> {feature, run})
let trial = null; // that Accelerate is at

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

/** What Accelerate is trying, until the run that follows draws its own line. */
function drawTrial(told) {
  trial = told;
  sidebar.tell(trialWords(trial));
  const node = findNode(graph(), trial.node);
  if (isOurs(node)) showPanel(app, node, "tessera_line", trialLine(trial));
}

/** The run was stopped before the one that would tell of the trials. */
function endTrial(how) {
  if (trial) drawTrial({ ...trial, ended: how });
  trial = null;
}

/** A run that tells for itself. */
function leaveTrial() {
  trial = null;
  sidebar.tell("");
}

/** A report that comes from the server's cache, after a reload say, also brings back the lines of its run. */
function drawReport(node, output) {
  const report = list(object(output)[REPORT]).at(-1);
  if (report === undefined || !isOurs(node)) return;
  if (object(report).kind === "plan") sidebar.plan = { report, workflow: workflowId() };
  showPanel(app, node, "tessera_report", buildReport(report), REPORT_WIDTH);
  const sides = list(object(report).models);
  for (const run of [report, ...(sides.length ? sides : [object(report).a, object(report).b])]) drawLines(run, true);
}

const sidebar = new Sidebar({
  title: (id) => findNode(graph(), id)?.title ?? "",
  show: showNode,
  ask: async (path) => {
    try {
      const answer = await api.fetchApi(`${path}${path.includes("?") ? "&" : "?"}client=${encodeURIComponent(api.clientId)}`);
      return answer.ok ? await answer.json() : null;
    } catch {
      return null; // the server is away: the runs that are known stay
    }
  },
});

/** Of a workflow that has been loaded; a new graph has none yet. */
function workflowId() {
  const id = String(graph()?.id ?? "");
  return /[1-9a-f]/.test(id) ? id : null;
}

function showNode(id, run) {
  const elsewhere = run.workflow && workflowId() && run.workflow !== workflowId();
  const node = elsewhere ? null : findNode(graph(), id);
  if (isOurs(node)) return revealNode(app, node);
  const detail = elsewhere ? "This run came from another workflow." : `Node ${id} is not on the canvas any more.`;
  app.extensionManager.toast.add({ severity: "info", summary: "Tessera", detail, life: 4000 });
}

/** The server keeps the last runs of this page, so that they outlive a reload. */
async function restoreRuns() {
  const answer = await sidebar.host.ask("/tessera/runs");
  if (answer) sidebar.runs.restore(answer.runs);
}

function listen() {
  for (const event of ["tessera.step", "tessera.run", "execution_success"]) api.addEventListener(event, leaveTrial);
  api.addEventListener("execution_interrupted", () => endTrial("Interrupted"));
  api.addEventListener("execution_error", () => endTrial("Failed"));
  api.addEventListener("tessera.step", (event) => sidebar.runs.step(event.detail, workflowId()));
  api.addEventListener("tessera.run", (event) => {
    drawLines(event.detail, false);
    sidebar.runs.finish(event.detail, workflowId());
  });
  api.addEventListener("tessera.blocks", (event) => {
    const node = findNode(graph(), object(event.detail).node);
    if (node) drawStop(node, event.detail);
  });
  api.addEventListener("tessera.trial", (event) => drawTrial(object(event.detail)));
  api.addEventListener("reconnecting", () => sidebar.runs.lose());
  api.addEventListener("reconnected", restoreRuns);
  const first = () => {
    if (!api.clientId) return;
    api.removeEventListener("status", first);
    restoreRuns();
  };
  api.addEventListener("status", first);
  first();
}

app.registerExtension({
  name: "tessera.reports",
  keybindings: [{ combo: { key: "t" }, commandId: `Workspace.ToggleSidebarTab.${TAB}` }],

  setup() {
    listen();
    app.extensionManager.registerSidebarTab({
      id: TAB,
      icon: "tessera-icon",
      title: "Tessera",
      tooltip: "Tessera: what acted in the last runs",
      type: "custom",
      render: (element) => sidebar.render(element),
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
