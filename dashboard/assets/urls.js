// Navigation without reloading, and the state of the controls in the address.
(() => {
  const { layerwatch } = window;
  const no = () => window.dash_clientside.no_update;
  const slugs = ["overview", "gradient-flow", "layer", "drift", "overfitting", "compare", "alerts"];
  let count = 0;

  const here = () => ({ path: location.pathname, search: location.search, count: ++count });

  // The navigation follows at once; a click that comes before the server's answer must not open the previous run.
  function lead(path) {
    const [, run, page] = path.match(/^\/run\/(.+)\/([a-z-]+)$/) ?? [];
    if (!slugs.includes(page)) return;
    for (const link of document.querySelectorAll(".nav-link")) {
      const slug = link.getAttribute("href").split("/").pop();
      if (slugs.includes(slug)) link.setAttribute("href", `/run/${run}/${slug}`);
      link.classList.toggle("active", slug === page);
    }
  }

  function go(href) {
    history.pushState({}, "", href);
    lead(location.pathname);
    window.dash_clientside.set_props("url", { data: here() });
    scrollTo(0, 0);
  }
  layerwatch.go = go;

  // Every plain link to one of our pages opens in place; with a modifier key the browser does what it always does.
  addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href]");
    if (!link || event.defaultPrevented || event.button !== 0) return;
    if (event.metaKey || event.ctrlKey || event.shiftKey || event.altKey || link.target) return;
    if (link.origin !== location.origin || !(link.pathname === "/" || link.pathname.startsWith("/run/"))) return;
    event.preventDefault();
    go(link.getAttribute("href"));
  });
  addEventListener("popstate", () => {
    const theme = new URLSearchParams(location.search).get("theme");
    if (theme) layerwatch.screen.theme = theme;
    window.dash_clientside.set_props("url", { data: here() });
  });

  addEventListener("click", async (event) => {
    const button = event.target.closest?.("#copy-link");
    if (!button) return;
    try {
      await navigator.clipboard.writeText(location.href);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Copy the address bar";
    }
    setTimeout(() => (button.textContent = "Copy link"), 1500);
  });

  const runPath = (name) => name.split("/").map(encodeURIComponent).join("/");
  Object.assign(window.dash_clientside.layerwatch, {
    locate: () => here(),

    // What differs from the defaults goes into the address; the history gets no entry for it.
    writeState(values, screen, page) {
      if (!page || !page.defaults) return no();
      const params = new URLSearchParams();
      const inputs = window.dash_clientside.callback_context.inputs_list[0];
      for (const { id, value } of inputs) {
        const empty = value === null || value === undefined || value === "";
        if (!empty && String(value) !== String(page.defaults[id.state] ?? "")) params.set(id.state, value);
      }
      if (screen.theme !== layerwatch.preferred()) params.set("theme", screen.theme);
      const search = params.size ? `?${params.toString().replaceAll("%2F", "/").replaceAll("%3A", ":")}` : "";
      history.replaceState(history.state, "", location.pathname + search + location.hash);
      return search;
    },

    // Fires also when the navigation is built; `nav` is the run that it was built for.
    switchRun(name, page) {
      if (!name || name === page?.nav) return no();
      go(`/run/${runPath(name)}/${slugs.includes(page?.page) ? page.page : "overview"}`);
      return no();
    },

    openLayer(click, page) {
      const name = click?.points?.[0]?.y;
      if (typeof name !== "string") return no();
      go(`/run/${runPath(page.run)}/layer?tensor=${encodeURIComponent(name).replaceAll("%2F", "/")}`);
      return no();
    },

    // relayoutData also fires when a plot is resized: only a drag, a pan or a double-click counts.
    zoomed(...events) {
      const { triggered } = window.dash_clientside.callback_context;
      const event = triggered?.[0]?.value;
      if (!event) return no();
      const low = event["xaxis.range[0]"] ?? event["xaxis.range"]?.[0];
      const high = event["xaxis.range[1]"] ?? event["xaxis.range"]?.[1];
      if (low !== undefined && high !== undefined) return `${Math.round(low)}:${Math.max(Math.round(high), Math.round(low) + 1)}`;
      return event["xaxis.autorange"] ? "" : no();
    },
  });
})();
