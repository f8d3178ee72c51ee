// What every card of a plot has, made once for all of them: how to read it ("?"), and the menu of downloads.
(() => {
  const FILES = [["png", "PNG picture"], ["svg", "SVG picture"], ["csv", "CSV data"], ["parquet", "Parquet data"]];
  let guide, menu, opener = null;

  const make = (tag, className, text = "") => Object.assign(document.createElement(tag), { className, textContent: text });

  // Below the anchor and inside the window; it scrolls with the page.
  function place(box, anchor, end) {
    const at = anchor.getBoundingClientRect(), width = box.offsetWidth, room = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(end ? at.right - width : at.left, room - width - 8));
    box.style.transform = `translate(${Math.round(left + scrollX)}px, ${Math.round(at.bottom + scrollY + 4)}px)`;
  }

  function explain(button) {
    if (!guide) {
      guide = make("div", "guide");
      guide.setAttribute("role", "tooltip");
      document.body.append(guide);
    }
    const parts = [["Good", button.dataset.good], ["Bad", button.dataset.bad]].filter(([, text]) => text);
    guide.replaceChildren(
      ...parts.map(([word, text]) => {
        const line = make("div", `guide-${word.toLowerCase()}`);
        line.append(make("b", "", word), text);
        return line;
      }),
    );
    guide.classList.toggle("shown", parts.length > 0);
    place(guide, button.closest(".guided"), false);
  }
  const quiet = () => guide?.classList.remove("shown");
  const button = (event) => event.target.closest?.(".guided")?.querySelector(".guide-button");
  addEventListener("mouseover", (event) => (button(event) ? explain(button(event)) : quiet()));
  addEventListener("focusin", (event) => event.target.matches?.(".guide-button") && explain(event.target));
  addEventListener("focusout", quiet);

  function build() {
    menu = make("div", "menu-items floating");
    menu.setAttribute("role", "menu");
    menu.setAttribute("aria-label", "Download");
    for (const [format, word] of FILES) {
      const item = make("button", "menu-item", word);
      item.setAttribute("role", "menuitem");
      item.dataset.format = format;
      item.addEventListener("click", () => {
        const { plot } = opener.dataset;
        close();
        window.layerwatch.download(plot, format);
      });
      menu.append(item);
    }
    menu.addEventListener("keydown", (event) => {
      const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      const items = [...menu.children], next = items.indexOf(document.activeElement) + by;
      items[(next + items.length) % items.length].focus();
    });
    menu.addEventListener("focusout", (event) => !menu.contains(event.relatedTarget) && event.relatedTarget !== opener && close());
    document.body.append(menu);
  }
  function close() {
    if (!opener) return;
    opener.setAttribute("aria-expanded", "false");
    if (menu.contains(document.activeElement)) opener.focus();
    menu.classList.remove("shown");
    opener = null;
  }
  addEventListener("click", (event) => {
    const pressed = event.target.closest?.(".menu-button"), again = pressed === opener;
    if (event.target.closest?.(".menu-items.floating")) return;
    close();
    if (!pressed || again) return;
    if (!menu) build();
    opener = pressed;
    opener.setAttribute("aria-expanded", "true");
    menu.classList.add("shown");
    place(menu, opener, true);
    menu.firstChild.focus({ preventScroll: true });
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    close();
    quiet();
  });
  window.layerwatch = Object.assign(window.layerwatch || {}, { files: FILES });
})();
