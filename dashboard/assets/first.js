// The page as the server has written it covers Dash's until that one stands.
queueMicrotask(() => {
  const [page, given] = ["first", "first-data"].map((id) => document.getElementById(id));
  if (!page) return;
  const { layerwatch } = window;

  // Links lead where they say, by themselves; everything else waits for Dash.
  const plain = (event) => page.contains(event.target) && event.stopImmediatePropagation();
  addEventListener("click", plain, true);
  function leave() {
    removeEventListener("click", plain, true);
    page.remove();
    given.remove();
  }

  // Rows, or the words that are there instead; a page that has neither is not waited for.
  const PATIENCE = 3000;
  const standing = [
    "[data-said] .fleet-table", "#fleet-table > p", ".ag-row .run-link", "[class*=ag-overlay-no-]", "#runs-empty:not(.hidden)", "#error:not(.hidden)",
    ".body:not(:has(#runs-card, #fleet-table)) > .notice",
  ];
  const ready = standing.map((selector) => `#react-entry-point ${selector}`).join(", ");
  let since = null;
  function look() {
    if (document.querySelector(ready)) return leave();
    if (document.querySelector("#react-entry-point :is(#runs-card, #fleet-table)")) since ??= performance.now();
    if (since !== null && performance.now() - since > PATIENCE) return leave();
    requestAnimationFrame(look);
  }
  try {
    const { "fleet-data": fleet, "runs-grid": grid, "runs-fit": fit } = JSON.parse(given.textContent);
    if (fleet) layerwatch.firstFleet(fleet);
    if (grid) layerwatch.firstRuns(grid, fit);
    look();
  } catch (error) {
    console.warn("the first rows could not be drawn", error);
    leave();
  }
});
