"use strict";
// Drawings and tables of the report. Each takes figures and returns an element or fills one; none keeps state.

const SVG = "http://www.w3.org/2000/svg";
const CLASSES = ["normal", "atypical"];

/** An element with attributes and children; text is always text, so no file name can become markup. */
function el(tag, attributes = {}, ...children) {
  const drawn = ["svg", "rect", "path", "line", "circle", "text", "g"].includes(tag);
  const node = drawn ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const number = (value) => value.toLocaleString("en-GB");
const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(part && part / whole < 0.1 ? 1 : 0)} %` : "–");
const fixed = (value) => (value === null ? "–" : value.toFixed(3));

/** Counts of crops at a threshold: {n, called, tp, fn, tn, fp}; the last four over labelled crops only. */
function tally(indices, p, label, threshold) {
  const count = { n: indices.length, called: 0, tp: 0, fn: 0, tn: 0, fp: 0 };
  for (const i of indices) {
    const called = p[i] >= threshold;
    if (called) count.called++;
    if (label[i] === 1) count[called ? "tp" : "fn"]++;
    else if (label[i] === 0) count[called ? "fp" : "tn"]++;
  }
  return count;
}

/** Sensitivity, specificity and balanced accuracy of a tally; null where a class is missing. */
function rates({ tp, fn, tn, fp }) {
  const sensitivity = tp + fn ? tp / (tp + fn) : null;
  const specificity = tn + fp ? tn / (tn + fp) : null;
  const balanced = sensitivity === null || specificity === null ? null : (sensitivity + specificity) / 2;
  return { sensitivity, specificity, balanced };
}

/** ROC curve of the labelled crops, ties as one step: {points: [[fpr, tpr], ...], auc}, or null where a class is missing. */
function rocOf(indices, p, label) {
  const order = indices.filter((i) => label[i] === 0 || label[i] === 1).sort((a, b) => p[b] - p[a]);
  const positives = order.reduce((sum, i) => sum + label[i], 0);
  const negatives = order.length - positives;
  if (!positives || !negatives) return null;
  const points = [[0, 0]];
  let [tp, fp, area] = [0, 0, 0];
  for (let k = 0; k < order.length; ) {
    const [before, value] = [tp, p[order[k]]];
    let passed = 0;
    for (; k < order.length && p[order[k]] === value; k++) label[order[k]] ? tp++ : passed++;
    area += (passed * (before + tp)) / 2;
    fp += passed;
    points.push([fp / negatives, tp / positives]);
  }
  return { points, auc: area / (positives * negatives) };
}

/** Histogram of P(atypical) over the threshold slider. With labels: labelled atypical above the axis, normal below. */
function drawHistogram(box, p, label, labelled, threshold, calibrated) {
  const [bins, pad, width] = [p.length < 200 ? 25 : 50, 8, Math.max(box.clientWidth, 120)]; // pad: half the slider's thumb
  const height = labelled ? 166 : 110;
  const counts = [new Array(bins).fill(0), new Array(bins).fill(0)];
  p.forEach((value, i) => {
    const bin = Math.min(bins - 1, Math.floor(value * bins));
    if (!labelled) counts[1][bin]++;
    else if (label[i] !== null) counts[label[i]][bin]++;
  });
  const most = Math.sqrt(Math.max(1, ...counts[0], ...counts[1]));
  const axis = labelled ? height / 2 : height;
  const x = (value) => pad + value * (width - 2 * pad);
  const svg = el("svg", { width, height, role: "img", "aria-label": "Histogram of P(atypical), square-root scale" });
  for (const side of labelled ? [0, 1] : [1]) {
    counts[side].forEach((count, bin) => {
      const tall = count ? Math.max(1.5, (Math.sqrt(count) / most) * (axis - 4)) : 0;
      const kind = labelled ? side : Number((bin + 0.5) / bins >= threshold);
      svg.append(el("rect", {
        x: x(bin / bins) + 0.5, width: Math.max(1, (width - 2 * pad) / bins - 1), height: tall,
        y: side ? axis - tall : axis + 1, class: `bar ${CLASSES[kind]}`,
      }));
    });
  }
  svg.append(el("line", { x1: pad, x2: width - pad, y1: axis, y2: axis, class: "axis" }));
  svg.append(el("line", { x1: x(calibrated), x2: x(calibrated), y1: 0, y2: height, class: "calibrated" }));
  svg.append(el("line", { x1: x(threshold), x2: x(threshold), y1: 0, y2: height, class: "cut" }));
  if (labelled) {
    svg.append(el("text", { x: pad, y: 10 }, "labelled atypical"));
    svg.append(el("text", { x: width - pad, y: height - 3, "text-anchor": "end" }, "labelled normal"));
  }
  box.replaceChildren(svg);
}

/** ROC curve with the threshold's point on it. */
function drawRoc(box, roc, { sensitivity, specificity }) {
  const [side, left, low] = [236, 42, 36];
  const x = (v) => left + v * (side - left - 8);
  const y = (v) => 8 + (1 - v) * (side - low - 8);
  const spoken = `ROC curve, area ${fixed(roc.auc)}; at this threshold sensitivity ${fixed(sensitivity)}, specificity ${fixed(specificity)}`;
  const svg = el("svg", { viewBox: `0 0 ${side} ${side}`, role: "img", "aria-label": spoken, class: "roc" });
  svg.append(el("path", { class: "axis", d: `M${x(0)},${y(1)}V${y(0)}H${x(1)}M${x(0)},${y(0)}L${x(1)},${y(1)}` }));
  svg.append(el("path", { class: "curve", d: "M" + roc.points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join("L") }));
  svg.append(el("circle", { class: "point", cx: x(1 - specificity), cy: y(sensitivity), r: 5.5 }));
  for (const v of [0, 0.5, 1]) {
    svg.append(el("text", { x: x(v), y: side - low + 14, "text-anchor": v === 1 ? "end" : "middle" }, String(v)));
    svg.append(el("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, String(v)));
  }
  svg.append(el("text", { x: x(0.5), y: side - 2, "text-anchor": "middle" }, "1 − specificity"));
  svg.append(el("text", { transform: `translate(10 ${y(0.5)}) rotate(-90)`, "text-anchor": "middle" }, "sensitivity"));
  svg.append(el("text", { x: x(1) - 4, y: y(0) - 8, "text-anchor": "end", class: "strong" }, `AUC ${fixed(roc.auc)}`));
  box.replaceChildren(svg);
}

/** Two by two buttons; pressing one shows its crops. `choose(outcome)` gets "tp", "fn", "fp" or "tn". */
function drawConfusion(box, count, choose) {
  const words = { tp: "found", fn: "missed", fp: "false alarms", tn: "right" };
  const cell = (key, right) => el("td", {}, el("button", {
    type: "button", class: right ? "hit" : "miss", onclick: () => choose(key),
    title: "Show these crops",
  }, el("b", {}, number(count[key])), " ", el("span", {}, words[key])));
  const head = (text, scope) => el("th", { scope }, text);
  box.replaceChildren(el("table", { class: "confusion" },
    el("thead", {}, el("tr", {}, el("td"), head("called atypical", "col"), head("called normal", "col"))),
    el("tbody", {},
      el("tr", {}, head("labelled atypical", "row"), cell("tp", true), cell("fn", false)),
      el("tr", {}, head("labelled normal", "row"), cell("fp", false), cell("tn", true)))));
}

/** One line a domain; its name is a button that filters by it. */
function drawDomains(box, rows, labelled, choose) {
  const names = labelled
    ? ["Domain", "Crops", "Atypical", "Called", "Bal. acc.", "Sens.", "Spec.", "AUC"]
    : ["Domain", "Crops", "Called atypical"];
  const body = rows.map(({ name, index, count, roc }) => {
    const { balanced, sensitivity, specificity } = rates(count);
    const cells = labelled
      ? [number(count.n), number(count.tp + count.fn), number(count.called), fixed(balanced), fixed(sensitivity), fixed(specificity), fixed(roc ? roc.auc : null)]
      : [number(count.n), `${number(count.called)} (${percent(count.called, count.n)})`];
    const button = el("button", { type: "button", class: "link", title: "Show this domain's crops", onclick: () => choose(index) }, name);
    return el("tr", {}, el("th", { scope: "row" }, button), ...cells.map((text) => el("td", {}, text)));
  });
  box.replaceChildren(el("table", {},
    el("thead", {}, el("tr", {}, ...names.map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, ...body)));
}

/** An attribution map on a canvas: vermilion speaks for atypical, green for normal; strength in logits, opaque at 1.5. */
function drawMap(map, canvas = el("canvas", { class: "map", "aria-hidden": "true" })) {
  const side = map.side;
  const values = Uint8Array.from(atob(map.values), (c) => c.charCodeAt(0));
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  const image = context.createImageData(side, side);
  const full = Math.max(map.largest, 1);
  for (let k = 0; k < values.length; k++) {
    const value = ((values[k] - 128) / 127) * map.largest;
    image.data.set(value > 0 ? [255, 106, 0] : [0, 190, 160], 4 * k);
    image.data[4 * k + 3] = 165 * Math.min(1, Math.abs(value) / full) ** 0.8;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}
