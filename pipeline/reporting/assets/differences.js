// The first rule minus each other one, with the interval and a line at zero.
function drawDifferences(width, differences, hidden) {
  const first = differences.length ? differences[0].rule : null;
  const shown = differences.filter((each) => each.rule === first && !hidden.has(each.against));
  const x = domain([0, ...shown.flatMap((each) => [each.mean, each.low, each.high])]);
  if (!shown.length) return html("p", { class: "note" }, "Nothing to compare.");
  const left = Math.max(74, ...shown.map((each) => 8 + 6 * each.against.length)), right = 10, step = 24, height = shown.length * step + 38;
  const px = scale(x, [left, width - right]);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${first} minus the other rules` });
  for (const at of ticks(...x, (width - left) / 60)) {
    root.append(svg("line", { class: at === 0 ? "zero" : "gridline", x1: px(at), x2: px(at), y1: 0, y2: height - 34 }));
    root.append(svg("text", { x: px(at), y: height - 20, "text-anchor": "middle" }, show(at)));
  }
  root.append(svg("text", { class: "name", x: width - right, y: height - 4, "text-anchor": "end" }, `${first} is better →`));
  const marks = shown.map((each, row) => {
    const y = row * step + step / 2;
    const mark = svg("g", { class: "mark", role: "img", "aria-label": `minus ${each.against}: ${show(each.mean)}` },
      svg("rect", { x: 0, y: y - step / 2, width, height: step, fill: "transparent" }),
      svg("text", { class: "name", x: 0, y: y + 4 }, each.against));
    if (each.low !== null && each.high !== null) {
      mark.append(svg("line", { x1: px(each.low), x2: px(each.high), y1: y, y2: y, ...stroke(each.against, 2) }));
    }
    const shape = symbol(each.against);
    shape.setAttribute("transform", `translate(${px(each.mean)},${y})`);
    mark.append(shape);
    root.append(mark);
    return mark;
  });
  explore(marks, (_, at) => [`${first} minus ${shown[at].against}`, [["difference", show(shown[at].mean)],
    ["interval", `${show(shown[at].low)} to ${show(shown[at].high)}`], ["agent temperature", shown[at].temperature === null ? "all" : show(shown[at].temperature)]]]);
  return root;
}
