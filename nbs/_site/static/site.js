// Mathematics: typeset only what Sphinx marked as such; afterwards say so. A formula wider than its column shrinks a little, then scrolls by itself.
window.MathJax = {
  startup: {
    elements: [".math"],
    pageReady: () => MathJax.startup.defaultPageReady().then(fit).finally(() => { document.documentElement.dataset.math = "done" }),
  },
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]], tags: "none" },
  svg: { scale: .95 },
  options: { enableMenu: false },
};

function fit() {
  for (const formula of document.querySelectorAll("mjx-container:not([display])")) {
    const column = formula.closest("p, li, td, dd, blockquote, .content");
    formula.classList.toggle("wide", formula.firstElementChild.getBoundingClientRect().width > column?.clientWidth);
  }
  for (const box of document.querySelectorAll(".equation > .math")) {
    box.style.fontSize = "";
    if (box.scrollWidth > box.clientWidth) box.style.fontSize = Math.max(.8, box.clientWidth / box.scrollWidth) + "em";
  }
}
addEventListener("resize", () => document.documentElement.dataset.math && fit());

// On a telephone, a table of few columns that is wider than the page shows a row's cells below each other, each after the name of its column. A table of many columns scrolls.
function stack() {
  const narrow = matchMedia("(max-width: 40rem)").matches;
  for (const box of document.querySelectorAll("article .table-wrapper:not(dl.py *)")) {
    const table = box.querySelector("table"), columns = [...table.querySelectorAll("thead th")].map(e => e.textContent.trim());
    table.classList.remove("stacked");
    if (!narrow || columns.length > 4 || box.scrollWidth <= box.clientWidth) continue;
    table.classList.add("stacked");
    for (const row of table.tBodies[0].rows) [...row.cells].forEach((cell, i) => { if (i && columns[i] && cell.textContent.trim()) cell.dataset.column = columns[i] });
  }
}
addEventListener("resize", stack);

document.addEventListener("DOMContentLoaded", () => {
  // An option does not break after its hyphens.
  for (const word of document.querySelectorAll("article code > .pre")) if (word.textContent.startsWith("-")) word.classList.add("nowrap");
  stack();
  // Results are tables whose columns stay aligned, unless a line is too long to be one: then lines wrap, as in a terminal.
  for (const result of document.querySelectorAll("div.cell_output pre")) if (result.textContent.split("\n").some(line => line.length > 110)) result.classList.add("prose");
  // Boxes that scroll can be reached by the keyboard.
  for (const box of document.querySelectorAll("div.highlight pre, div.math, .table-wrapper")) if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  // Search shows the words around a hit; TeX is not words, and a docstring stands in its API entry, too.
  if (typeof Search !== "undefined") {
    const plain = Search.htmlToText, wordless = /\\\(.*?\\\)|\\\[.*?\\\]|<span class="sd">.*?<\/span>/gs;
    Search.htmlToText = (html, anchor) => plain(html.replace(wordless, "…"), anchor);
  }
});
