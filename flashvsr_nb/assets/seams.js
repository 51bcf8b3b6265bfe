// Seams: where the tiles' borders show, and what the picture does across one of them.

// Means of a profile over the frames `from` to `to`: values (frames, n) -> n.
export function meanOver(values, n, from, to) {
  const out = new Float32Array(n);
  for (let f = from; f < to; f++) for (let i = 0; i < n; i++) out[i] += values[f * n + i] / (to - from);
  return out;
}

function render({ model, el }) {
  const v = new View({ model, el }, "Seam viewer"), [width, height] = v.get("size"), [W, H] = v.get("full"), F = v.get("frames");
  const seams = v.get("seams"), [hw, hh] = v.get("heat_size"), bytes = n => new Uint8Array(v.get(n).buffer, v.get(n).byteOffset, v.get(n).byteLength);
  const heat = { before: bytes("before_heat"), after: bytes("after_heat") }, tint = document.createElement("canvas");
  Object.assign(tint, { width: hw, height: hh });
  const profiles = { before: floats(v.get("before_steps")), after: floats(v.get("after_steps")) };

  function over(g, frame) { // heat of the side it lies on, and the chosen seam
    const strength = v.get("heat");
    const [x, y, w, h] = region(W, H, { zoom: v.get("zoom"), x: v.get("x"), y: v.get("y") });
    if (strength > 0) {
      const t = tint.getContext("2d"), image = t.createImageData(hw, hh), at = x + v.get("split") * w;
      for (let i = 0; i < hw * hh; i++) {
        const value = heat[(i % hw + 0.5) * W / hw < at ? "before" : "after"][frame * hw * hh + i];
        image.data.set([...viridis(value / 255), Math.min(255, 1.6 * value) * strength], 4 * i);
      }
      t.putImageData(image, 0, 0);
      g.imageSmoothingEnabled = false;
      g.drawImage(tint, x * hw / W, y * hh / H, w * hw / W, h * hh / H, 0, 0, width, height);
    }
    seams.forEach(({ axis, at }, n) => { // at: the first pixel behind the border
      const chosen = n === v.get("seam"), p = axis === "x" ? (at - x) / w * width : (at - y) / h * height;
      g.setLineDash(chosen ? [] : [4, 6]);
      for (const [thick, color] of chosen ? [[5, "#000"], [2, ORANGE]] : [[1, "#fff9"]]) {
        g.lineWidth = thick; g.strokeStyle = color; g.beginPath();
        if (axis === "x") { g.moveTo(p, 0); g.lineTo(p, 14); g.moveTo(p, height - 14); g.lineTo(p, height); } else {
          g.moveTo(0, p); g.lineTo(14, p); g.moveTo(width - 14, p); g.lineTo(width, p);
        }
        g.stroke();
      }
      g.setLineDash([]);
    });
  }

  function choose(px, py, event) { // the seam nearest to the click
    const [x, y, w, h] = region(W, H, { zoom: v.get("zoom"), x: v.get("x"), y: v.get("y") });
    const far = seams.map(({ axis, at }) => (axis === "x" ? Math.abs(x + px / width * w - at) : Math.abs(y + py / height * h - at)));
    v.set({ seam: far.indexOf(Math.min(...far)) }, event);
  }

  const p = pair(v, { width, height, over, click: seams.length ? choose : null });
  const chart = v.canvas("Step from pixel to pixel across the chosen seam, before and after", width, 190);
  const read = make("div", { class: "fvsr-read", "aria-live": "polite" });

  function drawChart() {
    const g = chart.getContext("2d"), seam = seams[v.get("seam")];
    if (!seam) { text(g, "no seam positions were given", width / 2, 80, { align: "center" }); return; }
    const n = seam.axis === "x" ? W : H, reach = v.get("reach"), frame = Math.min(v.get("frame"), F - 1);
    const offset = (v.get("kind") === "tint" ? 0 : F * (W + H)) + (seam.axis === "x" ? 0 : F * W);
    const [from, to] = v.get("over_time") === "mean" ? [0, F] : [frame, frame + 1];
    const lines = ["before", "after"].map(name => meanOver(profiles[name].subarray(offset, offset + F * n), n, from, to));
    const first = Math.max(1, seam.at - reach), last = Math.min(n - 1, seam.at + reach);
    const most = Math.max(1e-3, ...lines.flatMap(l => [...l.subarray(first, last + 1)])) * 1.05;
    const xs = Array.from({ length: last - first + 1 }, (_, i) => first + i - seam.at);
    plot(g, [0, 0, width, 190], { x: [-reach, reach], y: [0, most], xlabel: "pixels from the seam",
      ylabel: "mean step to the next pixel, grey levels", lines: [{ xs: [0, 0], ys: [0, most], color: "#999", dash: [3, 4] },
        ...lines.map((line, k) => ({ xs, ys: [...line.subarray(first, last + 1)], color: [RED, BLUE][k], dash: k ? [] : [6, 3] }))] });
    const ratio = lines.map(line => {
      const around = [...line.subarray(first, last + 1)].filter((_, i) => Math.abs(first + i - seam.at) > 2);
      return line[seam.at] / Math.max(1e-6, around.reduce((a, b) => a + b, 0) / around.length);
    });
    v.root.dataset.ratio = JSON.stringify(ratio);
    read.textContent = `Seam ${v.get("seam") + 1} of ${seams.length}, ${seam.axis} = ${seam.at}: step at the seam over the step beside it: ${
      v.get("names")[0]} ${ratio[0].toFixed(2)}, ${v.get("names")[1]} ${ratio[1].toFixed(2)} (1: no seam)`;
  }

  p.controls();
  v.slider("heat", "heat map", { min: 0, max: 1, step: 0.05, show: x => `${Math.round(100 * x)} %` });
  if (seams.length > 1) v.slider("seam", "seam", { min: 0, max: seams.length - 1, show: n => `${n + 1}` });
  v.slider("reach", "profile reach", { min: 8, max: 96, step: 4, show: x => `± ${x} px` });
  v.choice("over_time", "profile of", { frame: "this frame", mean: "all frames" });
  v.choice("kind", "step", { tint: "tint: signed", step: "plain: absolute" });
  v.root.append(p.canvas, v.controls, chart, v.key([RED, `${v.get("names")[0]} (dashed)`], [BLUE, v.get("names")[1]]), read);
  v.on(["heat", "seam"], p.draw);
  v.on(["seam", "reach", "over_time", "kind", "frame"], drawChart);
  p.draw(); drawChart();
  return v.end();
}

export default { render };
