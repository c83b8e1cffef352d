"use strict";
// A reader's own verdicts: kept in this browser under the report's key, compared with answers and labels, saved as CSV.

const VERDICTS = { a: "atypical", n: "normal", x: "no mitosis" };
/** given: crop to {key, blinded}, where an empty key is a verdict that was taken back; kept: whether the browser stores them. */
const reading = { blinded: false, kept: true, given: new Map() };

const verdictOf = (i) => reading.given.get(i)?.key || "";
/** Whether answer, label and name of a crop are hidden. */
const veiled = (i) => reading.blinded && !verdictOf(i);
const readCrops = () => everything.filter(verdictOf);

const placeOf = (what) => `midog-lora report ${data.key} ${what}`; // pages opened from disk share one store
function keep(what, value) {
  try {
    if (value === null) localStorage.removeItem(placeOf(what));
    else localStorage.setItem(placeOf(what), JSON.stringify(value));
  } catch {
    reading.kept = false;
  }
}
function recall() {
  try {
    const found = (what) => JSON.parse(localStorage.getItem(placeOf(what)));
    reading.blinded = found("blinded") === true;
    reading.given = new Map(everything.map((i) => [i, found(i)]).filter(([, verdict]) => verdict));
  } catch {
    reading.kept = false;
  }
}

/** The key of a verdict that was pressed alone, or ""; a key that is held would judge crops that nobody looked at. */
const pressed = (event) => {
  const key = event.key.toLowerCase();
  return key in VERDICTS && !event.repeat && !event.ctrlKey && !event.metaKey && !event.altKey ? key : "";
};

/** Give crop i a verdict, or take it back where it is the one that it has. It counts as blinded if it is the first. */
function give(i, key) {
  const before = reading.given.get(i);
  const verdict = { key: before?.key === key ? "" : key, blinded: reading.blinded && !before };
  reading.given.set(i, verdict);
  keep(i, verdict);
  refresh(state.order.indexOf(i));
  drawReading();
}

function setBlinded(blinded) {
  reading.blinded = blinded;
  keep("blinded", blinded || null);
  showBlinded();
}

/** Hide or show what would tell a reader the answers: panels, orders and filters. */
function showBlinded() {
  document.body.classList.toggle("blinded", reading.blinded);
  $("blinded").checked = reading.blinded;
  if (reading.blinded) {
    $("name").value = "";
    $("reading-panel").open = true;
  }
  for (const option of $("show").options) option.hidden = option.disabled = reading.blinded && !BLINDED.includes(option.value);
  if (reading.blinded && !BLINDED.includes($("show").value)) $("show").value = "all";
  select();
  setThreshold(state.threshold, false); // panels that were hidden are drawn to their width
}

/** A crop's place in an order that says nothing about it, the same each time. */
function shuffled(i) {
  let hash = parseInt(data.key.slice(0, 8), 16) ^ Math.imul(i + 1, 0x9e3779b1);
  hash = Math.imul(hash ^ (hash >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return (hash ^ (hash >>> 16)) >>> 0;
}

/** Cohen's kappa of pairs of 0 and 1: {n, same, kappa, low, high}; kappa is null where one class is all that both use,
    and the 95% interval, from Cohen's standard error, is null where there is no disagreement to measure it by. */
function kappaOf(pairs) {
  const n = pairs.length;
  const same = pairs.filter(([a, b]) => a === b).length;
  const [a, b] = [0, 1].map((k) => pairs.reduce((sum, pair) => sum + pair[k], 0) / n);
  const [agreed, chance] = [same / n, a * b + (1 - a) * (1 - b)];
  if (!n || chance === 1) return { n, same, kappa: null, low: null, high: null };
  const kappa = (agreed - chance) / (1 - chance);
  const error = (1.96 * Math.sqrt((agreed * (1 - agreed)) / n)) / (1 - chance);
  return { n, same, kappa, low: error ? Math.max(-1, kappa - error) : null, high: error ? Math.min(1, kappa + error) : null };
}

/** The panel of verdicts; agreement is shown when there is nothing left that it could influence. */
function drawReading() {
  const read = readCrops();
  const blinded = read.filter((i) => reading.given.get(i).blinded).length;
  const left = p.length - read.length;
  $("reading-summary").textContent = read.length ? `${number(read.length)} of ${number(p.length)} crops` : "press A, N or X on a crop";
  $("save-verdicts").disabled = !read.length;
  $("forget").disabled = !reading.given.size;
  $("not-kept").hidden = reading.kept;
  if (!read.length || (reading.blinded && left)) {
    const text = `Agreement with ${labelled ? "ensemble and labels" : "the ensemble"} follows when every crop has a verdict, or when answers are shown again.`;
    $("agreement").replaceChildren(reading.blinded ? el("p", { class: "small muted" }, text) : "");
    return;
  }
  const sure = read.filter((i) => verdictOf(i) !== "x");
  const own = (i) => Number(verdictOf(i) === "a");
  const withLabel = sure.filter((i) => label[i] !== null);
  const rows = [["You and the ensemble", sure.map((i) => [own(i), called(i)])]];
  if (withLabel.length) {
    rows.push(["You and the labels", withLabel.map((i) => [own(i), label[i]])],
      ["Ensemble and labels, same crops", withLabel.map((i) => [called(i), label[i]])]);
  }
  const body = rows.map(([name, pairs]) => {
    const { n, same, kappa, low, high } = kappaOf(pairs);
    const cells = [number(n), `${number(same)} (${percent(same, n)})`, fixed(kappa), low === null ? "–" : `${fixed(low)} to ${fixed(high)}`];
    return el("tr", {}, el("th", { scope: "row" }, name), ...cells.map((text) => el("td", {}, text)));
  });
  const head = ["Agreement", "Crops", "Same class", "Cohen’s κ", "95% interval"].map((name) => el("th", { scope: "col" }, name));
  const notes = [`${number(blinded)} of ${number(read.length)} verdicts were given blinded.`];
  if (sure.length < read.length) notes.push(`${number(read.length - sure.length)} of “no mitosis” are left out.`);
  $("agreement").replaceChildren(
    el("div", { class: "scroll" }, el("table", { class: "agreement" }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body))),
    el("p", { class: "small muted" }, notes.join(" ")));
}

// ---- CSV files ----

const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
/** The text on one line, and such that a spreadsheet does not read it as a formula: as `plain` in slides/outputs.py. */
function plain(text) {
  const line = /[\r\n]/.test(text) ? text.trim().replace(/\s+/g, " ") : text;
  const formula = line.startsWith("\t") || (/^[=+\-@]/.test(line) && !Number.isFinite(Number(line)));
  return formula ? `'${line}` : line;
}

/** Rows of crops as CSV text; `class` follows the threshold that the row names. */
function csvOf(crops) {
  const rows = crops.map((i) => [
    path[i], page[i], p[i], CLASSES[called(i)], state.threshold, label[i] === null ? "" : CLASSES[label[i]],
    domain[i] < 0 ? "" : domains[domain[i]], VERDICTS[verdictOf(i)] || "", verdictOf(i) && (reading.given.get(i).blinded ? "yes" : "no"),
  ]);
  const header = ["path", "page", "p_atypical", "class", "threshold", "label", "domain", "verdict", "blinded"];
  return [header, ...rows].map((row) => row.map((cell) => quoted(typeof cell === "string" ? plain(cell) : String(cell))).join(",") + "\r\n").join("");
}

function save(crops, what) {
  const name = document.querySelector("h1").textContent.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "report";
  const address = URL.createObjectURL(new Blob([csvOf(crops)], { type: "text/csv" }));
  el("a", { href: address, download: `${name}-${what}.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** Show what a reader did with the same report in another tab; order, active crop and dialog stay, as far as they can. */
function followOtherTab() {
  const { blinded } = reading;
  recall();
  if (reading.blinded !== blinded) showBlinded();
  else {
    for (const position of [...cells.keys()]) refresh(position);
    drawReading();
  }
  if (!detail.open) return;
  const position = state.order.indexOf(enlarged);
  if (position < 0) detail.close(); // a filter that blinding changed leaves it out
  else openDetail(position);
}

function startReading() {
  recall();
  $("blinded").addEventListener("change", () => setBlinded($("blinded").checked));
  $("save-verdicts").addEventListener("click", () => save(readCrops(), "verdicts"));
  $("save-crops").addEventListener("click", () => save(state.order, "crops"));
  $("forget").addEventListener("click", () => {
    if (!confirm(`Forget ${number(readCrops().length)} verdicts? They cannot be brought back.`)) return;
    for (const i of reading.given.keys()) keep(i, null);
    reading.given.clear();
    showBlinded();
  });
  addEventListener("storage", (event) => {
    if (event.key?.startsWith(placeOf(""))) followOtherTab();
  });
}
