// Differences at the temperature chosen; over all of them where metrics.json has that, otherwise at the only one.
function atTemperature(differences, chosen) {
  const overall = differences.filter((each) => each.temperature === null);
  if (chosen !== "") return differences.filter((each) => each.temperature === +chosen);
  return overall.length ? overall : differences;
}

// The charts of an evaluation: fronts, objectives against KL, control. All follow the rules and the temperature chosen.
function compare(comparison) {
  const { objectives, judges, labels, points, reference, control, differences } = comparison;
  const names = [...objectives, ...judges.filter((name) => !objectives.includes(name))];
  const labelled = (name) => labels[name] ?? name;
  const byId = (id) => document.getElementById(id);
  const rules = DATA.rules.filter((rule) => points.some((point) => point.rule === rule));
  const temperatures = [...new Set(points.map((point) => point.temperature))].filter((each) => each !== null).sort((a, b) => a - b);
  const hidden = new Set();
  const redraws = [];
  const redraw = () => {
    byId("kl-weights").textContent = byId("weights").value && `: ${byId("weights").value}`;
    redraws.forEach((each) => each());
  };
  // the base depends on no principal: its one point stands for every temperature and every weight
  const isBase = (point) => point.rule === "base";
  const chosen = (anyTemperature) => points.filter((point) => !hidden.has(point.rule)
    && (anyTemperature || !point.uses_temperature || byId("temperature").value === "" || point.temperature === +byId("temperature").value));
  const isWeighted = (point) => isBase(point) || byId("weights").value === "" || spoken(point.weights) === byId("weights").value;
  const spoken = (weights) => Object.entries(weights).map(([name, weight]) => `${name} ${show(weight)}`).join(", ");
  const end = (point, name) => { const [mean, low, high] = point.values[name] ?? [null, null, null]; return { mean, ends: low === null || high === null ? null : [low, high] }; };

  function described(point) {
    const lines = [["agent temperature", show(point.temperature)], ["weights", spoken(point.weights)]];
    for (const name of names) {
      const { mean, ends } = end(point, name);
      if (mean !== null) lines.push([labelled(name), ends ? `${show(mean)} (${show(ends[0])} to ${show(ends[1])})` : show(mean)]);
    }
    return [...lines, ["KL per token", show(point.kl)], ["tokens", show(point.tokens)], ["answers", show(point.n, 6)]];
  }

  const placed = (point, x, xs, y, ys) => ({ x, xs, y, ys, title: point.rule, lines: described(point) });
  const drawable = (series) => series.map((each) => ({ ...each, points: each.points.filter((point) => Number.isFinite(point.x) && Number.isFinite(point.y)) }));

  // the Pareto front: points that no other exceeds in both objectives
  function front(placedPoints) {
    const best = [];
    for (const point of [...placedPoints].sort((a, b) => b.x - a.x || b.y - a.y)) {
      if (!best.length || point.y > best[best.length - 1].y) best.push(point);
    }
    return best.reverse();
  }
  const corners = (best) => best.flatMap((point, at) => (at ? [[best[at - 1].x, point.y], [point.x, point.y]] : [[point.x, point.y]]));

  // the fronts of two objectives: of three and more, points behind such a front may be on that of all objectives
  function drawFronts(width, height, axes) {
    const series = drawable(rules.map((rule) => ({
      rule,
      points: chosen(false).filter((point) => point.rule === rule).map((point) => {
        const [x, y] = axes.map((name) => end(point, name));
        return placed(point, x.mean, x.ends, y.mean, y.ends);
      }),
    })));
    for (const each of series) {
      const best = front(each.points);
      each.line = corners(best);
      each.points.forEach((point) => { point.isBehind = !best.includes(point); });
    }
    const corner = axes.every((name) => name in reference) ? axes.map((name) => reference[name]) : null;
    return drawScatter(width, height, series,
      { x: labelled(axes[0]), y: labelled(axes[1]), title: `Pareto fronts: ${axes.join(" and ")}` }, { reference: corner, hasIntervals: byId("intervals").checked });
  }

  const drawPareto = (width) => drawFronts(width, Math.min(460, Math.max(300, width * 0.62)), [byId("pareto-x").value, byId("pareto-y").value]);

  // one line per rule and key, through the points in the order of x
  function lines(selected, keyOf, xOf, name) {
    const groups = new Map();
    for (const point of selected) {
      const key = JSON.stringify([point.rule, keyOf(point)]);
      if (!groups.has(key)) groups.set(key, { rule: point.rule, points: [] });
      const { mean, ends } = end(point, name);
      groups.get(key).points.push(placed(point, xOf(point), null, mean, ends));
    }
    return drawable([...groups.values()]).map((each) => {
      each.points.sort((a, b) => a.x - b.x);
      return { ...each, line: each.points.map((point) => [point.x, point.y]) };
    });
  }

  // the mean of each x: one weight of a principal has a point for every way to weigh the others
  function throughMeans(series) {
    return series.map((each) => {
      const values = Map.groupBy(each.points, (point) => point.x);
      const line = [...values].map(([x, points]) => [x, points.reduce((sum, point) => sum + point.y, 0) / points.length]);
      return { ...each, line, points: each.points.map((point) => ({ ...point, isBehind: values.get(point.x).length > 1 })) };
    });
  }

  function addChart(grid, title, draw) {
    const host = html("div", { class: "plot" });
    grid.append(html("figure", { class: "chart" }, html("figcaption", {}, title), host));
    redraws.push(keepDrawn(host, draw));
  }

  function addControls() {
    for (const rule of rules) {
      const sign = svg("svg", { viewBox: "0 0 34 14", "aria-hidden": "true" }, svg("line", { x1: 0, x2: 34, y1: 7, y2: 7, ...stroke(rule) }));
      const shape = symbol(rule, 4);
      shape.setAttribute("transform", "translate(17,7)");
      sign.append(shape);
      const box = html("input", { type: "checkbox", checked: "", value: rule });
      box.addEventListener("change", () => { hidden[box.checked ? "delete" : "add"](rule); redraw(); });
      byId("rules").append(html("label", {}, box, sign, rule));
    }
    byId("temperature").append(html("option", { value: "" }, "all"), ...temperatures.map((each) => html("option", { value: each }, show(each))));
    for (const [id, at] of [["pareto-x", 0], ["pareto-y", 1]]) {
      byId(id).append(...names.map((name) => html("option", { value: name }, labelled(name))));
      byId(id).selectedIndex = Math.min(at, objectives.length - 1);
    }
    for (const id of ["temperature", "pareto-x", "pareto-y", "intervals", "weights"]) byId(id).addEventListener("change", redraw);
    const vectors = [...new Map(points.map((point) => [spoken(point.weights), point.weights]))];
    const spread = ([, weights]) => Math.max(0, ...Object.values(weights)) - Math.min(...Object.values(weights));
    byId("weights").append(...vectors.map(([name]) => html("option", {}, name)), html("option", { value: "" }, "all"));
    byId("weights").selectedIndex = vectors.reduce((best, vector, at) => (spread(vector) < spread(vectors[best]) ? at : best), 0);
    byId("controls").hidden = byId("kl-controls").hidden = false;
  }

  addControls();
  redraws.push(keepDrawn(byId("pareto"), drawPareto));
  if (objectives.length > 2) {
    redraws.push(keepDrawn(byId("parallel"), (width) => drawParallel(width, chosen(false), objectives, labelled, described)));
    objectives.forEach((first, at) => objectives.slice(at + 1).forEach((second) =>
      addChart(byId("projections"), `${labelled(first)} and ${labelled(second)}`, (width) => drawFronts(width, 260, [first, second]))));
  }
  for (const name of objectives) {
    addChart(byId("kl"), labelled(name), (width) => drawScatter(width, 240, lines(chosen(true).filter(isWeighted), (point) => spoken(point.weights), (point) => point.kl, name),
      { x: "KL to the base, nats per token", y: "", title: `${name} against KL` }, { hasIntervals: byId("intervals").checked }));
  }
  for (const [principal, name] of control) {
    addChart(byId("control"), `Weight of ${principal} → ${labelled(name)}`, (width) => drawScatter(width, 240,
      throughMeans(lines(chosen(false).filter((point) => !isBase(point)), (point) => point.temperature, (point) => point.weights[principal], name)),
      { x: `weight of ${principal}`, y: "", title: `${name} by the weight of ${principal}` }, { hasIntervals: byId("intervals").checked }));
  }
  for (const metric of new Set(differences.map((each) => each.metric))) {
    const ours = differences.filter((each) => each.metric === metric && each.mean !== null);
    addChart(byId("differences"), `Difference of ${metric}`, (width) =>
      drawDifferences(width, atTemperature(ours, byId("temperature").value), hidden));
  }
  redraw();
}

if (DATA.comparison) compare(DATA.comparison);
