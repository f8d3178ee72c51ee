// The table of runs: its cells, what a link says of it, pins, and the choice of runs to compare.
(() => {
  const functions = (window.dashAgGridFunctions = window.dashAgGridFunctions || {});
  const components = (window.dashAgGridComponentFunctions = window.dashAgGridComponentFunctions || {});
  // Cells are React's, and plain elements as long as React is not there: see first.js.
  const element = (...parts) => (window.React ? React.createElement(...parts) : plain(...parts));
  function plain(tag, props, ...children) {
    const { className, style, key: _, ...attributes } = props ?? {};
    const made = Object.assign(document.createElement(tag), className ? { className } : {});
    Object.assign(made.style, style);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children.filter((child) => child || child === 0));
    return made;
  }
  const MOST = 8, REMEMBERED = "layerwatch_pins";

  functions.layerwatchGridTheme = (theme) =>
    theme.withParams({
      fontFamily: "inherit",
      fontSize: 13,
      headerFontWeight: 600,
      cellHorizontalPadding: layerwatch.screen.narrow ? 6 : 10,
      backgroundColor: "var(--card)",
      foregroundColor: "var(--text)",
      headerBackgroundColor: "var(--card)",
      headerTextColor: "var(--dim)",
      borderColor: "var(--border)",
      rowHoverColor: "var(--hover)",
      selectedRowBackgroundColor: "var(--accent-soft)",
      accentColor: "var(--accent)",
      wrapperBorder: false,
      columnBorder: false,
      headerColumnResizeHandleColor: "transparent",
    });

  // Runs without a number stay at the end, whichever way is sorted.
  functions.layerwatchNumbers = (one, two, _a, _b, descending) => {
    const [none, other] = [one ?? null, two ?? null].map((value) => value === null);
    if (none || other) return none && other ? 0 : none !== descending ? 1 : -1;
    return one - two;
  };
  functions.layerwatchSetting = (value) => (value === undefined ? "" : value === null ? "–" : String(value));
  functions.layerwatchPinsFirst = ({ nodes }) => {
    const pinned = pins();
    const place = (node) => (pinned.has(node.data.run) ? 0 : 1);
    nodes.splice(0, nodes.length, ...[...nodes].sort((a, b) => place(a) - place(b)));
  };

  let fitting = null; // the runs that fit the filter; null: all
  functions.layerwatchFiltered = () => fitting !== null;
  functions.layerwatchFits = ({ data }) => fitting.has(data.run);

  // ---- cells

  const path = (run) => `${window.layerwatch.base}/run/${run.split("/").map(encodeURIComponent).join("/")}`;
  const chips = (tags) => tags.map((tag) => element("span", { className: "tag", key: tag }, tag));
  components.RunLink = ({ data }) => {
    const link = element("a", { href: `${path(data.run)}/overview`, className: "run-link", title: data.run }, data.run);
    const note = data.note && element("span", { className: "dim fleet-note", title: data.note }, data.note);
    const under = data.tags.length || note ? element("span", { className: "fleet-under" }, ...chips(data.tags), note) : null;
    return element("span", { className: "run-cell" }, link, under);
  };
  components.Health = ({ data }) => element("span", { className: `badge ${data.health}` }, data.health);
  components.Star = ({ data }) => {
    const on = pins().has(data.run);
    const name = `${on ? "Unpin" : "Pin"} ${data.run}`;
    return element(
      "button",
      { className: on ? "star on" : "star", "aria-pressed": on, "aria-label": name, title: on ? "Unpin" : "Pin to the top", "data-run": data.run },
      on ? "★" : "☆",
    );
  };
  components.Progress = ({ data }) =>
    element(
      "span",
      { className: "progress" },
      data.texts.step,
      data.done === null ? null : element("i", { style: { width: `${100 * data.done}%` } }),
    );
  const { layerwatch = (window.layerwatch = {}) } = window;
  const UNITS = [[86400, "d"], [3600, "h"], [60, "min"]];
  function ago(moment) {
    if (moment === null) return "–";
    const seconds = Math.max(Date.now() / 1000 - moment, 0);
    const [size, unit] = UNITS.find(([size]) => seconds >= size) ?? [1, "s"];
    return seconds < 5 ? "just now" : `${Math.floor(seconds / size)} ${unit} ago`;
  }
  layerwatch.ago = ago;
  layerwatch.age = (moment) => ago(moment).replace(" ago", ""); // in a column that says Age
  components.Age = ({ data }) =>
    data.live
      ? element("span", { className: "badge live" }, element("span", { className: "dot" }), "live")
      : element("span", { className: "dim" }, layerwatch.age(data.updated));
  components.Drift = ({ data }) =>
    element(
      "span",
      { className: "drift-cell", title: data.layer },
      element("b", null, data.texts.drift),
      element("span", { className: "dim" }, element("bdi", { dir: "ltr" }, data.layer)),
    );
  components.Tags = ({ data }) => element("span", { className: "tags" }, ...chips(data.tags));

  const mantine = (window.dashMantineFunctions = window.dashMantineFunctions || {});
  mantine.twoDigits = (value) => Number(value).toFixed(2);

  // ---- state: in hidden fields of the page, and so in its address

  let grid = null;
  const field = (key) => window.layerwatch.props({ state: key })?.value ?? "";
  const write = (key, value) => {
    if (String(field(key)) !== value) window.dash_clientside.set_props({ state: key }, { value });
  };
  const split = (text) => String(text).split(",").filter(Boolean).map(decodeURIComponent);
  const remembered = () => localStorage.getItem(REMEMBERED) ?? "";
  const pins = () => new Set(split(window.React ? field("pins") : remembered()));

  function pin(run) {
    const now = pins();
    now.has(run) ? now.delete(run) : now.add(run);
    const text = [...now].map(encodeURIComponent).join(",");
    localStorage.setItem(REMEMBERED, text);
    write("pins", text);
  }

  function count() {
    const said = document.getElementById("runs-count");
    if (!said || !grid) return;
    const [all, shown] = [grid.getGridOption("rowData")?.length ?? 0, grid.getDisplayedRowCount()];
    if (window.layerwatch.props("runs-cursor")?.data === "") return void (said.textContent = "…"); // the others follow
    let total = 0;
    grid.forEachNode(() => (total += 1));
    said.textContent = shown === (total || all) ? `${shown} run${shown === 1 ? "" : "s"}` : `${shown} of ${total} runs`;
  }

  // ---- comparing

  let ticked = [];
  function choose({ api }) {
    const now = api.getSelectedNodes().map((node) => node.data.run);
    const next = [...ticked.filter((run) => now.includes(run)), ...now.filter((run) => !ticked.includes(run))];
    const over = next.splice(MOST);
    const same = String(next) === String(ticked);
    ticked = next;
    for (const run of over) api.getRowNode(run)?.setSelected(false);
    if (over.length || !same) bar(over.length > 0); // nothing new: that was our own unticking
  }
  function bar(refused) {
    const [box, said, link] = ["compare-bar", "compare-said", "compare-link"].map((id) => document.getElementById(id));
    if (!box) return;
    box.classList.toggle("hidden", ticked.length === 0);
    const [first, ...rest] = ticked;
    const few = ticked.length < 2;
    said.textContent = refused
      ? `At most ${MOST} runs can be compared: more curves cannot be told apart.`
      : few ? "Tick one more run to compare." : "";
    link.classList.toggle("hidden", few);
    link.textContent = `Compare ${ticked.length} runs`;
    link.setAttribute("href", few ? "#" : `${path(first)}/compare?with=${rest.map(encodeURIComponent).join(",")}`);
  }
  addEventListener("click", (event) => {
    if (event.target.closest?.("#compare-clear")) grid?.deselectAll();
    const star = event.target.closest?.(".star[data-run]");
    if (star) pin(star.dataset.run);
  });

  // ---- the grid of this page

  function sorted({ api }) {
    const order = api.getColumnState().filter((column) => column.sort).sort((a, b) => a.sortIndex - b.sortIndex);
    write("sort", order.map((column) => `${column.colId}:${column.sort}`).join(","));
  }
  function filtered({ api }) {
    const model = api.getFilterModel();
    write("where", Object.keys(model).length ? JSON.stringify(model) : "");
    count();
  }
  function pressed({ event, colDef, data, api, node }) {
    if (event.key === "Enter" && colDef.field === "run") window.layerwatch.go(`${path(data.run)}/overview`);
    if (event.key === "Enter" && colDef.colId === "pin") pin(data.run);
    if (event.key === "p" && !event.ctrlKey && !event.metaKey) pin(data.run);
    if (event.key === "Enter") api.setFocusedCell(node.rowIndex, colDef.colId ?? colDef.field);
  }

  function opened(api) {
    grid = api;
    ticked = [];
    for (const [name, then] of Object.entries({
      sortChanged: sorted,
      filterChanged: filtered,
      selectionChanged: choose,
      cellKeyDown: pressed,
      modelUpdated: count,
    })) api.addEventListener(name, then);
    try {
      const model = JSON.parse(field("where") || "null");
      if (model) api.setFilterModel(model);
    } catch {
      write("where", ""); // a link that somebody has edited
    }
    if (!field("pins")) write("pins", remembered());
    count();
  }

  // Brings pinned runs to the top; the focus stays with its run.
  function pinned(api) {
    const cell = api.getFocusedCell();
    const node = cell && api.getDisplayedRowAtIndex(cell.rowIndex);
    api.refreshClientSideRowModel("sort");
    api.refreshCells({ columns: ["pin"], force: true });
    if (node && node.rowIndex !== cell.rowIndex) api.setFocusedCell(node.rowIndex, cell.column);
  }

  let asked = 0;
  async function current() {
    const mine = ++asked;
    const api = await window.dash_ag_grid.getApiAsync("runs-grid");
    if (mine === asked && api && api !== grid && !api.isDestroyed()) opened(api);
    return api;
  }

  // Ages grow while nobody looks; only that column is drawn again.
  setInterval(() => {
    if (!document.hidden && grid && !grid.isDestroyed()) grid.refreshCells({ columns: ["updated"], force: true });
  }, 30000);

  // The first rows, before the grid is there: a table that looks like it.
  layerwatch.firstRuns = ({ columns, rows, height }, { runs }) => {
    const box = document.getElementById("first-grid");
    const fits = runs && new Set(runs), pinned = pins();
    const shown = rows.filter(({ run }) => !fits || fits.has(run)).sort((a, b) => pinned.has(b.run) - pinned.has(a.run));
    const ticks = { colId: "ticks", width: 40 };
    const all = [ticks, ...columns];
    const cell = (column, data) => {
      const value = data[column.field];
      const inside = column.cellRenderer ? components[column.cellRenderer]({ data }) : data.texts[column.field] ?? functions.layerwatchSetting(value);
      const className = [column.cellClass, column.type && "figure"].filter(Boolean).join(" ");
      return element("td", { className }, column === ticks ? element("i", null) : inside);
    };
    const cols = all.map(({ width }) => element("col", { style: width ? { width: `${width}px` } : {} }));
    const heads = all.map(({ headerName, headerClass, type }) => element("th", { className: type ? "figure" : "" }, headerClass || !headerName ? "" : headerName));
    const body = element("tbody", null, ...shown.map((data) => element("tr", null, ...all.map((column) => cell(column, data)))));
    box.append(element("table", { className: "first-table" }, element("colgroup", null, ...cols), element("thead", null, element("tr", null, ...heads)), body));
    if (height) box.style.height = height;
  };

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.runs = {
    // What is written in the controls becomes what the table shows.
    show(_id, columns) {
      current().then((api) => {
        if (!api || api.isDestroyed()) return;
        const wanted = new Set(["pin", "run", ...(Array.isArray(columns) ? columns : split(columns ?? ""))]);
        for (const column of api.getColumns()) {
          const id = column.getColId();
          if (id.startsWith("ag-Grid-") || column.isVisible() === wanted.has(id)) continue;
          api.setColumnsVisible([id], wanted.has(id));
        }
        pinned(api);
      });
      return window.dash_clientside.no_update;
    },

    // Which runs fit the filter, as the server says; of one that it does not understand it says why.
    fit(data) {
      const wrong = document.getElementById("filter-wrong");
      if (!data || !wrong || !document.getElementById("runs-card")) return window.dash_clientside.no_update;
      wrong.textContent = data.wrong;
      if (!data.wrong) fitting = data.runs && new Set(data.runs);
      current().then((api) => {
        if (api && !api.isDestroyed()) api.onFilterChanged();
        count();
      });
      return window.dash_clientside.no_update;
    },

    // Only the rows that changed: scroll, focus and ticks stay.
    apply({ rows, gone, cursor, all }) {
      if (rows) {
        current().then((api) => {
          const [add, update] = [rows.filter((row) => !api.getRowNode(row.run)), rows.filter((row) => api.getRowNode(row.run))];
          const remove = gone.filter((run) => api.getRowNode(run)).map((run) => ({ run }));
          if (add.length + update.length + remove.length === 0) return;
          api.applyTransaction(all ? { add, update, remove } : { add, update, remove, addIndex: 0 }); // newest first
          const cells = update.map((row) => api.getRowNode(row.run));
          // Cells that show more than their value; never the boxes, which somebody may be about to tick.
          if (cells.length) api.refreshCells({ rowNodes: cells, columns: ["run", "step", "updated", "drift", "rank"], force: true });
          document.getElementById("runs-card")?.classList.remove("hidden");
          document.getElementById("runs-empty")?.classList.add("hidden");
          count();
        });
      }
      return cursor;
    },
  };
})();
