const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const MINUS = "\u2212";

// All elements are made here, and text is only set as text content, so that data cannot become markup.
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

function show(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value) < 1e-9 ? 0 : Math.abs(value);  // smaller ones are rounding errors
  if (size === 0) return "0";
  const text = size < 1e-3 || size >= 1e6 ? value.toExponential(1) : String(+value.toPrecision(digits));
  return text.replaceAll("-", MINUS);
}

function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const found = [];
  for (let at = Math.ceil(low / step); at * step <= high + step * 1e-9; at++) found.push(+(at * step).toPrecision(12));
  return found;
}

// The domain of some values, a little wider; null when there are none.
function domain(values, margin = 0.06) {
  const known = values.filter((value) => Number.isFinite(value));
  if (!known.length) return null;
  const low = Math.min(...known), high = Math.max(...known);
  const space = high > low ? (high - low) * margin : Math.abs(high) * 0.1 || 0.5;
  return [low - space, high + space];
}

const scale = ([low, high], [from, to]) => (value) => from + ((value - low) / (high - low)) * (to - from);

// An empty chart with axes and grid; the label of the vertical axis is above it and horizontal, to be easy to read.
function frame(width, height, x, y, labels) {
  const edge = { left: 46, right: 12, top: labels.y ? 22 : 8, bottom: 34 };
  const px = scale(x, [edge.left, width - edge.right]), py = scale(y, [height - edge.bottom, edge.top]);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": labels.title });
  for (const at of ticks(...y, height / 55)) {
    root.append(svg("line", { class: "gridline", x1: edge.left, x2: width - edge.right, y1: py(at), y2: py(at) }));
    root.append(svg("text", { x: edge.left - 6, y: py(at) + 4, "text-anchor": "end" }, show(at)));
  }
  for (const at of ticks(...x, (width - 60) / 70)) {
    root.append(svg("line", { class: "gridline", x1: px(at), x2: px(at), y1: edge.top, y2: height - edge.bottom }));
    root.append(svg("text", { x: px(at), y: height - edge.bottom + 14, "text-anchor": "middle" }, show(at)));
  }
  root.append(svg("line", { class: "axis", x1: edge.left, x2: width - edge.right, y1: height - edge.bottom, y2: height - edge.bottom }));
  root.append(svg("text", { class: "name", x: width - edge.right, y: height - 4, "text-anchor": "end" }, labels.x));
  if (labels.y) root.append(svg("text", { class: "name", x: 0, y: 11 }, labels.y));
  return { root, px, py };
}

// Draw now, and again whenever the width of the container changes.
function keepDrawn(host, draw) {
  let drawn = 0;
  const redraw = () => {
    const width = Math.round(host.clientWidth);
    if (width < 40) return;
    drawn = width;
    host.replaceChildren(draw(width));
  };
  new ResizeObserver(() => { if (Math.round(host.clientWidth) !== drawn) redraw(); }).observe(host);
  redraw();
  return redraw;
}

const tip = document.getElementById("tip");

// Show lines of [label, value] beside an element, inside the window.
function showTip(target, title, lines) {
  const rows = lines.map(([label, value, kind]) =>
    html("tr", {}, html("th", { scope: "row", class: kind ? `who ${kind}` : null }, label), html("td", { class: "n" }, value)));
  tip.replaceChildren(html("strong", {}, title), html("table", {}, html("tbody", {}, ...rows)));
  tip.hidden = false;
  const box = target.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), document.documentElement.clientWidth - own.width - 8);
  const above = box.top - own.height - 8;
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${(above > 0 ? above : box.bottom + 8) + window.scrollY}px`;
}
const hideTip = () => { tip.hidden = true; };

// One tab stop for many marks: the arrow keys move between them, and pointing and focusing show the same.
function explore(marks, describe) {
  marks.forEach((mark, at) => {
    mark.setAttribute("tabindex", at === 0 ? "0" : "-1");
    const open = () => showTip(mark, ...describe(mark, at));
    mark.addEventListener("pointerenter", open);
    mark.addEventListener("focus", open);
    mark.addEventListener("pointerleave", hideTip);
    mark.addEventListener("blur", hideTip);
    mark.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return hideTip();
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const next = step && marks[at + step];
      if (!next) return;
      event.preventDefault();
      mark.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    });
  });
}
