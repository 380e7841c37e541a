// Draws the charts and serves the controls of the page of a study. What it claims was worked out before; only the front of
// two freely chosen axes is found here.
(function () {
  "use strict";

  const view = JSON.parse(document.getElementById("view").textContent);
  const results = JSON.parse(document.getElementById("results").textContent);
  const points = new Map(results.points.map((point) => [point.id, point]));
  const metrics = new Map(view.metrics.map((metric) => [metric.name, metric]));
  const {
    byId, all, SYMBOLS, DASHES, MINUS, CIVIDIS, plain, percent, ink, colour, faded, layoutOf, put, symbolPath, swatch, onColour,
  } = page;
  const NEAR = 5; // pp below the best accuracy that "near the best" reaches
  const PATTERNS = ["", "/", ".", "x", "\\", "-", "+", "|"];
  const BASELINES = { float32: "star", int: "square", fp8: "diamond" };
  const selected = new Set();
  const hidden = new Set(); // groups whose marks are not shown

  const metricOf = (name) => metrics.get(name) || { name: name, title: name, unit: "", direction: "minimize" };
  // Without noise there is no ratio to draw.
  const has = (point, name) => point.values[name] !== null && point.values[name] !== undefined && !(name === "sqnr_db" && point.values[name] >= view.exact_db);
  const scaled = (value, name) => (view.shares.includes(name) ? 100 * value : value);
  function shown(value, name) {
    if (value === null || value === undefined) return "–";
    if (name === "accuracy") return percent(value);
    if (name === "drop") return (100 * value).toFixed(2).replace("-", MINUS);
    if (name === "sqnr_db") return value.toFixed(1).replace("-", MINUS);
    const whole = Number.isInteger(value) || Math.abs(value) >= 1000;
    return (whole ? Math.round(value).toLocaleString("en").replace(/,/g, "\u202f") : String(Number(value.toPrecision(4)))).replace("-", MINUS);
  }
  function withUnit(value, name) {
    const unit = metricOf(name).unit;
    return shown(value, name) + (unit && unit !== "%" && value !== null && value !== undefined ? " " + unit : "");
  }
  function title(name) {
    const metric = metricOf(name);
    return metric.title + (metric.unit ? " (" + metric.unit + ")" : "");
  }
  const short = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);
  const usable = (point) => point.state === "complete" || point.state === "infeasible";

  // ---------------------------------------------------------------------------------------------- groups
  function grouping() {
    const choice = byId("front-group").value;
    return choice === "" ? null : view.groups[Number(choice)];
  }
  // The place of a point's mark; -1 where its parameter is not set.
  function groupOf(point, group) {
    if (!group) return 0;
    const value = point.parameters[group.name];
    return value === undefined || value === null ? -1 : group.values.indexOf(pythonText(value));
  }
  // Values are compared as Python wrote them.
  function pythonText(value) {
    if (value === true) return "True";
    if (value === false) return "False";
    return String(value);
  }
  function groupNames(group) {
    return group ? group.values.map((value) => group.name + " = " + value) : ["LNS"];
  }
  // A mark's number; the last ones are for what has no value of the parameter.
  const tone = (index) => (index < 0 ? ink().soft : colour(index));
  const LNS_SYMBOLS = ["circle", "triangle-up", "triangle-down", "cross", "x", "pentagon", "diamond", "square"];
  const symbol = (index) => (index < 0 ? "circle" : LNS_SYMBOLS[index % 8]);

  function mark(index, filled) {
    const path = symbolPath(SYMBOLS.indexOf(symbol(index)), 8, 7, 5);
    return { d: path, fill: filled ? tone(index) : "none", stroke: tone(index), "stroke-width": 1.5 };
  }
  function baselinePath(kind) {
    if (kind === "float32") {
      let d = "";
      for (let i = 0; i < 10; i += 1) {
        const r = i % 2 ? 2.6 : 6.4;
        d += (i ? "L" : "M") + (8 + r * Math.sin((Math.PI * i) / 5)).toFixed(1) + " " + (7 - r * Math.cos((Math.PI * i) / 5)).toFixed(1);
      }
      return d + "Z";
    }
    return symbolPath(SYMBOLS.indexOf(BASELINES[kind]), 8, 7, 5);
  }
  function drawLegend() {
    const legend = byId("front-legend");
    const focused = all("button", legend).indexOf(document.activeElement);
    legend.replaceChildren();
    const group = grouping();
    const present = results.points.filter((point) => point.kind === "lns");
    groupNames(group).concat(present.some((p) => groupOf(p, group) < 0) ? ["not set"] : []).forEach((name, place) => {
      const index = name === "not set" && group && place === group.values.length ? -1 : place;
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", String(!hidden.has(index)));
      button.title = "Show or hide these points";
      button.append(swatch([mark(index, true)], 16), document.createTextNode(name));
      button.addEventListener("click", function () {
        if (!hidden.delete(index)) hidden.add(index);
        drawLegend();
        drawFront();
        drawBits();
      });
      legend.append(button);
    });
    Object.keys(BASELINES).forEach((kind) => {
      if (!results.points.some((point) => point.kind === kind)) return;
      const span = document.createElement("span");
      span.className = "fixed";
      span.append(swatch([{ d: baselinePath(kind), fill: ink().card, stroke: ink().text, "stroke-width": 1.4 }], 16), document.createTextNode(kind));
      legend.append(span);
    });
    if (focused >= 0 && all("button", legend)[focused]) all("button", legend)[focused].focus();
  }

  // ---------------------------------------------------------------------------------------------- hovering
  function hover(point, first) {
    const names = view.metrics.map((metric) => metric.name).filter((name) => has(point, name));
    const range = (name) => (point.ranges[name] ? " (" + shown(point.ranges[name][0], name) + " – " + shown(point.ranges[name][1], name) + ")" : "");
    return "<b>" + plain(short(point.label, 60)) + "</b> · " + point.id + (point.pareto ? " · on the front" : "") + (first ? "<br>" + first : "") +
      names.map((name) => "<br>" + plain(metricOf(name).title) + " " + withUnit(point.values[name], name) + range(name)).join("") +
      (point.state === "infeasible" ? "<br>breaks a constraint" + (point.reason ? ": " + plain(short(point.reason, 60)) : "") : "");
  }

  // ---------------------------------------------------------------------------------------------- fronts
  function frontOf(list, x, y) {
    const cost = (point, name) => (metricOf(name).direction === "maximize" ? -1 : 1) * point.values[name];
    const kept = [];
    list.slice().sort((a, b) => cost(a, x) - cost(b, x) || cost(a, y) - cost(b, y) || a.id - b.id).forEach((point) => {
      if (!kept.length || cost(point, y) < cost(kept[kept.length - 1], y)) kept.push(point);
    });
    return kept.sort((a, b) => a.values[x] - b.values[x]);
  }
  function pad(values, log) {
    const list = values.filter((value) => Number.isFinite(value) && (!log || value > 0)).map((value) => (log ? Math.log10(value) : value));
    if (!list.length) return undefined;
    const low = Math.min.apply(null, list), high = Math.max.apply(null, list);
    const room = 0.07 * (high - low) || (log ? 0.1 : Math.max(Math.abs(high) * 0.05, 0.5));
    return [low - room, high + 1.4 * room];
  }
  // Of a logarithmic axis: the more digits of each decade, the fewer decades there are.
  function ticks(list, name, log) {
    if (!log || !list.length) return { nticks: 9 };
    const values = list.map((point) => point.values[name]);
    const low = Math.min.apply(null, values), high = Math.max.apply(null, values);
    const decades = Math.log10(high / low);
    const digits = decades > 3.2 ? [1] : decades > 1.4 ? [1, 2, 5] : decades > 0.7 ? [1, 1.5, 2, 3, 4, 5, 7] : [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9];
    const at = [];
    for (let power = Math.floor(Math.log10(low)) - 1; power <= Math.ceil(Math.log10(high)); power += 1) {
      digits.forEach((digit) => at.push(digit * Math.pow(10, power)));
    }
    const text = (value) => (value >= 1e6 ? value / 1e6 + " M" : value >= 1e3 ? (value / 1e3).toLocaleString("en") + " k" : String(Number(value.toPrecision(3))));
    return { tickvals: at, ticktext: at.map(text) };
  }
  // Where each baseline's name stands, so that names of near ones do not lie on each other.
  function namePlaces(list, x, y, rangeX, rangeY, logX, logY) {
    const at = (point, name, range, log) => {
      const value = log ? Math.log10(point.values[name]) : scaled(point.values[name], name);
      return range ? (value - range[0]) / (range[1] - range[0] || 1) : 0;
    };
    const ways = ["middle right", "top center", "bottom center", "middle left"];
    const placed = [];
    return list.map((point) => {
      const here = [at(point, x, rangeX, logX), at(point, y, rangeY, logY)];
      const beside = (sign) => list.some((other) => {
        const far = sign * (at(other, x, rangeX, logX) - here[0]);
        return other !== point && far >= 0 && far < 0.12 && Math.abs(at(other, y, rangeY, logY) - here[1]) < 0.03;
      });
      const taken = placed.filter((other) => Math.abs(other.here[0] - here[0]) < 0.17 && Math.abs(other.here[1] - here[1]) < 0.045).map((other) => other.way).concat(beside(1) ? ["middle right"] : [], beside(-1) ? ["middle left"] : []);
      // A name at the right edge would leave the chart.
      const way = ways.slice(here[0] > 0.86 ? 1 : 0).find((name) => !taken.includes(name)) || ways[0];
      placed.push({ here: here, way: way });
      return way;
    });
  }
  // Names at the edge of a chart of so many pixels, moved so that none lies on another.
  function apart(annotations, range, pixels) {
    if (!range) return;
    let last = -Infinity;
    annotations.sort((a, b) => b.y - a.y).forEach((note) => {
      const at = ((range[1] - note.y) / (range[1] - range[0] || 1)) * pixels;
      const moved = Math.max(at, last + 14);
      note.yshift = at - moved;
      last = moved;
    });
  }
  function errors(list, name, thin) {
    const ends = list.map((point) => point.ranges[name] || [point.values[name], point.values[name]]);
    return {
      type: "data", symmetric: false, thickness: 1, width: 3, color: thin,
      array: ends.map((end, i) => scaled(end[1] - list[i].values[name], name)),
      arrayminus: ends.map((end, i) => scaled(list[i].values[name] - end[0], name)),
    };
  }
  function drawFront() {
    const x = byId("front-x").value, y = byId("front-y").value;
    const group = grouping();
    const ranges = byId("front-ranges").checked;
    const near = byId("front-near").checked;
    const shade = ink();
    const everything = results.points.filter((point) => usable(point) && has(point, x) && has(point, y));
    const logOf = (name) => byId("front-log").checked && metricOf(name).direction === "minimize" && everything.length > 0 && everything.every((point) => point.values[name] > 0);
    const logX = logOf(x), logY = logOf(y);
    view.nets.forEach((net, number) => {
      const element = byId("front-" + number);
      const mine = net.points.map((id) => points.get(id)).filter((point) => usable(point) && has(point, x) && has(point, y));
      const lns = mine.filter((point) => point.kind === "lns" && !hidden.has(groupOf(point, group)));
      const baselines = mine.filter((point) => point.kind !== "lns");
      const traces = [];
      const line = frontOf(lns.filter((point) => point.state === "complete"), x, y);
      // Between two points of the front, what can be had is the worse of the two in each axis.
      const better = metricOf(x).direction === "minimize" ? "hv" : "vh";
      traces.push({
        x: line.map((p) => scaled(p.values[x], x)), y: line.map((p) => scaled(p.values[y], y)), type: "scatter", mode: "lines",
        line: { color: shade.soft, width: 1.6, shape: better }, hoverinfo: "skip",
      });
      const places = Array.from(new Set(lns.map((point) => groupOf(point, group)))).sort((a, b) => a - b);
      places.forEach((index) => {
        [false, true].forEach((front) => {
          const list = lns.filter((point) => groupOf(point, group) === index && point.pareto === front);
          if (!list.length) return;
          const trace = {
            x: list.map((p) => scaled(p.values[x], x)), y: list.map((p) => scaled(p.values[y], y)), type: "scatter", mode: "markers",
            customdata: list.map((p) => p.id),
            marker: {
              symbol: symbol(index) + (front ? "" : "-open"), size: list.map((p) => (selected.has(p.id) ? 16 : front ? 11 : 8)),
              color: tone(index), opacity: list.map((p) => (front || selected.has(p.id) ? 1 : p.state === "infeasible" ? 0.35 : 0.7)),
              line: { color: front ? list.map((p) => (selected.has(p.id) ? shade.text : shade.card)) : tone(index), width: list.map((p) => (selected.has(p.id) ? 3 : front ? 1 : 1.4)) },
            },
            selected: { marker: { opacity: 1 } }, unselected: { marker: { opacity: 1 } },
            hoverinfo: "text", hovertext: list.map((p) => hover(p)),
          };
          if (ranges) {
            trace.error_y = errors(list, y, faded2(index));
            trace.error_x = errors(list, x, faded2(index));
          }
          traces.push(trace);
        });
      });
      const rangeX = pad(everything.map((p) => scaled(p.values[x], x)), logX);
      let rangeY = pad(everything.map((p) => scaled(p.values[y], y)), logY);
      let below = 0;
      if (near && y === "accuracy" && rangeY) {
        const best = Math.max.apply(null, everything.map((p) => 100 * p.values.accuracy));
        if (best - NEAR > rangeY[0]) rangeY = [best - NEAR, Math.min(best + 0.6, 100.3)];
        below = mine.filter((p) => 100 * p.values.accuracy < rangeY[0]).length;
      } else if (y === "accuracy" && rangeY) rangeY[1] = Math.min(rangeY[1], 102);
      if (baselines.length) {
        const trace = {
          x: baselines.map((p) => scaled(p.values[x], x)), y: baselines.map((p) => scaled(p.values[y], y)), type: "scatter", mode: "markers+text",
          text: baselines.map((p) => plain(short(p.label, 18))), textposition: namePlaces(baselines, x, y, rangeX, rangeY, logX, logY), textfont: { size: 12, color: shade.text },
          customdata: baselines.map((p) => p.id), cliponaxis: false,
          marker: { symbol: baselines.map((p) => BASELINES[p.kind]), size: baselines.map((p) => (selected.has(p.id) ? 17 : 12)), color: shade.card, line: { color: shade.text, width: baselines.map((p) => (selected.has(p.id) ? 3.4 : 1.7)) } },
          selected: { marker: { opacity: 1 } }, unselected: { marker: { opacity: 1 } },
          hoverinfo: "text", hovertext: baselines.map((p) => hover(p, "baseline")),
        };
        if (ranges) trace.error_y = errors(baselines, y, shade.soft);
        traces.push(trace);
      }
      // A baseline without the metric across is a line.
      const shapes = [], annotations = [];
      net.baselines.map((id) => points.get(id)).filter((point) => has(point, y) && !has(point, x)).forEach((point) => {
        const at = logY ? Math.log10(point.values[y]) : scaled(point.values[y], y);
        shapes.push({ type: "line", layer: "below", xref: "paper", x0: 0, x1: 1, y0: scaled(point.values[y], y), y1: scaled(point.values[y], y), line: { color: shade.text, width: 1.2, dash: "5px,4px" } });
        annotations.push({ xref: "paper", x: 1, xanchor: "left", xshift: 5, y: at, yanchor: "middle", showarrow: false, text: plain(short(point.label, 12)), font: { size: 11.5, color: shade.text } });
      });
      apart(annotations, rangeY, 470 - 92);
      put(element, traces, layoutOf({
        height: 470, minwidth: 320, margin: { l: 62, r: shapes.length ? 74 : 22, t: 36, b: 56 }, dragmode: "select", clickmode: "event", shapes: shapes, annotations: annotations,
        xaxis: { title: { text: plain(title(x)), standoff: 10 }, type: logX ? "log" : "linear", range: rangeX, showline: true, ...ticks(everything, x, logX) },
        yaxis: { title: { text: plain(title(y)), standoff: 8 }, type: logY ? "log" : "linear", range: rangeY, ...ticks(everything, y, logY) },
      }));
      byId("front-" + number + "-note").textContent =
        (below ? below + " of " + mine.length + " points lie below this axis. " : "") +
        (mine.length ? "" : "No point of this net has both.");
      if (!element.dataset.listens && element.on) {
        element.dataset.listens = "yes";
        element.on("plotly_click", (event) => toggle(event.points.filter((p) => p.customdata !== undefined).slice(0, 1).map((p) => p.customdata)));
        element.on("plotly_selected", function (event) {
          if (!event || !event.points) return;
          const ids = event.points.map((p) => p.customdata).filter((id) => id !== undefined);
          if (ids.length) select(ids, true);
        });
      }
    });
  }
  const faded2 = (index) => (index < 0 ? ink().soft : faded(colour(index), 0.55));

  // ---------------------------------------------------------------------------------------------- bits
  function drawBits() {
    const group = grouping();
    const shade = ink();
    const bitsOf = (point) => view.bits[point.id];
    const there = (point) => usable(point) && has(point, "accuracy");
    const everything = results.points.filter((point) => there(point) && bitsOf(point) !== undefined && bitsOf(point) < 32);
    const widths = Array.from(new Set(everything.map(bitsOf))).sort((a, b) => a - b);
    view.nets.forEach((net, number) => {
      const element = byId("bits-" + number);
      if (!widths.length) {
        element.textContent = "No point has a word width.";
        return;
      }
      const mine = net.points.map((id) => points.get(id)).filter(there);
      const lns = mine.filter((p) => p.kind === "lns" && p.state === "complete" && bitsOf(p) !== undefined && !hidden.has(groupOf(p, group)));
      const bands = [], dots = [], lines = [];
      Array.from(new Set(lns.map((p) => groupOf(p, group)))).sort((a, b) => a - b).forEach((index) => {
        const list = lns.filter((p) => groupOf(p, group) === index);
        const best = widths.map((bits) => list.filter((p) => bitsOf(p) === bits).sort((a, b) => b.values.accuracy - a.values.accuracy || a.id - b.id)[0]).filter(Boolean);
        const others = list.filter((p) => !best.includes(p));
        const ends = best.map((p) => (p.ranges.accuracy || [p.values.accuracy, p.values.accuracy]).map((v) => 100 * v));
        const x = best.map(bitsOf);
        if (best.length > 1) {
          bands.push({ x: x.concat(x.slice().reverse()), y: ends.map((e) => e[1]).concat(ends.map((e) => e[0]).reverse()), type: "scatter", mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: index < 0 ? shade.band : faded(colour(index), 0.14), hoverinfo: "skip" });
        }
        const side = 0.09 * (index - (group ? (group.values.length - 1) / 2 : 0));
        dots.push({ x: others.map((p) => bitsOf(p) + side), y: others.map((p) => 100 * p.values.accuracy), type: "scatter", mode: "markers", marker: { symbol: symbol(index), size: 5, color: tone(index), opacity: 0.45 }, hoverinfo: "text", hovertext: others.map((p) => hover(p)) });
        lines.push({
          x: x, y: best.map((p) => 100 * p.values.accuracy), type: "scatter", mode: "lines+markers",
          line: { color: tone(index), width: 2.2, dash: DASHES[Math.max(index, 0) % DASHES.length] },
          marker: { symbol: symbol(index), size: 10, color: tone(index), line: { color: shade.card, width: 1 } },
          error_y: best.length === 1 ? Object.assign(errors(best, "accuracy", tone(index))) : { visible: false },
          hoverinfo: "text", hovertext: best.map((p) => hover(p, "most accurate of this width")),
        });
      });
      const baselines = mine.filter((p) => p.kind !== "lns");
      const placed = baselines.filter((p) => p.kind !== "float32" && bitsOf(p) !== undefined && bitsOf(p) < 32);
      const shapes = [], annotations = [];
      baselines.filter((p) => !placed.includes(p)).forEach((p) => {
        const y = 100 * p.values.accuracy;
        shapes.push({ type: "line", layer: "below", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: shade.text, width: 1.3, dash: "5px,4px" } });
        annotations.push({ xref: "paper", x: 1, xanchor: "left", xshift: 5, y: y, yanchor: "middle", showarrow: false, text: plain(short(p.label, 10)), font: { size: 11.5, color: shade.text } });
      });
      const ys = lns.concat(placed, baselines).flatMap((p) => (p.ranges.accuracy || [p.values.accuracy]).map((v) => 100 * v));
      const rangeY = pad(ys, false);
      if (rangeY) rangeY[1] = Math.min(rangeY[1], 101);
      apart(annotations, rangeY, 430 - 92);
      // Baselines of one width stand beside each other.
      const offsets = placed.map((p, i) => 0.18 + 0.16 * placed.slice(0, i).filter((q) => bitsOf(q) === bitsOf(p)).length);
      lines.push({
        x: placed.map((p, i) => bitsOf(p) + offsets[i]), y: placed.map((p) => 100 * p.values.accuracy), type: "scatter", mode: "markers", cliponaxis: false,
        marker: { symbol: placed.map((p) => BASELINES[p.kind]), size: 12, color: shade.card, line: { color: shade.text, width: 1.7 } },
        error_y: errors(placed, "accuracy", shade.soft), hoverinfo: "text", hovertext: placed.map((p) => hover(p, "baseline")),
      });
      put(element, bands.concat(dots, lines), layoutOf({
        height: 430, minwidth: 320, margin: { l: 62, r: 66, t: 36, b: 56 }, shapes: shapes, annotations: annotations,
        xaxis: { title: { text: "word width (bits)", standoff: 10 }, range: [widths[0] - 0.5, widths[widths.length - 1] + Math.max(0.7, 0.25 + Math.max.apply(null, offsets.concat([0])))], tickvals: widths, showgrid: false, showline: true },
        yaxis: { title: { text: "accuracy (%)", standoff: 8 }, nticks: 9, range: rangeY },
      }));
    });
  }

  // ---------------------------------------------------------------------------------------------- single points
  // Selected ones; else the front, thinned evenly, and the baselines.
  function rowsOf(net) {
    const chosen = net.points.filter((id) => selected.has(id));
    if (selected.size) return chosen.map((id) => points.get(id));
    const room = Math.max(view.shown_rows - net.baselines.length, 2);
    let front = net.front;
    if (front.length > room) front = Array.from({ length: room }, (_, i) => front[Math.round((i * (front.length - 1)) / (room - 1))]);
    return front.concat(net.baselines).map((id) => points.get(id));
  }
  const rowNames = (rows) => rows.map((p) => plain(short(p.label, 40)) + (p.pareto && selected.size ? " ●" : ""));
  const labelWidth = (rows) => 26 + 7.4 * Math.max.apply(null, [8].concat(rows.map((p) => Math.min(p.label.length, 40))));
  function blank(element, text) {
    if (element.data) Plotly.purge(element);
    element.textContent = text;
  }
  function drawCost() {
    const legend = byId("cost-legend");
    if (!legend) return;
    legend.replaceChildren();
    view.parts.forEach((part, index) => {
      const span = document.createElement("span");
      span.className = "fixed";
      span.append(swatch(patternSwatch(index), 22), document.createTextNode(part));
      legend.append(span);
    });
    view.nets.forEach((net, number) => {
      const element = byId("cost-" + number);
      const rows = rowsOf(net).filter((p) => Object.keys(p.breakdown).length);
      if (!rows.length) return blank(element, "No cost of these points was broken down.");
      if (!element.data) element.textContent = "";
      const names = rowNames(rows);
      const total = rows.map((p) => view.parts.reduce((sum, part) => sum + (p.breakdown[part] || 0), 0));
      // One bar many times longer than all others would hide what they are made of: it leaves the chart.
      const sums = total.slice().sort((a, b) => a - b);
      const most = sums[sums.length - 1];
      const second = sums.length > 1 ? sums[sums.length - 2] : most;
      const end = most > 4 * second && second > 0 ? 1.25 * second : 1.16 * (most || 1);
      byId("cost-" + number + "-note").textContent = end < most ? "A bar that leaves the chart is longer than it is drawn; its length stands at its end." : "";
      put(element, view.parts.map((part, index) => ({
        type: "bar", orientation: "h", y: rows.map((p, i) => i), x: rows.map((p) => p.breakdown[part] || 0),
        marker: { color: colour(index), line: { color: ink().card, width: 1 }, pattern: { fillmode: "overlay", shape: PATTERNS[index % 8], fgcolor: ink().card, fgopacity: 0.75, size: 6, solidity: 0.25 } },
        hoverinfo: "text",
        hovertext: rows.map((p, i) => "<b>" + names[i] + "</b><br>" + plain(part) + " " + shown(p.breakdown[part] || 0) + " of " + shown(total[i]) + " transistors (" + ((100 * (p.breakdown[part] || 0)) / (total[i] || 1)).toFixed(1) + " %)"),
      })), layoutOf({
        height: 27 * rows.length + 110, minwidth: labelWidth(rows) + 260, margin: { l: 60, r: 64, t: 40, b: 52 }, barmode: "stack", bargap: 0.28,
        annotations: total.map((sum, i) => ({ x: Math.min(sum, end), y: i, xanchor: "left", xshift: 4, yanchor: "middle", showarrow: false, text: (sum > end ? "▸ " : "") + shown(sum), font: { size: 11.5, color: ink().text } })),
        xaxis: { title: { text: "transistors", standoff: 8 }, range: [0, end], showline: true, tickformat: ",~r", nticks: 8 },
        yaxis: { range: [rows.length - 0.5, -0.5], tickvals: rows.map((p, i) => i), ticktext: names, showgrid: false, showline: false, ticks: "", ticklabelstandoff: 6 },
      }));
    });
  }
  function patternSwatch(index) {
    const marks = ["", "M2 12L8 2M8 12L14 2M14 12L20 2", "M5 5h1.5M11 5h1.5M17 5h1.5M5 9.5h1.5M11 9.5h1.5M17 9.5h1.5", "M3 3L9 11M9 3L3 11M12 3L18 11M18 3L12 11", "M2 2L8 12M8 2L14 12M14 2L20 12", "M1 5H21M1 9H21", "M6 2V12M15 2V12M1 7H21", "M6 2V12M11 2V12M16 2V12"];
    return [{ d: "M1 2H21V12H1Z", fill: colour(index) }, { d: marks[index % 8], stroke: ink().card, "stroke-width": 1.6, fill: "none" }];
  }
  function drawLayers() {
    const low = view.sqnr_limits[0], high = view.sqnr_limits[1];
    view.nets.forEach((net, number) => {
      const element = byId("layers-" + number);
      if (!element) return;
      const rows = rowsOf(net).filter((p) => p.layers.length);
      if (!rows.length) return blank(element, "No layers of these points were measured.");
      if (!element.data) element.textContent = "";
      const z = rows.map((p) => net.layers.map((name) => {
        const layer = p.layers.find((item) => item.name === name);
        return layer ? layer.sqnr_db : null;
      }));
      const names = rowNames(rows);
      const labels = { x: [], y: [], text: [], colours: [] };
      z.forEach((row, i) => row.forEach((value, j) => {
        labels.x.push(j);
        labels.y.push(i);
        labels.text.push(value === null ? "–" : value.toFixed(1).replace("-", MINUS));
        labels.colours.push(value === null ? ink().soft : onColour(CIVIDIS, (value - low) / (high - low)));
      }));
      const slanted = net.layers.length > 7; // names that stand aslant need no width of their own
      const columnWidth = slanted ? 50 : Math.max.apply(null, [48].concat(net.layers.map((name) => 12 + 6.8 * Math.min(name.length, 18))));
      put(element, [
        {
          type: "heatmap", z: z, xgap: 2, ygap: 2, colorscale: CIVIDIS, zmin: low, zmax: high, hoverinfo: "text",
          hovertext: z.map((row, i) => row.map((value, j) => "<b>" + plain(net.layers[j]) + "</b><br>" + names[i] + "<br>" + (value === null ? "not measured" : "SQNR " + value.toFixed(1) + " dB"))),
          colorbar: { thickness: 12, outlinewidth: 0, ticksuffix: " dB", nticks: 6, tickfont: { size: 11.5 } },
        },
        { type: "scatter", mode: "text", x: labels.x, y: labels.y, text: labels.text, textfont: { size: 12, color: labels.colours }, hoverinfo: "skip" },
      ], layoutOf({
        height: 26 * rows.length + 110, minwidth: labelWidth(rows) + 100 + columnWidth * net.layers.length, margin: { l: 60, r: 20, t: 86, b: 12 }, plot_bgcolor: ink().blank,
        xaxis: { side: "top", range: [-0.5, net.layers.length - 0.5], tickvals: net.layers.map((_, j) => j), ticktext: net.layers.map((name) => plain(name.length > 18 ? "…" + name.slice(-17) : name)), showgrid: false, showline: false, ticks: "", tickangle: slanted ? -35 : 0 },
        yaxis: { range: [rows.length - 0.5, -0.5], tickvals: rows.map((_, i) => i), ticktext: names, showgrid: false, showline: false, ticks: "", ticklabelstandoff: 6 },
      }));
    });
  }

  // ---------------------------------------------------------------------------------------------- Δ tables, codes
  function drawDelta() {
    if (!byId("delta-table")) return;
    const choice = byId("delta-table").value;
    const shade = ink();
    const list = results.delta_tables.map((table, index) => [table, index]).filter((item) => choice === "" || String(item[1]) === choice);
    const legend = byId("delta-legend");
    legend.replaceChildren();
    const line = (index) => ({ color: colour(index), width: 2, dash: DASHES[index % DASHES.length], shape: "hv" });
    list.forEach((item) => {
      const span = document.createElement("span");
      span.className = "fixed";
      const dash = DASHES[item[1] % DASHES.length];
      span.append(swatch([{ d: "M0 7H36", stroke: colour(item[1]), "stroke-width": 2, "stroke-dasharray": dash === "solid" ? "" : dash.replace(/px/g, "") }], 36), document.createTextNode(item[0].label));
      legend.append(span);
    });
    const text = (item, i) => "<b>" + plain(item[0].label) + "</b><br>d = " + item[0].d[i] + "<br>made " + item[0].approximation[i] + "<br>exact " + (item[0].exact[i] === null ? "–" : Number(item[0].exact[i].toPrecision(6))) + "<br>error " + (item[0].ulp[i] === null ? "–" : String(Number(item[0].ulp[i].toPrecision(3))).replace("-", MINUS)) + " ulp";
    // Tables of several resolutions lie on one curve only over octaves.
    const octaves = list.length > 1 && list.every((item) => item[0].gamma);
    const unit = (item) => (octaves ? item[0].gamma : 1);
    const over = (item, values) => values.map((value) => (value === null ? null : value / unit(item)));
    const few = list.length === 1 && list[0][0].d.length <= 64;
    const trace = (item, field) => ({
      x: over(item, item[0].d), y: field === "ulp" ? item[0].ulp : over(item, item[0][field]), type: "scatter", mode: few ? "lines+markers" : "lines", line: line(item[1]),
      marker: { symbol: SYMBOLS[item[1] % 8], size: 5, color: colour(item[1]) }, hoverinfo: "text", hovertext: item[0].d.map((_, i) => text(item, i)),
    });
    const exact = list.map((item) => ({ x: over(item, item[0].d), y: over(item, item[0].exact), type: "scatter", mode: "lines", line: { color: shade.soft, width: 5 }, opacity: 0.35, hoverinfo: "skip" }));
    const axes = { height: 380, minwidth: 320, margin: { l: 56, r: 16, t: 36, b: 52 } };
    const across = { title: { text: octaves ? "d (octaves)" : "d (codes)", standoff: 8 }, showline: true };
    put(byId("delta-values"), exact.concat(list.map((item) => trace(item, "approximation"))), layoutOf(Object.assign({ xaxis: across, yaxis: { title: { text: octaves ? "Δ (octaves)" : "Δ (codes)", standoff: 6 } } }, axes)));
    put(byId("delta-errors"), list.map((item) => trace(item, "ulp")), layoutOf(Object.assign({ xaxis: across, yaxis: { title: { text: "error (ulp)", standoff: 6 }, zeroline: true, zerolinecolor: shade.soft } }, axes)));
  }
  function drawCodes() {
    if (!byId("codes-layer")) return;
    const index = Number(byId("codes-layer").value);
    const record = results.histograms[index];
    const log = byId("codes-log").checked;
    const total = record.counts.reduce((sum, count) => sum + (count || 0), 0);
    const second = record.kind === "activations" ? 1 : 0;
    put(byId("codes-chart"), [{
      type: "bar", x: record.codes, y: record.counts, marker: { color: colour(second), line: { width: 0 } },
      hoverinfo: "text", hovertext: record.codes.map((code, i) => "code " + code + "<br>" + shown(record.counts[i]) + " words (" + ((100 * (record.counts[i] || 0)) / (total || 1)).toPrecision(3) + " %)"),
    }], layoutOf({
      height: 330, minwidth: 320, margin: { l: 62, r: 16, t: 14, b: 52 }, bargap: 0.06,
      xaxis: { title: { text: "code of " + record.kind, standoff: 8 }, showline: true },
      yaxis: { title: { text: "words", standoff: 8 }, type: log ? "log" : "linear", rangemode: log ? "normal" : "tozero" },
    }));
  }

  // ---------------------------------------------------------------------------------------------- selection
  const table = byId("points-table");
  const boxes = new Map(all("tbody tr", table).map((row) => [Number(row.dataset.id), row.querySelector("input")]));
  const refilter = page.table(table, (row) => !byId("only-selected").checked || selected.has(Number(row.dataset.id)));

  function select(ids, add) {
    if (!add) selected.clear();
    ids.forEach((id) => selected.add(id));
    drawSelection();
  }
  function toggle(ids) {
    ids.forEach((id) => selected.delete(id) || selected.add(id));
    drawSelection();
  }
  function element(name, className, text) {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }
  function copyable(text, what, className) {
    const block = element("p", "block");
    const span = element("span", "command " + (className || ""));
    const code = element("code", "", text);
    code.tabIndex = 0;
    const button = element("button", "copy", "Copy");
    button.type = "button";
    button.setAttribute("aria-label", "Copy the " + what);
    span.append(code, button);
    block.append(span);
    return block;
  }
  const CARDS = 12;
  function drawCards() {
    const cards = byId("cards");
    cards.replaceChildren();
    const ids = Array.from(selected);
    byId("selected-none").hidden = ids.length > 0;
    ids.slice(0, CARDS).forEach((id) => {
      const point = points.get(id);
      const card = element("article", "card");
      const head = element("h3");
      head.append(document.createTextNode(point.label));
      const drop = element("button", "drop", "×");
      drop.type = "button";
      drop.setAttribute("aria-label", "Take point " + id + " out of the selection");
      drop.addEventListener("click", () => toggle([id]));
      head.append(drop);
      const pills = element("p", "pills");
      pills.style.margin = "0 0 .5rem";
      const pill = (text, kind) => pills.append(element("span", "pill " + (kind || ""), text));
      pill("point " + id);
      if (view.nets.length > 1) pill(point.net);
      pill(point.kind);
      if (point.pareto) pill("on the front", "front");
      if (point.state !== "complete") pill(point.state, "bad");
      const body = document.createElement("tbody");
      const row = (name, value) => {
        const line = document.createElement("tr");
        const th = element("th", "", name);
        th.scope = "row";
        line.append(th, element("td", "", value));
        body.append(line);
      };
      view.metrics.forEach((metric) => {
        if (!has(point, metric.name)) return;
        const range = point.ranges[metric.name];
        row(metric.title, withUnit(point.values[metric.name], metric.name) + (range ? " (" + shown(range[0], metric.name) + " – " + shown(range[1], metric.name) + ")" : ""));
      });
      if (point.datapath) row("datapath", point.datapath + (point.fingerprint ? " " + point.fingerprint : ""));
      Object.keys(point.parameters).forEach((name) => row(name, point.parameters[name] === null ? "–" : String(point.parameters[name])));
      if (point.reason) row("reason", point.reason);
      const pairs = element("table", "pairs");
      pairs.append(body);
      card.append(head, pills, pairs);
      if (point.command) card.append(copyable(point.command, "command"));
      if (point.datapath_toml) {
        const details = document.createElement("details");
        details.append(element("summary", "", "The datapath as TOML"), copyable(point.datapath_toml, "TOML", "text"));
        card.append(details);
      }
      cards.append(card);
    });
    if (ids.length > CARDS) cards.append(element("p", "absent", "and " + (ids.length - CARDS) + " more, in the table of points."));
  }
  function drawSelection() {
    boxes.forEach((box, id) => {
      box.checked = selected.has(id);
      const row = box.closest("tr");
      if (box.checked) row.dataset.selected = "";
      else delete row.dataset.selected;
    });
    const text = selected.size ? selected.size + " selected" : "none selected";
    byId("selection-count").textContent = text;
    refilter();
    drawCards();
    drawFront();
    drawCost();
    drawLayers();
  }

  all(".needs-js", table).concat([]).forEach((box) => {
    box.addEventListener("change", () => toggle([Number(box.closest("tr").dataset.id)]));
  });
  byId("select-front").addEventListener("click", () => select(results.points.filter((point) => point.pareto).map((point) => point.id), false));
  all(".select-none").forEach((button) => button.addEventListener("click", () => select([], false)));
  byId("only-selected").addEventListener("change", refilter);
  byId("filter-clear").addEventListener("click", function () {
    byId("only-selected").checked = false;
    refilter();
  });
  ["front-x", "front-y", "front-log", "front-near", "front-ranges"].forEach((id) => byId(id).addEventListener("change", drawFront));
  byId("front-group").addEventListener("change", function () {
    hidden.clear();
    drawLegend();
    drawFront();
    drawBits();
  });
  if (byId("delta-table")) byId("delta-table").addEventListener("change", drawDelta);
  ["codes-layer", "codes-log"].forEach((id) => byId(id) && byId(id).addEventListener("change", drawCodes));

  // An axis that hides the differences of interest starts near the best.
  const accuracies = results.points.filter((p) => usable(p) && has(p, "accuracy")).map((p) => p.values.accuracy);
  byId("front-near").checked = accuracies.length > 0 && Math.max.apply(null, accuracies) - Math.min.apply(null, accuracies) > 0.2;

  page.start(function () {
    drawLegend();
    drawFront();
    drawBits();
    drawCost();
    drawLayers();
    drawDelta();
    drawCodes();
  });
})();
