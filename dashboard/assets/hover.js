// One cursor for all plots over steps, and the text of heat maps, made here of what a trace says about itself
// (figures/cells.py): what comes from a log is set as text, never as markup.
(() => {
  const layerwatch = (window.layerwatch = window.layerwatch || {});
  let last = null, waiting = 0, tip = null;

  const number = (value) => {
    if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "∞" : "−∞";
    const size = Math.abs(value);
    const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(3) : Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
    return text.replace(/\.?0*e\+?/, "e").replaceAll("-", "−");
  };
  const plots = () => document.querySelectorAll("#body .js-plotly-plot");
  const full = (graph) => graph._fullLayout;
  const carriesSteps = (graph, axis) => full(graph).meta?.steps?.includes(axis._name);

  // The subplot under a place on the screen, and its coordinates there.
  function place(graph, x, y) {
    const frame = graph.getBoundingClientRect();
    for (const { xaxis, yaxis } of Object.values(full(graph)?._plots ?? {})) {
      const left = x - frame.left - xaxis._offset, top = y - frame.top - yaxis._offset;
      if (left < 0 || top < 0 || left > xaxis._length || top > yaxis._length) continue;
      return { graph, xaxis, yaxis, at: xaxis.p2c(left), up: yaxis.p2c(top) };
    }
    return null;
  }

  // A thin line in every subplot whose axis is of the same kind.
  function cursors(found) {
    const { xaxis, at } = found ?? {};
    for (const graph of plots()) {
      const lines = new Map([...graph.querySelectorAll(":scope > .cursor-line")].map((line) => [line.dataset.axis, line]));
      const keys = found && full(graph)?.meta?.axis === full(found.graph).meta.axis ? full(graph).meta.steps ?? [] : [];
      for (const key of keys) {
        const axis = full(graph)[key];
        const left = axis && axis.type === xaxis.type ? axis.c2p(at) : NaN;
        if (!(left >= 0 && left <= axis._length)) continue;
        let line = lines.get(key);
        lines.delete(key);
        if (!line) {
          line = document.createElement("div");
          line.className = "cursor-line";
          line.dataset.axis = key;
          line.setAttribute("aria-hidden", "true");
          graph.append(line);
        }
        const beside = Object.values(full(graph)._plots).filter((plot) => plot.xaxis === axis).map((plot) => plot.yaxis);
        const top = Math.min(...beside.map((one) => one._offset));
        line.style.height = `${Math.max(...beside.map((one) => one._offset + one._length)) - top}px`;
        line.style.transform = `translate(${axis._offset + left}px, ${top}px)`;
        line.hidden = false;
      }
      for (const line of lines.values()) line.hidden = true;
    }
  }

  // Which of the ascending or descending edges a coordinate is between.
  function cell(edges, at) {
    const up = edges[edges.length - 1] >= edges[0];
    let low = 0, high = edges.length - 1;
    if (up ? at < edges[0] || at > edges[high] : at > edges[0] || at < edges[high]) return -1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (up === edges[middle] <= at) low = middle;
      else high = middle;
    }
    return low;
  }

  // The heat map under the cursor: what its cell stands for, and where the row is.
  function reading(found) {
    const { graph, xaxis, yaxis, at, up } = found;
    let read = null;
    for (const [calculated] of graph.calcdata ?? []) {
      const { trace, x, y, z } = calculated ?? {};
      const meta = trace?.meta;
      if (trace?.type !== "heatmap" || !meta || trace.xaxis !== xaxis._id || trace.yaxis !== yaxis._id) continue;
      const column = cell(x, at), row = cell(y, up);
      if (column < 0 || row < 0) continue;
      const value = z[row]?.[column];
      const empty = value === undefined || value === null || Number.isNaN(value);
      if (meta.says) {
        if (!empty && read) read.value = meta.says;
        continue;
      }
      if (meta.factor === undefined) continue;
      const part = (list) => (typeof list === "number" ? list : list[row]);
      const told = part(meta.offset) + part(meta.factor) * value;
      const text = empty ? "nothing captured" : `${number(meta.log ? 10 ** told : told)}${meta.unit ?? ""}`;
      read = {
        row: rowName(graph, yaxis, trace, row),
        step: stepText(graph, xaxis, (meta.steps ?? trace.x)[column], trace.x[column]),
        what: empty ? "" : meta.what, value: text, edges: [y[row], y[row + 1]],
      };
    }
    return read;
  }
  function rowName(graph, axis, trace, row) {
    if (axis.type === "category") return String(axis._categories[row] ?? "");
    const at = Number(trace.y?.[row] ?? row), floor = full(graph).meta.floor?.[axis._name];
    const value = floor === undefined ? at : at === 0 ? 0 : Math.sign(at) * 10 ** (Math.abs(at) + floor);
    return `${axis.title?.text?.replace(/<[^>]*>/g, " ") ?? ""} ${number(value)}`.trim();
  }
  function stepText(graph, axis, step, value) {
    const text = `step ${Number(step).toLocaleString("en")}`;
    const { axis: kind } = full(graph).meta;
    if (kind === "relative") return `${text} · ${number(value)}${axis.ticksuffix ?? ""}`;
    return kind === "wall" ? `${text} · ${new Date(value).toLocaleString()}` : text;
  }

  function tell(read, found) {
    if (!tip) {
      tip = document.createElement("div");
      tip.className = "cell-text";
      tip.setAttribute("aria-hidden", "true");
      tip.append(...["b", "span", "span"].map((name) => document.createElement(name)));
      document.body.append(tip);
    }
    tip.hidden = !read;
    for (const line of document.querySelectorAll(".cursor-row")) line.hidden = true;
    if (!read) return;
    const [row, step, value] = tip.children;
    row.textContent = read.row;
    step.textContent = read.step;
    value.textContent = `${read.what} ${read.value}`.trim();
    const { offsetWidth: wide, offsetHeight: tall } = tip;
    const left = last.x + 14 + wide > innerWidth ? last.x - 14 - wide : last.x + 14;
    tip.style.transform = `translate(${Math.max(left, 4)}px, ${Math.max(last.y - tall - 12, 4)}px)`;
    band(found, read.edges.map((edge) => found.yaxis.c2p(edge)));
  }
  function band({ graph, xaxis, yaxis }, ends) {
    let row = graph.querySelector(":scope > .cursor-row");
    if (!row) {
      row = document.createElement("div");
      row.className = "cursor-row";
      row.setAttribute("aria-hidden", "true");
      graph.append(row);
    }
    const top = Math.max(Math.min(...ends), 0), bottom = Math.min(Math.max(...ends), yaxis._length);
    row.style.width = `${xaxis._length}px`;
    row.style.height = `${bottom - top}px`;
    row.style.transform = `translate(${xaxis._offset}px, ${yaxis._offset + top}px)`;
    row.hidden = false;
  }

  function follow() {
    waiting = 0;
    const graph = last?.target.isConnected ? last.target.closest?.("#body .js-plotly-plot") : null;
    const found = graph && full(graph)?.meta?.steps ? place(graph, last.x, last.y) : null;
    const over = found && carriesSteps(graph, found.xaxis) ? found : null;
    cursors(over);
    tell(over && reading(over), over);
  }
  const soon = () => (waiting ||= requestAnimationFrame(follow));
  layerwatch.pointAgain = () => last && soon(); // after a plot was drawn under a resting cursor

  function moved(event) {
    last = { target: event.target, x: event.clientX, y: event.clientY };
    soon();
  }
  addEventListener("pointermove", moved, { passive: true });
  addEventListener("pointerdown", moved, { passive: true });
  const away = () => {
    last = null;
    soon();
  };
  document.documentElement.addEventListener("pointerleave", away);
  addEventListener("scroll", () => last && away(), { passive: true });
})();
