// Two clips under one split: the same place at the same time, magnified alike.

// Which part of a picture a view shows: `zoom` times magnified around (x, y), 0 to 1, never past the border.
export function region(width, height, { zoom, x, y }) {
  const w = width / zoom, h = height / zoom;
  return [Math.min(Math.max(x * width - w / 2, 0), width - w), Math.min(Math.max(y * height - h / 2, 0), height - h), w, h];
}

// Canvas with split, zoom and keys; `over` may draw on top, `click` replaces the jump of the magnified part.
function pair(v, { width, height, over = null, click = null }) {
  const canvas = v.canvas("Before on the left of the line, after on the right. Left and right: frame. Space: play. Plus, minus: zoom.",
    width, height);
  const sides = ["before", "after"].map(name => ({ name, pictures: null }));
  const last = () => v.get("frames") - 1;

  function draw() {
    const g = canvas.getContext("2d"), frame = Math.min(Math.max(v.get("frame"), 0), last()), at = v.get("split") * width;
    const shown = sides.map(side => side.pictures.get(frame));
    if (!shown.every(Boolean)) return; // what is there stays, until both have come
    g.imageSmoothingEnabled = v.get("zoom") <= 2; // magnified, a pixel is a square
    shown.forEach((picture, i) => {
      g.save();
      g.beginPath(); g.rect(i ? at : 0, 0, i ? width - at : at, height); g.clip();
      g.drawImage(picture, ...region(picture.width, picture.height, { zoom: v.get("zoom"), x: v.get("x"), y: v.get("y") }), 0, 0, width, height);
      g.restore();
    });
    over?.(g, frame);
    g.fillStyle = "#fff"; g.fillRect(at - 2, 0, 4, height);
    g.fillStyle = "#000"; g.fillRect(at - 0.5, 0, 1, height);
    g.save(); g.beginPath(); g.rect(0, 0, at, height); g.clip();
    text(g, v.get("names")[0], 8, 8, { color: "#fff", back: "#000b" }); g.restore();
    g.save(); g.beginPath(); g.rect(at, 0, width - at, height); g.clip();
    text(g, v.get("names")[1], width - 8, 8, { color: "#fff", back: "#000b", align: "right" }); g.restore();
    v.root.dataset.frame = frame;
  }

  for (const side of sides) {
    const load = () => {
      side.pictures?.close();
      side.pictures = new Pictures(v.get(side.name), v.get(`${side.name}_ends`), draw);
    };
    load();
    v.on([side.name], () => { load(); draw(); });
    v.undo.push(() => side.pictures.close());
  }
  v.on(["frame", "split", "zoom", "x", "y"], draw);

  let drag = false;
  const split = event => v.set({ split: Math.min(Math.max(place(canvas, event)[0] / width, 0), 1) }, event);
  canvas.addEventListener("pointerdown", event => {
    const [px, py] = place(canvas, event);
    if (Math.abs(px - v.get("split") * width) < 14 || (v.get("zoom") === 1 && !click)) {
      drag = true; canvas.setPointerCapture(event.pointerId); split(event);
    } else if (click) {
      click(px, py, event);
    } else {
      const [x, y, w, h] = region(1, 1, { zoom: v.get("zoom"), x: v.get("x"), y: v.get("y") });
      v.set({ x: x + px / width * w, y: y + py / height * h }, event);
    }
  });
  canvas.addEventListener("pointermove", event => { if (drag) split(event); });
  canvas.addEventListener("pointerup", () => { drag = false; });

  let timer = null;
  const play = makePlay();
  function makePlay() {
    const button = make("button", { type: "button", "aria-label": "play or pause" }, "▶ play");
    const stop = () => { clearInterval(timer); timer = null; button.textContent = "▶ play"; };
    const start = () => {
      timer = setInterval(() => v.set({ frame: (v.get("frame") + 1) % v.get("frames") }), 1000 / v.get("fps"));
      button.textContent = "⏸ pause";
    };
    button.addEventListener("click", () => (timer === null ? start() : stop()));
    v.undo.push(stop);
    return button;
  }
  canvas.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key], zoom = { "+": 1.25, "=": 1.25, "-": 0.8 }[event.key];
    if (step) v.set({ frame: Math.min(Math.max(v.get("frame") + step, 0), last()) }, event);
    else if (zoom) v.set({ zoom: Math.min(Math.max(v.get("zoom") * zoom, 1), 16) }, event);
    else if (event.key === " ") play.click();
    else return;
    event.preventDefault();
  });

  const controls = () => {
    v.slider("split", "split", { min: 0, max: 1, step: 0.005, show: x => `${Math.round(100 * x)} %` });
    if (last()) v.slider("frame", "frame", { min: 0, max: last() });
    v.slider("zoom", "zoom", { min: 1, max: 16, step: 0.25, show: x => `${Number(x).toFixed(2)}×` });
    if (last()) v.controls.append(play);
  };
  return { canvas, draw, controls };
}
