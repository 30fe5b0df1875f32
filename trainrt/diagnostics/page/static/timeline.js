// One step on one clock: a row a rank, its events within each other, arrows from those that came last to those that waited.
import { $, bytes, color, node, seconds, swatch } from "./dom.js";
import { onSelect, select, selection } from "./seats.js";

const LABEL = 112, ARROWS = 40, TOP = 18, WORTH = 0.02;
const INKS = {
  data: "data", forward: "forward", backward: "backward", optimizer: "optimizer", snapshot: "snapshot", checkpoint: "checkpoint",
  evaluation: "forward", collective: "wait", other: "other", garbage_collection: "bad", compile: "other",
};
const box = $("timeline"), canvas = box.querySelector("canvas"), view = { from: 0, to: 1 };
let line = null, rows = [], end = 1, height = 26, arrowsTo = new Map();

for (const [ink, title] of [["data", "data"], ["forward", "forward"], ["backward", "backward"], ["optimizer", "optimizer"], ["snapshot", "snapshot"], ["wait", "waiting in a collective"], ["transfer", "transfer"]]) {
  const item = node("span");
  item.append(swatch(ink), title);
  $("legend").append(item);
}

export function showTimeline(document) {
  const other = line?.step !== document.step;
  line = document;
  if ($("step") !== window.document.activeElement) $("step").value = line.step ?? "";
  $("steps").replaceChildren(...line.steps.slice(-200).map((step) => node("option", undefined, { value: step })));
  $("timeline-note").textContent = note();
  $("trace").hidden = !line.ranks.length;
  $("trace").href = `/api/perfetto?step=${line.step}${line.rank === null ? "" : `&rank=${line.rank}`}`;
  rows = line.ranks;
  end = Math.max(1e-9, ...rows.map((row) => row.offset_seconds + row.seconds));
  if (other || view.to > end) Object.assign(view, { from: 0, to: end });
  arrowsTo = new Map(line.arrows.map((arrow) => [`${arrow.to} ${arrow.name} ${arrow.to_seconds.toFixed(5)}`, arrow]));
  box.hidden = !rows.length;
  draw();
}

function note() {
  if (!line.steps.length) return "No events yet: ranks write them for some steps only.";
  if (!line.ranks.length) return `Step ${line.step} has no events; steps that have: ${line.steps.slice(-12).join(", ")}.`;
  const few = line.shown < line.with_events ? ` Shown are the ${line.shown} ranks of the groups of rank ${line.rank}; select another on the map.` : "";
  return `Events of ${line.with_events} of ${line.world_size} ranks.${few}`;
}

const at = (t, width) => LABEL + (t - view.from) / (view.to - view.from) * (width - LABEL);

function draw() {
  if (!rows.length || box.hidden) return;
  const width = box.clientWidth, scale = devicePixelRatio || 1;
  height = rows.length > 32 ? 15 : rows.length > 16 ? 20 : 27;
  const tall = TOP + rows.length * height;
  canvas.width = width * scale;
  canvas.height = tall * scale;
  canvas.style.height = `${tall}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  ticks(context, width, tall);
  const inks = Object.fromEntries([...Object.values(INKS), "transfer"].map((name) => [name, color(name)]));
  context.save();
  context.beginPath();
  context.rect(LABEL, 0, width - LABEL, tall);
  context.clip();
  rows.forEach((row, i) => track(context, row, TOP + i * height, width, inks));
  drawArrows(context, width);
  context.restore();
  names(context);
  box.setAttribute("aria-label", `Step ${line.step} of ${rows.length} ranks, ${seconds(view.from)} to ${seconds(view.to)}`);
}

function ticks(context, width, tall) {
  const span = view.to - view.from, rough = span / 8, ten = 10 ** Math.floor(Math.log10(rough));
  const every = [1, 2, 5, 10].map((n) => n * ten).find((n) => n >= rough);
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "top";
  for (let t = Math.ceil(view.from / every) * every; t <= view.to; t += every) {
    const x = Math.round(at(t, width)) + 0.5;
    context.fillStyle = color("line");
    context.fillRect(x, 0, 1, tall);
    context.fillStyle = color("soft");
    if (x < width - 40) context.fillText(t === 0 ? "0" : seconds(t), x + 3, 1);
  }
}

function track(context, row, top, width, inks) {
  const deepest = row.depth.reduce((a, b) => Math.max(a, b), 1);
  for (let i = 0; i < row.start.length; i++) {
    const from = row.start[i], to = from + row.duration[i];
    if (row.depth[i] === 0 || to < view.from || from > view.to) continue;
    const kind = line.names[row.kind[i]], inset = Math.min(row.depth[i] - 1, 3) * (deepest > 1 ? height / 9 : 0) + 1;
    const x = at(from, width), w = Math.max(0.7, at(to, width) - x), h = height - 2 * inset - 1;
    context.fillStyle = inks[INKS[kind] ?? "other"];
    context.fillRect(x, top + inset, w, h);
    const arrow = row.waiting[i] && arrowsTo.get(`${row.rank} ${line.names[row.name[i]]} ${to.toFixed(5)}`);
    if (kind !== "collective") continue;
    // What comes after the last arrival is transfer; whoever has no arrow was last, or nobody is known to have been.
    const split = arrow ? arrow.from_seconds : from, after = at(split, width);
    if (arrow || line.arrows.length) { context.fillStyle = inks.transfer; context.fillRect(after, top + inset, Math.max(0.5, x + w - after), h); }
  }
}

function drawArrows(context, width) {
  const index = new Map(rows.map((row, i) => [row.rank, i])), chosen = selection.rank;
  const inView = line.arrows.filter((a) => a.to_seconds >= view.from && a.from_seconds <= view.to && index.has(a.from) && index.has(a.to));
  const own = inView.filter((a) => a.from === chosen || a.to === chosen);
  const shown = (own.length ? own : inView.filter((a) => a.waited_seconds > WORTH * end)).slice(0, ARROWS), ink = color("ink");
  context.lineWidth = 1.2;
  for (const arrow of shown) {
    const x1 = at(arrow.from_seconds, width), y1 = TOP + (index.get(arrow.from) + 0.5) * height;
    const x2 = at(arrow.to_seconds, width), y2 = TOP + (index.get(arrow.to) + 0.5) * height;
    context.globalAlpha = own.length ? 0.9 : 0.6;
    context.strokeStyle = context.fillStyle = ink;
    context.beginPath();
    context.moveTo(x1, y1);
    const bend = Math.max(14, (x2 - x1) / 2), dy = y2 > y1 ? 1 : -1;
    context.bezierCurveTo(x1 + bend / 2, y1 + dy * 4, x2 + bend / 3, y2 - dy * height, x2, y2 - dy * 4);
    context.stroke();
    context.beginPath();
    context.moveTo(x2, y2 - dy * 1);
    context.lineTo(x2 - 3.5, y2 - dy * 8);
    context.lineTo(x2 + 4.5, y2 - dy * 7);
    context.fill();
    context.beginPath();
    context.arc(x1, y1, 2.4, 0, 7);
    context.fill();
  }
  context.globalAlpha = 1;
  box.dataset.arrows = shown.length;
}

function names(context) {
  context.textBaseline = "middle";
  context.font = `${Math.min(13, height - 2)}px system-ui, sans-serif`;
  rows.forEach((row, i) => {
    const mine = row.rank === selection.rank, y = TOP + (i + 0.5) * height;
    context.fillStyle = mine ? color("accent") : color("panel");
    context.fillRect(0, y - height / 2, LABEL - 4, height - 1);
    context.fillStyle = mine ? color("panel") : color("soft");
    context.fillText(`rank ${row.rank}  ${row.host}`, 4, y, LABEL - 12);
  });
}

// The innermost event at a point, in words.
function hit(x, y) {
  const row = rows[Math.floor((y - TOP) / height)], t = view.from + (x - LABEL) / (box.clientWidth - LABEL) * (view.to - view.from);
  if (!row || x < LABEL) return row ? tell(row, null) : "";
  let found = null;
  for (let i = 0; i < row.start.length; i++) if (row.start[i] <= t && t <= row.start[i] + row.duration[i]) found = i;
  return tell(row, found);
}

function tell(row, i) {
  if (i === null) return `Rank ${row.rank} on ${row.host}: step ${seconds(row.seconds)}, self ${seconds(row.self_seconds)}, waiting ${seconds(row.waiting_seconds)}.`;
  const name = line.names[row.name[i]], group = line.names[row.group[i]];
  const arrow = arrowsTo.get(`${row.rank} ${name} ${(row.start[i] + row.duration[i]).toFixed(5)}`);
  return `Rank ${row.rank}: ${name}${group ? ` over ${group}` : ""}, ${seconds(row.duration[i])} from ${seconds(row.start[i])} on`
    + `${row.bytes[i] ? `, ${bytes(row.bytes[i])}` : ""}${arrow ? `; ${seconds(arrow.waited_seconds)} of it waiting for rank ${arrow.from}` : ""}.`;
}

function zoom(factor, around = (view.from + view.to) / 2) {
  const span = Math.min(end, Math.max(end / 2000, (view.to - view.from) * factor));
  const share = (around - view.from) / (view.to - view.from);
  view.from = Math.max(0, Math.min(end - span, around - share * span));
  view.to = view.from + span;
  draw();
}

function move(share) {
  const span = view.to - view.from;
  view.from = Math.max(0, Math.min(end - span, view.from + share * span));
  view.to = view.from + span;
  draw();
}

function choose(by) {
  const now = rows.findIndex((row) => row.rank === selection.rank);
  const row = rows[Math.max(0, Math.min(rows.length - 1, now < 0 ? 0 : now + by))];
  if (row) select({ rank: row.rank });
}

const KEYS = {
  "+": () => zoom(0.6), "=": () => zoom(0.6), "-": () => zoom(1 / 0.6), 0: () => zoom(1e9), ArrowLeft: () => move(-0.2), ArrowRight: () => move(0.2),
  ArrowUp: () => choose(-1), ArrowDown: () => choose(1), Escape: () => select({ rank: null }),
};
box.addEventListener("keydown", (event) => {
  if (!KEYS[event.key] || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  KEYS[event.key]();
});
$("zoom-in").addEventListener("click", KEYS["+"]);
$("zoom-out").addEventListener("click", KEYS["-"]);
$("zoom-all").addEventListener("click", KEYS[0]);
canvas.addEventListener("mousemove", (event) => {
  $("event-detail").textContent = hit(event.offsetX, event.offsetY);
  if (event.buttons === 1) move(-event.movementX / (box.clientWidth - LABEL));
});
canvas.addEventListener("click", (event) => {
  const row = rows[Math.floor((event.offsetY - TOP) / height)];
  if (row && event.offsetX < LABEL) select({ rank: row.rank });
});
// The wheel scrolls the page, as everywhere; with Ctrl it zooms.
canvas.addEventListener("wheel", (event) => {
  if (!event.ctrlKey) return;
  event.preventDefault();
  zoom(event.deltaY > 0 ? 1.25 : 0.8, view.from + (event.offsetX - LABEL) / (box.clientWidth - LABEL) * (view.to - view.from));
}, { passive: false });
onSelect(() => {
  draw();
  const row = rows.find((one) => one.rank === selection.rank);
  $("event-detail").textContent = row ? tell(row, null) : "";
});
addEventListener("resize", draw);
export const redrawTimeline = draw;
export const shownRanks = () => rows.map((row) => row.rank);
