"use strict";
// Pictures of slides: SVG in level-0 pixels, of which the viewBox is what is shown. A scale bar, and a closer look.

const CLOSEST = 800; // level-0 pixels that the picture shows at least from side to side
const MARK_RADIUS = 5; // of a figure's dot, in pixels on the screen
const RING = 10; // µm: radius of the ring that takes its place in a closer look, so that the figure is seen
const SCALE_FONT = 13; // pixels on the screen

/** 1, 2 or 5 times a power of ten, at most `value`. */
function roundLength(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [5, 2, 1].find((step) => step * power <= value * (1 + 1e-9));
}

function lengthName(micrometres) {
  return micrometres >= 1000 ? `${micrometres / 1000} mm` : `${micrometres} µm`;
}

function slidePicture(svg) {
  const mpp = Number(svg.dataset.mpp);
  const { width, height } = svg.viewBox.baseVal;
  const view = { x: 0, y: 0, zoom: 1 };
  const bar = [el("path", { class: "bar below" }), el("path", { class: "bar" })];
  const text = el("text", { class: "length" });
  svg.append(el("g", { "aria-hidden": "true" }, ...bar, text));
  svg.classList.add("placed");

  /** Level-0 pixels of one pixel on the screen. */
  const unit = () => Math.max(width / view.zoom / (svg.clientWidth || 1), height / view.zoom / (svg.clientHeight || 1));

  function draw() {
    const [w, h] = [width / view.zoom, height / view.zoom];
    view.x = Math.min(Math.max(view.x, 0), width - w);
    view.y = Math.min(Math.max(view.y, 0), height - h);
    svg.setAttribute("viewBox", `${view.x} ${view.y} ${w} ${h}`);
    const pixel = unit();
    const near = RING / mpp > 3 * MARK_RADIUS * pixel;
    svg.classList.toggle("near", near);
    svg.style.setProperty("--r", `${near ? RING / mpp : MARK_RADIUS * pixel}px`);
    const micrometres = roundLength((w * mpp) / 4);
    const [left, bottom, length] = [view.x + 16 * pixel, view.y + h - 16 * pixel, micrometres / mpp];
    for (const line of bar) line.setAttribute("d", `M${left} ${bottom}h${length}`);
    text.setAttribute("x", left + length / 2);
    text.setAttribute("y", bottom - 9 * pixel);
    text.style.fontSize = `${SCALE_FONT * pixel}px`;
    text.textContent = lengthName(micrometres);
    svg.classList.toggle("enlarged", view.zoom > 1);
    [out.disabled, whole.disabled] = [view.zoom <= 1, view.zoom <= 1];
    closer.disabled = view.zoom >= most;
  }

  /** Enlarge by `factor`; the place at x, y (shares of what is shown) stays where it is. */
  const most = Math.max(1, width / CLOSEST);
  function zoom(factor, x = 0.5, y = 0.5) {
    const before = view.zoom;
    view.zoom = Math.min(Math.max(before * factor, 1), most);
    view.x += (x * width) / before - (x * width) / view.zoom;
    view.y += (y * height) / before - (y * height) / view.zoom;
    draw();
  }
  const share = (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return [((point.x - view.x) / width) * view.zoom, ((point.y - view.y) / height) * view.zoom];
  };

  const button = (label, title, onclick) =>
    el("button", { type: "button", title, "aria-label": `${title}: ${svg.getAttribute("aria-label")}`, onclick }, label);
  const closer = button("+", "Closer", () => zoom(2));
  const out = button("−", "Farther", () => zoom(0.5));
  const whole = button("Whole", "The whole slide", () => zoom(1 / most));
  svg.parentElement.querySelector("figcaption").append(closer, out, whole);

  svg.addEventListener("dblclick", (event) => { event.preventDefault(); zoom(2, ...share(event)); });
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return; // the page scrolls
    event.preventDefault();
    zoom(2 ** (-event.deltaY / 200), ...share(event));
  }, { passive: false });

  let drag = null; // where the pointer went down, and whether it has moved since
  svg.addEventListener("pointerdown", (event) => { if (event.button === 0) drag = { x: event.clientX, y: event.clientY, moved: false }; });
  svg.addEventListener("pointermove", (event) => {
    if (!(event.buttons & 1)) drag = null; // let go outside
    if (!drag || view.zoom <= 1) return;
    const [x, y] = [event.clientX - drag.x, event.clientY - drag.y];
    if (!drag.moved && Math.hypot(x, y) < 4) return;
    if (!drag.moved) svg.setPointerCapture(event.pointerId);
    const pixel = unit();
    Object.assign(view, { x: view.x - x * pixel, y: view.y - y * pixel });
    drag = { x: event.clientX, y: event.clientY, moved: true };
    svg.classList.add("moving");
    draw();
  });
  for (const end of ["pointerup", "pointercancel"]) {
    svg.addEventListener(end, () => { svg.classList.remove("moving"); setTimeout(() => (drag = null)); });
  }
  svg.addEventListener("click", (event) => { if (drag?.moved) { event.preventDefault(); event.stopPropagation(); } }, true);
  svg.addEventListener("dragstart", (event) => event.preventDefault());
  new ResizeObserver(draw).observe(svg);
  draw();
}

document.querySelectorAll("svg[data-mpp]").forEach(slidePicture);
