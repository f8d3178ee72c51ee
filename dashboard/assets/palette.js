// Search (Ctrl+K or /) over pages, runs, layers, findings and actions, and the list of keys (?).
(() => {
  const SHOWN = 60;
  const { layerwatch } = window;
  const pages = [
    ["overview", "Overview", "o"], ["gradient-flow", "Gradient flow", "f"], ["layer", "Layer", "l"], ["drift", "Drift", "d"],
    ["overfitting", "Overfitting", "v"], ["compare", "Compare", "c"], ["alerts", "Alerts", "a"], ["runs", "Runs", "r"], ["fleet", "Fleet", "e"],
  ];
  const keys = [
    ["Ctrl K  or  /", "search pages, runs, layers, findings, actions"], ["?", "this list"],
    ...pages.map(([, word, key]) => [`g ${key}`, `page ${word}`]),
    ["j  k", "next and previous layer"], ["t", "dark or light"], ["p", "pause or resume live updates"], ["0", "back to the whole run"],
  ];
  let dialog, input, list, items = [], found = [], at = 0, known = {};

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const page = () => window.layerwatch.props("page")?.data ?? {};
  const click = (selector) => document.querySelector(selector)?.click();
  const runPath = (name) => name.split("/").map(encodeURIComponent).join("/");
  const open = (run, slug, search = "") => layerwatch.go(layerwatch.along(`${layerwatch.base}/run/${runPath(run)}/${slug}${search}`));
  const tensor = (name) => `?tensor=${encodeURIComponent(name).replaceAll("%2F", "/")}`;

  function actions() {
    const some = [
      ["Dark or light", "t", () => click("#theme-button")],
      ["Pause or resume live updates", "p", () => click("#live-button")],
      ["Copy link to this view", "", () => click("#copy-link")],
      ["Keys", "?", () => help()],
    ];
    if (layerwatch.state.range) some.push(["Back to the whole run", "0", () => click("#range-chip")]);
    for (const button of document.querySelectorAll("#body .menu-button[data-plot]")) {
      if (!button.offsetParent) continue;
      const title = button.closest(".card")?.querySelector("h2")?.textContent ?? button.dataset.plot;
      for (const [format, word] of layerwatch.files)
        some.push([`Download ${title}: ${word}`, "", () => layerwatch.download(button.dataset.plot, format)]);
    }
    return some.map(([text, hint, go]) => ({ kind: "Action", text, hint, go }));
  }
  function collect() {
    const { run, nav } = page();
    const of = run || nav;
    const entries = pages.map(([slug, text, key]) => ({ kind: "Page", text, hint: `g ${key}`, go: () => click(`.nav-${slug}`) }));
    for (const { text, severity, step, layers: [layer] } of known.findings ?? []) {
      const where = layer ? `${layer}, ` : "";
      entries.push({
        kind: "Finding", text: `${text}: ${where}step ${step.toLocaleString("en")}`, hint: severity,
        go: () => (layer ? open(of, "layer", tensor(layer)) : open(of, "overview")),
      });
    }
    for (const name of known.layers ?? []) entries.push({ kind: "Layer", text: name, hint: "", go: () => open(of, "layer", tensor(name)) });
    const shown = location.pathname.split("/").pop();
    const slug = pages.some(([one]) => one === shown) ? shown : "overview";
    for (const name of known.runs ?? []) entries.push({ kind: "Run", text: name, hint: name === run ? "open" : "", go: () => open(name, slug) });
    items = [...entries, ...actions()];
    for (const item of items) item.plain = item.text.toLowerCase();
  }

  // Every word of the query must be in the text: as it is, best at the start of a part, else letter by letter.
  function score(text, word) {
    const place = text.indexOf(word);
    if (place >= 0) return place === 0 ? 0 : /[a-z0-9]/.test(text[place - 1]) ? 2 : 1;
    let from = 0, gaps = 0;
    for (const letter of word) {
      const next = text.indexOf(letter, from);
      if (next < 0) return Infinity;
      gaps += next > from && from > 0 ? 1 : 0;
      from = next + 1;
    }
    return 4 + gaps;
  }
  // Runs, layers and findings come a moment after the pages: a line that the reader has gone to stays chosen.
  function search() {
    const chosen = at && found[at];
    const query = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rank = { Page: 0, Action: 0.1, Finding: 0.2, Run: 0.3, Layer: 0.4 };
    found = [];
    for (const item of items) {
      let sum = query.length ? rank[item.kind] + item.plain.length / 1000 : 0;
      for (const word of query) if ((sum += score(item.plain, word)) === Infinity) break;
      if (sum < Infinity) found.push([sum, item]);
    }
    if (query.length) found.sort((one, two) => one[0] - two[0]);
    else found.sort((one, two) => rank[one[1].kind] - rank[two[1].kind]);
    found = found.slice(0, SHOWN).map(([, item]) => item);
    at = Math.max(found.findIndex(({ kind, text }) => kind === chosen?.kind && text === chosen.text), 0);
    show();
  }
  function anew() {
    at = 0;
    search();
  }
  function show() {
    list.replaceChildren(
      ...found.map((item, i) => {
        const line = make("li", "palette-line");
        line.id = `palette-${i}`;
        line.setAttribute("role", "option");
        const text = make("span", "palette-text", item.text);
        text.dir = "auto";
        line.append(make("span", "palette-kind", item.kind), text, make("span", `palette-hint ${item.kind === "Finding" ? item.hint : ""}`, item.hint));
        line.addEventListener("click", () => choose(i));
        return line;
      }),
    );
    if (!found.length) list.append(make("li", "palette-none", "Nothing of that name."));
    mark();
  }
  function mark() {
    [...list.children].forEach((line, i) => line.setAttribute("aria-selected", i === at && found.length > 0));
    if (found.length) input.setAttribute("aria-activedescendant", `palette-${at}`);
    else input.removeAttribute("aria-activedescendant");
    list.children[at]?.scrollIntoView({ block: "nearest" });
  }
  function choose(place) {
    const item = found[place];
    if (!item) return;
    input.blur(); // a hidden field keeps the focus until the next frame, and would take the next key for text
    dialog.close();
    item.go();
  }

  function build() {
    dialog = make("dialog", "palette");
    dialog.setAttribute("aria-label", "Search");
    input = make("input", "palette-input");
    list = make("ul", "palette-list");
    list.id = "palette-list";
    list.setAttribute("role", "listbox");
    list.setAttribute("aria-label", "Results");
    const about = {
      role: "combobox", "aria-expanded": "true", "aria-controls": "palette-list", "aria-autocomplete": "list",
      "aria-label": "Search pages, runs, layers, findings and actions", autocomplete: "off", spellcheck: "false",
      placeholder: "Page, run, layer, finding or action", type: "text",
    };
    for (const [name, value] of Object.entries(about)) input.setAttribute(name, value);
    input.addEventListener("input", anew);
    dialog.addEventListener("keydown", (event) => {
      event.stopPropagation();
      const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 };
      if (event.key in moves) {
        const last = found.length - 1, step = moves[event.key];
        at = Math.abs(step) === 1 ? (at + step + found.length) % Math.max(found.length, 1) : Math.min(Math.max(at + step, 0), Math.max(last, 0));
        mark();
      } else if (event.key === "Enter") choose(at);
      else if ((event.ctrlKey || event.metaKey) && event.key === "k") dialog.close();
      else return;
      event.preventDefault();
    });
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    dialog.append(input, list);
    document.body.append(dialog);
  }
  async function palette() {
    if (!dialog) build();
    if (dialog.open) return;
    input.value = "";
    const run = page().run || page().nav || "";
    if (known.run !== run) known = { run };
    collect();
    dialog.showModal();
    anew();
    try {
      const answer = await fetch(`${layerwatch.base}/api/names?run=${encodeURIComponent(run)}`, { cache: "no-store" });
      if (!answer.ok) return;
      known = { ...(await answer.json()), run };
    } catch {
      return; // pages and actions are there without the server
    }
    collect();
    if (dialog.open) search();
  }
  function help() {
    const box = make("dialog", "palette keys");
    box.setAttribute("aria-label", "Keys");
    const rows = make("dl", "key-list");
    for (const [key, text] of keys) {
      const name = make("dt");
      for (const part of key.split("  ")) name.append(part === "or" ? " or " : make("kbd", "", part), " ");
      rows.append(name, make("dd", "", text));
    }
    const close = make("button", "pill", "Close");
    close.addEventListener("click", () => box.close());
    box.append(make("h2", "", "Keys"), rows, close);
    box.addEventListener("keydown", (event) => event.stopPropagation());
    box.addEventListener("click", (event) => event.target === box && box.close());
    box.addEventListener("close", () => box.remove());
    document.body.append(box);
    box.showModal();
  }
  addEventListener("click", (event) => event.target.closest?.("#palette-button") && palette());
  Object.assign(layerwatch, { palette, help, pageKeys: Object.fromEntries(pages.map(([slug, , key]) => [key, slug])) });
})();
