// Charts by step: the parts of a step stacked, loss, throughput.
import { $, color, seconds } from "./dom.js";

const HEIGHT = 210, charts = {};
const BANDS = { compute: "compute", waiting: "wait", data: "data", snapshot: "snapshot", checkpoint: "checkpoint", other: "other" };

function axes(format) {
  const one = { stroke: () => color("soft"), grid: { stroke: () => color("line"), width: 1 }, ticks: { stroke: () => color("line") } };
  return [{ ...one }, { ...one, size: 68, ...(format ? { values: (_, splits) => splits.map((v) => v === 0 ? "0" : format(v)) } : {}) }];
}

function make(id, series, { height = HEIGHT, format = null, zero = false } = {}) {
  const target = $(id);
  charts[id]?.destroy();
  charts[id] = new uPlot({
    width: target.clientWidth || 500, height, scales: { x: { time: false }, ...(zero ? { y: { range: (_, low, high) => [0, high * 1.05 || 1] } } : {}) }, axes: axes(format), series: [{ label: "step" }, ...series],
    legend: { markers: { width: 0, fill: (_, i) => series[i - 1]?.ink?.() ?? null } },
  }, [[], ...series.map(() => [])], target);
  return charts[id];
}

// While nobody points at a step the legend tells of the last one.
function feed(id, data) {
  charts[id].setData(data);
  requestAnimationFrame(() => {
    if (charts[id].cursor.idx == null && data[0].length) charts[id].setLegend({ idx: data[0].length - 1 });
  });
}

const line = (label, ink) => ({ label, ink: () => color(ink), stroke: () => color(ink), width: 2, points: { show: false } });

export function showMetrics(metrics) {
  if (!charts["loss-chart"]) {
    make("loss-chart", [line("loss", "accent")]);
    make("rate-chart", [line("tokens/s", "good")]);
  }
  const steps = metrics.map((m) => m.step);
  feed("loss-chart", [steps, metrics.map((m) => m.loss)]);
  feed("rate-chart", [steps, metrics.map((m) => m.tokens_per_second)]);
}

// Each band is drawn from 0 to the sum up to it, the highest first, so that what shows of it is its own.
export function showAccounting(accounting) {
  const names = Object.keys(accounting.bands).filter((name) => accounting.bands[name].some((v) => v > 0));
  const key = names.join(" ");
  if (!charts["accounting-chart"] || charts["accounting-chart"].bandsKey !== key) {
    const made = make("accounting-chart", [...names].reverse().map((name) => band(name)), { height: 270, format: seconds, zero: true });
    made.bandsKey = key;
  }
  let sum = accounting.steps.map(() => 0);
  const tops = names.map((name) => { sum = sum.map((total, i) => total + (accounting.bands[name][i] ?? 0)); return sum; });
  const chart = charts["accounting-chart"];
  chart.bandValues = [...names].reverse().map((name) => accounting.bands[name]);
  feed("accounting-chart", [accounting.steps, ...tops.reverse()]);
  const last = names.map((name) => `${title(name)} ${seconds(accounting.bands[name].at(-1))}`).join(", ");
  $("accounting-chart").setAttribute("aria-label", accounting.steps.length ? `Step ${accounting.steps.at(-1)}: ${last}` : "No summaries yet");
}

const title = (name) => name.startsWith("transfer ") ? `communication ${name.slice(9)}` : name;

function band(name) {
  const ink = () => name.startsWith("transfer ") ? shade(name.slice(9)) : color(BANDS[name] ?? "other");
  const value = (chart, _, series, index) => seconds(index === null ? chart.bandValues?.[series - 1]?.at(-1) : chart.bandValues?.[series - 1]?.[index]);
  return { label: title(name), ink, stroke: ink, fill: ink, width: 0, points: { show: false }, value };
}

const shade = (axis) => color(`axis-${axis}`) || color("transfer");

export function resizeCharts() {
  for (const [id, chart] of Object.entries(charts)) chart.setSize({ width: $(id).clientWidth, height: chart.height });
}

export function recolorCharts() {
  for (const chart of Object.values(charts)) {
    chart.redraw(true, true);
    chart.root.querySelectorAll(".u-series .u-marker").forEach((marker, i) => { if (i && chart.series[i].ink) marker.style.background = chart.series[i].ink(); });
  }
}

addEventListener("resize", resizeCharts);
