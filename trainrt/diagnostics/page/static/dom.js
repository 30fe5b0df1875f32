// Small tools: nodes, numbers for people, colors of the style sheet.
export const $ = (id) => document.getElementById(id);

export async function get(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

export function node(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

export function pairs(list, rows) {
  list.replaceChildren(...rows.map(([key, value]) => {
    const box = node("div");
    box.append(node("dt", key), node("dd", value));
    return box;
  }));
}

export function swatch(name) {
  const box = node("span", undefined, { class: "swatch" });
  box.style.background = `var(--${name})`;
  return box;
}

export const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

export function seconds(s) {
  if (s === null || s === undefined || Number.isNaN(s)) return "not heard";
  if (s >= 100) return `${s.toFixed(0)} s`;
  if (s >= 1) return `${s.toFixed(2)} s`;
  return s >= 0.0995 ? `${(s * 1000).toFixed(0)} ms` : `${(s * 1000).toFixed(1)} ms`;
}

export const percent = (share) => `${(share * 100).toFixed(share < 0.0995 ? 1 : 0)} %`;
export const times = (ratio) => `${ratio.toFixed(2)}\u00d7`;

export function bytes(n) {
  if (n === null || n === undefined || Number.isNaN(n)) return "not heard";
  for (const [unit, size] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20]]) {
    if (n >= size) return `${(n / size).toFixed(n >= 100 * size ? 0 : 1)} ${unit}`;
  }
  return `${(n / 1024).toFixed(0)} KiB`;
}

export function ago(time) {
  const s = Math.max(0, Date.now() / 1000 - time);
  if (s < 90) return `${s.toFixed(0)} s ago`;
  return s < 5400 ? `${(s / 60).toFixed(0)} min ago` : `${(s / 3600).toFixed(1)} h ago`;
}

export const words = (name) => name.replaceAll("_", " ");

// 3, 4, 5, 9 becomes "3 to 5, 9".
export function ranges(numbers, most = 12) {
  const runs = [];
  for (const n of numbers) {
    if (runs.length && runs.at(-1)[1] === n - 1) runs.at(-1)[1] = n;
    else runs.push([n, n]);
  }
  const told = runs.slice(0, most).map(([a, b]) => a === b ? `${a}` : b === a + 1 ? `${a}, ${b}` : `${a} to ${b}`);
  return told.join(", ") + (runs.length > most ? ", ..." : "");
}
