// A star beside the name of every small plot: pinned ones come first. The figure says where its panels are.
(() => {
  const NAME = "scalars-plot";
  const pins = () => String(window.layerwatch.state.pins ?? "").split(",").filter(Boolean);

  function stars(plot, places) {
    const { panels } = plot.layout?.meta ?? {};
    const frame = document.getElementById(`${NAME}-frame`);
    let layer = frame.querySelector(".scalar-stars");
    if (!layer) {
      layer = document.createElement("div");
      layer.className = "scalar-stars";
      frame.append(layer);
    }
    const focused = document.activeElement?.dataset?.scalar;
    const buttons = (panels ?? []).map((name, i) => {
      const button = document.createElement("button");
      const on = pins().includes(name);
      button.className = on ? "star on" : "star";
      button.textContent = on ? "★" : "☆";
      button.dataset.scalar = name;
      button.setAttribute("aria-pressed", String(on));
      button.setAttribute("aria-label", `${on ? "Unpin" : "Pin"} ${name}`);
      const [left, top] = places[i];
      button.style.left = `${left - 5}px`;
      button.style.top = `${top - 27}px`;
      return button;
    });
    layer.replaceChildren(...buttons);
    if (focused) buttons.find((button) => button.dataset.scalar === focused)?.focus({ preventScroll: true });
  }

  let known = "";
  function look() {
    const plot = document.querySelector(`[id="${NAME}"] .js-plotly-plot`);
    if (!plot?.layout) return;
    const full = plot._fullLayout;
    const corner = (_, i) => [full[`xaxis${i ? i + 1 : ""}`], full[`yaxis${i ? i + 1 : ""}`]].map((axis) => Math.round(axis?._offset ?? 0));
    const places = (plot.layout.meta?.panels ?? []).map(corner);
    const now = JSON.stringify([plot.layout.meta ?? null, pins(), places]);
    const there = document.querySelector(`[id="${NAME}-frame"] .scalar-stars`);
    if (now === known && there) return;
    known = now;
    stars(plot, places);
  }
  setInterval(() => !document.hidden && look(), 300);

  addEventListener("click", (event) => {
    const star = event.target.closest?.("[data-scalar]");
    if (!star) return;
    const name = star.dataset.scalar, now = pins();
    const next = now.includes(name) ? now.filter((pin) => pin !== name) : [...now, name];
    window.dash_clientside.set_props({ state: "pins" }, { value: next.join(",") });
  });
})();
