/** Graphs that the browser tests build in the page, and questions they ask of it. */
window.tesseraTest = (() => {
  const add = (type, pos, values = {}) => {
    const node = LiteGraph.createNode(type);
    node.pos = pos;
    app.graph.add(node);
    for (const [name, value] of Object.entries(values)) node.widgets.find((w) => w.name === name).value = value;
    return node;
  };

  const inputs = (interval = 3) => ({
    model: add("UNETLoader", [40, 80], { unet_name: "tiny_flux.safetensors" }),
    text: add("TestConditioning", [40, 240]),
    latent: add("EmptySD3LatentImage", [40, 420], { width: 64, height: 64 }),
    cache: add("TesseraTaylorCache", [360, 80], { interval }),
  });

  const branch = ({ model, text, latent }, cache, seed, y) => {
    const fixed = { seed, control_after_generate: "fixed", steps: 8, cfg: 1, scheduler: "simple" };
    const sampler = add("KSampler", [680, y], fixed);
    const report = add("TesseraRunReport", [1000, y]);
    model.connect(0, cache, "model");
    cache.connect(0, sampler, "model");
    text.connect(0, sampler, "positive");
    text.connect(0, sampler, "negative");
    latent.connect(0, sampler, "latent_image");
    cache.connect(0, report, "model");
    sampler.connect(0, report, "latent");
    return { cache: String(cache.id), sampler: String(sampler.id), report: String(report.id) };
  };

  /** Loader, Taylor Cache, KSampler, Run Report; 8 steps. Returns the node ids. */
  const sampling = (seed, interval) => {
    app.graph.clear();
    const made = inputs(interval);
    return branch(made, made.cache, seed, 80);
  };

  /** The same on the digits model. */
  const digits = (seed, steps) => {
    app.graph.clear();
    const made = {
      model: add("UNETLoader", [40, 80], { unet_name: "digits_flux.safetensors" }),
      text: add("TesseraDigitsPrompt", [40, 240], { text: "seven" }),
      latent: add("EmptySD3LatentImage", [40, 460], { width: 128, height: 128 }),
      cache: add("TesseraTaylorCache", [360, 80], { interval: 3 }),
    };
    const ids = branch(made, made.cache, seed, 80);
    app.graph.getNodeById(ids.sampler).widgets.find((w) => w.name === "steps").value = steps;
    return ids;
  };

  /** The same with Local Window Attention in place of the cache; 3 steps. Returns the node ids. */
  const sparse = (seed) => {
    app.graph.clear();
    const made = inputs();
    made.latent.widgets.forEach((w) => ["width", "height"].includes(w.name) && (w.value = 256));
    app.graph.remove(made.cache);
    const attention = add("TesseraLocalWindowAttention", [360, 80], { radius: 4, min_tokens: 0 });
    const ids = branch(made, attention, seed, 80);
    app.graph.getNodeById(ids.sampler).widgets.find((w) => w.name === "steps").value = 3;
    return { window: ids.cache, report: ids.report };
  };

  /** Two such branches from one loader, their Taylor Caches alike. Returns the node ids of both. */
  const twins = (seed, interval) => {
    app.graph.clear();
    const made = inputs(interval);
    const second = add("TesseraTaylorCache", [360, 600], { interval });
    return [branch(made, made.cache, seed, 80), branch(made, second, seed + 1, 600)];
  };

  /** Compare of a plain MODEL with a cached one; 6 steps. */
  const comparison = (seed) => {
    app.graph.clear();
    const { model, text, latent, cache } = inputs();
    const noise = add("RandomNoise", [360, 560], { noise_seed: seed, control_after_generate: "fixed" });
    const sampler = add("KSamplerSelect", [40, 560]);
    const sigmas = add("BasicScheduler", [40, 660], { scheduler: "simple", steps: 6 });
    const compare = add("TesseraCompare", [720, 80], { repeats: 2, decode: "none" });
    model.connect(0, cache, "model");
    model.connect(0, compare, "model_a");
    cache.connect(0, compare, "model_b");
    model.connect(0, sigmas, "model");
    text.connect(0, compare, "positive");
    text.connect(0, compare, "negative");
    latent.connect(0, compare, "latent");
    noise.connect(0, compare, "noise");
    sampler.connect(0, compare, "sampler");
    sigmas.connect(0, compare, "sigmas");
    return { cache: String(cache.id), compare: String(compare.id) };
  };

  /** A Test Record node that sends one record and returns another. */
  const record = (event, report) => {
    app.graph.clear();
    const texts = { event: event ? JSON.stringify(event) : "", report: report ? JSON.stringify(report) : "" };
    return String(add("TesseraTestRecord", [80, 80], texts).id);
  };

  const panel = (id, name, graph = app.graph) =>
    graph.getNodeById(id)?.widgets?.find((w) => w.name === name)?.element ?? null;

  const show = (id) => {
    const node = app.graph.getNodeById(id);
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [120 - node.pos[0], 100 - node.pos[1]];
    app.canvas.setDirty(true, true);
  };

  /** Gives nodes their outputs, as the server does during a run. */
  const executed = (outputs) => {
    for (const [node, output] of Object.entries(outputs)) {
      app.api.dispatchCustomEvent("executed", { node, display_node: node, output, prompt_id: "test", merge: false });
    }
    app.canvas.setDirty(true, true); // a real run redraws with every step
  };

  /** Zooms so far out that `room` more pixels below the lowest node are in view as well. */
  const overview = (room) => {
    const ends = (i) => Math.max(...app.graph.nodes.map((node) => node.pos[i] + node.size[i]));
    app.canvas.ds.scale = Math.min(1300 / ends(0), 800 / (ends(1) + room));
    app.canvas.ds.offset = [100 / app.canvas.ds.scale, 100 / app.canvas.ds.scale];
    app.canvas.setDirty(true, true);
  };

  /** Every node as [type, left, top, right, bottom] with its title, in pixels of the graph. */
  const boxes = () =>
    app.graph.nodes.map((node) => {
      if (!LiteGraph.vueNodesMode) {
        const [x, y, width, height] = node.getBounding();
        return [node.type, x, y, x + width, y + height];
      }
      const { left, top, right, bottom } = document.querySelector(`[data-node-id="${node.id}"]`).getBoundingClientRect();
      return [node.type, ...[left, top, right, bottom].map((v) => v / app.canvas.ds.scale)];
    });

  /** Whether each of these nodes shows the picture that it was given. */
  const pictured = (ids) =>
    ids.every((id) => {
      const node = app.graph.getNodeById(id);
      const inside = [...(document.querySelectorAll(`[data-node-id="${id}"] img`) ?? [])];
      const widgets = (node.widgets ?? []).flatMap((w) => [...(w.element?.querySelectorAll?.("img") ?? [])]);
      return [...(node.imgs ?? []), ...inside, ...widgets].some((img) => img.complete && img.naturalWidth);
    });

  return { executed, overview, boxes, pictured, sampling, digits, sparse, twins, comparison, record, panel, show };
})();
