// Draws the charts and serves the controls of the report page. All statistics come from the page's data;
// nothing is computed here but positions.
(function () {
  "use strict";

  const view = JSON.parse(document.getElementById("view").textContent);
  const results = JSON.parse(document.getElementById("results").textContent);
  const points = new Map(results.points.map((point) => [point.id, point]));
  const {
    byId, all, SYMBOLS, DASHES, MINUS, CIVIDIS, plain, percent, signed, dark, ink, colour, faded, layoutOf, put, symbolPath, swatch, onColour,
  } = page;
  const NEAR_POINTS = 5; // pp below float32 that the axis "near float32" reaches
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

  // ---- accuracy against width
  const shown = new Set(view.series.map((name, index) => index));
  const widths = [];
  view.models.forEach((model) => model.configs.forEach((config) => widths.includes(config.bits) || widths.push(config.bits)));
  widths.sort((a, b) => a - b);

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
  const SHARES = {
    light: [[0, "#fdf3e7"], [0.35, "#fbc98d"], [0.65, "#ec8a3a"], [0.85, "#c25405"], [1, "#6b2a00"]],
    dark: [[0, "#232b33"], [0.35, "#573a1c"], [0.65, "#a35a10"], [0.85, "#e69022"], [1, "#ffdf9e"]],
  };
  const SHARE_TICKS = [-3, -2, -1, 0, 1, 2];
  const SHARE_NAMES = ["≤ 0.001 %", "0.01 %", "0.1 %", "1 %", "10 %", "100 %"];

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

  page.table(byId("points-table"));
  page.start(drawAll);
})();
