// Parallel coordinates: an axis per objective, a line per point. Where lines of two rules cross between two axes, one
// gives more to the one objective and the other to the other.
function drawParallel(width, points, names, labelled, described) {
  const known = points.filter((point) => names.every((name) => Number.isFinite(point.values[name]?.[0])));
  if (!known.length) return html("p", { class: "note" }, "No numbers to draw.");
  const height = 300, top = 26, bottom = 30, left = 60, right = 60;
  const x = (at) => left + (at * (width - left - right)) / Math.max(1, names.length - 1);
  const axes = names.map((name) => {
    const ends = domain(known.map((point) => point.values[name][0]), 0);
    return { name, ends, py: scale(ends, [height - bottom, top]) };
  });
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `Parallel coordinates: ${names.join(", ")}` });
  const marks = known.map((point) => {
    const line = axes.map(({ name, py }, at) => `${x(at)},${py(point.values[name][0])}`).join(" ");
    const said = axes.map(({ name }) => `${name} ${show(point.values[name][0])}`).join(", ");
    return svg("g", { class: "mark", role: "img", "aria-label": `${point.rule}: ${said}` },
      svg("polyline", { points: line, ...stroke(point.rule, 1.8), "stroke-opacity": 0.75 }),
      svg("polyline", { points: line, fill: "none", stroke: "transparent", "stroke-width": 9 }));
  });
  axes.forEach(({ name, ends, py }, at) => {
    root.append(svg("line", { class: "axis", x1: x(at), x2: x(at), y1: top, y2: height - bottom }),
      svg("text", { x: x(at), y: top - 6, "text-anchor": "middle" }, show(ends[1])),
      svg("text", { x: x(at), y: height - bottom + 12, "text-anchor": "middle" }, show(ends[0])),
      svg("text", { class: "name", x: x(at), y: height - 4, "text-anchor": at === 0 ? "start" : at === names.length - 1 ? "end" : "middle", dx: at === 0 ? -left + 4 : at === names.length - 1 ? right - 4 : 0 }, labelled(name)));
  });
  root.append(...marks);
  explore(marks, (_, at) => [known[at].rule, described(known[at])]);
  return root;
}
