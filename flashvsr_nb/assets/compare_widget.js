function render({ model, el }) {
  const v = new View({ model, el }, "Comparison of two clips"), [width, height] = v.get("size");
  const p = pair(v, { width, height });
  p.controls();
  v.root.append(p.canvas, v.controls, make("div", { class: "fvsr-read" },
    "Drag the line. Click: centre of the magnified part. Keys on the picture: ← → frame, space play, + − zoom."));
  p.draw();
  return v.end();
}

export default { render };
