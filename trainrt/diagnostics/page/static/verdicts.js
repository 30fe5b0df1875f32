// Verdicts in sentences, most costly first; what is named in the evidence is a link to the rank or step on this page.
import { $, ago, node, percent, ranges, seconds, times, words } from "./dom.js";
import { seats } from "./seats.js";

const ACTIONS = {
  evict: "Evict", repartition: "Divide the layers anew over the stages", rebalance: "Balance the work", plan_gc: "Collect garbage at planned steps",
  check_storage: "Check the storage", check_network: "Check the network", wait: "Wait", none: "Nothing to do",
};
const FEW = 4;
const MENTION = /\b(ranks?) (\d+(?:(?:, and |, | and )\d+)*)|\b(step) (\d+)|\b(hosts?|on) (?!(?:ranks?|steps?|hosts?)\b)([\w.-]*\w)/gi;

export function showDiagnosis(diagnosis) {
  const [mood, text] = headline(diagnosis);
  $("headline").textContent = text;
  $("headline").className = diagnosis.verdicts.length ? "lead" : mood;
  $("verdict-list").replaceChildren(...diagnosis.verdicts.map(card));
  const window = diagnosis.first_step != null ? `Over steps ${diagnosis.first_step} to ${diagnosis.last_step}` : "";
  const written = diagnosis.written ? `written ${ago(diagnosis.written)}` : "";
  $("verdict-notes").textContent = [[window, written].filter(Boolean).join(", "), ...(diagnosis.notes ?? [])].filter(Boolean).map(sentence).join(" ");
}

const sentence = (text) => /[.!?]$/.test(text) ? text : `${text}.`;

function headline(d) {
  const cost = d.step_seconds == null ? "" : ` A step takes ${seconds(d.step_seconds)}`;
  const ideal = d.slowdown == null || d.ideal_step_seconds == null ? "" : `; without what holds it up it would take ${seconds(d.ideal_step_seconds)} (${times(d.slowdown)})`;
  const figures = cost && `${cost}${ideal}.`;
  if (d.state === "healthy") return ["good", `Healthy: no rank, host, link or stage holds the others up.${figures}`];
  if (d.state === "hung") return ["bad", `Hung: no step ends, the ranks wait for one that does not come.`];
  if (d.state === "straggling") return ["bad", `Straggling.${figures}`];
  return ["warn", `Unknown: there is not enough data to say whether anything is slow.${figures}`];
}

function card(verdict) {
  const grave = verdict.cause === "hang" || verdict.cause === "mismatched_collective" || verdict.share >= 0.1;
  const box = node("article", undefined, { class: `verdict ${verdict.action === "none" ? "none" : grave ? "" : "minor"}` });
  const said = node("p", undefined, { class: "said" });
  said.append(...linked(verdict.sentence));
  const todo = node("p", undefined, { class: "todo" });
  todo.append(node("strong", `${order(verdict)}.`));
  box.append(said, todo, facts(verdict));
  if (verdict.evidence.length) {
    const list = node("ul", undefined, { class: "evidence", "aria-label": "Evidence" });
    for (const line of verdict.evidence) {
      const item = node("li");
      item.append(...linked(line));
      list.append(item);
    }
    box.append(list);
  }
  box.append(...involved(verdict));
  return box;
}

function order(verdict) {
  const names = [...new Set(verdict.culprits.map((c) => verdict.kind === "rank" && c.rank !== null ? `rank ${c.rank} on ${c.host}` : c.host ?? `rank ${c.rank}`))];
  const whom = names.slice(0, 4).join(", ") + (names.length > 4 ? ` and ${names.length - 4} more` : "");
  const text = ACTIONS[verdict.action] ?? words(verdict.action);
  if (verdict.action === "evict") return `${text} ${whom}`;
  return whom && verdict.action.startsWith("check_") ? `${text} of ${whom}` : text;
}

function facts(verdict) {
  const list = node("ul", undefined, { class: "facts", "aria-label": "Cause and cost" });
  const told = [words(verdict.cause), `${percent(verdict.confidence)} sure`];
  if (verdict.seconds_a_step) told.push(`costs ${seconds(verdict.seconds_a_step)} a step`);
  if (verdict.share) told.push(`${percent(verdict.share)} of the step`);
  if (verdict.cost_device_hours) told.push(`${verdict.cost_device_hours.toPrecision(2)} device-hours`);
  list.append(...told.map((text) => node("li", text)));
  if (verdict.since_step != null) {
    const item = node("li", "since ");
    item.append(node("a", `step ${verdict.since_step}`, { href: `#step=${verdict.since_step}` }));
    list.append(item);
  }
  return list;
}

function involved(verdict) {
  const made = [];
  const culprits = verdict.culprits.filter((c) => c.rank !== null);
  if (culprits.length > FEW) made.push(folded(`${culprits.length} ranks are to blame`, `Ranks ${ranges(culprits.map((c) => c.rank), 60)}`));
  else if (culprits.length) {
    const line = node("p", culprits.length === 1 ? "Culprit: " : "Culprits: ", { class: "hint" });
    culprits.forEach((c, i) => {
      const place = [c.host ? `on ${c.host}` : "", c.stage != null ? `stage ${c.stage}` : "", c.dp_rank != null ? `dp ${c.dp_rank}` : ""].filter(Boolean).join(", ");
      line.append(i ? "; " : "", node("a", `rank ${c.rank}`, { href: `#rank=${c.rank}` }), place ? ` ${place}` : "");
    });
    made.push(line);
  }
  const victims = verdict.victims.length;
  if (victims) made.push(folded(`${victims} ${victims === 1 ? "rank waits" : "ranks wait"} for it`, `Ranks ${ranges(verdict.victims, 60)}`));
  return made;
}

function folded(summary, text) {
  const box = node("details");
  box.append(node("summary", summary), node("p", text, { class: "hint" }));
  return box;
}

// Text with ranks, steps and hosts as links.
function linked(text) {
  const parts = [];
  let at = 0;
  for (const found of text.matchAll(MENTION)) {
    parts.push(text.slice(at, found.index));
    at = found.index + found[0].length;
    if (found[3]) parts.push(node("a", found[0], { href: `#step=${found[4]}` }));
    else if (found[5]) parts.push(`${found[5]} `, hostLink(found[6]));
    else parts.push(...rankLinks(found[1], found[2]));
  }
  parts.push(text.slice(at));
  return parts.filter((part) => part !== "");
}

function rankLinks(word, numbers) {
  if (/^\d+$/.test(numbers)) return [node("a", `${word} ${numbers}`, { href: `#rank=${numbers}` })];
  return [`${word} `, ...numbers.split(/(\d+)/).filter(Boolean).map((part) => /\d/.test(part) ? node("a", part, { href: `#rank=${part}` }) : part)];
}

function hostLink(host) {
  const first = seats.byHost[seats.hosts.indexOf(host)]?.[0];
  return first === undefined ? host : node("a", host, { href: `#rank=${first}` });
}
