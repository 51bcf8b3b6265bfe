// The KV ring while chunks pass: which slab lies in which slot, and what that weighs.

// Bytes of all layers in `slots` slabs: `block` for each block of 128 tokens, `fixed` for each slab.
export function cacheBytes({ rows, cols, slots, block, fixed }) {
  return slots * (rows * cols * block + fixed);
}

function render({ model, el }) {
  const v = new View({ model, el }, "Cache timeline"), tables = v.get("tables");
  v.slider("chunk", "chunk", { min: 0, max: v.get("chunks") - 1 });
  v.slider("keep", "slabs kept", { min: 1, max: Object.keys(tables).length });
  v.slider("height", "output height", { min: 128, max: 2176, step: 128, show: x => `${x} px` });
  v.slider("width", "output width", { min: 128, max: 3840, step: 128, show: x => `${x} px` });
  const ring = v.canvas("Slots of the ring, one column for each chunk; the number is the slab that lies there", 880, 210);
  const bars = v.canvas("Size of the cache by kind of number", 880, 150);
  const read = make("div", { class: "fvsr-read", "aria-live": "polite" });

  function draw() {
    const table = tables[v.get("keep")], chunk = Math.min(v.get("chunk"), table.length - 1), g = ring.getContext("2d");
    const slots = Math.max(...table.map(column => column.length)), cw = 800 / table.length, ch = Math.min(34, 170 / slots);
    g.fillStyle = "#fff"; g.fillRect(0, 0, 880, 210);
    text(g, "slot", 6, 4, { size: 13 });
    for (let s = 0; s < slots; s++) text(g, String(s), 30, 24 + s * ch + ch / 2 - 7, { size: 13, align: "right" });
    table.forEach((column, k) => {
      const newest = Math.max(...column), x = 40 + k * cw;
      column.forEach((slab, s) => {
        const age = newest - slab, shade = viridis(1 - age / 6), y = 24 + s * ch;
        g.globalAlpha = k <= chunk ? 1 : 0.18;
        g.fillStyle = `rgb(${shade})`; g.fillRect(x + 2, y + 1, cw - 4, ch - 2);
        text(g, String(slab), x + cw / 2, y + ch / 2 - 7, { align: "center", color: age < 3 ? "#000" : "#fff" });
        g.globalAlpha = 1;
        if (k === chunk && age < (k ? 1 : 3)) { g.lineWidth = 3; g.strokeStyle = RED; g.strokeRect(x + 2.5, y + 1.5, cw - 5, ch - 3); }
      });
      text(g, String(k), x + cw / 2, 26 + slots * ch, { align: "center", size: 13, color: k === chunk ? RED : "#000" });
    });
    text(g, "chunk", 840, 26 + slots * ch, { size: 13 });
    const shape = { rows: Math.ceil(v.get("height") / 128), cols: Math.ceil(v.get("width") / 128) };
    const kinds = v.get("kinds").map(kind => ({ ...kind, size: cacheBytes({ ...shape, ...kind, slots: table[chunk].length }) }));
    const b = bars.getContext("2d"), most = Math.max(...kinds.map(kind => kind.size));
    b.fillStyle = "#fff"; b.fillRect(0, 0, 880, 150);
    kinds.forEach(({ name, size }, i) => {
      b.fillStyle = [SKY, BLUE, GREEN][i % 3]; b.fillRect(110, 8 + i * 44, 640 * size / most, 30);
      text(b, name, 102, 15 + i * 44, { align: "right" });
      text(b, size >= 2 ** 30 ? `${(size / 2 ** 30).toFixed(2)} GiB` : `${(size / 2 ** 20).toFixed(1)} MiB`, 116 + 640 * size / most, 15 + i * 44);
    });
    v.root.dataset.bytes = JSON.stringify(kinds.map(kind => kind.size));
    read.textContent = `After chunk ${chunk}: slabs ${[...table[chunk]].sort((a, c) => a - c).join(", ")} in ${table[chunk].length} slots; framed: written by this chunk`;
  }
  for (const canvas of [ring, bars]) {
    canvas.addEventListener("keydown", event => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) { event.preventDefault(); v.set({ chunk: Math.min(Math.max(v.get("chunk") + step, 0), v.get("chunks") - 1) }, event); }
    });
  }
  ring.addEventListener("pointerdown", event => {
    const k = Math.floor((place(ring, event)[0] - 40) / (800 / v.get("chunks")));
    v.set({ chunk: Math.min(Math.max(k, 0), v.get("chunks") - 1) }, event);
  });
  v.root.append(v.controls, ring, bars, read);
  v.on(["chunk", "keep", "height", "width"], draw);
  draw();
  return v.end();
}

export default { render };
