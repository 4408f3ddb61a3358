
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  const body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const compare = (first, second) => {
      const cells = [first.cells[column], second.cells[column]];
      if (column === 0) return direction * cells[0].textContent.localeCompare(cells[1].textContent);
      const [left, right] = cells.map(cell => cell.dataset.value);
      // Undefined values come last in both directions.
      if (left === "" || right === "") return (left === "") - (right === "");
      return direction * (Number(left) - Number(right));
    };
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    body.append(...Array.from(body.rows).sort(compare));
  }));
}
