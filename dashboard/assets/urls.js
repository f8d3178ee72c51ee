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

  // The table of runs needs scripts that the other pages are spared.
  const elsewhere = (path) => inside(path) === "/" && !window.dash_ag_grid;

  function go(href) {
    if (elsewhere(new URL(href, location).pathname)) return location.assign(href);
    history.pushState({}, "", href);
    shownPath = null; // until the server has answered, nothing of this address is on screen
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
    if (link.origin !== location.origin || !/^\/($|fleet$|run\/|problems($|\/))/.test(path)) return;
    event.preventDefault();
    go(link.matches(".nav-link") ? along(link.getAttribute("href")) : link.getAttribute("href"));
  });
  // Back and forward within a page move its controls; the plots stay. Everything else opens the page anew.
  let restoring = null;
  addEventListener("popstate", () => {
    if (elsewhere(location.pathname)) return location.reload();
    const params = new URLSearchParams(location.search), theme = params.get("theme");
    if (theme) layerwatch.screen.theme = theme;
    const page = layerwatch.props("page")?.data ?? {};
    const keys = Object.keys(layerwatch.state);
    const known = [...params.keys()].every((key) => key === "theme" || keys.includes(key));
    if (location.pathname !== shownPath || !keys.length || !known) return window.dash_clientside.set_props("url", { data: here() });
    restoring = location.search;
    setTimeout(() => (restoring = null), 1500);
    for (const key of keys) {
      const now = layerwatch.state[key], old = params.get(key) ?? page.defaults[key] ?? "";
      const value = typeof now === "number" ? Number(old) : old;
      if (String(now) !== String(old)) window.dash_clientside.set_props({ state: key }, { value });
    }
  });

  // The history gets an entry for a zoom, so that going back undoes it, and none for the other controls.
  let shownPath = null, shownRange = "";
  function record(search) {
    const range = layerwatch.state.range ?? "", zoomed = location.pathname === shownPath && range !== shownRange;
    [shownPath, shownRange] = [location.pathname, range];
    if (restoring === search) restoring = null;
    else if (restoring === null && search !== location.search) {
      history[zoomed ? "pushState" : "replaceState"](history.state, "", location.pathname + search + location.hash);
    }
  }

  // Choices that go along through the navigation: those about the reader's eye everywhere, the others within a run.
  const sticky = {};
  const ANYWHERE = ["axis", "smoothing"], WITHIN = ["range", "tensor"];
  function along(href) {
    const url = new URL(href, location.href);
    const run = inside(url.pathname).match(/^\/run\/(.+)\/[a-z-]+$/)?.[1];
    if (run === undefined) return href;
    for (const key of run === runPath(sticky.run ?? "") ? [...ANYWHERE, ...WITHIN] : ANYWHERE) {
      const value = sticky[key];
      const plain = { axis: "step", smoothing: 0 }[key] ?? "";
      if (value !== undefined && String(value) !== String(plain) && !url.searchParams.has(key)) url.searchParams.set(key, value);
    }
    return url.pathname + url.search.replaceAll("%2F", "/").replaceAll("%3A", ":") + url.hash;
  }
  layerwatch.along = along;

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

  // While the server makes the page; Dash itself would wait until the first plot is on it.
  let read = false;
  function readPlotly() {
    const early = document.querySelector("#plotly[rel=preload]");
    if (!early || read || window.Plotly) return;
    read = true;
    document.head.append(Object.assign(document.createElement("script"), { src: early.href }));
  }

  // A slow server has not sent the layout yet: the browser warns of what it has loaded early for nothing.
  addEventListener("load", () => setTimeout(readPlotly, 1000));

  const runPath = (name) => name.split("/").map(encodeURIComponent).join("/");
  Object.assign(window.dash_clientside.layerwatch, {
    // The page of this address may have come with the layout.
    locate(_id, page) {
      setTimeout(readPlotly);
      if (page?.at === inside(location.pathname) + location.search) return no();
      return here();
    },

    // What differs from the defaults goes into the address; see record.
    writeState(values, screen, page) {
      if (!page || !page.defaults) return no();
      const params = new URLSearchParams();
      const inputs = window.dash_clientside.callback_context.inputs_list[0].filter(({ id }) => id); // a page may have no controls
      layerwatch.state = Object.fromEntries(inputs.map(({ id, value }) => [id.state, value ?? ""]));
      showRange(layerwatch.state.range);
      for (const { id, value } of inputs) {
        const empty = value === null || value === undefined || value === "";
        if (!empty && String(value) !== String(page.defaults[id.state] ?? "")) params.set(id.state, value);
      }
      if (screen.theme !== layerwatch.preferred()) params.set("theme", screen.theme);
      if (sticky.run !== page.run) for (const key of WITHIN) delete sticky[key];
      Object.assign(sticky, layerwatch.state, { run: page.run });
      const search = params.size ? `?${params.toString().replaceAll("%2F", "/").replaceAll("%3A", ":")}` : "";
      record(search);
      return search;
    },

    // Fires also when the navigation is built; `nav` is the run that it was built for.
    switchRun(name, page) {
      if (!name || name === page?.nav) return no();
      go(along(`${base}/run/${runPath(name)}/${slugs.includes(page?.page) ? page.page : "overview"}`));
      return no();
    },

    openLayer(click, page) {
      const name = click?.points?.[0]?.y;
      if (typeof name !== "string") return no();
      go(`${base}/run/${runPath(page.run)}/layer?tensor=${encodeURIComponent(name).replaceAll("%2F", "/")}`);
      return no();
    },
  });
})();
