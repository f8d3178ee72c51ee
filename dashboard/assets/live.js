// Asks whether the run has grown. One request at a time; the next one waits until the page has drawn the last news;
// silent while the tab is hidden or paused; asks less often while nothing happens.
(() => {
  const FAST = 1000, SLOW = 15000;
  let built = null, paused = false, wait = FAST, timer = null, drawing = 0;

  // Callbacks in flight. A new pulse would make Dash drop their answers, and the page would never change.
  const plain = window.fetch;
  window.fetch = function (resource, ...rest) {
    const url = typeof resource === "string" ? resource : resource.url;
    if (!url.includes("_dash-update-component")) return plain.call(this, resource, ...rest);
    drawing += 1;
    return plain.call(this, resource, ...rest).finally(() => (drawing -= 1));
  };

  function selected() {
    const found = location.pathname.match(/^\/run\/(.+?)(?:\/(?:overview|gradient-flow|layer|drift|overfitting|compare|alerts))?\/?$/);
    return found ? decodeURIComponent(found[1]) : "";
  }

  async function ask() {
    timer = null;
    if (document.hidden || paused) return;
    if (drawing) return again(250);
    const began = performance.now(), name = selected();
    try {
      const answer = await plain(`/api/live?run=${encodeURIComponent(name)}`, { cache: "no-store" });
      if (!answer.ok) return again(SLOW);
      const { cursor, live } = await answer.json();
      label(live);
      const news = cursor !== shown();
      if (news) window.dash_clientside.set_props("pulse", { data: cursor });
      const cost = performance.now() - began;
      wait = news ? FAST : Math.min(wait * 1.4, live ? 3000 : SLOW);
      again(Math.max(wait, 5 * cost));
    } catch {
      label(false, "Server gone");
      again(SLOW);
    }
  }
  // What is on screen: the last pulse, or what the page was built from when it is newer than that.
  function shown() {
    const page = window.dash_component_api.getLayout("page")?.props.data;
    if (page.built !== built) {
      built = page.built;
      return page.cursor;
    }
    return window.dash_component_api.getLayout("pulse")?.props.data || page.cursor;
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
