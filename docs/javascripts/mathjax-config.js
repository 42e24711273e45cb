// Formulas as arithmatex leaves them in the pages; the file beside this one is MathJax's tex-svg.js (Apache-2.0).
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex" },
};
