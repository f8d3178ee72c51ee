// Asks whether the run has grown. One request at a time; the next one waits until the page has drawn the last news;
// silent while the tab is hidden or paused; asks less often while nothing happens.
(() => {
  const FAST = 1000, SLOW = 15000;
  let seen = {}, paused = false, wait = FAST, timer = null, drawing = 0;

  // Callbacks in flight. A new pulse would make Dash drop their answers, and the page would never change.
  const plain = window.fetch;
  window.fetch = function (resource, ...rest) {
    const url = typeof resource === "string" ? resource : resource.url;
    if (!url.includes("_dash-update-component")) return plain.call(this, resource, ...rest);
    drawing += 1;
    return plain.call(this, resource, ...rest).finally(() => (drawing -= 1));
  };

  const page = () => window.dash_component_api?.getLayout?.("page")?.props.data ?? {};

  async function ask() {
    timer = null;
    if (document.hidden || paused) return;
    const { built, run, cursor, said } = page();
    if (drawing || built === undefined) return again(250);
    if (built !== seen.built) seen = { built, cursor, said };
    const began = performance.now();
    try {
      const answer = await plain(`${window.layerwatch.base}/api/live?run=${encodeURIComponent(run)}`, { cache: "no-store" });
      if (!answer.ok) return again(SLOW);
      const now = await answer.json();
      if (page().built !== built) return again(250); // the reader has gone on to another page
      label(now.live);
      const news = now.cursor !== seen.cursor || now.said !== seen.said;
      if (now.cursor !== seen.cursor) window.dash_clientside.set_props("pulse", { data: now.cursor });
      if (now.said !== seen.said) window.dash_clientside.set_props("verdict", { data: now.said });
      seen = { built, cursor: now.cursor, said: now.said };
      wait = news ? FAST : Math.min(wait * 1.4, now.live ? 3000 : SLOW);
      again(Math.max(wait, 5 * (performance.now() - began)));
    } catch {
      label(false, "Server gone");
      again(SLOW);
    }
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
