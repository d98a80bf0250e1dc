"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function draw(parent, name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function canvas(parent, width, height) {
  return draw(parent, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", width });
}

// One tooltip for the page; the same words are the node's accessible title.
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);
function explain(node, words) {
  draw(node, "title", {}, words);
  node.addEventListener("pointerenter", (event) => {
    tip.textContent = words;
    tip.hidden = false;
    tip.style.left = `${Math.min(event.clientX + 12, innerWidth - 260)}px`;
    tip.style.top = `${event.clientY + 12}px`;
  });
  node.addEventListener("pointerleave", () => { tip.hidden = true; });
}

for (const cell of document.querySelectorAll("td.bar")) {
  const at = (value) => 4 + 192 * Math.max(0, Math.min(1, Number(value)));
  const { low, high, value, guess, ceiling } = cell.dataset;
  const svg = canvas(cell, 200, 18);
  draw(svg, "line", { class: "axis", x1: 4, x2: 196, y1: 9, y2: 9 });
  draw(svg, "line", { class: "span", x1: at(low), x2: at(high), y1: 9, y2: 9 });
  draw(svg, "line", { class: "guess", x1: at(guess), x2: at(guess), y1: 2, y2: 16 });
  if (ceiling !== "") draw(svg, "line", { class: "ceiling", x1: at(ceiling), x2: at(ceiling), y1: 1, y2: 17 });
  draw(svg, "circle", { class: "leak", cx: at(value), cy: 9, r: 3.5 });
}

for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const table = head.closest("table");
    const column = [...head.parentNode.children].indexOf(head);
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const key = (row) => {
      const text = (row.children[column].querySelector("summary") || row.children[column]).textContent.trim();
      return text === "-" ? -Infinity : text === "none" ? Infinity : text !== "" && !isNaN(text) ? Number(text) : text;
    };
    const order = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      return (typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? -1 : 1) * (down ? -1 : 1);
    });
    body.append(...order);
  });
}

const fade = document.getElementById("only-hits");
if (fade) fade.addEventListener("change", () => document.getElementById("texts").classList.toggle("only-hits", fade.checked));

const PALETTE = ["#c2462e", "#1f6fb2", "#3f8f4f", "#9467bd", "#b8860b", "#2a9d9d", "#d1558f", "#6b7280"];

function frame(svg, box, xs, ys, xName, yName) {
  draw(svg, "path", { class: "axis", d: `M${box.left},${box.top}V${box.bottom}H${box.right}` });
  for (const [place, words] of xs) draw(svg, "text", { x: place, y: box.bottom + 16, "text-anchor": "middle" }, words);
  for (const [place, words] of ys) draw(svg, "text", { x: box.left - 6, y: place + 4, "text-anchor": "end" }, words);
  draw(svg, "text", { x: (box.left + box.right) / 2, y: box.bottom + 34, "text-anchor": "middle" }, xName);
  draw(svg, "text", { x: box.left, y: box.top - 8, "text-anchor": "start" }, yName);
}

function legend(parent, names) {
  const line = document.createElement("p");
  line.className = "small";
  names.forEach((name, index) => {
    const svg = canvas(line, 12, 10);
    svg.style.display = "inline-block";
    draw(svg, "rect", { width: 12, height: 10, rx: 2, fill: PALETTE[index % PALETTE.length] });
    line.append(` ${name}   `);
  });
  parent.append(line);
}

const roc = document.getElementById("roc");
if (roc && data.roc) {
  const box = { left: 60, right: 480, top: 24, bottom: 400 };
  const least = Math.log10(Math.min(1e-2, ...data.roc.flatMap((c) => c.points.map((p) => p[0]).filter((v) => v > 0))));
  const x = (v) => box.left + (1 - Math.log10(Math.max(v, 10 ** least)) / least) * (box.right - box.left);
  const y = (v) => box.bottom - (1 - Math.log10(Math.max(v, 10 ** least)) / least) * (box.bottom - box.top);
  const svg = canvas(roc, 520, 445);
  const ticks = [];
  for (let power = Math.ceil(least); power <= 0; power++) ticks.push(10 ** power);
  frame(svg, box, ticks.map((v) => [x(v), String(v)]), ticks.map((v) => [y(v), String(v)]), "false alarms", "members found");
  draw(svg, "path", { class: "axis", "stroke-dasharray": "3 3", d: `M${x(10 ** least)},${y(10 ** least)}L${x(1)},${y(1)}` });
  data.roc.forEach((curve, index) => {
    const path = curve.points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join("");
    const line = draw(svg, "path", { class: "curve", d: path, stroke: PALETTE[index % PALETTE.length] });
    explain(line, `${curve.name}: AUC ${curve.auc.toFixed(3)}`);
  });
  legend(roc, data.roc.map((curve) => `${curve.name} (AUC ${curve.auc.toFixed(2)})`));
}

const frontier = document.getElementById("frontier");
if (frontier && data.cells) {
  const box = { left: 60, right: 740, top: 24, bottom: 340 };
  const losses = data.cells.map((c) => c.loss);
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  const pad = (high - low || 1) * 0.08;
  const x = (v) => box.left + v * (box.right - box.left);
  const y = (v) => box.top + ((v - low + pad) / (high - low + 2 * pad)) * (box.bottom - box.top);
  const svg = canvas(frontier, 780, 385);
  const steps = [0, 1, 2, 3, 4].map((i) => low + ((high - low) * i) / 4);
  frame(svg, box, [0, 0.2, 0.4, 0.6, 0.8, 1].map((v) => [x(v), v.toFixed(1)]), (high > low ? steps : [low]).map((v) => [y(v), v.toFixed(2)]), "tokens recovered by the best attack", "held-out loss, nats per token (less is better, upwards)");
  const names = [...new Set(data.cells.map((c) => c.policy))];
  for (const cell of data.cells) {
    const colour = PALETTE[names.indexOf(cell.policy) % PALETTE.length];
    draw(svg, "line", { x1: x(cell.low), x2: x(cell.high), y1: y(cell.loss), y2: y(cell.loss), stroke: colour, "stroke-opacity": 0.4, "stroke-width": 3 });
    draw(svg, "circle", { cx: x(cell.guess), cy: y(cell.loss), r: 3, fill: "none", stroke: colour, "stroke-opacity": 0.6 });
    const dot = draw(svg, "circle", { class: "dot", cx: x(cell.worst), cy: y(cell.loss), r: 5, fill: colour });
    explain(dot, cell.words);
  }
  legend(frontier, names);
}

const heat = document.getElementById("heat");
if (heat && data.cells) {
  const rows = [...new Set(data.cells.map((c) => c.cut.join("/")))];
  const columns = [...new Set(data.cells.map((c) => c.budget))];
  const [wide, high] = [Math.max(56, Math.min(110, 640 / columns.length)), 34];
  const svg = canvas(heat, 90 + wide * columns.length, 60 + high * rows.length);
  columns.forEach((name, i) => draw(svg, "text", { x: 90 + wide * (i + 0.5), y: 16, "text-anchor": "middle" }, name));
  rows.forEach((row, j) => {
    draw(svg, "text", { x: 82, y: 28 + high * (j + 0.5) + 4, "text-anchor": "end" }, `cut ${row}`);
    columns.forEach((column, i) => {
      const here = data.cells.filter((c) => c.cut.join("/") === row && c.budget === column);
      if (!here.length) return;
      const mean = here.reduce((sum, c) => sum + c.worst, 0) / here.length;
      const box = draw(svg, "rect", { class: "cell", x: 92 + wide * i, y: 28 + high * j, width: wide - 4, height: high - 4, rx: 3, fill: `color-mix(in oklab, var(--leak) ${(100 * mean).toFixed(0)}%, var(--panel))` });
      explain(box, `${here.length} recording(s): ${here.map((c) => c.worst.toFixed(3)).join(", ")}`);
      const label = draw(svg, "text", { x: 90 + wide * (i + 0.5), y: 28 + high * (j + 0.5) + 2, "text-anchor": "middle", "pointer-events": "none" }, mean.toFixed(2));
      label.style.fill = mean > 0.55 ? "#ffffff" : "var(--ink)";
    });
  });
  draw(svg, "text", { x: 90, y: 50 + high * rows.length }, `budget: policy and epsilon${data.meanings && ` ${data.meanings}`}; colour: mean recovery`);
}
document.documentElement.dataset.drawn = "yes";
