"use strict";
// Curves and scores of the labelled crops at the calibrated threshold, as Python computed them: see inference/assessment.py.

/** Axes from 0 to 1 (upwards from `low` to `high`, with `marks`) and lines of points [x, y, weight?]; a weight is a dot's size. */
function drawCurves(box, { title, across, up, low = 0, high = 1, marks = [0, 0.5, 1], lines, spoken }) {
  const [side, left, foot] = [230, 44, 30];
  const x = (v) => left + v * (side - left - 8);
  const y = (v) => 8 + (1 - (Math.max(v, low) - low) / (high - low)) * (side - foot - 8);
  const svg = el("svg", { viewBox: `0 0 ${side} ${side}`, role: "img", "aria-label": spoken, class: "roc" });
  svg.append(el("path", { class: "axis", d: `M${x(0)},${y(high)}V${y(low)}H${x(1)}` }));
  for (const { points, kind } of lines) {
    svg.append(el("path", { class: kind, d: "M" + points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join("L") }));
    for (const [a, b, weight] of points) if (weight) svg.append(el("circle", { class: kind, cx: x(a), cy: y(b), r: 1.5 + 6 * Math.sqrt(weight) }));
  }
  for (const v of [0, 0.5, 1]) svg.append(el("text", { x: x(v), y: side - foot + 14, "text-anchor": v === 1 ? "end" : "middle" }, String(v)));
  for (const v of marks) svg.append(el("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, String(Number(v.toFixed(2)))));
  svg.append(el("text", { x: x(0.5), y: side - 2, "text-anchor": "middle" }, across));
  svg.append(el("text", { transform: `translate(9 ${y((low + high) / 2)}) rotate(-90)`, "text-anchor": "middle" }, up));
  box.append(el("figure", {}, el("figcaption", {}, title), svg));
}

/** A row for each score, a column for each set of crops: value and 95% interval. */
function drawScores(box, sets) {
  const cell = ([value, low, high]) => [fixed(value), low === null ? "" : ` (${fixed(low)} to ${fixed(high)})`].join("");
  const head = sets.map(({ name, note }) => el("th", { scope: "col" }, name, el("small", {}, note)));
  const rows = sets[0].scores.map(([name], n) =>
    el("tr", {}, el("th", { scope: "row" }, name), ...sets.map(({ scores }) => el("td", {}, cell(scores[n].slice(1))))));
  box.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, el("td"), ...head)), el("tbody", {}, ...rows)));
}

if (data.assessment) {
  const { sets, seen, curves } = data.assessment;
  $("scores-panel").hidden = false;
  $("scores-seen").textContent = seen;
  drawScores($("scores"), sets);
  if (curves.decision) {
    const { prevalence, precision_recall, reliability, decision } = curves;
    const total = reliability.reduce((sum, [count]) => sum + count, 0);
    const bins = reliability.map(([count, mean, share]) => [mean, share, count / total]);
    const all = decision.map(([cut]) => [cut, prevalence - ((1 - prevalence) * cut) / (1 - cut)]);
    const top = Math.max(prevalence, ...decision.map(([, benefit]) => benefit));
    drawCurves($("curves"), {
      title: "Precision and recall", across: "recall (sensitivity)", up: "precision", spoken: "Precision by recall; dashed: the share of atypical crops",
      lines: [{ points: [[0, prevalence], [1, prevalence]], kind: "chance" }, { points: precision_recall, kind: "curve" }],
    });
    drawCurves($("curves"), {
      title: "Calibration", across: "mean P(atypical)", up: "share of atypical", spoken: "Share of atypical crops by P(atypical); dashed: perfect calibration",
      lines: [{ points: [[0, 0], [1, 1]], kind: "chance" }, { points: bins, kind: "curve" }],
    });
    drawCurves($("curves"), {
      title: "Decision curve", across: "P(atypical) at which one acts", up: "net benefit", low: -0.25 * top, high: top, marks: [0, top / 2, top],
      spoken: "Net benefit by the probability at which one acts; dashed: acting on all crops, and on none",
      lines: [{ points: all.filter(([, benefit]) => benefit >= -0.25 * top), kind: "chance" }, { points: [[0, 0], [1, 0]], kind: "chance" }, { points: decision, kind: "curve" }],
    });
  }
}
