// The plan and how its groups lie over hosts, snapshots, memory, mixtures.
import { $, bytes, node, pairs, percent, seconds } from "./dom.js";
import { PROTECTION } from "./state.js";
import { seats, unpack } from "./seats.js";

const HOSTS_SHOWN = 48;

export function showPlan(document) {
  const { plan, mesh } = document;
  const axes = Object.entries(mesh).filter(([, n]) => n > 1).map(([axis, n]) => `${axis} ${n}`).join(" \u00d7 ") || "one rank";
  const rows = plan.mesh || seats.ranks ? [["mesh", axes], ["ranks", String(seats.ranks || plan.world_size)], ["hosts", String(seats.hosts.length || "not known")]] : [];
  if (plan.memory_bytes_per_rank) rows.push(["memory a rank", `${bytes(plan.memory_bytes_per_rank)}, estimated`]);
  if (plan.predicted_step_seconds) rows.push(["step", `${seconds(plan.predicted_step_seconds)}, predicted`]);
  if (document.incarnation) rows.push(["incarnation", `${document.incarnation}, since step ${document.first_step}`]);
  pairs($("plan"), rows);
  $("topology").replaceChildren(...document.topology.map((one) => {
    const groups = `${one.groups} ${one.groups === 1 ? "group" : "groups"} of ${one.ranks} ranks`;
    return node("li", `${one.axis}: ${groups}, ${one.hosts === 1 ? "each within one host" : `each over ${one.hosts} hosts`}.`);
  }));
}

export function showHealth({ snapshots, memory }) {
  const restores = Object.entries(snapshots.restores).filter(([from]) => from !== "none").map(([from, n]) => `${n} from ${from}`).join(", ");
  $("snapshot-sentence").textContent = PROTECTION[snapshots.protection] ?? "No word of snapshots yet.";
  const rows = [["snapshot", snapshots.every == null ? "not known" : snapshots.every === 0 ? "never" : snapshots.every === 1 ? "every step" : `every ${snapshots.every} steps`]];
  if (snapshots.stall_seconds != null) rows.push(["stall", `${seconds(snapshots.stall_seconds)} a step (${percent(snapshots.stall_share)})`]);
  if (snapshots.skipped != null) rows.push(["skipped", String(snapshots.skipped)]);
  rows.push(["stores", String(snapshots.stores)], ["restores", restores || "none"]);
  rows.push(["checkpoints", snapshots.checkpoints.length ? `${snapshots.checkpoints.length}, last at step ${snapshots.checkpoints.at(-1)}` : "none"]);
  pairs($("snapshots"), rows);
  showMemory(memory);
}

// The fullest hosts first.
function showMemory(memory) {
  const most = unpack(memory.most_bytes), hosts = [...most.keys()].filter((host) => most[host] > 0).sort((a, b) => most[b] - most[a] || a - b);
  const planned = memory.planned_bytes ? `; the plan estimates ${bytes(memory.planned_bytes)}` : "";
  const rest = hosts.length > HOSTS_SHOWN ? ` Shown are the ${HOSTS_SHOWN} fullest of ${hosts.length} hosts.` : "";
  $("memory-note").textContent = hosts.length ? `The most that any rank of a host uses, in step ${memory.step}${planned}.${rest}` : "Nothing heard yet.";
  const top = Math.max(memory.planned_bytes ?? 0, ...hosts.slice(0, 1).map((host) => most[host])) || 1;
  $("memory").replaceChildren(...hosts.slice(0, HOSTS_SHOWN).map((host) => {
    const item = node("li"), name = seats.hosts[host] ?? `host ${host}`;
    item.append(node("span", name, { title: name }), node("meter", undefined, { min: 0, max: top, value: most[host], "aria-label": `${name}: ${bytes(most[host])}` }), node("span", bytes(most[host])));
    return item;
  }));
}

export function showMixtures(last) {
  $("mixtures-section").hidden = !last?.moe_strategies;
  if (!last?.moe_strategies) return;
  $("mixtures-note").textContent = `Tried ${last.moe_trials} strategies so far, where trying all would have taken ${last.moe_trials_exhaustive}.`;
  pairs($("mixtures"), last.moe_strategies.map((s) => [s.strategy, `${s.calls} ${s.calls === 1 ? "call" : "calls"}, ${s.why}`]));
}
