// Asks what has changed on this page, and changes that and nothing else. One request at a time, silent while the tab is
// hidden or paused, less often while nothing happens and when answers are slow.
(() => {
  const layerwatch = (window.layerwatch = window.layerwatch || {}); // filled by screen.js, which comes later
  const { pace: FAST = 1000 } = layerwatch, SLOW = 15 * FAST; // milliseconds; tests of long sessions set another pace
  let seen = {}, paused = false, wait = FAST, timer = null, asking = false, calls = 0;

  // Callbacks in flight: their figures are on the way, so there is nothing to compare with yet.
  const plain = window.fetch;
  window.fetch = function (resource, ...rest) {
    const url = typeof resource === "string" ? resource : resource.url;
    if (!url.includes("_dash-update-component")) return plain.call(this, resource, ...rest);
    calls += 1;
    return plain.call(this, resource, ...rest).finally(() => (calls -= 1));
  };

  const props = (id) => layerwatch.props(id);
  const set = (id, change) => window.dash_clientside.set_props(id, change);
  const tag = (figure) => figure?.layout?.meta?.tag;

  // The tags of the plots that can be seen, by their ids.
  function held() {
    const found = {};
    for (const { id, offsetParent } of document.querySelectorAll(".dash-graph[id]")) {
      const known = offsetParent && tag(props(id)?.figure);
      if (known) found[id] = known;
    }
    return found;
  }

  async function ask() {
    timer = null;
    if (document.hidden || paused || asking) return;
    const page = props("page")?.data ?? {};
    if (calls || page.built === undefined) return again(250);
    if (page.run && !page.cursor) return again(SLOW); // there is no such run
    if (page.built !== seen.built) seen = page;
    const began = performance.now();
    const plots = held();
    asking = true;
    try {
      const answer = await plain(`${layerwatch.base}/api/live`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({
          run: page.run, page: page.page, cursor: seen.cursor, said: seen.said,
          state: page.run ? layerwatch.state : {}, screen: layerwatch.screen, plots,
        }),
      });
      if (!answer.ok) return again(SLOW);
      const now = await answer.json();
      if (props("page")?.data.built !== page.built) return again(250); // the reader has gone on to another page
      show(now, plots);
      const news = now.cursor !== seen.cursor || now.said !== seen.said;
      seen = { built: page.built, cursor: now.cursor, said: now.said };
      wait = news ? FAST : Math.min(wait * 1.4, now.live ? 3 * FAST : SLOW);
      again(Math.max(wait, Math.min(5, FAST / 200) * (performance.now() - began)));
    } catch {
      label(false, "Server gone");
      again(SLOW);
    } finally {
      asking = false;
    }
  }

  function show(now, plots) {
    label(now.live);
    for (const [id, patch] of Object.entries(now.plots)) {
      const old = props(id)?.figure;
      if (tag(old) === plots[id]) draw(id, old, patch); // else a control has been moved in the meantime
    }
    for (const [id, text] of Object.entries(now.texts)) set(id, { children: text });
    setTimeout(() => layerwatch.pointAgain?.(), 200);
    if (now.cursor !== seen.cursor) set("pulse", { data: now.cursor });
    if (now.said !== seen.said) set("verdict", { data: now.said });
  }

  function draw(id, old, patch) {
    const graph = document.querySelector(`[id="${CSS.escape(id)}"] .js-plotly-plot`);
    const figure = applied(old, patch);
    keepZoom(graph, old, figure);
    set(id, { figure });
    const { said = "", tone = "" } = figure.layout.meta;
    if (props(`${id}-said`)?.children === said) return;
    set(`${id}-said`, { children: said });
    set(`${id}-frame`, { className: `plot-frame ${said ? tone : ""}`.trim() });
  }

  // An axis that the reader has zoomed keeps its range although the data now asks for another one.
  function keepZoom(graph, old, figure) {
    if (!graph || old.layout.uirevision !== figure.layout.uirevision) return;
    const touched = Object.keys(graph._fullLayout?._preGUI ?? {}).filter((key) => /^[xy]axis\d*\.range/.test(key));
    for (const axis of new Set([...touched.map((key) => key.split(".")[0]), ...layerwatch.zoomedHeights(graph)])) {
      if (!old.layout[axis] || !figure.layout[axis]) continue;
      const { range, autorange } = old.layout[axis];
      figure.layout = { ...figure.layout, [axis]: { ...figure.layout[axis], range, autorange } };
    }
  }

  // See figures/diff.py. What a patch does not touch stays the same object, so Plotly need not look at it again.
  function applied(old, patch) {
    if (patch === undefined || patch === null) return old;
    if ("set" in patch) return patch.set;
    if ("in" in patch) {
      const now = { ...old };
      for (const key of patch.gone ?? []) delete now[key];
      for (const [key, inner] of Object.entries(patch.in)) now[key] = applied(old[key], inner);
      return now;
    }
    if ("at" in patch) return [...old.map((item, i) => applied(item, patch.at[i])), ...(patch.tail ?? [])];
    if ("from" in patch) return old.slice(0, patch.from).concat(patch.tail);
    const now = { dtype: old.dtype, bdata: "" };
    if ("shape" in old) now.shape = patch.shape;
    now.bdata = encoded("bytes" in patch ? joined(decoded(old.bdata).subarray(0, patch.bytes), decoded(patch.tail)) : matrix(old, patch));
    return now;
  }
  layerwatch.applied = applied;

  function matrix(old, patch) {
    const before = decoded(old.bdata), block = decoded(patch.block), band = decoded(patch.band ?? "");
    const sizes = (shape) => String(shape).split(",").map(Number);
    const [rows, columns] = sizes(patch.shape), [, had] = sizes(old.shape);
    const cell = before.length / (rows * had), keep = patch.columns * cell, more = columns * cell - keep;
    const now = new Uint8Array(rows * columns * cell);
    for (let row = 0; row < rows; row++) {
      const place = row * columns * cell;
      now.set(before.subarray(row * had * cell, row * had * cell + keep), place);
      now.set(block.subarray(row * more, (row + 1) * more), place + keep);
    }
    (patch.rows ?? []).forEach((row, i) => now.set(band.subarray(i * keep, (i + 1) * keep), row * columns * cell));
    return now;
  }

  function joined(one, two) {
    const both = new Uint8Array(one.length + two.length);
    both.set(one);
    both.set(two, one.length);
    return both;
  }
  function decoded(text) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  }
  function encoded(bytes) {
    if (bytes.toBase64) return bytes.toBase64();
    let text = "";
    for (let i = 0; i < bytes.length; i += 0x8000) text += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
    return btoa(text);
  }

  function again(delay) {
    clearTimeout(timer);
    timer = setTimeout(ask, delay);
  }
  function label(live, text) {
    const button = document.getElementById("live-button");
    if (!button) return;
    button.textContent = text || (paused ? "Paused" : live ? "Live" : "Up to date");
    button.className = `pill ${paused ? "paused" : live ? "on" : ""}`;
  }
  addEventListener("click", (event) => {
    if (!event.target.closest?.("#live-button")) return;
    paused = !paused;
    label(false);
    if (!paused) again(0);
  });
  document.addEventListener("visibilitychange", () => !document.hidden && again(0));
  again(1200);
})();
