// Clicks on the layer x step maps, and the sliders of their profiles.
(() => {
  const no = () => window.dash_clientside.no_update;
  const { layerwatch } = window;
  const set = (id, value) => window.dash_clientside.set_props(id, { value });
  const escaped = (name) => name.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&");

  // Plotly's click does not say which keys are down.
  let keys = {};
  addEventListener("pointerdown", ({ shiftKey, altKey }) => (keys = { shiftKey, altKey }), true);

  // Shift takes the profile of this step, Alt that to compare with; the sliders move along.
  function slice(trace, x) {
    const held = keys.shiftKey ? "at" : keys.altKey ? "against" : "";
    if (!held || trace.type !== "heatmap") return false;
    const axis = layerwatch.state.axis || "step";
    if (axis === "step" || axis === "log") set({ slider: held }, Math.round(x));
    return true;
  }

  Object.assign(window.dash_clientside.layerwatch, {
    // A row opens its layer. A row of several layers, or of a block, narrows the rows to those.
    openRow(click, page) {
      const point = click?.points?.[0];
      const plot = window.dash_clientside.callback_context.triggered[0]?.prop_id.split(".")[0];
      const drawn = document.querySelector(`[id="${plot}"] .js-plotly-plot`)?.data;
      if (typeof point?.y !== "string" || !drawn || slice(drawn[point.curveNumber], point.x)) return no();
      const { layers, width, blocks } = drawn[0].meta;
      if (layers) {
        const first = Array.from(drawn[0].y).indexOf(point.y) * width;
        set({ state: "filter" }, `^(?:${layers.slice(first, first + width).map(escaped).join("|")})$`);
      } else if (blocks) {
        set({ state: "group" }, "layer");
        set({ state: "filter" }, `^${escaped(point.y)}(?:\\.|$)`);
      } else {
        const run = page.run.split("/").map(encodeURIComponent).join("/");
        const tensor = encodeURIComponent(point.y).replaceAll("%2F", "/");
        layerwatch.go(`${layerwatch.base}/run/${run}/layer?tensor=${tensor}`);
      }
      return no();
    },

    // The end of a slider where it rests is no choice: the profile follows a run that grows.
    fromEnd: (value, end) => (value >= end ? "" : String(value)),
    fromStart: (value, start) => (value <= start ? "" : String(value)),
  });
})();
