"use strict";
(() => {
  const table = document.getElementById("cells-table");

  const openTarget = () => {
    const target = location.hash.length > 1 ? document.getElementById(location.hash.slice(1)) : null;
    if (target instanceof HTMLDetailsElement) target.open = true;
  };
  addEventListener("hashchange", openTarget);
  document.addEventListener("click", (event) => {
    const link = event.target instanceof Element ? event.target.closest('a[href^="#"]') : null;
    if (link && link.hash === location.hash) openTarget();
  });
  openTarget();

  for (const [name, open] of [["openAll", true], ["closeAll", false]]) {
    const attribute = open ? "[data-open-all]" : "[data-close-all]";
    for (const button of document.querySelectorAll(attribute)) {
      button.addEventListener("click", () => {
        for (const part of document.getElementById(button.dataset[name]).querySelectorAll("details")) part.open = open;
      });
    }
  }
  for (const controls of document.querySelectorAll(".controls")) controls.hidden = false;

  if (!table) return;
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  const text = document.getElementById("cells-text");
  const columns = document.getElementById("cells-columns");
  const count = document.getElementById("cells-count");
  const choices = [...document.querySelectorAll("select[data-column]")];
  const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

  const sort = (index, direction) => {
    const numeric = headings[index].hasAttribute("data-numeric");
    const sign = direction === "ascending" ? 1 : -1;
    const compare = (a, b) => {
      const first = a.cells[index].dataset.sort;
      const second = b.cells[index].dataset.sort;
      if (first === "" || second === "") return (first === "" ? 1 : 0) - (second === "" ? 1 : 0);
      return sign * (numeric ? Number(first) - Number(second) : collator.compare(first, second));
    };
    headings.forEach((heading, place) => {
      if (place === index) heading.setAttribute("aria-sort", direction);
      else heading.removeAttribute("aria-sort");
    });
    body.append(...[...rows].sort(compare));
  };

  const filter = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const content = row.textContent.toLowerCase();
      row.hidden = !(words.every((word) => content.includes(word))
        && choices.every((choice) => choice.value === "" || row.cells[choice.dataset.column].dataset.value === choice.value));
      if (!row.hidden) shown += 1;
    }
    count.textContent = shown === rows.length
      ? `${rows.length} ${rows.length === 1 ? "cell" : "cells"}`
      : `${shown} of ${rows.length} cells`;
  };

  const show = () => table.classList.toggle("essential", columns.value === "essential");

  headings.forEach((heading, index) => {
    heading.querySelector("button").addEventListener("click", () => {
      sort(index, heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending");
    });
  });
  text.addEventListener("input", filter);
  for (const choice of choices) choice.addEventListener("change", filter);
  columns.addEventListener("change", show);
  document.getElementById("cells-reset").addEventListener("click", () => {
    text.value = "";
    columns.value = "essential";
    for (const choice of choices) choice.value = "";
    show();
    filter();
    sort(0, "ascending");
  });
  show();
  filter();
})();
