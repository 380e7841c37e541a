// What every page with charts shares: colours and marks, the theme, Plotly's settings, tables that are sorted and filtered,
// copying, print. A page's own script, which follows in the same element, calls page.start(draw) at its end.
const page = (function () {
  "use strict";

  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const all = (selector, within) => Array.from((within || document).querySelectorAll(selector));

  // Okabe and Ito's palette; on dark ground its blue and black are exchanged for its lighter members.
  const PALETTE = {
    light: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"],
    dark: ["#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#F0E442", "#FFFFFF"],
  };
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "pentagon"];
  const DASHES = ["solid", "8px,4px", "2px,3px", "8px,3px,2px,3px", "14px,5px", "4px,2px"];
  const MINUS = "\u2212";
  let printing = false;
  let drawAll = function () {};

  // Plotly reads a few tags and entities in any text it shows: names are shown as they are.
  function plain(text) {
    return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }
  function percent(share, digits) {
    return (100 * share).toFixed(digits === undefined ? 2 : digits) + " %";
  }
  function signed(value) {
    const text = Math.abs(value).toFixed(2);
    return Number(text) === 0 ? text : (value < 0 ? MINUS : "+") + text;
  }
  const CIVIDIS = [[0, "#00224e"], [0.125, "#123570"], [0.25, "#3b496c"], [0.375, "#575d6d"], [0.5, "#707173"], [0.625, "#8a8678"], [0.75, "#a59c74"], [0.875, "#c3b369"], [1, "#fee838"]];

  // ---------------------------------------------------------------------------------------------- theme
  function dark() {
    if (printing) return false;
    if (root.dataset.theme) return root.dataset.theme === "dark";
    return window.matchMedia("(prefers-color-scheme: dark)").matches;
  }
  function ink() {
    return dark()
      ? { text: "#e8edf2", soft: "#a3b0be", grid: "#28323d", card: "#171e26", band: "rgba(232,237,242,.12)", blank: "#222c36", hover: "#0b0f14" }
      : { text: "#16202c", soft: "#52606f", grid: "#e7ebf0", card: "#ffffff", band: "rgba(22,32,44,.10)", blank: "#eef1f4", hover: "#ffffff" };
  }
  const colour = (index) => PALETTE[dark() ? "dark" : "light"][index % 7];
  function faded(hex, alpha) {
    const part = (at) => parseInt(hex.slice(at, at + 2), 16);
    return "rgba(" + part(1) + "," + part(3) + "," + part(5) + "," + alpha + ")";
  }

  const themes = ["system", "light", "dark"];
  function showTheme() {
    byId("theme").textContent = "Theme: " + (root.dataset.theme || "system");
  }
  byId("theme").addEventListener("click", function () {
    const next = themes[(themes.indexOf(root.dataset.theme || "system") + 1) % 3];
    if (next === "system") delete root.dataset.theme;
    else root.dataset.theme = next;
    try {
      if (next === "system") localStorage.removeItem("lnsdeploy-theme");
      else localStorage.setItem("lnsdeploy-theme", next);
    } catch (error) {
      // Not remembered where storage is refused; the page still changes.
    }
    showTheme();
    drawAll();
  });
  showTheme();

  // ---------------------------------------------------------------------------------------------- charts
  const CONFIG = {
    displaylogo: false,
    responsive: false,
    plotlyServerURL: "",
    typesetMath: false,
    showSendToCloud: false,
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
    toImageButtonOptions: { format: "svg", filename: "lnsdeploy" },
  };

  function layoutOf(extra) {
    const shade = ink();
    const axis = { gridcolor: shade.grid, zeroline: false, linecolor: shade.soft, tickcolor: shade.soft, automargin: true };
    return Object.assign(
      {
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif", size: 13, color: shade.text },
        margin: { l: 60, r: 16, t: 12, b: 50 },
        showlegend: false,
        separators: ".\u202f",
        hovermode: "closest",
        hoverlabel: { bgcolor: shade.hover, bordercolor: shade.soft, font: { color: shade.text, size: 12.5 }, align: "left" },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: shade.soft, activecolor: shade.text },
      },
      extra,
      { xaxis: Object.assign({}, axis, extra.xaxis), yaxis: Object.assign({}, axis, extra.yaxis) },
    );
  }
  function put(element, traces, layout) {
    layout.width = Math.max(Math.floor(printing ? 690 : element.parentElement.clientWidth), layout.minwidth || 280);
    delete layout.minwidth;
    Plotly.react(element, traces, layout, CONFIG);
  }

  function symbolPath(index, x, y, r) {
    const k = 0.82 * r;
    const poly = (list) => "M" + list.map((p) => (x + p[0]).toFixed(1) + " " + (y + p[1]).toFixed(1)).join("L") + "Z";
    switch (SYMBOLS[index % SYMBOLS.length]) {
      case "circle": return "M" + (x - r) + " " + y + "a" + r + " " + r + " 0 1 0 " + 2 * r + " 0a" + r + " " + r + " 0 1 0 " + -2 * r + " 0Z";
      case "square": return poly([[-k, -k], [k, -k], [k, k], [-k, k]]);
      case "diamond": return poly([[0, -1.25 * r], [1.25 * r, 0], [0, 1.25 * r], [-1.25 * r, 0]]);
      case "triangle-up": return poly([[0, -1.1 * r], [1.1 * r, 0.8 * r], [-1.1 * r, 0.8 * r]]);
      case "triangle-down": return poly([[0, 1.1 * r], [1.1 * r, -0.8 * r], [-1.1 * r, -0.8 * r]]);
      case "cross": { const a = 0.4 * r, b = 1.1 * r; return poly([[-a, -b], [a, -b], [a, -a], [b, -a], [b, a], [a, a], [a, b], [-a, b], [-a, a], [-b, a], [-b, -a], [-a, -a]]); }
      case "x": { const a = 0.55 * r, b = 1.1 * r; return poly([[0, -a], [b - a, -b], [b, a - b], [a, 0], [b, b - a], [b - a, b], [0, a], [a - b, b], [-b, b - a], [-a, 0], [-b, a - b], [a - b, -b]]); }
      default: return poly([0, 1, 2, 3, 4].map((i) => [1.1 * r * Math.sin((2 * Math.PI * i) / 5), -1.1 * r * Math.cos((2 * Math.PI * i) / 5)]));
    }
  }
  function swatch(paths, width) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("width", width);
    svg.setAttribute("height", 14);
    svg.setAttribute("aria-hidden", "true");
    paths.forEach((attributes) => {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      Object.keys(attributes).forEach((name) => path.setAttribute(name, attributes[name]));
      svg.append(path);
    });
    return svg;
  }

  // Black or white, whichever contrasts more with the colour at a place (0 to 1) of a scale.
  function onColour(scale, place) {
    const at = Math.min(Math.max(place, 0), 1);
    let upper = scale.findIndex((stop) => stop[0] >= at);
    if (upper < 1) upper = 1;
    const from = scale[upper - 1], to = scale[upper];
    const part = (at - from[0]) / (to[0] - from[0]);
    const light = [1, 3, 5].map((start) => {
      const mixed = parseInt(from[1].slice(start, start + 2), 16) * (1 - part) + parseInt(to[1].slice(start, start + 2), 16) * part;
      const c = mixed / 255;
      return c <= 0.03928 ? c / 12.92 : Math.pow((c + 0.055) / 1.055, 2.4);
    });
    return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2] > 0.179 ? "#000000" : "#ffffff";
  }

  // ---------------------------------------------------------------------------------------------- drawing anew
  function start(draw) {
    drawAll = draw;
    let lastWidth = root.clientWidth;
    let waiting = 0;
    window.addEventListener("resize", function () {
      if (root.clientWidth === lastWidth || printing) return;
      lastWidth = root.clientWidth;
      clearTimeout(waiting);
      waiting = setTimeout(drawAll, 120);
    });
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

    // Paper is light, and as wide as paper is.
    let themeBefore;
    let opened = [];
    window.addEventListener("beforeprint", function () {
      printing = true;
      themeBefore = root.dataset.theme;
      root.dataset.theme = "light";
      opened = all("details:not([open])");
      opened.forEach((element) => (element.open = true));
      drawAll();
    });
    window.addEventListener("afterprint", function () {
      printing = false;
      if (themeBefore) root.dataset.theme = themeBefore;
      else delete root.dataset.theme;
      opened.forEach((element) => (element.open = false));
      drawAll();
    });

    drawAll();
    // The charts have moved what follows them since the browser went to the address's section.
    const target = location.hash.length > 1 && byId(location.hash.slice(1));
    if (target) target.scrollIntoView();
  }

  // ---------------------------------------------------------------------------------------------- table
  // Makes the heads of a table into buttons that sort it, and its rows those that the page's filters (and extra) keep.
  function table(element, extra) {
    const body = element.tBodies[0];
    const rows = Array.from(body.rows);
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const filters = all("[data-filter]");

    function filter() {
      const needle = byId("filter-text").value.trim().toLowerCase();
      let count = 0;
      rows.forEach((row, index) => {
        const keep = (!extra || extra(row)) && texts[index].includes(needle) && filters.every((select) => !select.value || row.dataset[select.dataset.filter] === select.value);
        row.hidden = !keep;
        if (keep) count += 1;
      });
      byId("filter-count").textContent = count + " of " + rows.length;
    }
    byId("filter-text").addEventListener("input", filter);
    filters.forEach((select) => select.addEventListener("change", filter));
    byId("filter-clear").addEventListener("click", function () {
      byId("filter-text").value = "";
      filters.forEach((select) => (select.value = ""));
      filter();
    });

    const collator = new Intl.Collator("en", { numeric: true });
    all("th[data-sort]", element).forEach((head) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      // Browsers repeat a table's head on every printed page, but not the buttons in it.
      window.addEventListener("beforeprint", () => (head.textContent = button.textContent));
      window.addEventListener("afterprint", () => head.replaceChildren(button));
      button.addEventListener("click", function () {
        const column = head.cellIndex;
        const descending = head.getAttribute("aria-sort") === "ascending";
        all("th[aria-sort]", element).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        const numeric = head.dataset.sort === "number";
        const key = (row) => (numeric ? row.cells[column].dataset.value : row.cells[column].textContent);
        const sorted = rows.slice().sort((a, b) => {
          const x = key(a), y = key(b);
          // What was not measured stays at the end, whichever the direction.
          if (numeric && (x === "" || y === "")) return (x === "" ? 1 : 0) - (y === "" ? 1 : 0);
          const order = numeric ? Number(x) - Number(y) : collator.compare(x, y);
          return descending ? -order : order;
        });
        body.append.apply(body, sorted);
      });
    });
    return filter;
  }

  // ---------------------------------------------------------------------------------------------- copying
  function copied(button, done) {
    button.textContent = done ? "Copied" : "Selected";
    byId("status").textContent = done ? "Copied" : "Copying was refused; the text is selected";
    setTimeout(() => (button.textContent = "Copy"), 1600);
  }
  function selectAndCopy(button, code) {
    code.hidden = false; // what is hidden cannot be selected
    const range = document.createRange();
    range.selectNodeContents(code);
    const selection = window.getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    copied(button, document.execCommand("copy"));
  }
  document.addEventListener("click", function (event) {
    const button = event.target.closest(".copy");
    if (!button) return;
    const code = button.parentElement.querySelector("code");
    if (navigator.clipboard) {
      navigator.clipboard.writeText(code.textContent).then(() => copied(button, true), () => selectAndCopy(button, code));
    } else {
      selectAndCopy(button, code);
    }
  });

  return {
    root, byId, all, PALETTE, SYMBOLS, DASHES, MINUS, CIVIDIS, plain, percent, signed, dark, ink, colour, faded, layoutOf, put,
    symbolPath, swatch, onColour, start, table,
  };
})();
