// A zoom of one plot over steps is the zoom of all: the others follow at once with the points they have, then the
// server reads the range again at full resolution.
(() => {
  const { layerwatch } = window;
  const no = () => window.dash_clientside.no_update;
  const following = new WeakMap(); // plots that we move, and where: the events of that are no wish of the reader
  const graphOf = (id) => document.querySelector(`[id="${CSS.escape(id)}"] .js-plotly-plot`);

  // {range: [low, high]} in the coordinates of the axis, {} for everything, undefined when it is no zoom across.
  function wish(event, keys) {
    for (const key of keys) {
      if (event[`${key}.autorange`]) return {};
      const low = event[`${key}.range[0]`] ?? event[`${key}.range`]?.[0];
      const high = event[`${key}.range[1]`] ?? event[`${key}.range`]?.[1];
      if (low !== undefined && high !== undefined) return { range: [low, high] };
    }
    return undefined;
  }

  // A place on the axis as a step; see figures/times.py.
  function step(value, { axis, clock }) {
    if (axis === "log") return 10 ** Number(value);
    if (axis === "step" || !clock) return Number(value);
    const at = axis === "wall" ? milliseconds(value) : Number(value);
    const { steps, values } = clock;
    let high = values.findIndex((other) => other >= at);
    if (high === -1) high = values.length - 1;
    high = Math.max(high, 1);
    const share = (at - values[high - 1]) / (values[high] - values[high - 1] || 1);
    const found = steps[high - 1] + share * (steps[high] - steps[high - 1]);
    return Math.min(Math.max(found, steps[0]), steps[steps.length - 1]);
  }
  // The inverse: a step as a place on the axis, as its range has it.
  function place(at, { axis, clock }) {
    if (axis === "log") return Math.log10(Math.max(at, 0.5));
    if (axis === "step" || !clock) return at;
    const { steps, values } = clock;
    const high = Math.max(steps.findIndex((other) => other >= at), 1);
    const share = (at - steps[high - 1]) / (steps[high] - steps[high - 1] || 1);
    return values[high - 1] + share * (values[high] - values[high - 1]);
  }
  // A plot that is drawn already from what the controls say, but was zoomed since.
  layerwatch.align = (graph, range) => {
    const meta = graph?._fullLayout?.meta;
    if (!meta?.steps) return;
    const ends = range ? range.split(":").map((at) => place(Number(at), meta)) : null;
    const update = {};
    for (const key of meta.steps) {
      const { range: [low, high], autorange, type } = graph._fullLayout[key];
      const [from, to] = type === "date" ? [milliseconds(low), milliseconds(high)] : [low, high];
      if (!ends && !autorange) update[`${key}.autorange`] = true;
      if (ends && Math.abs(from - ends[0]) + Math.abs(to - ends[1]) > 0.02 * (ends[1] - ends[0])) update[`${key}.range`] = ends;
    }
    if (Object.keys(update).length) follow(graph, update);
  };
  // Plotly writes dates in the reader's time zone, "2026-11-22 08:43:15.1234".
  const milliseconds = (text) => (typeof text === "number" ? text : new Date(String(text).replace(" ", "T").replace(/(\.\d{3})\d+$/, "$1")).getTime());

  function inView(graph) {
    const { top, bottom, width } = graph.getBoundingClientRect();
    return width > 0 && bottom > 0 && top < innerHeight;
  }
  function bring(from, { range }) {
    const { axis } = from._fullLayout.meta;
    for (const graph of document.querySelectorAll("#body .js-plotly-plot")) {
      const meta = graph._fullLayout?.meta;
      if (graph === from || meta?.axis !== axis || !meta.steps || !inView(graph)) continue;
      const update = {};
      for (const key of meta.steps) update[range ? `${key}.range` : `${key}.autorange`] = range ? [...range] : true;
      follow(graph, update);
    }
  }
  function follow(graph, update) {
    following.set(graph, String(wish(update, graph._fullLayout.meta.steps).range));
    setTimeout(() => graph.isConnected && window.Plotly.relayout(graph, update));
  }
  // Such an event may come late, when the page is busy: it is told by what it says, and counts once.
  function ours(graph, asked) {
    const same = following.get(graph) === String(asked.range);
    following.delete(graph);
    return same;
  }
  // Value axes that the reader has zoomed: a live update leaves them. Plotly forgets it when Dash writes the figure back.
  const heights = new WeakMap();
  function remember(graph, event) {
    const known = touched(graph);
    for (const key of Object.keys(event)) {
      const [, axis, what] = key.match(/^(yaxis\d*)\.(autorange|range)/) ?? [];
      if (axis) known[what === "range" ? "add" : "delete"](axis);
    }
    heights.set(graph, { of: graph._fullLayout?.uirevision, axes: known });
  }
  function touched(graph) {
    const { of, axes } = heights.get(graph) ?? {};
    return axes && of === graph._fullLayout?.uirevision ? axes : new Set();
  }
  layerwatch.zoomedHeights = touched;
  function wished({ prop_id: name, value: event }) {
    const graph = graphOf(name.slice(0, name.lastIndexOf(".")));
    const meta = graph?._fullLayout?.meta;
    if (graph && event) remember(graph, event);
    const asked = event && meta?.steps && wish(event, meta.steps);
    return asked && !ours(graph, asked) ? { graph, meta, asked } : null;
  }

  Object.assign(window.dash_clientside.layerwatch, {
    // relayoutData also fires when a plot is resized: only a drag, a pan or a double-click counts.
    zoomed() {
      const found = (window.dash_clientside.callback_context.triggered ?? []).map(wished).find(Boolean);
      if (!found) return no();
      const { graph, meta, asked } = found;
      bring(graph, asked);
      if (!asked.range) return "";
      const [low, high] = asked.range.map((value) => Math.round(step(value, meta)));
      return `${low}:${Math.max(high, low + 1)}`;
    },
  });
  layerwatch.stepAt = step;
})();
