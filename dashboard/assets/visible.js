// Plots that are drawn when they come near the view: all of these in one request, what lies elsewhere when nothing else
// is to be done. A card that is hidden costs nothing.
(() => {
  const { layerwatch } = window;
  const MARGIN = "160px", REST = 700; // milliseconds without a change before the plots out of view are drawn
  const near = new Set(), done = new Map(), due = new Map(); // plot id -> what it was, is being drawn from
  let now = null, timer = null, leaving = null, moved = false; // whether the last change was one of the zoom
  let first = false; // nothing has been asked for on this page
  // What the server has answered lately, so that a layer that was seen before is there at once. It is as old as that;
  // the next live update brings what is new.
  const kept = new Map(), KEPT = 60;

  const frames = () => [...document.querySelectorAll(".plot-frame[data-controls]")];
  const plotOf = (frame) => frame.id.slice(0, -"-frame".length);
  const set = (id, change) => window.dash_clientside.set_props(id, change);
  // Everything that a plot is drawn from.
  const sign = (frame, state = now.state) =>
    JSON.stringify([now.built, now.retry, now.screen, JSON.parse(frame.dataset.controls).map((key) => state[key])]);
  function keep(id, is, drawnFrom) {
    if (is.className.includes("failed")) return;
    kept.set(id + drawnFrom, structuredClone(is)); // Plotly writes into the figures that it draws
    if (kept.size > KEPT) kept.delete(kept.keys().next().value);
  }
  function known(frame, state) {
    const key = plotOf(frame) + sign(frame, state), is = kept.get(key);
    if (is && kept.delete(key)) kept.set(key, is); // the newest is forgotten last
    return is;
  }
  // The server has drawn it with the page, from the same values.
  function came(frame) {
    if (!frame.dataset.drawn || done.has(plotOf(frame))) return;
    const is = [...JSON.parse(frame.dataset.controls).map((key) => now.state[key]), now.screen.theme, now.screen.narrow];
    const same = JSON.parse(frame.dataset.drawn).every((value, i) => String(value ?? "") === String(is[i] ?? ""));
    if (same) done.set(plotOf(frame), sign(frame));
  }
  const waits = (frame) => done.get(plotOf(frame)) !== sign(frame) && due.get(plotOf(frame)) !== sign(frame);

  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) near[isIntersecting ? "add" : "delete"](target);
    look();
  }, { rootMargin: MARGIN });

  function look() {
    if (!now) return;
    const wanted = frames().filter((frame) => near.has(frame) && waits(frame));
    const asked = wanted.filter((frame) => !known(frame));
    if (asked.length) ask(asked, REST, first);
    else later(REST);
    for (const frame of wanted) {
      const is = !asked.includes(frame) && known(frame);
      if (is) show(plotOf(frame), structuredClone(is), sign(frame));
    }
  }
  function later(delay) {
    clearTimeout(timer);
    timer = setTimeout(rest, delay);
  }
  // One plot after the other, so that a key or a scroll never waits for more than one.
  async function rest() {
    if (due.size) return;
    const next = frames().find((frame) => frame.offsetParent && waits(frame));
    if (next) await ask([next], 30);
    else await foresee();
  }
  // The next layer, which a key will want.
  async function foresee() {
    const tensor = layerwatch.neighbour(1);
    if (tensor === undefined || done.size === 0) return;
    const state = { ...now.state, tensor }, { signal } = leaving;
    const ahead = frames().filter((frame) => near.has(frame) && done.has(plotOf(frame)) && !known(frame, state));
    const plots = ahead.map(plotOf), signs = ahead.map((frame) => sign(frame, state));
    if (!plots.length) return;
    const drawn = await fetched({ plots, state }, signal).catch(() => ({}));
    plots.forEach((id, i) => drawn[id] && keep(id, drawn[id], signs[i]));
  }

  async function fetched(more, signal) {
    const { page, run, state, screen } = now;
    const answer = await fetch(`${layerwatch.base}/api/plots`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ page, run, state, screen, ...more }),
      signal,
    });
    if (!answer.ok) throw new Error(`The server answered ${answer.status}.`);
    return answer.json();
  }

  async function ask(asked, pause = REST, early = false) {
    clearTimeout(timer);
    first = false;
    const plots = asked.map(plotOf), signs = asked.map((frame) => sign(frame));
    plots.forEach((id, i) => due.set(id, signs[i]));
    try {
      const drawn = await fetched({ plots, first: early }, leaving.signal);
      plots.forEach((id, i) => drawn[id] && keep(id, drawn[id], signs[i]));
      asked.forEach((frame, i) => {
        const is = drawn[plots[i]];
        if (is && frame.isConnected && sign(frame) === signs[i]) show(plots[i], is, signs[i]);
      });
    } catch (error) {
      if (error.name !== "AbortError") set("error", { children: `The plots could not be drawn. ${error.message}`, className: "banner" });
    } finally {
      plots.forEach((id, i) => due.get(id) === signs[i] && due.delete(id));
      later(pause);
    }
  }

  function show(id, { figure, className, said }, drawnFrom) {
    done.set(id, drawnFrom);
    set(id, { figure });
    set(`${id}-said`, { children: said });
    set(`${id}-frame`, { className });
    // Plotly keeps a zoom of the reader's when a figure asks for the range that was there before it.
    if (moved) setTimeout(() => align(document.getElementById(`${id}-frame`)), 80);
  }
  const align = (frame) => layerwatch.align(frame?.querySelector(".js-plotly-plot"), now.state.range);

  // The cards of a page appear a moment after its controls speak up.
  function meet(tries = 100) {
    const there = frames();
    if (!there.length && tries) return setTimeout(meet, 20, tries - 1);
    for (const frame of near) if (!frame.isConnected) near.delete(frame);
    for (const frame of there) {
      came(frame);
      watch.observe(frame);
    }
    look();
  }
  addEventListener("pagehide", () => leaving?.abort());

  Object.assign(window.dash_clientside.layerwatch, {
    drawVisible(_values, screen, retry, page) {
      const inputs = window.dash_clientside.callback_context.inputs_list[0].filter(({ id }) => id); // a page may have no controls
      const state = Object.fromEntries(inputs.map(({ id, value }) => [id.state, value]));
      leaving?.abort(); // what was asked before is not wanted any more
      leaving = new AbortController();
      if (page?.built === undefined) return window.dash_clientside.no_update; // no page has been opened yet
      first = now?.built !== page.built;
      if (first) [done, kept].forEach((map) => map.clear());
      due.clear();
      moved = now?.built === page.built && now.state.range !== state.range;
      now = { page: page.page, run: page.run, built: page.built, state, screen, retry };
      if (moved) {
        for (const frame of frames())
          if (frame.offsetParent && !waits(frame)) align(frame);
      }
      meet();
      return window.dash_clientside.no_update;
    },
  });
})();
