// Tiles over a frame: where they lie, what they share, how they are blended. The same rules as `flashvsr_nb.tiling`.

// The tiles of one axis, [start, stop] each: as few as possible, evenly spread, starting at multiples of `snap`.
export function tileGrid(size, tile, { overlap = 0, snap = 1 } = {}) {
  if (tile >= size) return [[0, size]];
  const shared = Math.ceil(overlap / snap) * snap, steps = Math.ceil((size - tile) / (tile - shared));
  const far = Math.ceil((size - tile) / snap);
  return Array.from({ length: steps + 1 }, (_, i) => Math.floor(i * far / steps) * snap)
    .map(start => [start, Math.min(start + tile, size)]);
}

const RAMPS = { average: () => 1, linear: u => u, hann: u => Math.sin(Math.PI / 2 * u) ** 2,
  gaussian: u => Math.exp(-4.5 * (1 - u) ** 2) };

// Weights of the tiles along one axis: ramps only where a neighbour is, divided by their sum.
export function tileWeights(spans, blend) {
  const total = new Float64Array(spans.at(-1)[1]), weights = spans.map(([start, stop], n) => {
    const before = spans[n - 1], after = spans[n + 1], w = new Float64Array(stop - start);
    for (let i = 0; i < w.length; i++) {
      const at = start + i + 0.5;
      let u = 1;
      if (before && before[1] > start) u = Math.min(u, (at - start) / (before[1] - start));
      if (after && stop > after[0]) u = Math.min(u, (stop - at) / (stop - after[0]));
      total[start + i] += w[i] = RAMPS[blend](u);
    }
    return w;
  });
  return weights.map((w, n) => w.map((x, i) => x / total[spans[n][0] + i]));
}

// Layout of a frame of LR pixels: mirrored to whole blocks of 32, tiles in it. As TiledStream makes it.
export function layout(height, width, { tile, overlap, snap }) {
  const side = Math.ceil(tile / 32) * 32, step = Math.ceil(overlap / snap) * snap < side ? snap : 4;
  const full = [height, width].map(n => Math.ceil(n / 32) * 32);
  const [rows, cols] = full.map(n => tileGrid(n, side, { overlap, snap: step }));
  const length = spans => spans.reduce((sum, [a, b]) => sum + b - a, 0);
  return { rows, cols, full, redundancy: length(rows) * length(cols) / (full[0] * full[1]) };
}

// A first idea of the seams, before any model has run: each tile is off by its mean's distance from the frame's mean, times
// `share`; the blend spreads these offsets; a gradient shows the less, the more texture is around it. grey: (h, w) levels.
export function coarseSeams(grey, h, w, { rows, cols, full }, blend, share = 0.05) {
  const fit = (spans, n, size) => spans.map(([a, b]) => [Math.round(a * n / size), Math.max(Math.round(a * n / size) + 1, Math.round(b * n / size))]);
  const down = fit(rows, h, full[0]), across = fit(cols, w, full[1]), wd = tileWeights(down, blend), wa = tileWeights(across, blend);
  const mean = grey.reduce((a, b) => a + b, 0) / grey.length, field = new Float32Array(h * w), out = new Float32Array(h * w);
  down.forEach(([top, bottom], r) => across.forEach(([left, right], c) => {
    let sum = 0;
    for (let y = top; y < bottom; y++) for (let x = left; x < right; x++) sum += grey[y * w + x];
    const off = share * (sum / ((bottom - top) * (right - left)) - mean);
    for (let y = top; y < bottom; y++) for (let x = left; x < right; x++) field[y * w + x] += off * wd[r][y - top] * wa[c][x - left];
  }));
  for (let y = 0; y < h; y++) {
    for (let x = 0; x < w; x++) {
      const at = y * w + x, right = x + 1 < w ? at + 1 : at, below = y + 1 < h ? at + w : at;
      const texture = Math.abs(grey[right] - grey[at]) + Math.abs(grey[below] - grey[at]);
      out[at] = (Math.abs(field[right] - field[at]) + Math.abs(field[below] - field[at])) / (1 + texture / 4);
    }
  }
  return out;
}

function render({ model, el }) {
  const v = new View({ model, el }, "Tile explorer"), sizes = v.get("sizes"), sides = v.get("sides"), CW = 640;
  v.slider("size", "frame size, LR", { min: 0, max: sizes.length - 1, show: i => `${sizes[i][1]}×${sizes[i][0]}` });
  v.slider("tile", "tile side", { min: sides[0], max: sides.at(-1), step: 32, show: x => `${x} px` });
  v.slider("overlap", "overlap", { min: 0, max: 128, step: 4, show: x => `${x} px` });
  v.slider("vram", "GPU memory", { min: 4, max: 48, step: 0.5, show: x => `${x} GB` });
  v.choice("blend", "blend", Object.fromEntries(Object.keys(RAMPS).map(name => [name, name])));
  v.choice("snap", "tiles start at", { 32: "whole blocks (32 px)", 4: "tokens (4 px)" });
  v.choice("view", "show", { grid: "tiles and overlaps", weights: "weights of one tile", seams: "seam map" });
  const canvas = v.canvas("Frame with its tiles. Click or arrow keys: choose a tile", CW, 360);
  const bar = v.canvas("Predicted memory against the GPU's", CW, 46), read = make("div", { class: "fvsr-read", "aria-live": "polite" });
  const pictures = new Pictures(v.get("picture"), [v.get("picture").byteLength], () => draw());
  const [tw, th] = v.get("thumb_size"), grey = Float32Array.from(new Uint8Array(v.get("thumb").buffer, v.get("thumb").byteOffset, tw * th));
  const buffer = document.createElement("canvas");
  let plan, timer = null;

  const wanted = () => `${v.get("tile")} ${v.get("overlap")} ${v.get("blend")} ${v.get("snap")}`;
  const measured = () => v.get("size") === v.get("own_size") && v.get("measured_for") === wanted();

  function paint(g, w, h, value, alpha) { // a small map, stretched over the canvas
    Object.assign(buffer, { width: w, height: h });
    const b = buffer.getContext("2d"), image = b.createImageData(w, h);
    for (let i = 0; i < w * h; i++) image.data.set([...viridis(value(i)), alpha(i)], 4 * i);
    b.putImageData(image, 0, 0);
    g.imageSmoothingEnabled = false;
    g.drawImage(buffer, 0, 0, canvas.width, canvas.height);
  }

  function draw() {
    const [height, width] = sizes[v.get("size")], snap = Number(v.get("snap")), g = canvas.getContext("2d");
    plan = layout(height, width, { tile: v.get("tile"), overlap: Math.min(v.get("overlap"), v.get("tile") / 2), snap });
    const { rows, cols, full } = plan, scale = CW / full[1];
    canvas.height = Math.round(full[0] * scale);
    g.fillStyle = "#777"; g.fillRect(0, 0, CW, canvas.height);
    const picture = pictures.get(0);
    if (picture) g.drawImage(picture, Math.floor((full[1] - width) / 2) * scale, Math.floor((full[0] - height) / 2) * scale, width * scale, height * scale);
    const chosen = Math.min(Math.max(v.get("chosen"), 0), rows.length * cols.length - 1), view = v.get("view");
    const r = Math.floor(chosen / cols.length), c = chosen % cols.length;
    if (view === "seams") drawSeams(g);
    if (view === "grid") {
      g.fillStyle = ORANGE; g.globalAlpha = 0.4;
      rows.slice(1).forEach(([a], i) => g.fillRect(0, a * scale, CW, (rows[i][1] - a) * scale));
      cols.slice(1).forEach(([a], i) => g.fillRect(a * scale, 0, (cols[i][1] - a) * scale, canvas.height));
      g.globalAlpha = 1;
    }
    if (view === "weights") {
      const down = tileWeights(rows, v.get("blend"))[r], across = tileWeights(cols, v.get("blend"))[c];
      const w = Math.round(full[1] / 4), h = Math.round(full[0] / 4);
      const at = i => { const y = Math.floor(i / w) * 4 + 2 - rows[r][0], x = (i % w) * 4 + 2 - cols[c][0]; return (down[y] ?? 0) * (across[x] ?? 0); };
      paint(g, w, h, at, () => 190);
    }
    if (view !== "seams") rows.forEach(([top, bottom], y) => cols.forEach(([left, right], x) => {
      for (const [thick, style] of y === r && x === c ? [[6, "#000"], [3, "#fff"]] : [[1.5, "#fffb"]]) {
        g.lineWidth = thick; g.strokeStyle = style;
        g.strokeRect(left * scale + 2, top * scale + 2, (right - left) * scale - 4, (bottom - top) * scale - 4);
      }
    }));
    drawBar();
    const side = v.get("tile"), shares = [rows, cols].flatMap(s => s.slice(1).map(([a], i) => s[i][1] - a));
    const many = rows.length * cols.length;
    read.textContent = `${many} ${many > 1 ? "tiles" : "tile: untiled"}, ${rows.length} × ${cols.length} of ${side} px; overlaps ${
      shares.length ? `${Math.min(...shares)} to ${Math.max(...shares)} px` : "none"}; redundancy ${plan.redundancy.toFixed(3)}. ${said()}${
      view === "seams" ? (measured() ? " Seam map: measured." : " Seam map: first idea from the tiles' means.") : ""}`;
    v.root.dataset.plan = JSON.stringify({ rows, cols, redundancy: plan.redundancy, predicted: predicted() });
  }

  function drawSeams(g) {
    if (measured()) {
      const [w, h] = v.get("measured_size"), heat = new Uint8Array(v.get("measured").buffer, v.get("measured").byteOffset, w * h);
      paint(g, w, h, i => heat[i] / 255, () => 215);
      return;
    }
    const heat = coarseSeams(grey, th, tw, plan, v.get("blend")), top = Math.max(0.02, heat.reduce((a, b) => Math.max(a, b), 0));
    paint(g, tw, th, i => heat[i] / top, () => 215);
    if (!v.get("can_measure") || v.get("size") !== v.get("own_size")) return;
    clearTimeout(timer);
    timer = setTimeout(() => { v.model.set("ask", wanted()); v.model.save_changes(); }, 120); // once the slider rests
  }

  function predicted() { // the best way that fits the card, or the smallest
    const { rows, cols, redundancy } = plan, entry = v.get("table")[v.get("size")];
    const found = [entry?.[rows.length * cols.length === 1 ? "untiled" : String(v.get("tile"))] ?? []].flat();
    const ways = found.map(w => ({ exact: true, ...w, time: w.seconds ?? w.time ?? w.fixed + w.area * redundancy }));
    const fit = ways.filter(w => w.gib <= v.get("vram")), order = fit.length ? (a, b) => b.exact - a.exact || a.time - b.time : (a, b) => a.gib - b.gib;
    return (fit.length ? fit : ways).sort(order)[0];
  }
  function said() {
    const p = predicted();
    if (!p) return "";
    const fits = p.gib <= v.get("vram") ? "fits" : "does not fit", unit = p.seconds ? "s per frame" : `× the time of the untiled frame${v.get("official") ? ", everything resident" : ""}`;
    return `Predicted${v.get("official") ? ", official size" : ""}: ${p.gib.toFixed(2)} GiB (${fits}), ${p.time.toFixed(2)} ${unit}.`;
  }
  function drawBar() {
    const p = predicted(), g = bar.getContext("2d");
    bar.style.display = p ? "" : "none";
    if (!p) return;
    const most = Math.max(p.gib, v.get("vram")) * 1.15, x = value => value / most * CW;
    g.fillStyle = "#fff"; g.fillRect(0, 0, CW, 46);
    g.fillStyle = p.gib <= v.get("vram") ? BLUE : RED; g.fillRect(0, 20, x(p.gib), 22);
    g.fillStyle = "#000"; g.fillRect(x(v.get("vram")) - 1, 14, 3, 32);
    text(g, `${v.get("vram")} GB`, Math.min(x(v.get("vram")), CW - 30), 0, { align: "center", size: 13 });
    text(g, `${p.gib.toFixed(2)} GiB`, 6, 24, { color: "#fff", size: 13 });
  }

  canvas.addEventListener("pointerdown", event => {
    const [x, y] = place(canvas, event).map(p => p * plan.full[1] / CW);
    const nearest = (spans, p) => { const far = spans.map(([a, b]) => Math.abs((a + b) / 2 - p)); return far.indexOf(Math.min(...far)); };
    v.set({ chosen: nearest(plan.rows, y) * plan.cols.length + nearest(plan.cols, x) }, event);
  });
  canvas.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -plan.cols.length, ArrowDown: plan.cols.length }[event.key];
    if (!step) return;
    event.preventDefault();
    v.set({ chosen: Math.min(Math.max(v.get("chosen") + step, 0), plan.rows.length * plan.cols.length - 1) }, event);
  });
  v.root.append(v.controls, canvas, v.key([ORANGE, "computed more than once"]), bar, read);
  v.on(["size", "tile", "overlap", "vram", "blend", "snap", "view", "chosen", "measured_for"], draw);
  v.undo.push(() => { clearTimeout(timer); pictures.close(); });
  draw();
  return v.end();
}

export default { render };
