// j and k: the next and the previous layer.
(() => {
  const id = { state: "tensor" };

  function move(by) {
    const select = window.dash_component_api?.getLayout?.(id);
    if (!select?.props) return;
    const names = select.props.data.flatMap((entry) => (entry.items ? entry.items : [entry]));
    const values = names.map((entry) => (typeof entry === "string" ? entry : entry.value));
    const place = values.indexOf(select.props.value) + by;
    if (place >= 0 && place < values.length) window.dash_clientside.set_props(id, { value: values[place] });
  }

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest?.("input, textarea, select, [contenteditable]")) return;
    if (event.key === "j") move(1);
    if (event.key === "k") move(-1);
  });
  addEventListener("click", (event) => {
    if (event.target.closest?.("#layer-next")) move(1);
    if (event.target.closest?.("#layer-previous")) move(-1);
  });
})();
