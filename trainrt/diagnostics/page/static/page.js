// The page of one run: reads /api/*, hears of changes from /api/stream, and asks for the documents that changed.
import { recolorCharts, showAccounting, showMetrics } from "./charts.js";
import { $, get } from "./dom.js";
import { recolor, showHeat } from "./heat.js";
import { showIncidents } from "./incidents.js";
import { showHealth, showMixtures, showPlan } from "./plan.js";
import { begin, onSelect, seats, select, selection, sit } from "./seats.js";
import { showState } from "./state.js";
import { redrawTimeline, shownRanks, showTimeline } from "./timeline.js";
import { showDiagnosis } from "./verdicts.js";

const metrics = [], POINTS = 4000;
let status = null, known = {}, wanted = null, busy = false;

async function freshMetrics() {
  const from = metrics.at(-1)?.step ?? 0, fresh = await get(`/api/metrics?after=${from}`);
  metrics.push(...fresh.lines.filter((line) => line.step > (metrics.at(-1)?.step ?? 0)));
  // A page that is open for weeks: the older half of the steps is kept ever sparser.
  if (metrics.length > POINTS) metrics.splice(0, POINTS / 2, ...metrics.slice(0, POINTS / 2).filter((_, i) => i % 2 === 0));
  showMetrics(metrics);
  showMixtures(metrics.at(-1));
}

async function freshTimeline() {
  const asked = new URLSearchParams();
  if (selection.step !== null) asked.set("step", selection.step);
  if (selection.rank !== null && seats.ranks > 64) asked.set("rank", selection.rank);
  showTimeline(await get(`/api/timeline?${asked}`));
}

async function freshDiagnosis() { showDiagnosis(await get("/api/diagnosis")); }
async function freshPlan() { const plan = await get("/api/plan"); sit(plan); showPlan(plan); }
async function freshHeat() { showHeat(await get("/api/heatmap")); }

// What each document of the page is made of; in the order in which they stand.
const DOCUMENTS = [
  [["plan", "seats"], freshPlan],
  [["diagnosis", "seats"], freshDiagnosis],
  [["metrics"], freshMetrics],
  [["summaries", "seats"], freshHeat],
  [["summaries"], async () => showAccounting(await get("/api/accounting"))],
  [["events", "seats"], async () => { if (selection.step === null || !shownRanks().length) await freshTimeline(); }],
  [["incidents"], async () => showIncidents((await get("/api/incidents")).incidents)],
  [["metrics", "summaries", "plan", "incidents"], async () => showHealth((await get("/api/health")))],
];

// Changes that come while documents are fetched are taken up afterwards, all at once.
async function refresh(revisions) {
  wanted = revisions;
  if (busy) return;
  busy = true;
  try {
    while (wanted) {
      const now = wanted;
      wanted = null;
      for (const [needs, fetchAndShow] of DOCUMENTS) {
        if (needs.some((need) => known[need] !== now[need])) await fetchAndShow();
      }
      known = now;
      if (status) showState(status, metrics.at(-1));
    }
  } finally {
    busy = false;
  }
}

function link(text, mood) {
  $("link").textContent = text;
  $("link").className = mood;
}

const stream = new EventSource("/api/stream");
stream.addEventListener("change", (event) => {
  const told = JSON.parse(event.data);
  status = told.status;
  showState(status, metrics.at(-1));
  link(status.live ? "live" : "not live", status.live ? "good" : "");
  refresh(told.revisions).catch((error) => link(`${error.message}; reload the page`, "bad"));
});
stream.onerror = () => link("page server gone; retrying", "bad");

let shown = { rank: null, step: null };
onSelect(() => {
  const moved = shown.step !== selection.step || (shown.rank !== selection.rank && seats.ranks > 64);
  shown = { ...selection };
  if (moved) freshTimeline().catch((error) => link(error.message, "bad"));
});
$("step").addEventListener("change", () => select({ step: Number($("step").value) || null }));
$("latest").addEventListener("click", () => { select({ step: null }); freshTimeline(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { recolor(); redrawTimeline(); recolorCharts(); });
get("/api/run").then((run) => { $("run-name").textContent = run.path; });
begin();
