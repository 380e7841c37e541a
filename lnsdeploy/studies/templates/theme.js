// Runs before the first paint, so that a chosen theme does not flash in the other.
(function () {
  "use strict";
  var root = document.documentElement;
  root.classList.add("js");
  try {
    var chosen = localStorage.getItem("lnsdeploy-theme");
    if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  } catch (error) {
    // Storage is refused to some local files; the system's theme is used then.
  }
})();
