// Training curves, drawn by uPlot: one picture a panel, bands where there are intervals.

// Okabe and Ito's palette; the seventh is the ink. Dashes tell apart what colours do not.
const LINE_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", ""];
const LINE_COLOURS_DARK = ["#3D9BE0", "#FF7F3F", "#1FC99A", "#E59AC6", "#F0B429", "#8FD0F5", ""];
const DASHES = [[], [7, 4], [2, 3], [10, 4, 2, 4], [4, 6]];
const MOST_BANDS = 6; // of lines in one panel: more bands hide each other, and the lines

function lineStyle(index) {
  const colours = isDark() ? LINE_COLOURS_DARK : LINE_COLOURS;
  const colour = colours[index % colours.length] || variable("--ink");
  return { colour, dash: DASHES[index % DASHES.length] };
}

function lineSample(index) {
  const { colour, dash } = lineStyle(index);
  const line = svg("line", { x1: 0, x2: 30, y1: 5, y2: 5, stroke: colour, "stroke-width": 2.5 });
  if (dash.length) line.setAttribute("stroke-dasharray", dash.join(" "));
  return svg("svg", { viewBox: "0 0 30 10", "aria-hidden": "true" }, line);
}

// Draws all panels into `root`; returns a function that draws them again in new colours.
// `runs`: labels that stand for the same thing in every panel and share one legend.
function drawCurves(root, panels, runs) {
  const charts = [];
  const hidden = new Set();
  const shared = runs.length > 1;

  function legend(labels, className) {
    const entries = labels.map((label, i) => {
      const button = element("button", { type: "button", "aria-pressed": String(!hidden.has(label)) });
      button.append(lineSample(i), label);
      button.addEventListener("click", () => {
        if (!hidden.delete(label)) hidden.add(label);
        button.setAttribute("aria-pressed", String(!hidden.has(label)));
        charts.forEach((chart) => chart.showLines(hidden));
      });
      return button;
    });
    return element("div", { class: `legend ${className}` }, ...entries);
  }

  function draw() {
    charts.splice(0).forEach((chart) => chart.plot.destroy());
    root.replaceChildren();
    if (shared) root.append(legend(runs, "shared"));
    const grid = root.appendChild(element("div", { class: "panels" }));
    for (const panel of panels) {
      const box = grid.appendChild(element("div", { class: "panel" }, element("h3", {}, panel.title)));
      const banded = panel.lines.filter(hasBand).length > MOST_BANDS;
      const note = banded ? `${panel.note}; bands where ${MOST_BANDS} lines or fewer are shown` : panel.note;
      if (note) box.append(element("p", { class: "note" }, note));
      const own = !panel.lines.every((line) => runs.includes(line.label));
      const labels = own ? panel.lines.map((line) => line.label) : runs;
      charts.push(drawPanel(box, panel, labels));
      if (own && labels.length > 1) box.append(legend(labels, ""));
    }
    charts.forEach((chart) => chart.showLines(hidden));
  }
  draw();
  return draw;
}

// One panel. `labels` decides which style a line has.
function drawPanel(box, panel, labels) {
  const steps = [...new Set(panel.lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const data = [steps];
  const series = [{ label: "step" }];
  const bands = [];
  const names = [null]; // the line that each series belongs to
  const index = labels.map(() => null); // the series of each label's line
  for (const line of panel.lines) {
    const style = lineStyle(labels.indexOf(line.label));
    index[labels.indexOf(line.label)] = series.length;
    const few = line.steps.length <= 30;
    const points = { show: few, size: 5, fill: style.colour };
    const look = { stroke: style.colour, width: 2, dash: style.dash, points };
    add(line.estimate, { label: line.label, ...look });
    if (hasBand(line)) {
      const edge = { label: "", width: 0, points: { show: false }, stroke: "transparent" };
      add(line.low, edge);
      add(line.high, edge);
      bands.push({ series: [series.length - 1, series.length - 2], fill: `color-mix(in srgb, ${style.colour} 18%, transparent)` });
    }

    function add(values, options) {
      const at = new Map(line.steps.map((step, i) => [step, values[i]]));
      data.push(steps.map((step) => (at.has(step) ? (at.get(step) ?? undefined) : undefined)));
      series.push(options);
      names.push(line.label);
    }
  }

  const axis = {
    stroke: variable("--faint"),
    font: "11px system-ui, sans-serif",
    grid: { stroke: variable("--rule"), width: 1 },
    ticks: { show: false },
  };
  const readout = element("div", { class: "readout", hidden: "" });
  const plot = new uPlot(
    {
      width: Math.max(200, box.clientWidth - 20),
      height: 200,
      series,
      bands,
      legend: { show: false },
      scales: { x: { time: false }, y: { range: rangeOfShown } },
      axes: [
        { ...axis, size: 26, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000] },
        { ...axis, size: 46, values: (_, ticks) => ticks.map(shortNumber) },
      ],
      cursor: { sync: { key: "step", setSeries: false }, y: false, points: { size: 7 } },
      hooks: { setCursor: [showReadout] },
    },
    data,
    box,
  );
  box.append(readout);
  new ResizeObserver(() => {
    const width = Math.max(200, box.clientWidth - 20);
    if (width !== plot.width) plot.setSize({ width, height: 200 });
  }).observe(box);

  function showReadout(u) {
    // Of synchronised panels, only the one under the pointer says its numbers.
    const here = u.cursor.event != null && u.cursor.left >= 0;
    const rows = [];
    let step = null;
    for (let i = 1; here && i < series.length; i++) {
      const at = u.cursor.idxs[i];
      if (!series[i].label || !u.series[i].show || at == null || data[i][at] === undefined) continue;
      step = step ?? steps[u.cursor.idx];
      const bounded = names[i + 1] === names[i] && data[i + 1]?.[at] !== undefined;
      const bounds = bounded ? ` [${number(data[i + 1][at])}, ${number(data[i + 2][at])}]` : "";
      const when = steps[at] === step ? "" : ` (step ${steps[at]})`;
      const text = `${series[i].label}: ${number(data[i][at])}${bounds}${when}`;
      rows.push(element("div", {}, lineSample(labels.indexOf(names[i])), text));
    }
    readout.hidden = !rows.length;
    if (!rows.length) return;
    readout.replaceChildren(element("div", {}, `step ${step}`), ...rows);
    const left = u.over.offsetLeft + u.root.offsetLeft + u.cursor.left;
    const over = left + readout.offsetWidth + 14 > box.clientWidth;
    readout.style.left = `${Math.max(0, over ? left - readout.offsetWidth - 14 : left + 14)}px`;
    readout.style.bottom = `${box.clientHeight - u.root.offsetTop}px`; // over the title, not the data
  }

  function rangeOfShown(u) {
    const shown = series.map((_, i) => i).filter((i) => i > 0 && u.series[i].show);
    const values = (of) => of.flatMap((i) => data[i]).filter((value) => value !== undefined);
    return shownRange(values(shown.filter((i) => series[i].label)), values(shown.filter((i) => !series[i].label)));
  }

  function showLines(hidden) {
    const shown = panel.lines.filter((line) => hasBand(line) && !hidden.has(line.label)).length;
    for (let i = 1; i < names.length; i++) {
      const show = !hidden.has(names[i]) && (Boolean(series[i].label) || shown <= MOST_BANDS);
      if (plot.series[i].show !== show) plot.setSeries(i, { show });
    }
  }
  return { plot, showLines };
}

function hasBand(line) {
  return line.low.some((value) => value !== null);
}

function extent(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

// The values of the lines with some room, and of the edges of bands what that room shows: an
// interval over two seeds can be many times as wide as all lines together.
function shownRange(values, edges) {
  if (!values.length) return [0, 1];
  const [lowest, highest] = extent(values);
  const [least, most] = extent([...values, ...edges]);
  const room = (highest - lowest || Math.abs(highest) || 1) / 2;
  const [low, high] = [Math.max(least, lowest - room), Math.min(most, highest + room)];
  const margin = (high - low || Math.abs(high) || 1) * 0.08;
  return [low >= 0 && low - margin < 0 ? 0 : low - margin, high + margin];
}

function shortNumber(value) {
  return value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential() : String(Number(value.toPrecision(6)));
}
