// The state of the run in a sentence and a few numbers.
import { $, ago, pairs, percent, seconds } from "./dom.js";

const SENTENCES = {
  starting: ["warn", "Starting."], running: ["good", "Running."], diagnosing: ["warn", "Something failed; finding out what."],
  recovering: ["warn", "Recovering."], finished: ["good", "Finished."], interrupted: ["warn", "Interrupted after a checkpoint; the same command goes on."],
  failed: ["bad", "Failed."], unknown: ["warn", "The run has not begun."],
};
export const PROTECTION = {
  full: "Every committed step survives the loss of a process or a node.",
  degraded: "Degraded: a lost process is restored from memory; a lost node goes back to the last checkpoint.",
  none: "No snapshot in memory: a failure goes back to the last checkpoint on disk.",
};

export function showState(status, last) {
  const ended = ["finished", "interrupted", "failed", "unknown"].includes(status.state);
  let [mood, text] = SENTENCES[status.state] ?? ["warn", status.state];
  if (!ended && !status.live) {
    mood = "bad";
    text = `The driver is gone (it was ${status.state}); the same launch command takes the run up again.`;
  }
  if (status.state !== "unknown") text += ` Step ${status.step} of ${status.steps}, ${status.world_size} ranks.`;
  if (status.message && status.state !== "finished") text += ` ${status.message}`;
  $("sentence").textContent = text;
  $("sentence").className = mood;
  $("protection").textContent = ended ? (status.time ? `Ended ${ago(status.time)}.` : "") : PROTECTION[status.protection] ?? "";
  document.title = `${status.state} - trainrt`;
  pairs($("numbers"), numbers(status, last));
}

function numbers(status, last) {
  const rows = last ? [
    ["loss", last.loss === null ? "not finite" : last.loss.toFixed(4)], ["step", seconds(last.step_seconds)],
    ["tokens/s", Math.round(last.tokens_per_second).toLocaleString("en")], ["MFU", percent(last.mfu)],
    ["snapshot stall", seconds(last.snapshot_stall_seconds)], ["restarts", String(last.incarnation - 1)], ["last step", ago(last.time)],
  ] : [];
  if (status.effective_time != null) rows.push(["effective time", percent(status.effective_time)]);
  if (status.unigram_entropy) rows.splice(1, 0, ["unigram entropy", status.unigram_entropy.toFixed(4)]);
  return rows;
}
