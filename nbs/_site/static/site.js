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

document.addEventListener("DOMContentLoaded", () => {
  // Boxes that scroll can be reached by the keyboard.
  for (const box of document.querySelectorAll("div.highlight pre, div.math, .table-wrapper")) if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  // Search shows the words around a hit; TeX is not words, and a docstring stands in its API entry, too.
  if (typeof Search !== "undefined") {
    const plain = Search.htmlToText, wordless = /\\\(.*?\\\)|\\\[.*?\\\]|<span class="sd">.*?<\/span>/gs;
    Search.htmlToText = (html, anchor) => plain(html.replace(wordless, "…"), anchor);
  }
});
