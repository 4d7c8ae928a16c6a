"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const smoothing = document.getElementById("smoothing");
const log = document.getElementById("log");
const moment = document.getElementById("moment");
const LONGEST_NAME = 24; // of a run, in legends
const LONGEST_CLASS = 14;
const MOST_COUNTED = 20; // classes up to which the confusion matrix shows its counts

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
// Plotly reads a little HTML in texts.
const escaped = (text) => text.replace(/[&<>]/g, (sign) => ({"&": "&amp;", "<": "&lt;", ">": "&gt;"})[sign]);
const clipped = (text, longest) => escaped(text.length > longest ? text.slice(0, longest - 1) + "…" : text);

function draw(div, traces, layout) {
  const axis = {gridcolor: color("line"), zerolinecolor: color("line"), linecolor: color("line")};
  Plotly.react(div, traces, {
    ...layout,
    xaxis: {...axis, ...layout.xaxis},
    yaxis: {...axis, ...layout.yaxis},
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: {color: color("text"), size: 12},
    hoverlabel: {bgcolor: color("card"), bordercolor: color("line"), font: {color: color("text")}},
    margin: {l: 58, r: 8, t: 8, b: 36},
  }, {responsive: true, displaylogo: false});
}

/** The mean of all values so far, that of the newest weighing most; `weight` is what the next one leaves to them. */
function smoothed(values, weight) {
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + value;
    total = weight * total + 1;
    return sum / total;
  });
}

/** From 0 on, where all values are one, around which Plotly shows ±1 however small it is; else as Plotly likes. */
function rangeOf(values) {
  const [value, ...others] = new Set(values.filter((each) => each !== null));
  return value && !others.length && !log.checked ? [0, 2 * value] : undefined;
}

function drawCurve(div) {
  const x = document.querySelector("input[name=x]:checked").value;
  const weight = div.dataset.series === "curves" ? Number(smoothing.value) : 0;
  const curves = data[div.dataset.series].map((ofRun) => ofRun[div.dataset.metric]);
  const traces = curves.flatMap((curve, run) => {
    if (!curve) return [];
    const trace = {
      x: curve[x], y: smoothed(curve.value, weight), name: clipped(data.runs[run], LONGEST_NAME), connectgaps: true,
      mode: curve.spread || curve.value.length < 3 ? "lines+markers" : "lines",
      line: {color: color(`run-${run % 8}`), width: 2},
    };
    if (curve.spread) trace.error_y = {array: curve.spread, visible: curve.spread.some((value) => value !== null)};
    const raw = {...trace, y: curve.value, opacity: 0.25, showlegend: false, hoverinfo: "skip"};
    return weight ? [raw, trace] : [trace];
  });
  draw(div, traces, {
    xaxis: {title: {text: x}},
    yaxis: {type: log.checked ? "log" : "linear", range: rangeOf(curves.flatMap((curve) => curve?.value ?? []))},
    hovermode: "x unified",
    showlegend: data.runs.length > 1,
    legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0},
    uirevision: x + log.checked,
  });
}

function drawConfusion(div) {
  const counts = data.confusion[div.dataset.run];
  const names = data.classes[div.dataset.run].map((name) => clipped(name, LONGEST_CLASS));
  const labels = names.map((name, index) => (names.indexOf(name) === names.lastIndexOf(name) ? name : `${name} (${index})`));
  draw(div, [{
    type: "heatmap", x: labels, y: labels, text: counts,
    z: counts.map((row) => row.map((count) => count / Math.max(1, row.reduce((sum, each) => sum + each)))),
    zmin: 0, zmax: 1, showscale: false, colorscale: [[0, color("card")], [1, color("accent")]],
    texttemplate: counts.length <= MOST_COUNTED ? "%{text}" : "",
    hovertemplate: "label %{y}<br>prediction %{x}<br>%{text} images, %{z:.1%}<extra></extra>",
  }], {
    xaxis: {type: "category", title: {text: "prediction"}, automargin: true, showgrid: false},
    yaxis: {type: "category", title: {text: "label"}, automargin: true, showgrid: false, autorange: "reversed"},
  });
}

function drawCurves() {
  document.querySelectorAll(".plot").forEach(drawCurve);
}

function drawAll() {
  drawCurves();
  document.querySelectorAll(".confusion").forEach(drawConfusion);
}

const moments = [...new Set(data.grids.flat().map((grid) => grid.kimg))].sort((a, b) => a - b);

/** Of each run the newest picture at the slider's moment, or its first. */
function showSamples() {
  const kimg = moments[moment.value];
  moment.nextElementSibling.value = `kimg ${kimg}`;
  for (const image of document.querySelectorAll("img.grid")) {
    const grids = data.grids[image.dataset.run];
    const grid = grids.findLast((each) => each.kimg <= kimg) ?? grids[0];
    image.src = grid.source;
    image.parentElement.querySelector(".when").textContent = `step ${grid.step}, kimg ${grid.kimg}`;
  }
}

if (moment) {
  moment.max = moments.length - 1;
  moment.value = moment.max;
  moment.addEventListener("input", showSamples);
  showSamples();
}
document.querySelector(".toolbar").addEventListener("input", drawCurves);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
