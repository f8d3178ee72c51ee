// Searching a long table of the Compare page: rows that do not hold the words are hidden.
(() => {
  function search(field) {
    const table = document.getElementById(field.id.replace("-search", ""));
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of table?.querySelectorAll("tbody tr") ?? []) {
      const text = row.textContent.toLowerCase();
      row.classList.toggle("hidden", !words.every((word) => text.includes(word)));
    }
  }
  addEventListener("input", (event) => {
    if (event.target.classList?.contains("table-search")) search(event.target);
  });
})();
