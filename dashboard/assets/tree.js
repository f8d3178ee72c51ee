// The tree of layers: built here of the dotted names, so that a thousand of them cost one list; and the picked steps.
(() => {
  const { layerwatch } = window;
  const TREE = "layer-rows";
  const few = 60; // rows that are shown without closing any branch
  let built = null, root = null, open = new Set(), chosen = "", marks = {};

  const host = () => document.getElementById(TREE);
  const rank = { critical: 3, warning: 2, info: 1 };

  function grow({ names, hints }) {
    root = { path: "", label: "", children: [], places: new Map(), parent: null };
    names.forEach((name, place) => {
      let node = root;
      for (const [i, part] of name.split(".").entries()) {
        if (!node.places.has(part)) {
          const path = node.path || i ? `${node.path}.${part}` : part;
          const child = { path, label: part, children: [], places: new Map(), parent: node };
          node.places.set(part, child);
          node.children.push(child);
        }
        node = node.places.get(part);
      }
      node.name = name;
      node.hint = hints[place];
    });
    root.children.forEach(join);
    open = new Set();
    const count = (node) => node.children.reduce((sum, child) => sum + count(child), 1);
    if (count(root) <= few) each(root, (node) => open.add(node.path));
  }
  // A branch with a single twig is one row: encoder.layer.
  function join(node) {
    while (node.children.length === 1 && node.name === undefined) {
      const [child] = node.children;
      const { parent, label } = node;
      Object.assign(node, child, { label: `${label}.${child.label}`, parent });
      node.children.forEach((twig) => (twig.parent = node));
    }
    node.children.forEach(join);
  }
  function each(node, visit) {
    visit(node);
    node.children.forEach((child) => each(child, visit));
  }
  function judge(node) {
    node.worst = node.name === undefined ? undefined : marks[node.name];
    for (const child of node.children) {
      judge(child);
      if ((rank[child.worst] ?? 0) > (rank[node.worst] ?? 0)) node.worst = child.worst;
    }
    if ((rank[marks[node.path]] ?? 0) > (rank[node.worst] ?? 0)) node.worst = marks[node.path];
  }

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  function row(node, level, place, size) {
    const item = make("div", "tree-row");
    item.setAttribute("role", "treeitem");
    item.setAttribute("aria-level", level);
    item.setAttribute("aria-posinset", place);
    item.setAttribute("aria-setsize", size);
    item.setAttribute("aria-selected", node.name === chosen);
    if (node.children.length) item.setAttribute("aria-expanded", open.has(node.path));
    item.tabIndex = -1;
    item.style.setProperty("--depth", level - 1);
    item.node = node;
    const twist = make("span", "tree-twist", node.children.length ? "›" : "");
    twist.setAttribute("aria-hidden", "true");
    const label = make("span", node.name === undefined ? "tree-label dim" : "tree-label", node.label);
    label.dir = "auto";
    label.title = node.path;
    item.append(twist, label);
    if (node.worst) {
      const mark = make("span", `tree-mark ${node.worst}`);
      mark.append(make("span", "unseen", `, ${node.worst} finding`));
      item.append(mark);
    }
    if (node.hint) {
      const hint = make("span", "tree-hint");
      hint.style.setProperty("--level", node.hint);
      hint.setAttribute("aria-hidden", "true");
      item.append(hint);
    }
    return item;
  }
  function draw() {
    const tree = host();
    if (!tree) return;
    const focused = tree.contains(document.activeElement) ? document.activeElement.node?.path : undefined;
    const rows = [];
    const walk = (node, level) =>
      node.children.forEach((child, i) => {
        rows.push(row(child, level, i + 1, node.children.length));
        if (open.has(child.path)) walk(child, level + 1);
      });
    walk(root, 1);
    tree.replaceChildren(...rows);
    reach(tree);
    if (focused !== undefined) rows.find((item) => item.node.path === focused)?.focus({ preventScroll: true });
  }
  // Tab stops at one row: the chosen one.
  function reach(tree) {
    const rows = [...tree.children];
    const stop = rows.find((item) => item.node.name === chosen) ?? rows[0];
    for (const item of rows) {
      item.tabIndex = item === stop ? 0 : -1;
      item.setAttribute("aria-selected", item.node.name === chosen && chosen !== "");
    }
    return stop;
  }
  // Only the list itself scrolls, never the page.
  function scrollTo(item) {
    const tree = host();
    if (!item || !tree) return;
    const { top, bottom } = item.getBoundingClientRect();
    const frame = tree.getBoundingClientRect();
    if (top < frame.top) tree.scrollTop -= frame.top - top + 40;
    else if (bottom > frame.bottom) tree.scrollTop += bottom - frame.bottom + 40;
  }
  function select(name) {
    chosen = name;
    let node;
    each(root, (one) => one.name === name && (node = one));
    let grown = false;
    for (let up = node?.parent; up && up !== root; up = up.parent) {
      if (!open.has(up.path)) grown = Boolean(open.add(up.path));
    }
    return grown;
  }
  const choose = (node) => window.dash_clientside.set_props({ state: "tensor" }, { value: node.name });
  function turn(node, on = !open.has(node.path)) {
    if (!node.children.length) return;
    if (on) open.add(node.path);
    else open.delete(node.path);
    draw();
  }

  addEventListener("click", (event) => {
    const item = event.target.closest?.(`#${TREE} .tree-row`);
    if (!item) return;
    const { node } = item;
    item.focus({ preventScroll: true });
    if (node.name === undefined || event.target.classList.contains("tree-twist")) return turn(node);
    choose(node);
  });
  addEventListener("keydown", (event) => {
    const item = event.target.closest?.(`#${TREE} .tree-row`);
    if (!item || event.ctrlKey || event.metaKey || event.altKey) return;
    const rows = [...host().children], place = rows.indexOf(item), { node } = item;
    const at = (index) => {
      const next = rows[Math.min(Math.max(index, 0), rows.length - 1)];
      next.focus({ preventScroll: true });
      scrollTo(next);
    };
    const moves = {
      ArrowDown: () => at(place + 1),
      ArrowUp: () => at(place - 1),
      Home: () => at(0),
      End: () => at(rows.length - 1),
      ArrowRight: () => (open.has(node.path) || !node.children.length ? at(place + (node.children.length > 0)) : turn(node, true)),
      ArrowLeft: () => {
        if (node.children.length && open.has(node.path)) return turn(node, false);
        const up = rows.findIndex((one) => one.node === node.parent);
        if (up >= 0) at(up);
      },
      Enter: () => (node.name === undefined ? turn(node) : choose(node)),
      " ": () => (node.name === undefined ? turn(node) : choose(node)),
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    moves[event.key]();
  });

  Object.assign(window.dash_clientside.layerwatch, {
    showTree(data, name) {
      const fresh = data !== built || !host()?.children.length;
      if (data !== built) {
        built = data;
        grow(data);
        judge(root);
      }
      if (select(name) || fresh) draw();
      const tree = host();
      if (tree) scrollTo(reach(tree));
      return "tree";
    },
    markTree(said, data) {
      const now = said ?? {};
      if (JSON.stringify(now) === JSON.stringify(marks) && data === built) return "tree-legend";
      marks = now;
      if (root && data === built) {
        judge(root);
        draw();
      }
      return "tree-legend";
    },

    // The last two picks: a click moves the second one to the first.
    pickStep(...given) {
      const no = window.dash_clientside.no_update;
      const { triggered } = window.dash_clientside.callback_context;
      const [{ prop_id: name = "", value } = {}] = triggered ?? [];
      const graph = document.querySelector(`[id="${CSS.escape(name.split(".")[0])}"] .js-plotly-plot`);
      const point = value?.points?.[0], meta = graph?._fullLayout?.meta;
      const step = point && meta?.steps?.length ? layerwatch.stepAt(point.x, meta) : NaN; // ridges carry no steps
      const [, second] = given.slice(-2);
      if (!Number.isFinite(step)) return [no, no];
      return [second === "" || second === null || second === undefined ? no : second, Math.round(step)];
    },
  });
})();
