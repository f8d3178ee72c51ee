// Keys of the whole page; the list of them is in palette.js.
(() => {
  const id = { state: "tensor" }, TOGETHER = 1200;
  let led = -Infinity; // when g was pressed

  // The layer so many places further on; undefined at the ends of the list and on other pages.
  function neighbour(by) {
    const select = window.layerwatch.props(id);
    const names = (select?.data ?? []).flatMap((entry) => (entry.items ? entry.items : [entry]));
    const values = names.map((entry) => (typeof entry === "string" ? entry : entry.value));
    return values[values.indexOf(select?.value) + by];
  }
  window.layerwatch = Object.assign(window.layerwatch || {}, { neighbour });
  function move(by) {
    const value = neighbour(by);
    if (value !== undefined) window.dash_clientside.set_props(id, { value });
  }
  const click = (selector) => document.querySelector(selector)?.click();
  const jobs = {
    j: () => move(1),
    k: () => move(-1),
    t: () => click("#theme-button"),
    p: () => click("#live-button"),
    0: () => window.layerwatch.state.range && click("#range-chip"),
    "/": () => window.layerwatch.palette(),
    "?": () => window.layerwatch.help(),
  };

  addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && !event.altKey && !event.shiftKey && event.key.toLowerCase() === "k") {
      event.preventDefault();
      return window.layerwatch.palette();
    }
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (event.target.closest?.("input, textarea, select, [contenteditable], [role='combobox'], dialog")) return;
    // When it was pressed: a busy page hears of it later.
    const page = event.timeStamp - led < TOGETHER && window.layerwatch.pageKeys[event.key];
    led = event.key === "g" && !page ? performance.now() : -Infinity;
    if (!page && !Object.hasOwn(jobs, event.key)) return;
    event.preventDefault();
    if (page) click(`.nav-${page}`);
    else jobs[event.key]();
  });
  addEventListener("click", (event) => {
    if (event.target.closest?.("#layer-next")) move(1);
    if (event.target.closest?.("#layer-previous")) move(-1);
  });
})();
