// The heat map: a cell a rank, a row a host, as many columns of hosts as fit. Selecting a rank lights its peers along each axis.
import { $, bytes, color, node, percent, ranges, seconds, swatch, times } from "./dom.js";
import { hostOf, onSelect, peersOf, placeOf, seats, select, selection, unpack } from "./seats.js";

const SHADES = 64, HEIGHT = 520, TALLEST = 34, WIDEST = 150, GAP = 8, LABEL = 96, HEAD = 15, STANDS_OUT = 1.05;
const AXES = ["tp", "pp", "cp", "ep", "fsdp", "dp"];
// Self time is shown against the median of those that do the same work; the others from 0 to the largest.
const METRICS = {
  ratio: ["self time against its role", times], data_seconds: ["seconds of data", seconds],
  waiting_seconds: ["seconds of waiting", seconds], memory_bytes: ["memory", bytes],
};
const box = $("heat"), canvas = box.querySelector("canvas"), base = document.createElement("canvas");
let heat = null, grid = null, steps = 0;

for (const [name, [title]] of Object.entries(METRICS)) $("metric").append(node("option", title, { value: name }));
$("metric").addEventListener("change", redraw);
onSelect(showSelection);
addEventListener("resize", redraw);

export function showHeat(document) {
  const named = Object.entries(document).filter(([, value]) => value?.data !== undefined);
  heat = Object.fromEntries(named.map(([name, packed]) => [name, unpack(packed)]));
  steps = document.steps;
  $("heat-note").textContent = steps ? `Medians of the last ${steps} steps, to step ${document.last_step}.` : "No summaries yet.";
  redraw();
}

// Cells as large as the space allows: few hosts one below the other, many in several columns.
function plan(width) {
  const hosts = seats.hosts.length, slots = Math.max(1, ...seats.byHost.map((ranks) => ranks.length));
  const named = Math.min(LABEL, 14 + 8 * Math.max(0, ...seats.hosts.map((host) => host.length)));
  let best = null;
  for (let columns = 1; columns <= Math.min(hosts, 64); columns++) {
    const rows = Math.ceil(hosts / columns), room = Math.min(TALLEST, HEIGHT / rows), h = room < 13 ? Math.max(2, Math.floor(room)) : room, label = h >= 13 ? named : 0;
    const w = Math.min(WIDEST, ((width - (columns - 1) * GAP) / columns - label) / slots);
    const score = Math.min(w, 1.5 * h);
    if (!best || score > best.score * 1.001) best = { score, columns, rows, w, h, label, top: label ? 0 : HEAD, pitch: label + slots * w + GAP };
  }
  return best;
}

function cell(rank) {
  const host = seats.host[rank], column = Math.floor(host / grid.rows);
  return [column * grid.pitch + grid.label + seats.slot[rank] * grid.w, grid.top + (host - column * grid.rows) * grid.h];
}

function rankAt(x, y) {
  if (!grid) return null;
  const column = Math.floor(x / grid.pitch), row = Math.floor((y - grid.top) / grid.h);
  if (row < 0 || row >= grid.rows) return null;
  return seats.byHost[column * grid.rows + row]?.[Math.floor((x - column * grid.pitch - grid.label) / grid.w)] ?? null;
}

function redraw() {
  box.hidden = !seats.ranks || !heat || heat.ratio.length !== seats.ranks;
  if (box.hidden) return;
  const began = performance.now();
  drawBase();
  drawOver();
  box.dataset.redrawMs = (performance.now() - began).toFixed(1);
  describe();
}

function drawBase() {
  const width = box.clientWidth, scale = devicePixelRatio || 1;
  grid = plan(width);
  const height = Math.ceil(grid.top + grid.rows * grid.h);
  for (const one of [base, canvas]) {
    one.width = Math.round(width * scale);
    one.height = Math.round(height * scale);
  }
  canvas.style.height = `${height}px`;
  const context = base.getContext("2d"), name = $("metric").value, values = heat[name];
  const shades = palette(name), shade = shader(name, values);
  const w = grid.w - (grid.w > 6 ? 1.5 : 0.5), h = grid.h - (grid.h > 6 ? 1.5 : 0.5), told = w >= 26 && h >= 18;
  paint(context, w, h, shades, (rank) => shade(values[rank]));
  context.scale(scale, scale);
  if (grid.label) labels(context);
  else heads(context);
  if (told) figures(context, values, name, w, (rank) => shades[shade(values[rank])]);
  scaleBar(name, values, shades);
  largestOf(name, values);
}

// Pixel by pixel: that many calls of fillRect would take three times as long.
function paint(context, w, h, shades, shadeOf) {
  const scale = devicePixelRatio || 1, image = context.createImageData(base.width, base.height), across = base.width;
  const pixels = new Uint32Array(image.data.buffer), inks = shades.map(word), missing = word(color("line"));
  for (let rank = 0; rank < seats.ranks; rank++) {
    const [x, y] = cell(rank), t = shadeOf(rank), ink = Number.isNaN(t) ? missing : inks[t];
    const left = Math.round(x * scale), right = Math.max(left + 1, Math.round((x + w) * scale));
    const top = Math.round(y * scale), bottom = Math.max(top + 1, Math.round((y + h) * scale));
    for (let row = top; row < bottom; row++) pixels.fill(ink, row * across + left, row * across + right);
  }
  context.putImageData(image, 0, 0);
}

// "rgb(r,g,b)" or "#rrggbb" as one pixel, opaque, little-endian.
function word(ink) {
  const [r, g, b] = ink.startsWith("#") ? [1, 3, 5].map((at) => parseInt(ink.slice(at, at + 2), 16)) : ink.match(/\d+/g).map(Number);
  return (255 << 24 | b << 16 | g << 8 | r) >>> 0;
}

// Which shade a value has: an index into the palette, NaN where nothing was heard.
function shader(name, values) {
  if (name === "ratio") return (v) => Math.round(SHADES * Math.max(0, Math.min(1, 0.5 + 0.5 * Math.log2(v) / Math.log2(1.5))));
  const most = largest(values) || 1;
  return (v) => Math.round(SHADES * v / most);
}

const largest = (values) => values.reduce((most, v) => v > most ? v : most, 0);

function palette(name) {
  const read = (key) => [1, 3, 5].map((at) => parseInt(color(key).slice(at, at + 2), 16));
  const [low, mid, high] = ["heat-low", "heat-mid", "heat-high"].map(read);
  return Array.from({ length: SHADES + 1 }, (_, i) => {
    const t = i / SHADES, both = name === "ratio";
    const [a, b, share] = both ? (t < 0.5 ? [low, mid, 2 * t] : [mid, high, 2 * t - 1]) : [mid, high, t];
    return `rgb(${a.map((v, k) => Math.round(v + (b[k] - v) * share)).join(",")})`;
  });
}

function labels(context) {
  context.fillStyle = color("soft");
  context.font = `${Math.min(13, grid.h - 2)}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  seats.hosts.forEach((host, number) => {
    const column = Math.floor(number / grid.rows);
    context.fillText(host.length > 12 ? `\u2026${host.slice(-11)}` : host, column * grid.pitch, (number % grid.rows + 0.5) * grid.h, grid.label - 6);
  });
}

// Where there is no room for the name of each host: over a column that of its first.
function heads(context) {
  context.fillStyle = color("soft");
  context.font = "11px system-ui, sans-serif";
  for (let column = 0; column < grid.columns; column++) {
    const host = seats.hosts[column * grid.rows];
    if (host !== undefined) context.fillText(host.length > 9 ? `\u2026${host.slice(-8)}` : host, column * grid.pitch, 10, grid.pitch - 4);
  }
}

// Black or white, whichever can be read on a color "rgb(r,g,b)".
function contrast(shade) {
  const [r, g, b] = (shade ?? "rgb(128,128,128)").match(/\d+/g).map(Number);
  return 0.3 * r + 0.59 * g + 0.11 * b > 125 ? "#101418" : "#f4f6f8";
}

function figures(context, values, name, w, shadeOf) {
  const format = METRICS[name][1];
  context.textBaseline = "middle";
  context.font = "12px system-ui, sans-serif";
  for (let rank = 0; rank < seats.ranks; rank++) {
    const [x, y] = cell(rank);
    context.fillStyle = contrast(shadeOf(rank));
    context.fillText(`${rank}`, x + 6, y + grid.h / 2 - 1, w - 10);
    if (w < 84) continue;
    context.textAlign = "right";
    context.fillText(Number.isNaN(values[rank]) ? "?" : format(values[rank]), x + w - 6, y + grid.h / 2 - 1, w * 0.6);
    context.textAlign = "left";
  }
}

function scaleBar(name, values, shades) {
  const bar = document.createElement("canvas"), context = bar.getContext("2d"), [, format] = METRICS[name];
  bar.width = SHADES + 1;
  bar.height = 1;
  shades.forEach((shade, i) => { context.fillStyle = shade; context.fillRect(i, 0, 1, 1); });
  const [from, to] = name === "ratio" ? ["\u2264 0.67\u00d7", "\u2265 1.5\u00d7"] : ["0", format(largest(values))];
  $("heat-scale").replaceChildren(from, bar, to);
}

// The ranks that stand out, as links: among thousands of cells one is hard to see.
function largestOf(name, values) {
  const least = name === "ratio" ? STANDS_OUT : 0;
  const order = [...values.keys()].filter((rank) => values[rank] > least).sort((a, b) => values[b] - values[a]).slice(0, 3);
  const links = order.flatMap((rank, i) => [i ? ", " : "", node("a", `rank ${rank}`, { href: `#rank=${rank}` }), ` on ${hostOf(rank)} ${METRICS[name][1](values[rank])}`]);
  $("heat-top").replaceChildren(...(links.length ? ["Largest: ", ...links, "."] : ["No rank stands out."]));
}

// The map as it is or, with a rank selected, dimmed but for it and its peers.
function drawOver() {
  const context = canvas.getContext("2d"), scale = devicePixelRatio || 1, chosen = selection.rank;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.globalAlpha = chosen === null || chosen >= seats.ranks ? 1 : 0.5;
  context.drawImage(base, 0, 0);
  context.globalAlpha = 1;
  if (chosen === null || chosen >= seats.ranks) return;
  context.setTransform(scale, 0, 0, scale, 0, 0);
  const peers = peersOf(chosen);
  for (const axis of [...AXES].reverse()) for (const rank of peers[axis] ?? []) light(context, rank, color(`axis-${axis}`), 3);
  light(context, chosen, color("ink"), 4);
}

function light(context, rank, ink, width) {
  const [x, y] = cell(rank), scale = devicePixelRatio || 1, small = grid.h < 13 || grid.w < 13;
  if (small) {
    const room = width > 3 ? 3 : 0;
    context.fillStyle = ink;
    context.fillRect(x - room, y - room, Math.max(3, grid.w - 0.5) + 2 * room, Math.max(3, grid.h - 0.5) + 2 * room);
    if (!room) return;
  }
  context.drawImage(base, x * scale, y * scale, grid.w * scale, grid.h * scale, x, y, grid.w, grid.h);
  if (small) return;
  context.strokeStyle = ink;
  context.lineWidth = width;
  context.strokeRect(x + width / 2 - 0.5, y + width / 2 - 0.5, grid.w - width - 0.5, grid.h - width - 0.5);
}

function text(rank) {
  const own = heat.self_seconds[rank], step = heat.step_seconds[rank], waits = heat.waiting_seconds[rank];
  const place = placeOf(rank);
  return `Rank ${rank} on ${hostOf(rank)}${place ? ` (${place})` : ""}: self ${seconds(own)}, ${times(heat.ratio[rank])} the median of its role; `
    + `waiting ${seconds(waits)}${step > 0 ? ` (${percent(waits / step)})` : ""}, data ${seconds(heat.data_seconds[rank])}, memory ${bytes(heat.memory_bytes[rank])}.`;
}

function describe() {
  const rank = selection.rank, known = rank !== null && rank < seats.ranks;
  $("heat-detail").textContent = known ? text(rank) : rank === null ? "No rank is selected." : `This incarnation has no rank ${rank}.`;
  const peers = known ? peersOf(rank) : {};
  $("peers").replaceChildren(...AXES.filter((axis) => peers[axis]?.length).map((axis) => {
    const item = node("li");
    const count = peers[axis].length;
    item.append(swatch(`axis-${axis}`), `${axis}: ${count === 1 ? "rank" : count > 12 ? `${count} ranks,` : "ranks"} ${ranges(peers[axis])}`);
    return item;
  }));
  box.setAttribute("aria-label", known ? text(rank) : `Heat map of ${seats.ranks} ranks on ${seats.hosts.length} hosts`);
  box.dataset.rank = known ? rank : "";
}

function showSelection() {
  if (!grid || box.hidden) return;
  drawOver();
  describe();
}

const MOVES = {
  ArrowRight: (rank) => rank + 1, ArrowLeft: (rank) => rank - 1, Home: () => 0, End: () => seats.ranks - 1,
  ArrowDown: (rank) => besides(rank, 1), ArrowUp: (rank) => besides(rank, -1),
};

function besides(rank, hosts) {
  const ranks = seats.byHost[seats.host[rank] + hosts];
  return ranks ? ranks[Math.min(seats.slot[rank], ranks.length - 1)] : rank;
}

box.addEventListener("keydown", (event) => {
  if (event.key === "Escape") select({ rank: null });
  else if (event.key === "Enter" && selection.rank !== null) { $("timeline").focus(); $("timeline-section").scrollIntoView({ block: "start" }); }
  else if (MOVES[event.key] && seats.ranks) select({ rank: selection.rank === null ? 0 : Math.max(0, Math.min(seats.ranks - 1, MOVES[event.key](selection.rank))) });
  else return;
  event.preventDefault();
});
canvas.addEventListener("click", (event) => {
  const rank = rankAt(event.offsetX, event.offsetY);
  if (rank !== null) select({ rank });
});
canvas.addEventListener("mousemove", (event) => {
  const rank = rankAt(event.offsetX, event.offsetY);
  canvas.title = rank === null ? "" : text(rank);
});
export const recolor = redraw;
