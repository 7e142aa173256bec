"use strict";
// Buttons in the heads of the tables that can be sorted, and a run that is linked to is opened.

const words = new Intl.Collator("en", { numeric: true });

function key(row, column) {
  const cell = row.cells[column];
  const number = cell.dataset.number;
  return number === undefined ? cell.textContent.trim() : Number(number);
}

function compare(one, other) {
  if (typeof one === typeof other) return typeof one === "number" ? one - other : words.compare(one, other);
  return typeof one === "number" ? -1 : 1;
}

function sort(table, column, descending) {
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, key: key(row, column) }));
  const empty = rows.filter((each) => each.key === "");
  const full = rows.filter((each) => each.key !== "");
  full.sort((one, other) => (descending ? compare(other.key, one.key) : compare(one.key, other.key)));
  body.append(...full.concat(empty).map((each) => each.row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sort(table, column, descending);
    });
  });
}

function open() {
  const target = document.getElementById(location.hash.slice(1));
  if (target instanceof HTMLDetailsElement) {
    target.open = true;
    target.scrollIntoView();
  }
}

addEventListener("hashchange", open);
// a second click on the same link changes no hash
addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#']");
  if (link && link.hash === location.hash) open();
});
open();
