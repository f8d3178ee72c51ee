// The list of findings and events. Lines stay where they are while others come, so that scroll and focus stay.
(() => {
  const make = (tag, className, text = "") => {
    const element = document.createElement(tag);
    element.className = className;
    element.textContent = text;
    return element;
  };
  const link = ({ text, href }, className) => {
    const element = make("a", className, text);
    element.setAttribute("href", href);
    element.title = text;
    return element;
  };

  function line(row) {
    const item = make("li", `happening ${row.tone}`);
    item.dataset.key = row.key;
    item.dataset.said = JSON.stringify(row);
    const head = make("div", "happening-head");
    head.append(make("span", `badge ${row.tone}`, row.label), make("b", "", row.title), make("span", "when", `step ${row.step}`));
    head.append(make("span", "dim clock", row.time), link(row.link, "happening-link"));
    item.append(head, make("div", "happening-text", row.text));
    if (row.layers.length) {
      const where = make("div", "finding-layers");
      where.append(...row.layers.map((layer) => link(layer, "layer-link")));
      if (row.more) where.append(make("span", "dim", row.more));
      item.append(where);
    }
    return item;
  }

  function fill(box, rows) {
    let list = box.querySelector("ol");
    if (!list) box.replaceChildren((list = make("ol", "happening-list")));
    const known = new Map([...list.children].map((item) => [item.dataset.key, item]));
    const wanted = new Set(rows.map((row) => row.key));
    for (const [key, item] of known) if (!wanted.has(key)) item.remove();
    rows.forEach((row, place) => {
      let item = known.get(row.key);
      if (!item || item.dataset.said !== JSON.stringify(row)) {
        const next = line(row);
        item?.replaceWith(next);
        item = next;
      }
      if (list.children[place] !== item) list.insertBefore(item, list.children[place] ?? null);
    });
  }

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.alerts = {
    show(data) {
      const box = document.getElementById("alert-list");
      if (!data || !box) return window.dash_clientside.no_update;
      fill(box, data.rows ?? []);
      const said = document.getElementById("alerts-said");
      if (said.textContent !== data.said) said.textContent = data.said;
      const notes = data.notes ?? [];
      document.getElementById("alerts-unjudged").classList.toggle("hidden", notes.length === 0);
      document.getElementById("alerts-notes").replaceChildren(...notes.map((note) => make("li", "", note)));
      return window.dash_clientside.no_update;
    },
  };
})();
