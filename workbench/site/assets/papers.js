// Search and filters of the table of papers. The address keeps what was asked for.
(function () {
  "use strict";
  var papers = JSON.parse(document.getElementById("papers-data").textContent);
  var rows = Array.from(document.querySelectorAll("table.papers tbody tr"));
  var form = document.querySelector("form.filters");
  var query = document.getElementById("query");
  var selects = ["family", "status", "verdict"].map(function (name) {
    return document.getElementById(name);
  });
  var found = document.getElementById("found");
  var nothing = document.getElementById("nothing");

  function apply() {
    var words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    var count = 0;
    papers.forEach(function (paper, i) {
      var matches =
        words.every(function (word) {
          return paper.text.indexOf(word) >= 0;
        }) &&
        selects.every(function (select) {
          return !select.value || paper[select.id] === select.value;
        });
      rows[i].hidden = !matches;
      if (matches) count += 1;
    });
    found.textContent = String(count);
    nothing.hidden = count > 0;
  }
  function note() {
    var asked = new URLSearchParams();
    if (query.value) asked.set("q", query.value);
    selects.forEach(function (select) {
      if (select.value) asked.set(select.id, select.value);
    });
    var text = asked.toString();
    try {
      history.replaceState(null, "", text ? "?" + text : window.location.pathname);
    } catch (error) {
      // Some browsers refuse this for pages opened from a disk: the filter works all the same.
    }
  }
  function changed() {
    apply();
    note();
  }

  var asked = new URLSearchParams(window.location.search);
  query.value = asked.get("q") || "";
  selects.forEach(function (select) {
    select.value = asked.get(select.id) || "";
  });
  form.hidden = false;
  form.addEventListener("submit", function (event) {
    event.preventDefault();
  });
  form.addEventListener("input", changed);
  document.getElementById("clear").addEventListener("click", function () {
    form.reset();
    changed();
    query.focus();
  });
  apply();
})();
