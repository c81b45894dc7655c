// Points and lines of rules: each rule has a colour, a shape and a dash pattern, so that no chart relies on colour.
const SHAPES = [
  (r) => `M${-r},0A${r},${r} 0 1 0 ${r},0A${r},${r} 0 1 0 ${-r},0Z`,
  (r) => `M${-r},${-r}H${r}V${r}H${-r}Z`,
  (r) => `M0,${-1.25 * r}L${1.15 * r},${0.85 * r}H${-1.15 * r}Z`,
  (r) => `M0,${-1.35 * r}L${1.35 * r},0L0,${1.35 * r}L${-1.35 * r},0Z`,
  (r) => `M${-r},${-r}L${r},${r}M${-r},${r}L${r},${-r}`,
  (r) => `M0,${1.25 * r}L${1.15 * r},${-0.85 * r}H${-1.15 * r}Z`,
  (r) => `M${-r},0H${r}M0,${-r}V${r}`,
  (r) => `M${-r},${-r / 2}H${r}V${r / 2}H${-r}Z`,
];
const DASHES = ["none", "6 3", "2 3", "8 3 2 3", "1 4", "10 4", "4 2 1 2", "3 1"];

const symbol = (rule, r = 4.5) => svg("path", {
  d: SHAPES[shapeIndex(rule)](r), fill: `var(--r${ruleIndex(rule)})`, stroke: `var(--r${ruleIndex(rule)})`, "stroke-width": 1.8, "fill-opacity": 0.85,
});
const stroke = (rule, width = 1.5) => ({ fill: "none", stroke: `var(--r${ruleIndex(rule)})`, "stroke-width": width, "stroke-dasharray": DASHES[shapeIndex(rule)] });

// series: [{rule, points: [{x, y, xs, ys, title, lines}], line: [[x, y]...]}]; xs and ys are [low, high] or null.
function drawScatter(width, height, series, labels, { reference = null, hasIntervals = true } = {}) {
  const points = series.flatMap((each) => each.points);
  const spread = (axis, ends) => points.flatMap((point) => [point[axis], ...((hasIntervals && point[ends]) || [])]);
  const x = domain(spread("x", "xs")), y = domain(spread("y", "ys"));
  if (!x || !y) return html("p", { class: "note" }, "No numbers to draw.");
  const { root, px, py } = frame(width, height, x, y, labels);
  const inside = reference && reference[0] >= x[0] && reference[0] <= x[1] && reference[1] >= y[0] && reference[1] <= y[1];
  if (inside) {
    root.append(svg("path", { d: `M${px(reference[0]) - 6},${py(reference[1])}h12m-6,-6v12`, stroke: "var(--ink)", fill: "none" }),
      svg("text", { x: px(reference[0]) + 8, y: py(reference[1]) - 5 }, "reference"));
  }
  for (const each of series) {
    if (each.line.length > 1) root.append(svg("polyline", { points: each.line.map(([a, b]) => `${px(a)},${py(b)}`).join(" "), ...stroke(each.rule) }));
  }
  const described = [];
  const marks = series.flatMap((each) => each.points.map((point) => {
    const mark = svg("g", { class: point.isBehind ? "mark behind" : "mark", role: "img", "aria-label": `${point.title}: ${show(point.x)}, ${show(point.y)}` });
    if (hasIntervals) mark.append(...whiskers(point, each.rule, px, py));
    const shape = symbol(each.rule);
    shape.setAttribute("transform", `translate(${px(point.x)},${py(point.y)})`);
    mark.append(shape, svg("circle", { cx: px(point.x), cy: py(point.y), r: 11, fill: "transparent" }));
    root.append(mark);
    described.push([point.title, point.lines]);
    return mark;
  }));
  explore(marks, (_, at) => described[at]);
  return root;
}

function whiskers({ x, y, xs, ys }, rule, px, py) {
  const line = (x1, x2, y1, y2) => svg("line", { x1: px(x1), x2: px(x2), y1: py(y1), y2: py(y2), stroke: `var(--r${ruleIndex(rule)})`, "stroke-opacity": 0.4 });
  return [...(xs ? [line(xs[0], xs[1], y, y)] : []), ...(ys ? [line(x, x, ys[0], ys[1])] : [])];
}
