// Which key blocks a query block reads: the mask as a matrix, its meaning on the video.

// LCSA's window: may block i see block j of any slab? As `locality_mask` in Python.
export function locality(rows, cols, range) {
  const low = -Math.floor(range / 2), high = range - 1 - Math.floor(range / 2);
  const near = (n, i, j) => j - i >= low && j - i <= high;
  const out = new Uint8Array((rows * cols) ** 2);
  for (let i = 0; i < rows * cols; i++) {
    for (let j = 0; j < rows * cols; j++) {
      out[i * rows * cols + j] = near(rows, Math.floor(i / cols), Math.floor(j / cols)) && near(cols, i % cols, j % cols);
    }
  }
  return out;
}

// Does query block i see key block j? Slabs repeat, and `per` key blocks may share a place.
function allowed({ rows, cols, per }, local, i, j) {
  const s = rows * cols;
  return local === null || local[(i % s) * s + Math.floor(j / per) % s];
}

// Softmax of a row over the columns that `allow` lets through, in float32 steps as the model's.
function softmax(scores, from, n, allow) {
  const p = new Float32Array(n);
  let top = -Infinity, sum = 0;
  for (let j = 0; j < n; j++) if (allow(j)) top = Math.max(top, scores[from + j]);
  if (top === -Infinity) return p;
  for (let j = 0; j < n; j++) if (allow(j)) sum += p[j] = Math.exp(scores[from + j] - top);
  for (let j = 0; j < n; j++) p[j] /= sum;
  return p;
}

// LCSA: in each query slab the entries above the (topk+1)-th largest draft probability.
export function lcsa(d, { range, blocks }) {
  const { nq, nk, rows, cols, scores } = d, s = rows * cols, local = locality(rows, cols, range);
  const mask = new Uint8Array(nq * nk), topk = Math.floor(s * blocks) - 1;
  if (topk <= 0) return mask;
  for (let slab = 0; slab < nq / s; slab++) {
    const p = new Float32Array(s * nk);
    for (let i = 0; i < s; i++) {
      p.set(softmax(scores, (slab * s + i) * nk, nk, j => allowed(d, local, i, j)), i * nk);
    }
    const threshold = Float32Array.from(p).sort()[Math.max(0, p.length - 1 - topk)];
    p.forEach((x, at) => { mask[slab * s * nk + at] = x > threshold; });
  }
  return mask;
}

// SpargeAttention, stage 1: the most likely key blocks of each row while their probabilities add up to at most tau, at least
// one; blocks whose tokens are unlike each other (cosine up to theta) are read by all, and read all. As `sparge_mask` in Python.
export function sparge(d, { tau, theta, range }) {
  const { nq, nk, rows, cols, scores, qAlike, kAlike } = d, mask = new Uint8Array(nq * nk);
  const local = range ? locality(rows, cols, range) : null, lone = x => theta >= 0 && x <= theta;
  for (let i = 0; i < nq; i++) {
    const may = j => allowed(d, local, i, j);
    const p = softmax(scores, i * nk, nk, j => may(j) && !lone(kAlike[j]));
    const order = Uint32Array.from(p.keys()).sort((a, b) => p[b] - p[a] || a - b);
    let sum = 0;
    for (let n = 0; n < nk; n++) {
      sum += p[order[n]];
      if (n && sum > tau && tau < 1) break;
      mask[i * nk + order[n]] = may(order[n]);
    }
    for (let j = 0; j < nk; j++) if (may(j) && (lone(qAlike[i]) || lone(kAlike[j]))) mask[i * nk + j] = 1;
  }
  return mask;
}

// Share of ones, and share of dense attention inside the mask, averaged over the rows.
export function measures({ nq, mass }, mask) {
  let ones = 0, inside = 0, all = 0;
  mask.forEach((m, at) => { ones += m; inside += m * mass[at]; all += mass[at]; });
  return { density: ones / mask.length, covered: inside / all };
}

export function unpack(meta, view) { // one Bytes trait: scores, mass, used mask, alikeness of queries and keys
  const { nq, nk } = meta, all = floats(view), n = nq * nk;
  return { ...meta, scores: all.subarray(0, n), mass: all.subarray(n, 2 * n), used: all.subarray(2 * n, 3 * n),
    qAlike: all.subarray(3 * n, 3 * n + nq), kAlike: all.subarray(3 * n + nq) };
}

const COLORS = { 1: BLUE, 2: ORANGE, 3: GREEN }; // LCSA alone, Sparge alone, both

function render({ model, el }) {
  const v = new View({ model, el }, "Sparsity viewer"), { layers, heads } = v.get("counts");
  if (layers.length > 1) v.slider("layer", "layer", { min: layers[0], max: layers.at(-1) });
  if (heads > 1) v.slider("head", "head", { min: 0, max: heads - 1 });
  const chunks = v.get("counts").chunks;
  if (chunks.length > 1) v.slider("chunk", "chunk", { min: chunks[0], max: chunks.at(-1) });
  v.slider("local_range", "LCSA window", { min: 1, max: 15, show: x => `${x} blocks` });
  const blocks = v.slider("key_blocks", "LCSA key blocks", { min: 1, max: 2, step: 0.25, show: x => x.toFixed(2) });
  v.slider("tau", "Sparge mass τ", { min: 0, max: 1, step: 0.005, show: x => x.toFixed(3) });
  v.slider("theta", "Sparge alike θ", { min: -0.1, max: 1, step: 0.01, show: x => x.toFixed(2) });
  v.choice("policy", "show", { both: "LCSA and Sparge", lcsa: "LCSA", sparge: "Sparge", inside: "Sparge inside the window",
    used: "the mask that was used" });
  const matrix = v.canvas("Block mask: one row per query block, one column per key block. Arrow keys choose the query.", 330, 330);
  const film = v.canvas("Video: the blocks that the chosen query block reads", 550, 330);
  const read = make("div", { class: "fvsr-read", "aria-live": "polite" });
  v.root.append(v.controls, v.key([BLUE, "LCSA"], [ORANGE, "Sparge"], [GREEN, "both (or used)"], ["#bbb", "in the window, not read"],
    ["#444", "outside"]), make("div", { class: "fvsr-row" }, matrix, film), read);

  let data, masks, pictures, boxes = [];
  const repicture = () => {
    pictures?.close();
    pictures = new Pictures(v.get("pictures"), v.get("ends"), () => draw());
  };
  const load = () => {
    if (v.get("data").byteLength !== 4 * (3 * v.get("meta").nq * v.get("meta").nk + v.get("meta").nq + v.get("meta").nk)) return;
    data = unpack(v.get("meta"), v.get("data"));
    blocks.limits({ max: data.nk / data.per });
    choose();
  };
  const choose = () => { // masks anew, then the picture
    const range = v.get("local_range"), policy = v.get("policy");
    const a = lcsa(data, { range, blocks: v.get("key_blocks") });
    const b = sparge(data, { tau: v.get("tau"), theta: v.get("theta"), range: policy === "inside" ? range : 0 });
    masks = { lcsa: a, sparge: b, local: locality(data.rows, data.cols, range), used: data.used };
    draw();
  };
  const color = at => { // 0: not read, 1: LCSA, 2: Sparge, 3: both
    const policy = v.get("policy");
    if (policy === "used") return 3 * masks.used[at];
    return (policy === "lcsa" || policy === "both" ? masks.lcsa[at] : 0) + (policy !== "lcsa" ? 2 * masks.sparge[at] : 0);
  };

  function drawMatrix(query) {
    const { nq, nk, rows, cols, per } = data, g = matrix.getContext("2d"), s = rows * cols;
    const cw = 330 / nk, ch = 330 / nq;
    g.clearRect(0, 0, 330, 330);
    for (let i = 0; i < nq; i++) {
      for (let j = 0; j < nk; j++) {
        g.fillStyle = COLORS[color(i * nk + j)] ?? (allowed(data, masks.local, i, j) ? "#bbb" : "#444");
        g.fillRect(j * cw, i * ch, cw + 0.5, ch + 0.5);
      }
    }
    g.fillStyle = "#fff";
    for (let j = s * per; j < nk; j += s * per) g.fillRect(j * cw - 1, 0, 2, 330);
    for (let i = s; i < nq; i += s) g.fillRect(0, i * ch - 1, 330, 2);
    g.lineWidth = 3; g.strokeStyle = "#000"; g.strokeRect(1.5, query * ch - 1, 327, ch + 2);
    g.lineWidth = 1; g.strokeStyle = "#fff"; g.strokeRect(1.5, query * ch - 1, 327, ch + 2);
  }

  function drawFilm(query) {
    const { nk, rows, cols, per, kSlabs, qSlabs } = data, g = film.getContext("2d"), s = rows * cols;
    const shown = [...kSlabs.keys()].sort((a, b) => kSlabs[a] - kSlabs[b]), across = shown.length > 1 ? 2 : 1;
    const down = Math.ceil(shown.length / across), gap = 8, head = 22;
    const w = (550 - gap * (across - 1)) / across, h = w * rows / cols;
    film.height = down * (h + head + gap);
    g.fillStyle = "#fff"; g.fillRect(0, 0, film.width, film.height);
    boxes = [];
    const top = Math.max(1e-9, ...Array.from({ length: nk }, (_, j) => data.mass[query * nk + j]));
    shown.forEach((slot, n) => {
      const x = (n % across) * (w + gap), y = Math.floor(n / across) * (h + head + gap) + head, slab = kSlabs[slot];
      const own = qSlabs[Math.floor(query / s)] === slab, bw = w / cols, bh = h / rows;
      text(g, `slab ${slab}${own ? " (the query's)" : ""} · frames ${v.get("spans")[slab]}`, x, y - 19);
      const picture = pictures.get(v.get("shown").indexOf(slab));
      if (picture) g.drawImage(picture, x, y, w, h);
      for (let p = 0; p < s; p++) {
        const px = x + (p % cols) * bw, py = y + Math.floor(p / cols) * bh;
        let kind = 0, mass = 0;
        for (let half = 0; half < per; half++) {
          const at = query * nk + (slot * s + p) * per + half;
          kind |= color(at); mass += data.mass[at];
        }
        if (!allowed(data, masks.local, query, (slot * s + p) * per)) { g.fillStyle = "#000a"; g.fillRect(px, py, bw, bh); }
        g.lineWidth = 1; g.strokeStyle = "#fff8"; g.strokeRect(px + 0.5, py + 0.5, bw - 1, bh - 1);
        if (kind) {
          g.globalAlpha = 0.15 + 0.45 * Math.min(1, mass / top);
          g.fillStyle = COLORS[kind]; g.fillRect(px, py, bw, bh);
          g.globalAlpha = 1; g.lineWidth = 3; g.strokeStyle = COLORS[kind]; g.strokeRect(px + 2.5, py + 2.5, bw - 5, bh - 5);
        }
        if (bw > 44) text(g, percent(mass), px + bw / 2, py + bh / 2 - 7, { color: "#fff", back: "#000a", align: "center", size: 13 });
      }
      if (own) {
        const p = query % s, px = x + (p % cols) * bw, py = y + Math.floor(p / cols) * bh;
        for (const [width, style] of [[7, "#000"], [3, "#fff"]]) {
          g.lineWidth = width; g.strokeStyle = style; g.strokeRect(px + 4, py + 4, bw - 8, bh - 8);
        }
      }
      boxes.push({ x, y, bw, bh, slab });
    });
  }

  function draw() {
    if (!masks) return;
    const query = Math.min(Math.max(v.get("query"), 0), data.nq - 1);
    drawMatrix(query); drawFilm(query);
    const rows = [["LCSA", masks.lcsa], ["Sparge", masks.sparge], ["used in this run", masks.used]].map(([name, mask]) => {
      const m = measures(data, mask), row = mask.subarray(query * data.nk, (query + 1) * data.nk);
      let inside = 0; row.forEach((x, j) => { inside += x * data.mass[query * data.nk + j]; });
      v.root.dataset[name.split(" ")[0].toLowerCase()] = JSON.stringify(m);
      return `<tr><td>${name}</td><td>${percent(m.density)}</td><td>${percent(m.covered)}</td><td>${row.reduce((a, b) => a + b, 0)
        } of ${data.nk}</td><td>${percent(inside)}</td></tr>`;
    });
    read.innerHTML = `<table><tr><th>policy</th><th>density</th><th>attention mass covered</th><th>query block ${query} reads</th><th>with mass</th></tr>${
      rows.join("")}</table>`;
  }

  matrix.addEventListener("pointerdown", event => v.set({ query: Math.floor(place(matrix, event)[1] / 330 * data.nq) }, event));
  film.addEventListener("pointerdown", event => {
    const [x, y] = place(film, event), s = data.rows * data.cols;
    for (const b of boxes) {
      const c = Math.floor((x - b.x) / b.bw), r = Math.floor((y - b.y) / b.bh), slab = data.qSlabs.indexOf(b.slab);
      if (c >= 0 && c < data.cols && r >= 0 && r < data.rows && slab >= 0) v.set({ query: slab * s + r * data.cols + c }, event);
    }
  });
  const keys = event => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: event.target === film ? -data.cols : -1,
      ArrowDown: event.target === film ? data.cols : 1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    v.set({ query: Math.min(Math.max(v.get("query") + step, 0), data.nq - 1) }, event);
  };
  matrix.addEventListener("keydown", keys); film.addEventListener("keydown", keys);
  v.on(["data"], load); v.on(["pictures"], () => { repicture(); draw(); });
  v.on(["local_range", "key_blocks", "tau", "theta", "policy"], choose); v.on(["query"], draw);
  repicture(); load();
  v.undo.push(() => pictures.close());
  return v.end();
}

export default { render };
