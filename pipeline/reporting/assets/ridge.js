// A distribution by rule: one histogram per row over a common axis, with counts, the median and the middle 90 %.
const ruleNumber = (rule) => Math.max(0, DATA.rules.indexOf(rule));
const ruleIndex = (rule) => ruleNumber(rule) % 8;
// the ninth rule has the first colour again, with another shape and dash
const shapeIndex = (rule) => (ruleNumber(rule) + Math.floor(ruleNumber(rule) / 8)) % 8;

function drawRidge(chart, width) {
  const many = chart.groups.length > 1;
  const rowHeight = many ? 58 : 120, left = many ? 84 : 4, right = 8, foot = 22;
  const height = chart.groups.length * rowHeight + foot;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `Distribution: ${chart.label}` });
  const px = scale([chart.low, chart.high], [left, width - right]);
  const value = (number) => (chart.log && number !== null ? (10 ** number).toExponential(1).replaceAll("-", MINUS) : show(number));
  for (const at of ticks(chart.low, chart.high, (width - left) / 60)) {
    root.append(svg("line", { class: "gridline", x1: px(at), x2: px(at), y1: 0, y2: height - foot }));
    root.append(svg("text", { x: px(at), y: height - 6, "text-anchor": "middle" }, value(at)));
  }
  const marks = chart.groups.map((group, row) => {
    const mark = drawGroup(chart, group, px, (row + 1) * rowHeight, rowHeight);
    if (many) mark.append(svg("text", { class: "name", x: 0, y: (row + 1) * rowHeight - 10 }, group.rule));
    root.append(mark);
    return mark;
  });
  explore(marks, (_, at) => {
    const group = chart.groups[at];
    const outside = chart.outside ? [["beyond the axis, all rules", String(chart.outside)]] : [];
    return [`${chart.label}, ${group.rule}`, [["answers drawn", String(group.n)], ...(group.mean === null ? [] : [["mean", value(group.mean)]]),
      [chart.ends[0], value(group.low)], ["median", value(group.median)], [chart.ends[1], value(group.high)], ...outside]];
  });
  return root;
}

const grouped = (count) => count.toLocaleString("en-US");

// The bins whose counts fit above them: all that are not empty, or the tallest alone.
function countedBins(counts, width) {
  const filled = counts.flatMap((count, bin) => (count ? [bin] : []));
  const longest = Math.max(0, ...filled.map((bin) => grouped(counts[bin]).length));
  if (longest * 6 + 2 <= width) return filled;
  return filled.length ? [counts.indexOf(Math.max(...counts))] : [];
}

function drawGroup(chart, group, px, base, rowHeight) {
  const colour = `var(--r${ruleIndex(group.rule)})`;
  const step = (chart.high - chart.low) / group.counts.length;
  const top = Math.max(1, ...group.counts);
  const py = (count) => base - 9 - (count / top) * (rowHeight - 30);
  const outline = group.counts.flatMap((count, bin) => [`${px(chart.low + bin * step)},${py(count)}`, `${px(chart.low + (bin + 1) * step)},${py(count)}`]);
  const points = [`${px(chart.low)},${base - 9}`, ...outline, `${px(chart.high)},${base - 9}`].join(" ");
  const clamp = (value) => px(Math.min(chart.high, Math.max(chart.low, value)));
  const mark = svg("g", { class: "mark", role: "img", "aria-label": `${group.rule}: median ${show(group.median)}` },
    svg("rect", { x: px(chart.low), y: base - rowHeight, width: px(chart.high) - px(chart.low), height: rowHeight, fill: "transparent" }),
    svg("polygon", { points, fill: colour, "fill-opacity": 0.22, stroke: colour, "stroke-width": 1.2 }));
  for (const value of group.values) {
    mark.append(svg("line", { x1: clamp(value), x2: clamp(value), y1: base - 9, y2: base - 14, stroke: colour, "stroke-opacity": 0.8 }));
  }
  mark.append(svg("line", { x1: clamp(group.low), x2: clamp(group.high), y1: base - 5, y2: base - 5, stroke: colour, "stroke-width": 2 }),
    svg("line", { x1: clamp(group.median), x2: clamp(group.median), y1: base - 1, y2: base - rowHeight + 18, stroke: "var(--ink)", "stroke-width": 1.5 }));
  const label = (bin) => svg("text", { class: "count", x: px(chart.low + (bin + 0.5) * step), y: py(group.counts[bin]) - 3, "text-anchor": "middle" }, grouped(group.counts[bin]));
  mark.append(...countedBins(group.counts, px(chart.low + step) - px(chart.low)).map(label));
  return mark;
}

for (const host of document.querySelectorAll("[data-ridge]")) {
  keepDrawn(host, (width) => drawRidge(DATA.charts[host.dataset.ridge], width));
}
