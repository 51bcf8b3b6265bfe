// What all widgets share: labelled controls that keep their keys, canvases, pictures out of bytes, a clock.
const BLUE = "#0072B2", ORANGE = "#E69F00", GREEN = "#009E73", RED = "#D55E00", SKY = "#56B4E9";

// Viridis at nine places, in between linear: dark is little, bright is much, for every eye.
const VIRIDIS = [[68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 145, 140], [40, 174, 128], [94, 201, 98],
  [173, 220, 48], [253, 231, 37]];

function viridis(x) {
  const at = Math.min(Math.max(x, 0), 1) * 8, i = Math.min(Math.floor(at), 7), t = at - i;
  return VIRIDIS[i].map((a, c) => Math.round(a + (VIRIDIS[i + 1][c] - a) * t));
}

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function floats(view) { // a Bytes trait as float32; copied, for its start may not be aligned
  return new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

// One view of a widget: collects what has to be undone, redraws on changes of the model, measures.
class View {
  constructor({ model, el }, label) {
    this.model = model;
    this.root = make("div", { class: "fvsr", role: "group", "aria-label": label });
    this.controls = make("div", { class: "fvsr-controls" });
    this.undo = [];
    this.rows = [];
    el.append(this.root);
  }

  get(name) { return this.model.get(name); }

  on(names, handler) { // call `handler` when one of the traits changes, wherever the change comes from
    for (const name of names) {
      this.model.on(`change:${name}`, handler);
      this.undo.push(() => this.model.off(`change:${name}`, handler));
    }
  }

  set(values, event) { // the model first, which redraws at once; then the kernel is told
    for (const [name, value] of Object.entries(values)) this.model.set(name, value);
    if (event) this.measure(event.timeStamp);
    this.model.save_changes();
  }

  measure(start) { // milliseconds from the event to the drawn canvas, and to the frame after it
    const round = () => String(Math.round((performance.now() - start) * 10) / 10);
    this.root.dataset.drawMs = round();
    requestAnimationFrame(() => { const c = new MessageChannel(); c.port1.onmessage = () => { this.root.dataset.frameMs = round(); }; c.port2.postMessage(0); });
  }

  // A slider with label and value. JupyterLab takes arrow keys from inputs unless the input itself says no.
  slider(name, label, { min, max, step = 1, show = String }) {
    const out = make("output"), input = make("input", { type: "range", min, max, step, name, "aria-label": label,
      "data-lm-suppress-shortcuts": "true" });
    const follow = () => {
      input.value = this.get(name);
      out.textContent = show(this.get(name));
      input.setAttribute("aria-valuetext", out.textContent);
    };
    input.addEventListener("input", event => this.set({ [name]: Number(input.value) }, event));
    this.on([name], follow);
    this.rows.push({ name, input, follow, limits: l => { Object.assign(input, l); follow(); } });
    follow();
    this.controls.append(make("label", { class: "fvsr-control" }, label, input, out));
    return this.rows.at(-1);
  }

  choice(name, label, options) { // options: {value: text}
    const input = make("select", { name, "aria-label": label, "data-lm-suppress-shortcuts": "true" });
    for (const [value, text] of Object.entries(options)) input.append(make("option", { value }, text));
    const follow = () => { input.value = this.get(name); };
    input.addEventListener("change", event => this.set({ [name]: input.value }, event));
    this.on([name], follow);
    follow();
    this.controls.append(make("label", { class: "fvsr-control" }, label, input));
    return input;
  }

  canvas(label, width, height) { // focusable, and its keys are its own
    const canvas = make("canvas", { tabindex: 0, role: "img", "aria-label": label, "data-lm-suppress-shortcuts": "true" });
    Object.assign(canvas, { width, height });
    return canvas;
  }

  key(...pairs) { // legend: colour, text
    const row = make("div", { class: "fvsr-read" });
    for (const [color, text] of pairs) row.append(make("span", { class: "fvsr-key" }, make("i", { style: `background:${color}` }), text));
    return row;
  }

  end() { return () => { this.undo.forEach(f => f()); this.root.remove(); }; }
}

function place(canvas, event) { // of a pointer, in the canvas' own pixels
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
}

// Pictures of a Bytes trait, decoded when they are asked for; `ready` is called once a missing one has come.
class Pictures {
  constructor(view, ends, ready) { Object.assign(this, { view, ends, ready, done: new Map() }); }

  get(i) {
    if (!this.done.has(i)) {
      this.done.set(i, null);
      const from = this.view.byteOffset + (i ? this.ends[i - 1] : 0), to = this.view.byteOffset + this.ends[i];
      createImageBitmap(new Blob([this.view.buffer.slice(from, to)], { type: "image/jpeg" }))
        .then(picture => { this.done.set(i, picture); this.ready(); });
    }
    return this.done.get(i);
  }

  close() { for (const picture of this.done.values()) picture?.close(); this.done.clear(); }
}

function text(g, words, x, y, { color = "#000", back = null, align = "left", size = 14 } = {}) {
  g.font = `${size}px system-ui, sans-serif`;
  g.textAlign = align;
  g.textBaseline = "top";
  if (back) {
    const w = g.measureText(words).width, left = align === "center" ? x - w / 2 : align === "right" ? x - w : x;
    g.fillStyle = back;
    g.fillRect(left - 3, y - 2, w + 6, size + 5);
  }
  g.fillStyle = color;
  g.fillText(words, x, y);
}

const percent = x => `${(100 * x).toFixed(1)} %`;

// A chart: axes with numbers, lines and bars; returns the two scales. box: [left, top, width, height] of the whole of it.
function plot(g, [left, top, width, height], { x, y, xlabel, ylabel, lines = [], bars = [], xticks = null, digits = 1 }) {
  const x0 = left + 52, y0 = top + height - 40, w = width - 64, h = height - 66;
  const px = value => x0 + (value - x[0]) / (x[1] - x[0]) * w, py = value => y0 - (value - y[0]) / (y[1] - y[0]) * h;
  g.fillStyle = "#fff"; g.fillRect(left, top, width, height);
  g.lineWidth = 1; g.strokeStyle = "#ccc";
  for (const part of [0, 0.5, 1]) {
    const value = y[0] + part * (y[1] - y[0]);
    g.beginPath(); g.moveTo(x0, py(value)); g.lineTo(x0 + w, py(value)); g.stroke();
    text(g, value.toFixed(digits), x0 - 6, py(value) - 7, { align: "right", size: 13 });
  }
  for (const [value, words] of xticks ?? [0, 0.5, 1].map(p => [x[0] + p * (x[1] - x[0]), String(Math.round(x[0] + p * (x[1] - x[0])))])) {
    text(g, words, px(value), y0 + 5, { align: "center", size: 13 });
  }
  text(g, xlabel, x0 + w / 2, top + height - 18, { align: "center", size: 13 });
  text(g, ylabel, left + 4, top + 4, { size: 13 });
  g.save(); g.beginPath(); g.rect(x0, y0 - h - 1, w, h + 2); g.clip();
  for (const { at, value, wide, color } of bars) {
    g.fillStyle = color; g.fillRect(px(at - wide / 2), py(value), Math.max(1, px(wide) - px(0)), py(y[0]) - py(value));
  }
  for (const { xs, ys, color, dash = [], dots = false } of lines) {
    g.strokeStyle = g.fillStyle = color; g.lineWidth = 2; g.setLineDash(dash); g.beginPath();
    xs.forEach((value, i) => g[i ? "lineTo" : "moveTo"](px(value), py(ys[i])));
    g.stroke(); g.setLineDash([]);
    if (dots) xs.forEach((value, i) => { g.beginPath(); g.arc(px(value), py(ys[i]), 4, 0, 7); g.fill(); });
  }
  g.restore();
  return { px, py };
}
