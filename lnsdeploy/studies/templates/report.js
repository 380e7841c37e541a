// Draws the charts and serves the controls of the report page. All statistics come from the page's data;
// nothing is computed here but positions.
(function () {
  "use strict";

  const view = JSON.parse(document.getElementById("view").textContent);
  const results = JSON.parse(document.getElementById("results").textContent);
  const points = new Map(results.points.map((point) => [point.id, point]));
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
  const NEAR_POINTS = 5; // pp below float32 that the axis "near float32" reaches
  let printing = false;

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
  function smallShare(share) {
    const value = 100 * share;
    if (value === 0) return "0";
    if (value < 0.001) return "<.001";
    return value < 10 ? String(Number(value.toPrecision(2))) : value.toFixed(value < 99.95 ? 1 : 0);
  }
  function spreadText(spread) {
    const n = spread.n === 1 ? "1 seed" : spread.n + " seeds";
    const sd = spread.sd === null ? "" : " ± " + (100 * spread.sd).toFixed(2);
    return (100 * spread.mean).toFixed(2) + sd + " % (" + n + ")";
  }

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

  // ---- accuracy against width
  const shown = new Set(view.series.map((name, index) => index));
  const widths = [];
  view.models.forEach((model) => model.configs.forEach((config) => widths.includes(config.bits) || widths.push(config.bits)));
  widths.sort((a, b) => a - b);

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
  function drawLegend() {
    const legend = byId("width-legend");
    const focused = all("button", legend).indexOf(document.activeElement);
    legend.replaceChildren();
    view.series.forEach((name, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", String(shown.has(index)));
      button.title = "Show or hide this line";
      button.append(
        swatch(
          [
            { d: "M0 7H36", stroke: colour(index), "stroke-width": 2, "stroke-dasharray": DASHES[index % DASHES.length] === "solid" ? "" : DASHES[index % DASHES.length].replace(/px/g, "") },
            { d: symbolPath(index, 18, 7, 4.6), fill: colour(index) },
          ],
          36,
        ),
        document.createTextNode(name),
      );
      button.addEventListener("click", function () {
        if (shown.has(index)) shown.delete(index);
        else shown.add(index);
        drawLegend();
        drawWidth();
      });
      legend.append(button);
    });
    if (view.models.some((model) => model.float)) {
      const fixed = document.createElement("span");
      fixed.className = "fixed";
      fixed.append(
        swatch([{ d: "M0 2H36V12H0Z", fill: ink().band }, { d: "M0 7H36", stroke: ink().text, "stroke-width": 1.5, "stroke-dasharray": "5 4" }], 36),
        document.createTextNode("float32"),
      );
      legend.append(fixed);
    }
    if (focused >= 0) all("button", legend)[focused].focus();
  }

  function accuracies(model, trained) {
    const list = [];
    model.configs.forEach((config) => {
      list.push(config.accuracy.min, config.accuracy.max);
      if (trained && config.trained) list.push(config.trained.min, config.trained.max);
    });
    if (model.float) list.push(model.float.min, model.float.max);
    return list.map((value) => 100 * value);
  }
  // One range for all models, so that their panels can be compared.
  function axisRange(choice, trained) {
    const values = view.models.flatMap((model) => accuracies(model, trained));
    let low = Math.min.apply(null, values);
    const high = Math.max.apply(null, values);
    const floats = view.models.filter((model) => model.float).map((model) => 100 * model.float.mean);
    if (choice === "near" && floats.length) low = Math.max(low, Math.min.apply(null, floats) - NEAR_POINTS);
    const pad = Math.max(0.05 * (high - low), 0.25);
    return [Math.max(low - pad, -2), Math.min(high + pad, 100 + 0.4 * pad)];
  }

  function yardstick(model, bandChoice, vertical) {
    if (!model.float) return [];
    const shade = ink();
    const reference = model.float;
    const at = (low, high) => (vertical ? { x0: low, x1: high, yref: "paper", y0: 0, y1: 1 } : { y0: low, y1: high, xref: "paper", x0: 0, x1: 1 });
    const shapes = [];
    const sd = reference.sd || 0;
    const edges = bandChoice === "sd" ? [reference.mean - sd, reference.mean + sd] : [reference.min, reference.max];
    if (bandChoice !== "none" && reference.n > 1) {
      shapes.push(Object.assign({ type: "rect", layer: "below", line: { width: 0 }, fillcolor: shade.band }, at(100 * edges[0], 100 * edges[1])));
    }
    shapes.push(Object.assign({ type: "line", layer: "below", line: { color: shade.text, width: 1.3, dash: "5px,4px" } }, at(100 * reference.mean, 100 * reference.mean)));
    return shapes;
  }

  function drawWidth() {
    const band = byId("width-band").value;
    const axis = byId("width-axis").value;
    const seeds = byId("width-seeds").checked;
    const range = axisRange(axis, false);
    const order = Array.from(shown).sort((a, b) => a - b);
    view.models.forEach((model, number) => {
      const element = byId("width-" + number);
      const bands = [], dots = [], lines = [];
      order.forEach((index) => {
        const configs = model.configs.filter((config) => config.series === index).sort((a, b) => a.bits - b.bits);
        if (!configs.length) return;
        const tone = colour(index);
        const edges = configs.map((config) => {
          const s = config.accuracy;
          return band === "sd" ? [s.mean - (s.sd || 0), s.mean + (s.sd || 0)] : [s.min, s.max];
        });
        if (band !== "none" && configs.length > 1) {
          const x = configs.map((config) => config.bits);
          bands.push({
            x: x.concat(x.slice().reverse()),
            y: edges.map((edge) => 100 * edge[1]).concat(edges.map((edge) => 100 * edge[0]).reverse()),
            type: "scatter", mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: faded(tone, 0.13), hoverinfo: "skip",
          });
        }
        const members = configs.filter((config) => config.accuracy.n > 1).flatMap((config) => config.points.map((id) => [config, points.get(id)]));
        if (seeds) {
          dots.push({
            x: members.map((member) => member[0].bits + member[0].shift),
            y: members.map((member) => 100 * member[1].accuracy),
            type: "scatter", mode: "markers", cliponaxis: true,
            marker: { symbol: SYMBOLS[index % 8], size: 5, color: tone, opacity: 0.55 },
            hoverinfo: "text",
            hovertext: members.map((member) => plain(member[0].label) + "<br>seed " + member[1].seed + ": " + percent(member[1].accuracy) +
              (member[1].trained_accuracy === null ? "" : "<br>in training " + percent(member[1].trained_accuracy))),
          });
        }
        lines.push({
          x: configs.map((config) => config.bits + (config.alone ? config.shift : 0)),
          y: configs.map((config) => 100 * config.accuracy.mean),
          type: "scatter", mode: "lines+markers", cliponaxis: true,
          line: { color: tone, width: 2.2, dash: DASHES[index % DASHES.length] },
          marker: { symbol: SYMBOLS[index % 8], size: 10, color: tone, line: { color: ink().card, width: 1 } },
          error_y: band !== "none" && configs.length === 1 && configs[0].accuracy.n > 1
            ? { type: "data", symmetric: false, array: edges.map((edge, i) => 100 * (edge[1] - configs[i].accuracy.mean)), arrayminus: edges.map((edge, i) => 100 * (configs[i].accuracy.mean - edge[0])), color: tone, thickness: 1.3, width: 4 }
            : { visible: false },
          hoverinfo: "text",
          hovertext: configs.map((config) => "<b>" + plain(config.label) + "</b><br>" + spreadText(config.accuracy) +
            (config.delta === null ? "" : "<br>" + signed(config.delta) + " pp against float32") +
            (config.description ? "<br>" + plain(config.description) : "")),
        });
      });
      const annotations = [];
      const shapes = yardstick(model, band, false);
      if (model.float) {
        const note = (y, text, bold) => ({ xref: "paper", x: 1, xanchor: "left", y: y, yanchor: "middle", xshift: 5, showarrow: false, text: text, font: { size: 11.5, color: bold ? ink().text : ink().soft } });
        annotations.push(note(100 * model.float.mean, "float32", true));
        let last = 0;
        view.margins.forEach((margin) => {
          const y = 100 * model.float.mean - margin;
          // Only where its label has room below the one before.
          if (y < range[0] || (margin - last) * 340 < 14 * (range[1] - range[0])) return;
          last = margin;
          shapes.push({ type: "line", layer: "below", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: ink().soft, width: 1, dash: "1px,3px" } });
          annotations.push(note(y, MINUS + margin + " pp"));
        });
      }
      put(element, bands.concat(dots, lines), layoutOf({
        height: 440, minwidth: 300,
        margin: { l: 58, r: 62, t: 36, b: 60 },
        shapes: shapes, annotations: annotations,
        xaxis: {
          title: { text: "word width (bits)", standoff: 10 }, range: [widths[0] - 0.45, widths[widths.length - 1] + 0.45],
          tickvals: widths,
          ticktext: widths.map((bits) => bits + (view.gamma_at[bits] === undefined ? "" : "<br><span style='font-size:11px'>γ = " + view.gamma_at[bits] + "</span>")),
          showgrid: false, showline: true,
        },
        yaxis: { title: { text: "test accuracy (%)", standoff: 8 }, range: range, ticksuffix: " %" , nticks: 9 },
      }));
      noteBelow(byId("width-" + number + "-note"), model, range[0], false, order);
    });
  }
  function noteBelow(element, model, low, trained, order) {
    let below = 0, total = 0;
    model.configs.forEach((config) => {
      if (order && !order.includes(config.series)) return;
      config.points.forEach((id) => {
        total += 1;
        const point = points.get(id);
        if (100 * point.accuracy < low) below += 1;
      });
    });
    element.textContent = below ? below + " of " + total + " points lie below this axis; choose “all points” to see them." : "";
  }

  // ---- trained against emulated
  function drawKey() {
    byId("datapaths-key").replaceChildren();
    [["trained (fake-quantised)", 1, false], ["emulated (bit-exact)", 0, true]].forEach((item) => {
      const span = document.createElement("span");
      span.append(
        swatch([{ d: symbolPath(item[2] ? 2 : 0, 8, 7, 5), fill: item[2] ? colour(item[1]) : "none", stroke: colour(item[1]), "stroke-width": 2 }], 16),
        document.createTextNode(item[0]),
      );
      byId("datapaths-key").append(span);
    });
  }
  function rowLabel(config) {
    return plain(config.label.length > 44 ? config.label.slice(0, 43) + "…" : config.label);
  }
  // Width that these labels take (px), as far as can be told before they are drawn.
  function labelWidth(configs) {
    return 20 + 8 * Math.max.apply(null, configs.map((config) => Math.min(config.label.length, 44)));
  }
  function drawDatapaths() {
    const only = byId("datapaths-bits").value;
    const range = axisRange(byId("datapaths-axis").value, true);
    view.models.forEach((model, number) => {
      const element = byId("datapaths-" + number);
      const rows = model.configs.filter((config) => !only || String(config.bits) === only);
      const y = [];
      const shapes = yardstick(model, "range", true);
      let at = 0;
      rows.forEach((config, index) => {
        if (index && config.bits !== rows[index - 1].bits) {
          at += 0.5;
          shapes.push({ type: "line", layer: "below", xref: "paper", x0: 0, x1: 1, y0: at - 0.25 - 0.5, y1: at - 0.25 - 0.5, line: { color: ink().grid, width: 1 } });
        }
        y.push(at);
        at += 1;
      });
      const whisker = (spread) => ({
        type: "data", symmetric: false, thickness: 1.2, width: 3,
        array: spread.map((s) => (s ? 100 * (s.max - s.mean) : 0)),
        arrayminus: spread.map((s) => (s ? 100 * (s.mean - s.min) : 0)),
      });
      const gap = 0.14;
      const trace = (spread, offset, tone, filled, word) => ({
        x: spread.map((s) => (s ? 100 * s.mean : null)), y: y.map((v) => v + offset), type: "scatter", mode: "markers", cliponaxis: true,
        error_x: Object.assign(whisker(spread), { color: faded(tone, 0.65) }),
        marker: { symbol: filled ? "diamond" : "circle-open", size: filled ? 11 : 10, color: tone, line: { width: filled ? 0 : 2, color: tone } },
        hoverinfo: "text",
        hovertext: spread.map((s, i) => "<b>" + plain(rows[i].label) + "</b><br>" + word + (s ? " " + spreadText(s) : "")),
      });
      const annotations = rows.map((config, i) => ({
        xref: "paper", x: 1, xanchor: "right", xshift: 52, y: y[i], yanchor: "middle", showarrow: false, font: { size: 12, color: ink().text },
        text: config.trained ? signed(100 * (config.accuracy.mean - config.trained.mean)) : "–",
      }));
      rows.forEach((config, i) => {
        // What lies left of the axis is named at its edge.
        if (100 * config.accuracy.mean >= range[0]) return;
        annotations.push({ xref: "paper", x: 0, xanchor: "left", xshift: 3, y: y[i], yanchor: "middle", showarrow: false, font: { size: 12, color: ink().text }, text: "◂ " + percent(config.accuracy.mean) });
      });
      annotations.push({ xref: "paper", x: 1, xanchor: "right", xshift: 52, yref: "paper", y: 1, yanchor: "bottom", yshift: 4, showarrow: false, text: "change", font: { size: 11.5, color: ink().soft } });
      if (model.float) annotations.push({ x: 100 * model.float.mean, xanchor: "center", yref: "paper", y: 1, yanchor: "bottom", yshift: 4, showarrow: false, text: "float32", font: { size: 11.5, color: ink().text } });
      put(element, [
        trace(rows.map((config) => config.trained), -gap, colour(1), false, "trained"),
        trace(rows.map((config) => config.accuracy), gap, colour(0), true, "emulated"),
      ], layoutOf({
        height: Math.round(24 * at + 120), minwidth: labelWidth(model.configs) + 330,
        margin: { l: 60, r: 62, t: 58, b: 50 },
        shapes: shapes, annotations: annotations,
        xaxis: { title: { text: "test accuracy (%)", standoff: 8 }, range: range, ticksuffix: " %", showline: true },
        yaxis: { range: [at - 0.4, -0.6], tickvals: y, ticktext: rows.map(rowLabel), showgrid: false, showline: false, ticks: "", ticklabelstandoff: 6 },
      }));
      noteBelow(byId("datapaths-" + number + "-note"), { configs: rows }, range[0], true, null);
    });
  }

  // ---- heat maps
  const CIVIDIS = [[0, "#00224e"], [0.125, "#123570"], [0.25, "#3b496c"], [0.375, "#575d6d"], [0.5, "#707173"], [0.625, "#8a8678"], [0.75, "#a59c74"], [0.875, "#c3b369"], [1, "#fee838"]];
  const SHARES = {
    light: [[0, "#fdf3e7"], [0.35, "#fbc98d"], [0.65, "#ec8a3a"], [0.85, "#c25405"], [1, "#6b2a00"]],
    dark: [[0, "#232b33"], [0.35, "#573a1c"], [0.65, "#a35a10"], [0.85, "#e69022"], [1, "#ffdf9e"]],
  };
  const SHARE_TICKS = [-3, -2, -1, 0, 1, 2];
  const SHARE_NAMES = ["≤ 0.001 %", "0.01 %", "0.1 %", "1 %", "10 %", "100 %"];

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

  function drawHeat(kind) {
    const field = kind === "layers" ? "sqnr_db" : kind;
    const low = view.sqnr_limits[0];
    const high = view.sqnr_limits[1];
    view.models.forEach((model, number) => {
      const element = byId(kind + "-" + number);
      if (!element) return;
      if (!model.layers.length) {
        element.textContent = "No layers of this model were measured.";
        return;
      }
      const value = (cell) => {
        if (!cell || cell[field] === null) return null;
        return field === "sqnr_db" ? cell.sqnr_db : Math.log10(Math.max(100 * cell[field], 1e-3));
      };
      const z = model.cells.map((row) => row.map(value));
      const hover = model.cells.map((row, i) => row.map((cell, j) => {
        const layer = model.layers[j];
        const head = "<b>" + plain(layer.name) + "</b> (" + plain(layer.op) + ")<br>" + plain(model.configs[i].label);
        if (!cell) return head + "<br>not measured";
        return head +
          "<br>SQNR " + (cell.exact ? "exact" : cell.sqnr_db === null ? "–" : cell.sqnr_db.toFixed(1) + " dB") +
          (cell.max_error === null ? "" : "<br>largest absolute error " + cell.max_error.toPrecision(3)) +
          (cell.saturated === null ? "" : "<br>saturated " + smallShare(cell.saturated) + " %, flushed " + smallShare(cell.flushed) + " %") +
          "<br>" + cell.words.toLocaleString("en") + " words";
      }));
      const shares = field !== "sqnr_db";
      const scale = shares ? SHARES[dark() ? "dark" : "light"] : CIVIDIS;
      const ends = shares ? [-3, 2] : [low, high];
      const labels = { x: [], y: [], text: [], colours: [] };
      model.cells.forEach((row, i) => row.forEach((cell, j) => {
        const at = z[i][j];
        labels.x.push(j);
        labels.y.push(i);
        if (at === null) {
          labels.text.push(cell && !shares && cell.exact ? "exact" : "–");
          labels.colours.push(ink().soft);
        } else {
          labels.text.push(shares ? smallShare(cell[field]) : cell.sqnr_db.toFixed(1).replace("-", MINUS));
          labels.colours.push(onColour(scale, (at - ends[0]) / (ends[1] - ends[0])));
        }
      }));
      const columnWidth = Math.max.apply(null, [48].concat(model.layers.map((layer) => 14 + Math.max(8 * Math.min(layer.name.length, 18), 7 * Math.min(layer.op.length, 20)))));
      const separators = [];
      model.configs.forEach((config, i) => {
        if (i && config.bits !== model.configs[i - 1].bits) {
          separators.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: i - 0.5, y1: i - 0.5, line: { color: ink().card, width: 5 } });
        }
      });
      put(element, [
        {
          type: "heatmap", z: z, xgap: 2, ygap: 2,
          colorscale: scale, zmin: ends[0], zmax: ends[1],
          hoverinfo: "text", hovertext: hover, hoverongaps: true,
          colorbar: Object.assign(
            { thickness: 12, outlinewidth: 0, len: Math.min(1, 190 / (26 * model.configs.length)), lenmode: "fraction", y: 1, yanchor: "top", tickfont: { size: 11.5 }, xpad: 12 },
            model.configs.length < 8 ? { len: 1 } : {},
            shares ? { tickvals: SHARE_TICKS, ticktext: SHARE_NAMES } : { ticksuffix: " dB", nticks: 6 },
          ),
        },
        { type: "scatter", mode: "text", x: labels.x, y: labels.y, text: labels.text, textfont: { size: 12, color: labels.colours }, hoverinfo: "skip" },
      ], layoutOf({
        height: 26 * model.configs.length + 90, minwidth: labelWidth(model.configs) + 110 + columnWidth * model.layers.length,
        margin: { l: 60, r: 20, t: 76, b: 12 },
        plot_bgcolor: ink().blank,
        shapes: separators,
        xaxis: {
          side: "top", range: [-0.5, model.layers.length - 0.5], tickvals: model.layers.map((layer, j) => j),
          ticktext: model.layers.map((layer) => plain(layer.name.length > 18 ? "…" + layer.name.slice(-17) : layer.name) + (layer.op ? "<br><span style='font-size:11px'>" + plain(layer.op.length > 20 ? layer.op.slice(0, 19) + "…" : layer.op) + "</span>" : "")),
          showgrid: false, showline: false, ticks: "", tickangle: model.layers.length > 9 ? -35 : 0,
        },
        yaxis: { range: [model.configs.length - 0.5, -0.5], tickvals: model.configs.map((config, i) => i), ticktext: model.configs.map(rowLabel), showgrid: false, showline: false, ticks: "", ticklabelstandoff: 6 },
      }));
    });
  }

  function drawAll() {
    drawLegend();
    drawKey();
    drawWidth();
    drawDatapaths();
    drawHeat("layers");
    drawHeat("saturated");
    drawHeat("flushed");
  }

  // A range that hides the differences of interest starts near float32, and says how much it leaves out.
  function startNear(trained) {
    const range = axisRange("all", trained);
    return view.models.some((model) => model.float) && range[1] - range[0] > 16 ? "near" : "all";
  }
  byId("width-axis").value = startNear(false);
  byId("datapaths-axis").value = startNear(true);
  ["width-axis", "width-band", "width-seeds"].forEach((id) => byId(id).addEventListener("change", drawWidth));
  ["datapaths-axis", "datapaths-bits"].forEach((id) => byId(id).addEventListener("change", drawDatapaths));

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

  // ---------------------------------------------------------------------------------------------- table
  const body = byId("points-table").tBodies[0];
  const rows = Array.from(body.rows);
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const filters = all("[data-filter]");

  function filter() {
    const needle = byId("filter-text").value.trim().toLowerCase();
    let count = 0;
    rows.forEach((row, index) => {
      const keep = texts[index].includes(needle) && filters.every((select) => !select.value || row.dataset[select.dataset.filter] === select.value);
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
  all("th[data-sort]", byId("points-table")).forEach((head) => {
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
      all("th[aria-sort]", byId("points-table")).forEach((other) => other.removeAttribute("aria-sort"));
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

  // ---------------------------------------------------------------------------------------------- copying
  function copied(button, done) {
    button.textContent = done ? "Copied" : "Select it";
    byId("status").textContent = done ? "Command copied" : "Copying was refused; the command is selected";
    setTimeout(() => (button.textContent = "Copy"), 1600);
  }
  function selectAndCopy(button, code) {
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

  drawAll();
  // The charts have moved what follows them since the browser went to the address's section.
  const target = location.hash.length > 1 && byId(location.hash.slice(1));
  if (target) target.scrollIntoView();
})();
