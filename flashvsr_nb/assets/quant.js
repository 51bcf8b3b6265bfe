// Keys in eight bits: what outliers of a channel do to everybody's step, and what taking the mean away does.
function render({ model, el }) {
  const v = new View({ model, el }, "Quantisation viewer"), counts = v.get("counts");
  for (const [name, list] of Object.entries(counts)) {
    if (list.length > 1) v.slider(name, name, { min: list[0], max: list.at(-1) });
  }
  v.slider("size", "tokens per scale", { min: 0, max: v.get("sizes").length - 1, show: i => v.get("sizes")[i] });
  const canvas = v.canvas("Channels of K, histogram of INT8 codes, error against block size; each before and after smoothing", 880, 480);
  const read = make("div", { class: "fvsr-read", "aria-live": "polite" });

  function draw() {
    const d = v.get("data"), g = canvas.getContext("2d"), size = v.get("size"), n = d.peak[0].length, sizes = v.get("sizes");
    const colors = [RED, BLUE], index = [...Array(n).keys()], top = Math.max(...d.peak.flat()) * 1.05 || 1;
    plot(g, [0, 0, 880, 200], { x: [0, n - 1], y: [0, top], xlabel: "channel", ylabel: "largest |K| of each channel",
      lines: d.peak.map((ys, k) => ({ xs: index, ys, color: colors[k], dash: k ? [] : [6, 3] })) });
    const codes = d.codes.map(c => c[size]), most = Math.max(...codes.flat()) * 1.05, wide = 256 / codes[0].length;
    plot(g, [0, 210, 440, 270], { x: [-128, 128], y: [0, 100 * most], xlabel: "INT8 code", ylabel: "share of values, %",
      bars: codes.flatMap((c, k) => c.map((value, i) => ({ at: -128 + (i + 0.25 + 0.5 * k) * wide, value: 100 * value, wide: wide / 2, color: colors[k] }))) });
    const worst = Math.max(...d.error.flat()) * 105 || 1;
    const { px, py } = plot(g, [440, 210, 440, 270], { x: [-0.3, sizes.length - 0.7], y: [0, worst], xlabel: "tokens per scale", digits: 2,
      ylabel: "error of q·k, % of its spread", xticks: sizes.map((s, i) => [i, String(s)]),
      lines: d.error.map((e, k) => ({ xs: sizes.map((_, i) => i), ys: e.map(x => 100 * x), color: colors[k], dash: k ? [] : [6, 3], dots: true })) });
    g.lineWidth = 2; g.strokeStyle = "#000";
    d.error.forEach(e => { g.beginPath(); g.arc(px(size), py(100 * e[size]), 8, 0, 7); g.stroke(); });
    const [before, after] = d.error.map(e => 100 * e[size]);
    v.root.dataset.error = JSON.stringify([before / 100, after / 100]);
    read.textContent = `${sizes[size]} tokens per scale: error ${before.toFixed(2)} % as they are, ${after.toFixed(2)} % less their mean`;
  }
  v.root.append(v.controls, v.key([RED, "K as it is (dashed)"], [BLUE, "K less its mean over the tokens"]), canvas, read);
  v.on(["size", "data"], draw);
  draw();
  return v.end();
}

export default { render };
