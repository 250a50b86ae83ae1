// What every page shares: the contents that follow the reader, and code shown or hidden at once.
(function () {
  "use strict";
  var contents = document.querySelector("details.contents");
  var narrow = window.matchMedia("(max-width: 67.99rem)");

  function fold() {
    if (contents) contents.open = !narrow.matches;
  }
  fold();
  narrow.addEventListener("change", fold);

  // The section being read is marked in the contents.
  var links = contents ? Array.from(contents.querySelectorAll("a[href^='#']")) : [];
  var sections = links
    .map(function (link) {
      return document.getElementById(decodeURIComponent(link.hash.slice(1)));
    })
    .filter(Boolean);
  var current = null;

  function follow() {
    var reached = null;
    sections.forEach(function (section) {
      if (section.getBoundingClientRect().top < window.innerHeight * 0.3) reached = section;
    });
    var page = document.documentElement;
    var end = page.scrollTop > 0 && page.scrollTop + window.innerHeight >= page.scrollHeight - 4;
    if (end) reached = sections[sections.length - 1];
    if (reached === current) return;
    current = reached;
    links.forEach(function (link) {
      var here = reached && link.hash === "#" + reached.id;
      link.classList.toggle("current", Boolean(here));
      if (here) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    });
  }
  if (sections.length) {
    document.addEventListener("scroll", follow, { passive: true });
    follow();
  }

  // One button for all code; a reader's choice is kept where the browser allows it.
  var button = document.querySelector(".all-code");
  var cells = document.querySelectorAll("details.code");

  function remember(shown) {
    try {
      window.localStorage.setItem("workbench-code", shown ? "shown" : "hidden");
    } catch (error) {
      // Private windows may refuse: the choice then holds for this page only.
    }
  }
  function remembered() {
    try {
      return window.localStorage.getItem("workbench-code") === "shown";
    } catch (error) {
      return false;
    }
  }
  function show(shown) {
    cells.forEach(function (cell) {
      cell.open = shown;
    });
    button.setAttribute("aria-pressed", String(shown));
    button.textContent = shown ? "Hide all code" : "Show all code";
  }
  if (button && cells.length) {
    button.hidden = false;
    show(remembered());
    button.addEventListener("click", function () {
      var shown = button.getAttribute("aria-pressed") !== "true";
      show(shown);
      remember(shown);
    });
  }
})();
