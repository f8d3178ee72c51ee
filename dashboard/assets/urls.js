// Navigation without reloading, and the state of the controls in the address.
(() => {
  const { layerwatch } = window;
  const { base } = layerwatch;
  const no = () => window.dash_clientside.no_update;
  const slugs = ["overview", "gradient-flow", "layer", "drift", "overfitting", "compare", "alerts"];
  let count = 0;

  const inside = (path) => (path.startsWith(`${base}/`) ? path.slice(base.length) : "/");
  const here = () => ({ path: inside(location.pathname), search: location.search, count: ++count });

  // The navigation follows at once; a click that comes before the server's answer must not open the previous run.
  function lead(path) {
    const [, run, page] = inside(path).match(/^\/run\/(.+)\/([a-z-]+)$/) ?? [];
    if (!slugs.includes(page)) return;
    for (const link of document.querySelectorAll(".nav-link")) {
      const slug = link.getAttribute("href").split("/").pop();
      if (slugs.includes(slug)) link.setAttribute("href", `${base}/run/${run}/${slug}`);
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
    if (!link || link.hash || event.defaultPrevented || event.button !== 0) return;
    if (event.metaKey || event.ctrlKey || event.shiftKey || event.altKey || link.target) return;
    const path = link.pathname.startsWith(`${base}/`) ? inside(link.pathname) : "";
    if (link.origin !== location.origin || !(path === "/" || path.startsWith("/run/"))) return;
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

  function showRange(range) {
    const chip = document.getElementById("range-chip");
    if (!chip) return;
    chip.classList.toggle("hidden", !range);
    const [low, high] = (range || "").split(":").map((step) => Number(step).toLocaleString("en"));
    chip.textContent = range ? `Steps ${low} – ${high} ✕` : "";
  }
  addEventListener("click", (event) => {
    const chip = event.target.closest?.("#range-chip");
    if (chip) window.dash_clientside.set_props({ state: "range" }, { value: "" });
  });

  // Draw again what failed.
  let wishes = 0;
  addEventListener("click", (event) => {
    if (event.target.closest?.(".retry")) window.dash_clientside.set_props("retry", { data: ++wishes });
  });

  // A menu closes when the reader has chosen, looks elsewhere or presses Escape.
  const closeMenus = (except) => {
    for (const menu of document.querySelectorAll("details.menu[open]")) if (menu !== except) menu.open = false;
  };
  addEventListener("click", (event) => {
    closeMenus(event.target.closest?.(".menu-item") ? null : event.target.closest?.("details.menu"));
  });
  addEventListener("keydown", (event) => event.key === "Escape" && closeMenus(null));

  const runPath = (name) => name.split("/").map(encodeURIComponent).join("/");
  Object.assign(window.dash_clientside.layerwatch, {
    locate: () => here(),

    // What differs from the defaults goes into the address; the history gets no entry for it.
    writeState(values, screen, page) {
      if (!page || !page.defaults) return no();
      const params = new URLSearchParams();
      const inputs = window.dash_clientside.callback_context.inputs_list[0];
      layerwatch.state = Object.fromEntries(inputs.map(({ id, value }) => [id.state, value ?? ""]));
      showRange(layerwatch.state.range);
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
      go(`${base}/run/${runPath(name)}/${slugs.includes(page?.page) ? page.page : "overview"}`);
      return no();
    },

    openLayer(click, page) {
      const name = click?.points?.[0]?.y;
      if (typeof name !== "string") return no();
      go(`${base}/run/${runPath(page.run)}/layer?tensor=${encodeURIComponent(name).replaceAll("%2F", "/")}`);
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
