// Choosing a finding: its layer and step range become the page's, and its evidence comes into view.
(() => {
  const set = (key, value) => window.dash_clientside.set_props({ state: key }, { value });
  const value = (key) => window.layerwatch.state[key] ?? "";

  function choose({ finding, range, tensor }) {
    const again = value("finding") === finding;
    set("finding", again ? "" : finding);
    set("tensor", again ? "" : tensor);
    set("range", again ? "" : range);
    if (!again) setTimeout(() => document.getElementById("evidence")?.scrollIntoView({ block: "nearest", behavior: "smooth" }), 250);
  }
  addEventListener("click", (event) => {
    const button = event.target.closest?.("button[data-finding]");
    if (button) choose(button.dataset);
    if (event.target.closest?.("#evidence-close")) choose({ finding: value("finding") });
  });

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.findings = {
    mark(finding) {
      requestAnimationFrame(() => {
        for (const button of document.querySelectorAll("button[data-finding]")) {
          const on = button.dataset.finding === finding;
          button.setAttribute("aria-pressed", String(on));
          button.closest(".finding").classList.toggle("chosen", on);
        }
      });
      return window.dash_clientside.no_update;
    },
  };
})();
