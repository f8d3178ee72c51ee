// The page as the server has written it covers Dash's until that one stands.
queueMicrotask(() => {
  const [page, given] = ["first", "first-data"].map((id) => document.getElementById(id));
  if (!page) return;
  const { layerwatch } = window;
  const { "fleet-data": fleet, "runs-grid": grid, "runs-fit": fit } = JSON.parse(given.textContent);
  if (fleet) layerwatch.firstFleet(fleet);
  if (grid) layerwatch.firstRuns(grid, fit);

  // Links lead where they say, by themselves; everything else waits for Dash.
  const plain = (event) => page.contains(event.target) && event.stopImmediatePropagation();
  addEventListener("click", plain, true);

  // Rows, or the words that are there instead.
  const standing = ["[data-said] .fleet-table", "#fleet-table > p", ".ag-row", ".ag-overlay-no-rows-center", ".body > .notice:not(.hidden)", "#runs-empty:not(.hidden)", "#error:not(.hidden)"];
  const ready = standing.map((selector) => `#react-entry-point ${selector}`).join(", ");
  const look = () => {
    if (!document.querySelector(ready)) return requestAnimationFrame(look);
    removeEventListener("click", plain, true);
    page.remove();
    given.remove();
  };
  look();
});
