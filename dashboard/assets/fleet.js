// The Fleet page: counts that are links to narrower filters, what got worse, the table of runs.
(() => {
  const { layerwatch = (window.layerwatch = {}) } = window;
  const SORTS = [["run", "Run"], ["health", "Health"], ["owner", "Owner"], ["model", "Model"], ["steps", "Steps"], ["val", "Val"], ["gap", "Gap"], ["drift", "Largest drift"], ["age", "Age"]];
  const NUMBERS = new Set(["steps", "val", "gap"]);
  const LARGEST = new Set(["health", "steps", "gap", "drift", "age"]); // the worst, the largest, the newest first
  const write = (key, value) => window.dash_clientside.set_props({ state: key }, { value });
  const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;

  const make = (tag, className, ...parts) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...parts.filter((part) => part !== null && part !== ""));
    return element;
  };
  // A sentence says "ago", a column does not.
  const tick = (element) => {
    const moment = "moment" in element.dataset ? Number(element.dataset.moment) : null;
    element.textContent = (element.className ? layerwatch.age : layerwatch.ago)(moment);
  };
  const age = (moment, className = "dim") => {
    const element = make("span", className);
    if (moment !== null) element.dataset.moment = moment;
    tick(element);
    return element;
  };
  const badge = (health) => make("span", `badge ${health}`, health);

  // A link to the page with another filter; a plain click changes the filter in place.
  function narrowing(className, next, chosen, ...parts) {
    const link = make("a", className, ...parts);
    const params = new URLSearchParams(location.search);
    next ? params.set("filter", next) : params.delete("filter");
    link.setAttribute("href", `${layerwatch.base}/fleet${params.size ? `?${params}` : ""}`);
    link.dataset.filter = next;
    if (chosen) link.setAttribute("aria-current", "true");
    return link;
  }
  addEventListener("click", (event) => {
    const link = event.target.closest?.("a[data-filter]");
    if (!link || event.button !== 0 || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    write("filter", link.dataset.filter);
  });

  // ---- the parts of the page

  function scan({ scanned, before, newer }) {
    const parts = [make("span", "", "Scanned ", age(scanned, ""))];
    parts.push(before === null ? make("span", "", "the first scan") : make("span", "", "compared with the scan of ", age(before, "")));
    if (newer) parts.push(make("span", "fleet-newer", `${count(newer, "run")} ${newer === 1 ? "is" : "are"} newer than the scan`));
    return parts;
  }

  function health({ facets, states, fits }) {
    const bar = make("div", "fleet-bar");
    bar.setAttribute("aria-hidden", "true");
    const tiles = make("div", "kpis");
    const share = (number) => (fits && number ? `${Math.max((100 * number) / all, 0.1).toFixed(number / all < 0.1 ? 1 : 0)} %` : "");
    const all = facets.health.reduce((sum, { count }) => sum + count, 0);
    for (const { value, count: number, chosen, next } of facets.health) {
      const part = make("i", value);
      part.style.flexGrow = number;
      if (number) bar.append(part);
      tiles.append(tile(value, number, share(number), chosen, next, number ? value : ""));
    }
    const words = { live: "training now", new: "not in the scan before", copy: "of other runs" };
    const labels = { live: "live", new: "new", copy: "copies" };
    for (const [key, { count: number, chosen, next }] of Object.entries(states))
      if (number || chosen) tiles.append(tile(labels[key], number, words[key], chosen, next, ""));
    return [bar, tiles];
  }
  function tile(label, number, note, chosen, next, tone) {
    return narrowing(
      `kpi fleet-tile ${tone}${chosen ? " chosen" : ""}`, next, chosen,
      make("div", "kpi-label", label), make("div", "kpi-value", number.toLocaleString("en")), make("div", "kpi-note", note),
    );
  }

  function facet(values, empty) {
    if (!values.some(({ value }) => value !== "none")) return [make("p", "dim", empty)];
    const most = Math.max(...values.map(({ count }) => count), 1);
    return values.map(({ value, word, count: number, chosen, next }) => {
      const bar = make("i", "");
      bar.style.width = `${(100 * number) / most}%`;
      const name = make("span", value === "none" ? "fleet-value dim" : "fleet-value", value === "none" ? "none" : word);
      name.title = word;
      return narrowing(`fleet-count${chosen ? " chosen" : ""}`, next, chosen, bar, name, make("b", "", number.toLocaleString("en")));
    });
  }

  function news({ first, total, runs }) {
    if (first) {
      const about = "This is the first scan: there is nothing to compare with yet. What gets worse until the next one is listed here.";
      return [make("p", "dim", about)];
    }
    if (!total) return [make("p", "fleet-well", "Nothing got worse.")];
    const lines = runs.map((run) => {
      const was = run.before === null ? "new run" : run.before === run.health ? "new alarm" : `was ${run.before}`;
      const what = make("span", "fleet-alarms", run.alarms.join(", "));
      what.title = run.alarms.join(", ");
      return make("div", "fleet-news-line", badge(run.health), open(run.run), what, make("span", "dim", was), make("span", "dim", run.owner), age(run.when));
    });
    if (total > runs.length) lines.push(make("p", "dim", `and ${count(total - runs.length, "other")}`));
    return lines;
  }
  function open(run) {
    const link = make("a", "run-link", run);
    link.setAttribute("href", `${layerwatch.base}/run/${run.split("/").map(encodeURIComponent).join("/")}/overview`);
    link.title = run;
    return link;
  }

  function table({ rows, sort }) {
    if (!rows.length) return [make("p", "dim", "No run fits the filter. "), narrowing("", "", false, "Show all runs")];
    const head = make("tr", "");
    for (const [key, word] of SORTS) {
      const on = sort.replace(/^-/, "") === key;
      const down = LARGEST.has(key) !== sort.startsWith("-");
      const button = make("button", "fleet-sort", word, on ? (down ? " ↓" : " ↑") : "");
      button.dataset.sort = key;
      const cell = make("th", `fleet-${key}${NUMBERS.has(key) ? " figure" : ""}`, button);
      cell.scope = "col";
      if (on) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      head.append(cell);
    }
    const body = make("tbody", "", ...rows.map(line));
    return [make("table", "table fleet-table", make("thead", "", head), body)];
  }
  function line(row) {
    const cell = (key, ...parts) => make("td", `fleet-${key}${NUMBERS.has(key) ? " figure" : ""}`, ...parts);
    const under = make("div", "fleet-under", ...row.tags.map((tag) => make("span", "tag", tag)));
    if (row.copy) under.append(make("span", "dim", `copy of ${row.copy}`));
    if (row.note) {
      const note = make("span", "dim fleet-note", row.note);
      note.title = row.note;
      under.append(note);
    }
    const why = make("span", "fleet-why", row.reason.slice(0, 2).join(", ") + (row.reason.length > 2 ? ` +${row.reason.length - 2}` : ""));
    why.title = row.summary || row.reason.join(", ");
    const drifted = cell("drift", make("b", "", row.drift), " ", make("span", "dim fleet-layer", row.layer));
    drifted.title = row.layer;
    const live = row.live ? make("span", "badge live", make("span", "dot"), "live") : age(row.age);
    return make(
      "tr", "",
      cell("run", open(row.run), under.childNodes.length ? under : null),
      cell("health", badge(row.health), why),
      cell("owner", row.owner), cell("model", row.model), cell("steps", row.steps), cell("val", row.val), cell("gap", row.gap),
      drifted,
      cell("age", live),
    );
  }
  addEventListener("click", (event) => {
    const key = event.target.closest?.(".fleet-sort")?.dataset.sort;
    if (key) write("sort", shown.sort === key ? `-${key}` : key);
    if (event.target.closest?.("#fleet-more")) write("rows", String(shown.rows.length + 100));
  });

  function notes(data) {
    const box = document.getElementById("fleet-notes");
    box.classList.toggle("hidden", !data.notes.length);
    return [make("h2", "", "About this scan"), make("ul", "", ...data.notes.map((note) => make("li", "", note)))];
  }

  // ---- drawing: what has not changed stays, and so do its focus and scroll

  let shown = {};
  function fill(id, parts, data) {
    const box = document.getElementById(id);
    const said = JSON.stringify([data, location.search]);
    if (!box || box.dataset.said === said) return;
    const focused = box.contains(document.activeElement) ? document.activeElement : null;
    const place = focused ? [...box.querySelectorAll("a, button")].indexOf(focused) : -1;
    box.replaceChildren(...parts());
    box.dataset.said = said;
    if (place >= 0) box.querySelectorAll("a, button")[place]?.focus();
  }
  function draw(data) {
    const wrong = document.getElementById("filter-wrong");
    if (wrong) wrong.textContent = data.wrong ?? "";
    if (!data.rows) return;
    shown = data;
    fill("fleet-scan", () => scan(data), [data.scanned, data.before, data.newer]);
    fill("fleet-health", () => health(data), [data.facets.health, data.states]);
    fill("fleet-news", () => news(data.news), data.news);
    const { first, total } = data.news;
    document.getElementById("fleet-news-said").textContent = first || !total ? "" : `${count(total, "run")} with a worse health or a new alarm`;
    for (const key of ["problem", "model", "owner", "tag"])
      fill(`fleet-${key}`, () => facet(data.facets[key], document.getElementById(`fleet-${key}`).dataset.empty), data.facets[key]);
    fill("fleet-table", () => table(data), [data.rows, data.sort]);
    fill("fleet-notes", () => notes(data), data.notes);
    document.getElementById("fleet-count").textContent = data.fits === data.total ? "" : `${data.fits.toLocaleString("en")} of ${count(data.total, "run")}`;
    const more = document.getElementById("fleet-more");
    more.classList.toggle("hidden", data.rows.length >= data.fits);
    more.textContent = `Show more: ${data.rows.length.toLocaleString("en")} of ${data.fits.toLocaleString("en")}`;
  }
  layerwatch.firstFleet = draw;
  setInterval(() => {
    if (document.hidden) return;
    for (const element of document.querySelectorAll("[data-moment]")) tick(element);
  }, 30000);

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.fleet = {
    draw(data) {
      if (data && document.getElementById("fleet-table")) draw(data);
      return window.dash_clientside.no_update;
    },
  };
})();
