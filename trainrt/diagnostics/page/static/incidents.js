// Incidents, newest first, with the parts of each recovery as a bar.
import { $, node, seconds, swatch, words } from "./dom.js";

const PHASES = [["restart_seconds", "restart"], ["restore_seconds", "restore"], ["first_step_seconds", "first-step"]];
const COLUMNS = ["what", "where", "step", "found in", "recovered in", "steps lost", "state from", "action", "message"];

export function showIncidents(list) {
  if (!list.length) {
    $("incidents").replaceChildren(node("p", "None.", { class: "hint" }));
    return;
  }
  const table = node("table"), head = node("tr");
  for (const title of COLUMNS) head.append(node("th", title, { scope: "col" }));
  table.append(head, ...[...list].reverse().map(row));
  $("incidents").replaceChildren(table, ...(list.some((one) => one.phases) ? [legend()] : []));
}

function row(incident) {
  const made = node("tr"), time = (s) => s == null ? "" : seconds(s);
  const recovered = node("td", incident.recovered_seconds == null ? "nothing to recover" : seconds(incident.recovered_seconds));
  if (incident.phases) recovered.append(bar(incident.phases));
  const cells = [words(incident.kind), where(incident), incident.step ?? "", time(incident.detected_seconds), recovered,
    incident.steps_lost, incident.restored_from, incident.action, incident.message];
  made.append(...cells.map((value) => value instanceof Node ? value : node("td", String(value ?? ""))));
  return made;
}

function where(incident) {
  const cell = node("td");
  (incident.ranks ?? []).slice(0, 8).forEach((rank, i) => cell.append(i ? ", " : "", node("a", `rank ${rank}`, { href: `#rank=${rank}` })));
  if (incident.ranks?.length > 8) cell.append(` and ${incident.ranks.length - 8} more`);
  if (incident.nodes?.length) cell.append(`${incident.ranks?.length ? " on " : ""}${incident.nodes.join(", ")}`);
  return cell;
}

function bar(phases) {
  const total = PHASES.reduce((sum, [key]) => sum + (phases[key] ?? 0), 0) || 1;
  const told = PHASES.map(([key]) => `${words(key.replace("_seconds", ""))} ${seconds(phases[key] ?? 0)}`).join(", ");
  const made = node("div", undefined, { class: "phases", role: "img", "aria-label": told, title: told });
  for (const [key, name] of PHASES) {
    const part = node("span", undefined, { class: name });
    part.style.width = `${100 * (phases[key] ?? 0) / total}%`;
    made.append(part);
  }
  return made;
}

function legend() {
  const made = node("p", undefined, { class: "hint" });
  for (const [ink, text] of [["data", "restart: until ranks and groups are there"], ["snapshot", "restore the state"], ["forward", "first step"]]) {
    made.append(swatch(ink), `${text}\u2003`);
  }
  return made;
}
