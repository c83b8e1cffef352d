"use strict";
// The report's state: which crops are shown, in which order, at which threshold. Only visible crops are in the document.

const data = JSON.parse(document.getElementById("data").textContent);
const images = JSON.parse(document.getElementById("images").textContent);
const { p, label, folds, member, members, path, page, domain, domains } = data;
const everything = Array.from(p.keys());
const labelled = label.some((value) => value !== null);
const severalPages = page.some((value) => value > 0);
const spreadOf = (values) => (values.length ? Math.max(...values) - Math.min(...values) : 0);
const [spread, memberSpread] = [folds.map(spreadOf), member.map(spreadOf)];
const severalMembers = members.length > 1 && member.every((values) => values.length === members.length);
/** The folds of member m among all of crop i. */
const foldsOf = (i, m) => {
  const first = members.slice(0, m).reduce((sum, { folds: count }) => sum + count, 0);
  return folds[i].slice(first, first + members[m].folds);
};
const curve = labelled ? rocOf(everything, p, label) : null;
const byDomain = domains.map((name, index) => {
  const members = everything.filter((i) => domain[i] === index);
  return { name, index, members, roc: rocOf(members, p, label) };
});
const $ = (id) => document.getElementById(id);

const state = { threshold: data.threshold, order: [], active: 0, printing: false };

// ---- which crops, in which order ----

const called = (i) => Number(p[i] >= state.threshold);
const divided = (values) => values.some((value) => value >= state.threshold) && values.some((value) => value < state.threshold);
const disagree = (i) => divided(folds[i]);
const membersDisagree = (i) => divided(member[i]);
const outcome = (i) => (label[i] === null ? "" : ["tn", "fp", "fn", "tp"][2 * label[i] + called(i)]);
const words = { fn: "missed", fp: "false alarm", tp: "found", tn: "right" };
/** How far on the wrong side of the threshold a crop lies, in (-inf, 1]; positive for mistakes; unlabelled ones last. */
const wrongness = (i) => {
  if (label[i] === null) return -Infinity;
  return label[i] ? (state.threshold - p[i]) / (state.threshold || 1) : (p[i] - state.threshold) / (1 - state.threshold || 1);
};
const nameOf = (i) => path[i] + (severalPages ? ` page ${page[i]}` : "");
const shortName = (i) => path[i].split(/[\\/]/).pop() + (severalPages ? ` #${page[i]}` : "");

const SHOW = {
  all: ["all", () => true],
  atypical: ["called atypical", (i) => called(i)],
  normal: ["called normal", (i) => !called(i)],
  disagree: ["folds disagree", disagree],
  members: ["members disagree", membersDisagree],
  maps: ["with a map", (i) => data.maps[i]],
  mistakes: ["mistakes", (i) => ["fn", "fp"].includes(outcome(i))],
  fn: ["missed", (i) => outcome(i) === "fn"],
  fp: ["false alarms", (i) => outcome(i) === "fp"],
  tp: ["found", (i) => outcome(i) === "tp"],
  tn: ["right, normal", (i) => outcome(i) === "tn"],
  unread: ["without your verdict", (i) => !verdictOf(i)],
  read: ["with your verdict", verdictOf],
  against: ["your verdict differs", (i) => verdictOf(i) && VERDICTS[verdictOf(i)] !== CLASSES[called(i)]],
};
const BLINDED = ["all", "unread", "read"]; // what may be shown while answers are hidden
const collator = new Intl.Collator("en", { numeric: true });
let alphabet = null; // rank of each crop by name, made when first asked for
const rankByName = () => {
  if (!alphabet) {
    alphabet = new Array(p.length);
    everything.slice().sort((a, b) => collator.compare(path[a], path[b]) || page[a] - page[b]).forEach((i, rank) => (alphabet[i] = rank));
  }
  return alphabet;
};
const SORT = { // name, key; small keys first
  error: ["worst mistakes", (i) => -wrongness(i)],
  high: ["most atypical", (i) => -p[i]],
  low: ["most normal", (i) => p[i]],
  doubt: ["near the threshold", (i) => Math.abs(p[i] - state.threshold)],
  spread: ["spread of the folds", (i) => -spread[i]],
  apart: ["spread of the members", (i) => -memberSpread[i]],
  centre: ["looks away from the centre", (i) => (data.maps[i] ? data.maps[i].centre : 2)],
  name: ["name", (i) => rankByName()[i]],
  input: ["order of the input", (i) => i],
};

function select() {
  const keep = SHOW[$("show").value][1];
  const wanted = Number($("domain").value || -1);
  const text = $("name").value.trim().toLowerCase();
  const key = Float64Array.from(everything, reading.blinded ? shuffled : SORT[$("sort").value][1]);
  state.order = everything
    .filter((i) => (wanted < 0 || domain[i] === wanted) && (!text || nameOf(i).toLowerCase().includes(text)) && keep(i))
    .sort((a, b) => key[a] - key[b] || a - b);
  state.active = 0;
  $("count").textContent = state.order.length === p.length ? number(p.length) : `${number(state.order.length)} of ${number(p.length)}`;
  $("empty").hidden = state.order.length > 0;
  cells.forEach((cell) => cell.remove());
  cells.clear();
  layOut();
}

// ---- the grid: rows above and below the window are not in the document ----

const grid = $("grid");
const cells = new Map(); // position in the order -> <li>
const META = labelled ? 72 : 56; // pixels under a picture
let [columns, width, gap] = [1, 100, 10];

function layOut() {
  const room = grid.clientWidth;
  gap = room < 500 ? 8 : 12;
  columns = Math.max(2, Math.floor((room + gap) / ((room < 500 ? 108 : 136) + gap)));
  width = (room - gap * (columns - 1)) / columns;
  grid.style.height = `${Math.ceil(state.order.length / columns) * (width + META + gap)}px`;
  cells.forEach(place);
  render();
}

function place(cell, position) {
  const [row, column] = [Math.floor(position / columns), position % columns];
  cell.style.width = `${width}px`;
  cell.style.height = `${width + META}px`;
  cell.style.transform = `translate(${column * (width + gap)}px, ${row * (width + META + gap)}px)`;
}

function render() {
  const step = width + META + gap;
  const top = -grid.getBoundingClientRect().top;
  const first = Math.max(0, Math.floor((top - 400) / step) * columns);
  const last = Math.min(state.order.length, Math.ceil((top + innerHeight + 400) / step) * columns);
  const [from, to] = state.printing ? [0, Math.min(state.order.length, PRINTED)] : [first, last];
  cells.forEach((cell, position) => {
    if ((position < from || position >= to) && position !== state.active) {
      cell.remove();
      cells.delete(position);
    }
  });
  const wanted = state.order.length ? [state.active] : []; // stays, so that the focus is never lost
  for (let position = from; position < to; position++) wanted.push(position);
  for (const position of wanted) {
    if (cells.has(position)) continue;
    const cell = makeCell(position);
    cells.set(position, cell);
    place(cell, position);
    const after = [...cells.keys()].filter((other) => other > position); // the document's order is the reader's
    grid.insertBefore(cell, after.length ? cells.get(Math.min(...after)) : null);
  }
}

const queued = new Map(); // task to its handle: each runs once a frame, and none takes another's place
const later = (task) => { cancelAnimationFrame(queued.get(task)); queued.set(task, requestAnimationFrame(task)); };
addEventListener("scroll", () => later(render), { passive: true });
new ResizeObserver(() => { later(layOut); }).observe(grid);

function makeCell(position) {
  const i = state.order[position];
  const image = el("img", { alt: "", src: `data:image/webp;base64,${images[i]}`, decoding: "async" });
  const own = verdictOf(i) && el("span", { class: "own", title: `Your verdict: ${VERDICTS[verdictOf(i)]}` }, verdictOf(i).toUpperCase());
  const picture = el("span", { class: "picture" }, image, mapOver(i, $("maps").checked), scaleBar(i), el("span", { class: "badge" }), own);
  const button = el("button", { type: "button", class: "card", "data-position": position, tabindex: position === state.active ? 0 : -1 });
  const cell = el("li", { class: "cell", "aria-setsize": state.order.length, "aria-posinset": position + 1 }, button);
  if (veiled(i)) { // the document holds nothing that a reader could see by accident
    button.classList.add("veiled");
    button.append(picture, " ", el("span", { class: "line" }, `Crop ${number(position + 1)}`));
    return cell;
  }
  const line = el("span", { class: "line" }, el("b", {}, fixed(p[i])), " ", el("span", { class: "verdict" }));
  const known = label[i] === null ? "no label" : ["labelled ", el("span", { class: CLASSES[label[i]] }, CLASSES[label[i]])];
  const truth = labelled ? el("span", { class: "truth" }, ...[known].flat()) : "";
  const file = el("span", { class: "file", title: path[i] }, shortName(i));
  const more = el("span", { class: "visually-hidden more" }); // what the track shows to the eye
  button.append(picture, " ", track(i), line, " ", truth, " ", file, " ", more);
  judge(button, i);
  return cell;
}

/** Make a card again, because more or less of it may be shown. */
function refresh(position) {
  const cell = cells.get(position);
  if (!cell) return;
  const fresh = makeCell(position);
  const focused = cell.contains(document.activeElement);
  place(fresh, position);
  cell.replaceWith(fresh);
  cells.set(position, fresh);
  if (focused) fresh.firstChild.focus({ preventScroll: true });
}

/** What depends on the threshold, written into a card. */
function judge(button, i) {
  if (veiled(i)) return;
  const result = outcome(i);
  const wrong = result === "fn" || result === "fp";
  button.classList.toggle("atypical-card", called(i) === 1);
  button.classList.toggle("wrong", wrong);
  button.querySelector(".verdict").textContent = CLASSES[called(i)];
  button.querySelector(".badge").textContent = wrong ? words[result] : "";
  const extent = folds[i].length > 1 ? `folds ${fixed(Math.min(...folds[i]))} to ${fixed(Math.max(...folds[i]))}` : "";
  const each = severalMembers ? members.map(({ name }, m) => `${name} ${fixed(member[i][m])}`).join(", ") : "";
  const own = verdictOf(i) ? `your verdict ${VERDICTS[verdictOf(i)]}` : "";
  button.querySelector(".more").textContent = [extent, each, own].filter(Boolean).join(", ");
}

/** From 0 to 1: a bar from the lowest to the highest fold, a dot for the ensemble, a tick for the threshold, and a
    stroke for each of several members. */
function track(i) {
  const strokes = severalMembers ? member[i].map((value, m) => el("i", { class: `member m${m}`, style: `left:${100 * value}%` })) : [];
  return el("span", { class: "track" }, range(folds[i]), ...strokes, el("i", { class: "dot", style: `left:${100 * p[i]}%` }));
}

const range = (values) => (values.length ? el("i", { class: "range", style: `left:${100 * Math.min(...values)}%;width:${100 * spreadOf(values)}%` }) : null);

/** One member's own track: its folds as small dots, its answer as its stroke. */
function memberTrack(i, m) {
  const dots = foldsOf(i, m).map((value, n) => el("i", { class: "fold-dot", style: `left:${100 * value}%`, title: `Fold ${n}: ${fixed(value)}` }));
  return el("span", { class: `track m${m}` }, range(foldsOf(i, m)), ...dots, el("i", { class: `member m${m}`, style: `left:${100 * member[i][m]}%` }));
}

/** Where a crop's picture lies in its square box, and the networks' part of it, each as left, top, width, height in %. */
function geometry(i) {
  const [w, h] = data.size[i];
  const side = Math.min(w, h, data.kept || Infinity);
  const unit = 100 / Math.max(w, h);
  return `left:${50 - (side * unit) / 2}%;top:${50 - (side * unit) / 2}%;width:${side * unit}%;height:${side * unit}%`;
}

/** 10 µm, or on small or large crops another round length of at most half their width. */
function scaleBar(i, text = false) {
  const across = Math.max(...data.size[i]); // pixels of the square box
  const most = (Math.min(data.size[i][0], 1e6) * data.mpp) / 2;
  const length = [10, 5, 2, 1].find((micrometres) => micrometres <= most);
  if (!length) return null;
  const style = `width:${(100 * length) / data.mpp / across}%`;
  return el("span", { class: "scale", style, "aria-hidden": "true" }, text ? el("span", {}, `${length} µm`) : "");
}

function mapOver(i, wanted) {
  if (!wanted || !data.maps[i] || veiled(i)) return null;
  const canvas = drawMap(data.maps[i]);
  canvas.style.cssText = geometry(i);
  return canvas;
}

function moveTo(position, focus = true) {
  const target = Math.max(0, Math.min(state.order.length - 1, position));
  cells.get(state.active)?.firstChild.setAttribute("tabindex", -1);
  state.active = target;
  render();
  const button = cells.get(target)?.firstChild;
  button?.setAttribute("tabindex", 0);
  if (focus) button?.focus({ preventScroll: true });
  const [box, bar] = [button?.getBoundingClientRect(), $("toolbar").getBoundingClientRect().bottom];
  if (box && box.top < bar + 6) scrollBy(0, box.top - bar - 6);
  else if (box && box.bottom > innerHeight - 6) scrollBy(0, box.bottom - innerHeight + 6);
}

grid.addEventListener("keydown", (event) => {
  const verdict = pressed(event);
  if (verdict && state.order.length) {
    give(state.order[state.active], verdict);
    if (verdictOf(state.order[state.active])) moveTo(state.active + 1); // one key a crop
    return;
  }
  const rows = Math.max(1, Math.floor(innerHeight / (width + META + gap)) - 1) * columns;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, PageUp: -rows, PageDown: rows, Home: -Infinity, End: Infinity };
  if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  moveTo(state.active + steps[event.key]);
});
grid.addEventListener("click", (event) => {
  const button = event.target.closest(".card");
  if (button) openDetail(Number(button.dataset.position));
});

// ---- the threshold ----

function setThreshold(value, reselect = true) {
  state.threshold = Math.max(0, Math.min(1, value));
  $("threshold").value = state.threshold;
  if (document.activeElement !== $("threshold-number")) $("threshold-number").value = Number(state.threshold.toFixed(4));
  $("reset").disabled = state.threshold === data.threshold;
  document.body.style.setProperty("--t", state.threshold);
  recount();
  const keepsOrder = ["all"].includes($("show").value) && !["error", "doubt"].includes($("sort").value);
  if (reselect && !keepsOrder) select();
  else cells.forEach((cell, position) => judge(cell.firstChild, state.order[position]));
  drawReading();
}

let saying = 0;
function recount() {
  const count = tally(everything, p, label, state.threshold);
  const rate = rates(count);
  const doubtful = everything.filter(disagree).length;
  const figures = [["Crops", number(count.n), severalPages ? `of ${number(new Set(path).size)} files` : ""],
    ["Called atypical", number(count.called), percent(count.called, count.n)]];
  if (folds[0].length > 1) figures.push(["Folds disagree", number(doubtful), percent(doubtful, count.n)]);
  if (severalMembers) {
    const torn = everything.filter(membersDisagree).length;
    figures.push(["Members disagree", number(torn), percent(torn, count.n)]);
  }
  if (labelled) {
    figures.push(["Balanced accuracy", fixed(rate.balanced), curve ? `AUC ${fixed(curve.auc)}` : "one class only"],
      ["Sensitivity", fixed(rate.sensitivity), `${number(count.tp)} of ${number(count.tp + count.fn)} atypical`],
      ["Specificity", fixed(rate.specificity), `${number(count.tn)} of ${number(count.tn + count.fp)} normal`]);
    drawConfusion($("confusion"), count, (key) => show({ show: key }));
    if (curve) drawRoc($("roc"), curve, rate);
  }
  $("figures").replaceChildren(...figures.map(([name, value, note]) => el("div", {}, el("dt", {}, name), el("dd", {}, value, el("small", {}, note || "\u00a0")))));
  drawHistogram($("histogram"), p, label, labelled, state.threshold, data.threshold);
  if (byDomain.length) {
    const rows = byDomain.map((one) => ({ ...one, count: tally(one.members, p, label, state.threshold) }));
    drawDomains($("domain-table"), rows, labelled, (index) => show({ domain: index }));
  }
  clearTimeout(saying); // screen readers hear the end of a movement, not each step of it
  saying = setTimeout(() => {
    $("spoken").textContent = figures.slice(1).map(([name, value]) => `${name} ${value}`).join(", ");
  }, 500);
}

/** Set filters as if by hand, and go to the crops. */
function show(values) {
  for (const [id, value] of Object.entries(values)) $(id).value = value;
  select();
  $("crops").scrollIntoView();
  moveTo(0);
}

// ---- one crop, large ----

const detail = $("detail");
let enlarged = null; // the crop that the dialog shows: verdicts given there are its own, whatever the order does
function openDetail(position) {
  moveTo(position, false);
  enlarged = state.order[state.active];
  drawDetail();
}
function drawDetail() {
  const i = enlarged;
  const result = outcome(i);
  const place = `Crop ${number(state.active + 1)} of ${number(state.order.length)}`;
  $("detail-title").textContent = veiled(i) ? place : shortName(i);
  $("previous").disabled = state.active === 0;
  $("next").disabled = state.active === state.order.length - 1;
  const overlay = mapOver(i, $("overlay").checked);
  const frame = $("frame").checked ? el("span", { class: "frame", style: geometry(i) }) : null;
  const about = veiled(i) ? place : `Crop ${shortName(i)}, called ${CLASSES[called(i)]}`;
  $("stage").replaceChildren(el("img", { alt: about, src: `data:image/webp;base64,${images[i]}` }), ...[overlay, frame, scaleBar(i, true)].filter(Boolean));
  $("overlay-label").hidden = !data.maps[i] || veiled(i);
  for (const button of $("verdicts").children) button.setAttribute("aria-pressed", button.value === verdictOf(i));
  if (!detail.open) detail.showModal();
  if (veiled(i)) return $("detail-facts").replaceChildren(el("p", { class: "muted" }, "The answer is shown after your verdict."));
  const verdict = el("p", { class: `verdict-large ${CLASSES[called(i)]}` }, CLASSES[called(i)], el("small", {}, `is the ensemble’s answer, P(atypical) ${p[i].toPrecision(4)}`));
  const facts = [["Threshold", fixed(state.threshold)]];
  if (result) facts.push(["Label", `${CLASSES[label[i]]}: ${words[result]}`]);
  const answer = (value) => `${fixed(value)}, ${CLASSES[Number(value >= state.threshold)]}`;
  if (severalMembers) members.forEach(({ name }, m) => {
    const title = el("span", { class: `member-name m${m}` }, name);
    const about = el("span", { class: "muted small" }, `folds ${foldsOf(i, m).map(fixed).join(", ")}`);
    facts.push([title, el("div", { class: "member-facts" }, el("span", {}, answer(member[i][m])), memberTrack(i, m), about)]);
  });
  else folds[i].forEach((value, n) => facts.push([`Fold ${n}`, answer(value)]));
  if (severalMembers) facts.push(["Spread", `${fixed(memberSpread[i])} of the members, ${fixed(spread[i])} of the folds`]);
  else if (folds[i].length > 1) facts.push(["Spread", fixed(spread[i])]);
  if (data.maps[i]) facts.push(["Centre", `has ${percent(data.maps[i].centre, 1)} of the effect on the answer, and ${percent(data.maps[i].area, 1)} of the area`]);
  if (domain[i] >= 0) facts.push(["Domain", domains[domain[i]]]);
  facts.push(["File", path[i]]);
  if (severalPages) facts.push(["Page", String(page[i])]);
  const side = data.size[i].map((pixels) => Number((pixels * data.mpp).toPrecision(3)));
  facts.push(["Size", `${data.size[i].join(" × ")} pixels, ${side.join(" × ")} µm at ${data.mpp} µm per pixel`]);
  const rows = facts.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)));
  $("detail-facts").replaceChildren(verdict, track(i), el("table", { class: "facts" }, el("tbody", {}, ...rows)));
}
function giveInDetail(key) {
  give(enlarged, key);
  drawDetail(); // stays, to compare with the answer
}
for (const id of ["frame", "overlay"]) $(id).addEventListener("change", drawDetail);
$("previous").addEventListener("click", () => openDetail(state.active - 1));
$("next").addEventListener("click", () => openDetail(state.active + 1));
$("close").addEventListener("click", () => detail.close());
detail.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") openDetail(state.active - 1);
  if (event.key === "ArrowRight") openDetail(state.active + 1);
  if (pressed(event)) giveInDetail(pressed(event));
});
for (const button of $("verdicts").children) button.addEventListener("click", () => giveInDetail(button.value));
detail.addEventListener("click", (event) => { if (event.target === detail) detail.close(); });
detail.addEventListener("close", () => moveTo(state.active));

// ---- crops that the overview points to ----

function openCrop(i) {
  if (!state.order.includes(i)) show({ show: "all", domain: -1, name: "" });
  openDetail(state.order.indexOf(i));
}
for (const link of document.querySelectorAll("[data-crop]")) {
  link.addEventListener("click", (event) => { event.preventDefault(); openCrop(Number(link.dataset.crop)); });
}

// ---- on paper: the first crops of the selection, in the page's flow ----

const PRINTED = 150;
function forPaper(printing) {
  state.printing = printing;
  grid.classList.toggle("printing", printing);
  const rest = state.order.length - PRINTED;
  grid.dataset.note = printing && rest > 0 ? `${number(rest)} more crops are in the file.` : "";
  render();
}
addEventListener("beforeprint", () => forPaper(true));
addEventListener("afterprint", () => forPaper(false));

// ---- start ----

function start() {
  const several = folds[0].length > 1;
  const offered = {
    show: Object.keys(SHOW)
      .filter((key) => (labelled || !["mistakes", "fn", "fp", "tp", "tn"].includes(key)) && (several || key !== "disagree") && (severalMembers || key !== "members") && (key !== "maps" || (data.maps.some(Boolean) && !data.maps.every(Boolean)))),
    sort: Object.keys(SORT).filter((key) => (labelled || key !== "error") && (several || key !== "spread") && (severalMembers || key !== "apart") && (data.maps.length || key !== "centre")),
  };
  for (const [id, table] of [["show", SHOW], ["sort", SORT]]) {
    $(id).append(...offered[id].map((key) => el("option", { value: key }, table[key][0])));
    $(id).addEventListener("change", select);
  }
  $("domain").append(el("option", { value: -1 }, "all"), ...domains.map((name, index) => el("option", { value: index }, name)));
  $("domain").addEventListener("change", select);
  $("domain-label").hidden = $("domain-panel").hidden = domains.length < 1;
  $("domain-summary").textContent = domains.length;
  $("confusion-panel").hidden = !labelled;
  $("roc-panel").hidden = !curve;
  $("maps-label").hidden = !data.maps.some(Boolean);
  $("maps").checked = data.maps.some(Boolean); // they were asked for
  $("name").addEventListener("input", () => later(select));
  $("maps").addEventListener("change", select);
  $("clear").addEventListener("click", () => show({ show: "all", domain: -1, name: "" }));
  $("threshold").addEventListener("input", () => setThreshold(Number($("threshold").value)));
  $("threshold-number").addEventListener("input", () => $("threshold-number").value !== "" && setThreshold(Number($("threshold-number").value)));
  $("reset").addEventListener("click", () => setThreshold(data.threshold));
  $("legend").append(el("p", {}, "Bar: lowest to highest fold. Dot: the ensemble. Tick: the threshold. The line below a picture is vermilion where the answer is atypical, green where it is normal."),
    severalMembers ? el("p", {}, "Strokes: the members, ", ...members.flatMap(({ name }, m) => [m ? ", " : "", el("span", { class: `member-name m${m}` }, name)]), ".") : "",
    labelled ? el("p", {}, "A crop answered against its label is marked missed (atypical, called normal) or false alarm (normal, called atypical).") : "",
    data.maps.some(Boolean) ? el("p", {}, "Where it looks: hiding a vermilion place makes the crop look less atypical, hiding a green place more.") : "",
    el("p", {}, `White bar: 10 µm, where a pixel is ${data.mpp} µm. On crops too small for it, 5, 2 or 1 µm.`),
    el("p", {}, "Keys on a crop: A atypical, N normal, X no mitosis; the letter in its corner is your verdict."));
  let drawn = 0;
  new ResizeObserver(([entry]) => {
    const now = Math.round(entry.contentRect.width);
    if (now !== drawn) drawHistogram($("histogram"), p, label, labelled, state.threshold, data.threshold);
    drawn = now;
  }).observe($("histogram"));
  startReading();
  setThreshold(data.threshold, false);
  showBlinded();
  document.documentElement.dataset.ready = "true";
}
start();
