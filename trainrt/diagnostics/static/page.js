// The page of one run: reads /api/*, listens to /api/stream, draws. No state outlives a reload.
const $ = (id) => document.getElementById(id);
const get = async (path) => (await fetch(path)).json();
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const seconds = (s) => s >= 100 ? `${s.toFixed(0)} s` : s >= 1 ? `${s.toFixed(2)} s` : `${(s * 1000).toFixed(1)} ms`;
const ago = (time) => { const s = Date.now() / 1000 - time; return s < 90 ? `${Math.max(0, s).toFixed(0)} s ago` : s < 5400 ? `${(s / 60).toFixed(0)} min ago` : `${(s / 3600).toFixed(1)} h ago`; };
const metrics = [];
let pinnedStep = null, charts = null;

function node(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function pairs(list, rows) {
  list.replaceChildren(...rows.map(([key, value]) => { const box = node("div"); box.append(node("dt", key), node("dd", value)); return box; }));
}

const SENTENCES = {
  starting: ["warn", "Starting."], running: ["good", "Running."], diagnosing: ["warn", "Something failed; finding out what."],
  recovering: ["warn", "Recovering."], finished: ["good", "Finished."], interrupted: ["warn", "Interrupted after a checkpoint; the same command goes on."],
  failed: ["bad", "Failed."], unknown: ["warn", "The run has not begun."],
};
const PROTECTION = {
  full: "Every committed step survives the loss of a process or a node.",
  degraded: "Degraded: a lost process is restored from memory; a lost node goes back to the last checkpoint.",
  none: "No snapshot in memory: a failure goes back to the last checkpoint on disk.",
};

function showState(run) {
  const { status } = run, ended = ["finished", "interrupted", "failed", "unknown"].includes(status.state);
  let [mood, text] = SENTENCES[status.state] ?? ["warn", status.state];
  if (!ended && !status.live) { mood = "bad"; text = `The driver is gone (it was ${status.state}); the same launch command takes the run up again.`; }
  if (status.state !== "unknown") text += ` Step ${status.step} of ${status.steps}, ${status.world_size} ranks.`;
  if (status.message && status.state !== "finished") text += ` ${status.message}`;
  $("sentence").textContent = text; $("sentence").className = mood;
  $("protection").textContent = ended ? (status.time ? `Ended ${ago(status.time)}.` : "") : PROTECTION[status.protection] ?? "";
  $("run-name").textContent = run.path; document.title = `${status.state} - trainrt`;
  const last = metrics.at(-1);
  const rows = last ? [["loss", last.loss.toFixed(4)], ["step", seconds(last.step_seconds)], ["tokens/s", Math.round(last.tokens_per_second).toLocaleString("en")],
    ["MFU", `${(last.mfu * 100).toFixed(1)} %`], ["snapshot stall", seconds(last.snapshot_stall_seconds)], ["restarts", String(last.incarnation - 1)], ["last step", ago(last.time)]] : [];
  if (status.effective_time != null) rows.push(["effective time", `${(status.effective_time * 100).toFixed(1)} %`]);
  if (status.unigram_entropy) rows.splice(1, 0, ["unigram entropy", status.unigram_entropy.toFixed(4)]);
  pairs($("numbers"), rows);
}

function makeChart(target, label, stroke) {
  const axis = { stroke: color("soft"), grid: { stroke: color("line"), width: 1 }, ticks: { stroke: color("line") } };
  return new uPlot({ width: target.clientWidth || 500, height: 210, scales: { x: { time: false } }, axes: [{ ...axis }, { ...axis, size: 64 }],
    series: [{ label: "step" }, { label, stroke: color(stroke), width: 2, points: { show: false } }] }, [[], []], target);
}

function showCharts() {
  if (!charts) charts = [makeChart($("loss-chart"), "loss", "accent"), makeChart($("rate-chart"), "tokens/s", "good")];
  const steps = metrics.map((m) => m.step);
  charts[0].setData([steps, metrics.map((m) => m.loss)]);
  charts[1].setData([steps, metrics.map((m) => m.tokens_per_second)]);
}

function showMixtures() {
  const last = metrics.at(-1);
  $("mixtures-section").hidden = !last?.moe_strategies;
  if (!last?.moe_strategies) return;
  $("mixtures-note").textContent = `Tried ${last.moe_trials} strategies so far, where trying all would have taken ${last.moe_trials_exhaustive}.`;
  pairs($("mixtures"), last.moe_strategies.map((s) => [s.strategy, `${s.calls} ${s.calls === 1 ? "call" : "calls"}, ${s.why}`]));
}

// Blue to white to orange: read the same by those who do not tell red from green.
function heatColor(ratio) {
  const t = Math.max(-1, Math.min(1, Math.log2(ratio) / Math.log2(1.5)));
  const mix = (a, b, w) => a.map((v, i) => Math.round(v + (b[i] - v) * w));
  return `rgb(${mix([247, 247, 242], t < 0 ? [103, 169, 207] : [239, 108, 28], Math.abs(t)).join(",")})`;
}

function showHeat(map) {
  const text = (c) => `rank ${c.rank} on ${c.host}: self ${seconds(c.self_seconds)} (${c.ratio.toFixed(2)} x the median), waiting ${seconds(c.waiting_seconds)}, step ${seconds(c.seconds)}`;
  const focused = document.activeElement?.dataset?.rank;
  $("heat").replaceChildren(...map.hosts.map((host) => {
    const row = node("div", undefined, { class: "heat-row" }), cells = node("div", undefined, { class: "cells", role: "group", "aria-label": host });
    for (const cell of map.cells.filter((c) => c.host === host)) {
      const box = node("button", undefined, { class: "cell", type: "button", "data-rank": cell.rank, "aria-label": text(cell), title: text(cell) });
      box.append(node("div", `rank ${cell.rank}`), node("div", `${cell.ratio.toFixed(2)}x ${seconds(cell.self_seconds)}`));
      box.style.background = heatColor(cell.ratio);
      box.onfocus = box.onmouseenter = () => { $("heat-detail").textContent = text(cell); };
      cells.append(box);
    }
    row.append(node("span", host), cells);
    return row;
  }));
  if (focused !== undefined) document.querySelector(`.cell[data-rank="${focused}"]`)?.focus();
  $("heat-note").textContent = map.cells.length ? `Median of the last ${map.window_steps} steps; the median rank takes ${seconds(map.median_self_seconds)}.` : "No events yet.";
}

$("heat").addEventListener("keydown", (event) => {
  const cells = [...document.querySelectorAll(".cell")], at = cells.indexOf(document.activeElement);
  const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (at >= 0 && move) { event.preventDefault(); cells[(at + move + cells.length) % cells.length].focus(); }
});

function showIncidents(list) {
  if (!list.length) { $("incidents").replaceChildren(node("p", "None.", { class: "hint" })); return; }
  const table = node("table"), head = node("tr");
  for (const title of ["what", "where", "step", "found in", "recovered in", "steps lost", "from", "action", "message"]) head.append(node("th", title, { scope: "col" }));
  table.append(head);
  for (const i of [...list].reverse()) {
    const row = node("tr"), where = [i.ranks?.length ? `rank ${i.ranks.join(", ")}` : "", i.nodes?.join(", ")].filter(Boolean).join(" on ");
    for (const value of [i.kind, where, i.step ?? "", i.detected_seconds == null ? "" : seconds(i.detected_seconds), i.recovered_seconds == null ? "" : seconds(i.recovered_seconds), i.steps_lost, i.restored_from, i.action, i.message]) row.append(node("td", String(value ?? "")));
    table.append(row);
  }
  $("incidents").replaceChildren(table);
}

const KINDS = { data: "data", forward: "forward", backward: "backward", optimizer: "optimizer", snapshot: "snapshot", checkpoint: "snapshot", evaluation: "forward", collective: "wait", other: "other" };
$("legend").append(...["data", "forward", "backward", "optimizer", "snapshot", "wait"].flatMap((name) => {
  const box = node("span", undefined, { class: "swatch" }); box.style.background = `var(--${name})`;
  return [box, document.createTextNode(name === "wait" ? "waiting in a collective" : name)];
}));

function showTimeline(line) {
  if (pinnedStep === null && line.step !== null) $("step").value = line.step;
  const end = Math.max(...line.ranks.map((r) => r.offset_seconds + r.seconds), 1e-9);
  $("timeline").replaceChildren(...line.ranks.map((rank) => {
    const row = node("div", undefined, { class: "track" }), canvas = node("canvas", undefined, { role: "img", "aria-label": `rank ${rank.rank}: step ${seconds(rank.seconds)}, self ${seconds(rank.self_seconds)}` });
    row.append(node("span", `${rank.host} rank ${rank.rank}`), canvas);
    requestAnimationFrame(() => drawTrack(canvas, rank, end));
    return row;
  }));
}

function drawTrack(canvas, rank, end) {
  const scale = devicePixelRatio || 1, width = canvas.clientWidth, height = 34;
  canvas.width = width * scale; canvas.height = height * scale;
  const context = canvas.getContext("2d"); context.scale(scale, scale);
  const events = rank.events.filter((e) => e.kind !== "step").sort((a, b) => a.depth - b.depth);
  const at = (t) => (rank.offset_seconds + t) / end * width;
  for (const e of events) {
    const inner = e.waiting || e.kind === "collective";
    context.fillStyle = color(inner ? "wait" : KINDS[e.kind] ?? "other");
    context.fillRect(at(e.start), inner ? 12 : 2, Math.max(.6, e.seconds / end * width), inner ? 20 : 30);
  }
  canvas.onmousemove = (mouse) => {
    const t = mouse.offsetX / width * end - rank.offset_seconds;
    const hit = events.filter((e) => e.start <= t && t <= e.start + e.seconds).at(-1);
    $("event-detail").textContent = hit ? `rank ${rank.rank}: ${hit.name}${hit.group ? ` over ${hit.group}` : ""}, ${seconds(hit.seconds)}${hit.bytes ? `, ${(hit.bytes / 1024).toFixed(0)} KiB` : ""}` : "";
  };
}

function showPlan(plan) {
  const mesh = Object.entries(plan.mesh ?? {}).filter(([, n]) => n > 1).map(([axis, n]) => `${axis} ${n}`).join(" x ") || "one rank";
  pairs($("plan"), plan.mesh ? [["mesh", mesh], ["ranks", String(plan.world_size)], ["memory a rank", `${(plan.memory_bytes_per_rank / 2 ** 20).toFixed(0)} MiB, estimated`], ["step", `${seconds(plan.predicted_step_seconds)}, predicted`]] : []);
}

async function refresh() {
  const from = metrics.at(-1)?.step ?? 0;
  const [fresh, run, heat, incidents] = await Promise.all([get(`/api/metrics?after=${from}`), get("/api/run"), get("/api/heatmap"), get("/api/incidents")]);
  metrics.push(...fresh.lines.filter((line) => line.step > (metrics.at(-1)?.step ?? 0)));
  showState(run); showCharts(); showMixtures(); showHeat(heat); showIncidents(incidents.incidents); showPlan(run.plan);
  showTimeline(await get(pinnedStep === null ? "/api/timeline" : `/api/timeline?step=${pinnedStep}`));
}

let busy = false, again = false;
async function refreshSoon() {
  if (busy) { again = true; return; }
  busy = true;
  try { await refresh(); } finally { busy = false; if (again) { again = false; refreshSoon(); } }
}

$("step").addEventListener("change", () => { pinnedStep = Number($("step").value) || null; refreshSoon(); });
$("latest").addEventListener("click", () => { pinnedStep = null; refreshSoon(); });
addEventListener("resize", () => { charts?.forEach((chart, i) => chart.setSize({ width: [$("loss-chart"), $("rate-chart")][i].clientWidth, height: 210 })); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => location.reload());

const stream = new EventSource("/api/stream");
stream.addEventListener("change", refreshSoon);
stream.onopen = () => { $("link").textContent = "live"; };
stream.onerror = () => { $("link").textContent = "page server gone; retrying"; };
addEventListener("load", refreshSoon);
