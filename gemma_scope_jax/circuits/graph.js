"use strict";
// ---- the data: one list a column; a link joins two nodes by their indices
const data = JSON.parse(document.getElementById("data").textContent);
const { nodes, links, inputs, tokens, layers, kinds } = data;
const N = nodes.kind.length, M = links.source.length, TOP = layers + 1;
const NODES = 60, LINKS = 200;  // how many the first view shows, about
const byId = (id) => document.getElementById(id);
const make = (tag, cls, text) => {
  const e = document.createElement(tag);
  if (cls) e.className = cls;
  if (text !== undefined) e.textContent = text;
  return e;
};
const number = (v) => v === null || v === undefined ? "n/a"
  : Math.abs(v) >= 100 ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(3)));
const signed = (v) => v === null ? "n/a" : (v < 0 ? "\u2212" : "+") + number(Math.abs(v));
const percent = (v) => `${v >= .0995 ? Math.round(100 * v) : Number((100 * v).toPrecision(2))} %`;
const sum = (some, of) => some.reduce((all, one) => all + of(one), 0);
const count = (v) => v.toLocaleString("en");
// signs that cannot be seen, or that turn the text around them, are spelled out
const signs = { "\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d" };
const visible = (t) => t.replace(
  /[\u0000-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g,
  (c) => signs[c] || `\u2039${c.charCodeAt(0).toString(16).padStart(4, "0")}\u203a`);
const bare = (t) => visible(t).trim() || "\u2423".repeat(Math.max(1, t.length));

const kindOf = (i) => kinds[nodes.kind[i]];
const isAsked = (i) => kindOf(i) === "logit" || kindOf(i) === "direction";
const rowOf = (i) => kindOf(i) === "token" ? 0 : isAsked(i) ? TOP : nodes.layer[i] + 1;
const rows = Int32Array.from({ length: N }, (_, i) => rowOf(i));
const inputOf = new Map(inputs.node.map((node, k) => [node, k]));
const totalOf = (i) => inputOf.has(i) ? inputs.total[inputOf.get(i)] || 0 : 0;
const weightOf = (i) => inputOf.has(i) ? inputs.weight[inputOf.get(i)] || 0 : 0;
const influence = nodes.influence.map((v) => v || 0);
const sizes = links.weight.map((w) => Math.abs(w || 0));
const shares = sizes.map((w, l) => w / (totalOf(links.target[l]) || 1));
const scores = shares.map((s, l) => s * influence[links.target[l]]);
const incoming = Array.from({ length: N }, () => []), outgoing = Array.from({ length: N }, () => []);
for (let l = 0; l < M; l++) { incoming[links.target[l]].push(l); outgoing[links.source[l]].push(l); }
for (const list of [...incoming, ...outgoing]) list.sort((a, b) => sizes[b] - sizes[a]);
const heads = new Map(data.heads);

// what stands before each in the order of size, as a share of all: the sliders cut here
function ranked(values, some) {
  const order = some.sort((a, b) => values[b] - values[a]), before = new Float64Array(values.length);
  const all = sum(order, (i) => values[i]) || 1;
  let until = 0;
  for (const i of order) { before[i] = Math.min(until / all, 1 - 1e-9); until += values[i]; }
  return { order, before };
}
const everyNode = Array.from({ length: N }, (_, i) => i), asked = everyNode.filter(isAsked).sort((a, b) => weightOf(b) - weightOf(a));
const nodeRank = ranked(influence, everyNode.filter((i) => !isAsked(i)));
const linkRank = ranked(scores, Array.from({ length: M }, (_, l) => l));

const ids = [];
const nodeWithId = new Map();
for (let i = 0; i < N; i++) {
  const id = `${kindOf(i)}/${nodes.layer[i]}/${nodes.position[i]}/${nodes.feature[i]}`;
  let unique = id;
  for (let k = 2; nodeWithId.has(unique); k++) unique = `${id}/${k}`;
  ids.push(unique);
  nodeWithId.set(unique, i);
}

// ---- the state: what "Save view" writes
const state = {
  nodes: 1, links: 1,  // shares of the influence and of the score that are shown
  selected: null, pinned: [], groups: [],  // a group: { name, nodes }
  labels: new Map(), moved: new Map(), boxes: new Map(),
};
function nameOf(i) {
  if (state.labels.has(i)) return visible(state.labels.get(i));
  const own = nodes.label[i], kind = kindOf(i);
  if (kind === "token") return bare(tokens[nodes.position[i]] ?? own);
  if (own) return bare(own);
  if (kind === "error") return "error";
  if (isAsked(i)) return `${kind === "logit" ? "token" : "direction"} ${nodes.feature[i]}`;
  const raises = nodes.detail[i] < 0 ? [] : data.details[nodes.detail[i]][0];
  return raises.length ? [...new Set(raises.map(bare))].slice(0, 3).join(", ") : `#${nodes.feature[i]}`;
}
const tokenAt = (t) => bare(tokens[t] ?? "");
const layerOf = (i) => rows[i] === 0 || isAsked(i) ? "" : String(nodes.layer[i]);
const placeOf = (i) => `${layerOf(i)}${layerOf(i) && " \u00b7 "}${tokenAt(nodes.position[i])}`;
function describe(i) {
  const where = `token ${nodes.position[i]}, \u201c${tokenAt(nodes.position[i])}\u201d`;
  if (rows[i] === 0 || isAsked(i)) return `${kindOf(i)} ${nodes.feature[i] >= 0 ? nodes.feature[i] : ""} at ${where}`;
  return `${kindOf(i)}${nodes.feature[i] >= 0 ? ` ${nodes.layer[i]}/${nodes.feature[i]}` : ""}, layer ${nodes.layer[i]}, ${where}`;
}

// ---- the layout, in units of the first view's pixels: columns of tokens, rows of layers
const SPARE = .3, LEFT = 40, BOTTOM = 34, GAP = 21, LINE = 12, PAD = 16;
const scroll = byId("scroll"), view = byId("view"), space = byId("space");
const pens = { links: byId("links").getContext("2d"), nodes: byId("nodes").getContext("2d") };
const xs = new Float32Array(N), ys = new Float32Array(N), px = new Float32Array(N), py = new Float32Array(N);
const shown = new Uint8Array(N), room = new Float32Array(N), boxWidth = new Float32Array(N);
const font = `12px ${getComputedStyle(document.documentElement).getPropertyValue("--sans")}`;
let width = 0, height = 0, scale = 1, columns = [], bands = [], world = { w: 1, h: 1 }, lines = [], buckets = [];

function chooseShown() {
  const always = new Set([...asked, ...state.pinned, state.selected]);
  for (let i = 0; i < N; i++) shown[i] = always.has(i) || nodeRank.before[i] < state.nodes ? 1 : 0;
  // thin links first, so that thick ones lie on top; one stroke for many links of one look
  const steps = [0, .03, .08, .2], looks = new Map();
  let seen = 0;
  for (const l of linkRank.order) {
    if (linkRank.before[l] >= state.links) break;
    if (!shown[links.source[l]] || !shown[links.target[l]]) continue;
    const level = steps.findLastIndex((s) => shares[l] >= s), key = 2 * level + (links.weight[l] < 0 ? 1 : 0);
    if (!looks.has(key)) looks.set(key, []);
    looks.get(key).push(l);
    seen++;
  }
  const dense = Math.max(.35, Math.min(1, Math.sqrt(300 / Math.max(seen, 1))));
  buckets = [...looks.keys()].sort((a, b) => a - b).map((key) => ({
    down: key % 2 === 1, width: [.7, 1, 2, 3.4][key >> 1], alpha: [.22, .34, .42, .5][key >> 1] * dense,
    list: Int32Array.from(looks.get(key)),
  }));
  const many = sum(nodeRank.order, (i) => shown[i]);
  byId("node-count").textContent = `${count(many)} of ${count(nodeRank.order.length)} \u00b7 ${percent(state.nodes)}`;
  byId("link-count").textContent = `${count(seen)} of ${count(M)} \u00b7 ${percent(state.links)}`;
  byId("node-range").value = Math.round(1000 * state.nodes);
  byId("link-range").value = Math.round(1000 * state.links);
}
function spread(parts, available) {  // room that is left goes to where names need it
  const left = available - sum(parts, (p) => p.size), pull = sum(parts, (p) => p.pull);
  let at = 0;
  for (const p of parts) {
    if (left > 0 && pull > 0) p.size += left * p.pull / pull;
    p.at = at;
    at += p.size;
  }
  return Math.max(at, 1);
}
function cut(length, busy, part, thin) {  // runs of empty columns or rows become one thin part
  const parts = [];
  for (let k = 0; k < length; k++) {
    const last = parts[parts.length - 1];
    if (busy(k)) parts.push({ from: k, to: k, ...part(k) });
    else if (last && last.empty) last.to = k;
    else parts.push({ from: k, to: k, empty: true, size: thin, pull: 0 });
  }
  return parts;
}
const wished = (i) => rows[i] === 0 || kindOf(i) === "error" ? 24 : Math.min(150, pens.nodes.measureText(nameOf(i)).width) + 26;
function layOut() {
  const cells = new Map(), most = new Map(), deep = new Map(), wish = new Map();
  pens.nodes.font = font;
  for (let i = 0; i < N; i++) {
    if (!shown[i] || isAsked(i)) continue;
    const key = rows[i] * tokens.length + nodes.position[i];
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(i);
  }
  for (const i of asked) { most.set(nodes.position[i], 1); deep.set(TOP, 1); }
  for (const [key, cell] of cells) {
    const t = key % tokens.length, row = Math.floor(key / tokens.length);
    cell.sort((a, b) => influence[b] - influence[a]);
    most.set(t, Math.max(most.get(t) || 0, Math.min(cell.length, LINE)));
    deep.set(row, Math.max(deep.get(row) || 0, Math.ceil(cell.length / LINE)));
    wish.set(t, Math.max(wish.get(t) || 0, PAD + sum(cell.slice(0, LINE), wished)));
  }
  columns = cut(tokens.length, (t) => most.has(t), (t) => ({
    size: Math.max(most.get(t) * GAP + PAD, Math.min(96, pens.nodes.measureText(tokenAt(t)).width + 16)),
    wish: wish.get(t) || 0,
  }), 18);
  const scrolls = sum(columns, (c) => c.size) > width - LEFT;  // then names may have their room
  for (const c of columns) {
    if (scrolls && !c.empty) c.size = Math.max(c.size, Math.min(c.wish, 150));
    c.pull = c.empty ? 0 : Math.max(8, c.wish - c.size);
  }
  world.w = spread(columns, width - LEFT);
  bands = cut(TOP + 1, (row) => deep.has(row), (row) => ({ size: deep.get(row) * 17 + (row === TOP ? 10 : 1), pull: row === TOP ? .2 : deep.get(row) }), 8);
  world.h = spread(bands, height - BOTTOM);
  const columnOf = new Map(columns.map((c) => [c.from, c])), bandOf = new Map(bands.map((b) => [b.from, b]));
  lines = [];
  for (const [key, cell] of cells) {
    const column = columnOf.get(key % tokens.length), band = bandOf.get(Math.floor(key / tokens.length));
    for (let line = 0; line * LINE < cell.length; line++) {
      const some = cell.slice(line * LINE, (line + 1) * LINE), least = GAP * some.length, wish = sum(some, wished);
      const given = Math.min(1, Math.max(0, (column.size - PAD - least) / Math.max(wish - least, 1)));
      let x = column.at + PAD / 2 + 4;
      for (const i of some) {
        xs[i] = x;
        ys[i] = world.h - band.at - band.size * (line + .5) / deep.get(band.from);
        x += GAP + (wished(i) - GAP) * given;
      }
      (lines[band.from * 1024 + line] ||= []).push(...some);
    }
  }
  lines = lines.filter(Boolean);
  for (const line of lines) {
    line.sort((a, b) => xs[a] - xs[b]);
    line.forEach((i, k) => { room[i] = (k + 1 < line.length ? xs[line[k + 1]] : world.w) - xs[i]; });
  }
  placeTargets(columnOf, bandOf.get(TOP));
  for (const [i, [dx, dy]] of state.moved) { xs[i] += dx; ys[i] += dy; }
}
const targetText = (i) => kindOf(i) === "logit" ? `${nameOf(i)}  ${percent(weightOf(i))}` : nameOf(i);
function placeTargets(columnOf, band) {  // from their column to the right, or as far left as they need
  const places = new Map();
  for (const i of asked) {
    boxWidth[i] = Math.min(180, pens.nodes.measureText(targetText(i)).width + 16);
    places.set(nodes.position[i], (places.get(nodes.position[i]) || []).concat(i));
  }
  for (const [position, some] of places) {
    const all = sum(some, (i) => boxWidth[i] + 8);
    const squeeze = Math.min(1, world.w / all), start = columnOf.get(position).at + 4;
    let at = Math.max(0, Math.min(start, world.w - all));
    for (const i of at < start ? some.reverse() : some) {  // the first above the column

      boxWidth[i] = boxWidth[i] * squeeze;
      xs[i] = at + boxWidth[i] / 2;
      ys[i] = world.h - band.at - band.size / 2;
      at += boxWidth[i] + 8 * squeeze;
    }
  }
}

// ---- drawing: all links on one canvas, and above it nodes, text and the links that matter now.
// The lower one is larger than the view and moves with it, for thousands of links are slow to draw
let theme = {}, hovered = null, lit = null, held = null, stale = true, drawn = null, settle = 0;
function readTheme() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["paper", "card", "ink", "soft", "line", "heat", "accent", "sans"]) theme[name] = style.getPropertyValue(`--${name}`).trim();
}
const zoomed = () => scale < 1 ? Math.max(.4, scale) : Math.min(1.7, Math.sqrt(scale));
const strongest = Math.max(1e-9, ...nodeRank.order.slice(0, 1).map((i) => influence[i]));
const radiusOf = (i) => (3.6 + 5 * Math.sqrt(Math.min(1, influence[i] / strongest))) * zoomed();
const halfHeight = (i) => isAsked(i) ? 11 * Math.min(1, zoomed()) : radiusOf(i);
const fit = new Map();
function clipped(pen, text, most) {
  const key = `${Math.floor(most / 4)}|${text}`;
  if (!fit.has(key)) {
    if (fit.size > 5000) fit.clear();
    let kept = [...text.slice(0, 200)];
    const whole = pen.measureText(text).width <= most && text.length <= 200;
    while (!whole && kept.length && pen.measureText(kept.join("") + "\u2026").width > most) kept = kept.slice(0, -1);
    fit.set(key, whole ? text : kept.length ? `${kept.join("").trimEnd()}\u2026` : "");
  }
  return fit.get(key);
}
function size() {
  width = scroll.clientWidth;
  height = scroll.clientHeight;
  view.style.width = `${width}px`;
  view.style.height = `${height}px`;
  sharpen(pens.nodes, width, height);
  sharpen(pens.links, width * (1 + 2 * SPARE), height * (1 + 2 * SPARE));
}
function sharpen(pen, w, h) {
  const ratio = devicePixelRatio || 1;
  pen.canvas.width = Math.round(w * ratio);
  pen.canvas.height = Math.round(h * ratio);
  pen.canvas.style.width = `${w}px`;
  pen.canvas.style.height = `${h}px`;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
}
function redraw(all = true) {  // once a frame
  stale ||= all;
  redraw.asked ||= requestAnimationFrame(() => {
    redraw.asked = 0;
    place();
    if (stale || !moveLinks()) drawLinks();
    stale = false;
    drawNodes();
  });
}
function moveLinks() {  // the drawn links to where they belong now; false if they no longer fill the view
  const by = scale / drawn.scale, x = LEFT - scroll.scrollLeft + (drawn.left - LEFT - width * SPARE) * by;
  const y = -scroll.scrollTop + (drawn.top - height * SPARE) * by, wide = width * (1 + 2 * SPARE) * by, high = height * (1 + 2 * SPARE) * by;
  if (by > 1.6 || x > LEFT || y > 0 || x + wide < Math.min(width, px[0] + (world.w - xs[0]) * scale) || y + high < height) return false;
  pens.links.canvas.style.transform = `translate(${x}px, ${y}px) scale(${by})`;
  clearTimeout(settle);
  if (by !== 1) settle = setTimeout(redraw, 140);
  return true;
}
function place() {
  for (let i = 0; i < N; i++) {
    px[i] = LEFT + xs[i] * scale - scroll.scrollLeft;
    py[i] = ys[i] * scale - scroll.scrollTop;
  }
}
function trace(pen, l) {
  const s = links.source[l], t = links.target[l], y0 = py[s] - halfHeight(s), y1 = py[t] + halfHeight(t), mid = (y0 + y1) / 2;
  pen.moveTo(px[s], y0);
  pen.bezierCurveTo(px[s], mid, px[t], mid, px[t], y1);
}
function stroke(pen, bucket, some) {
  pen.strokeStyle = bucket.down ? theme.heat : theme.accent;
  pen.globalAlpha = bucket.alpha;
  pen.lineWidth = bucket.width;
  pen.beginPath();
  let many = 0;
  for (const l of some) {
    trace(pen, l);
    if (++many % 100 === 0) { pen.stroke(); pen.beginPath(); }  // long paths are slow to fill
  }
  pen.stroke();
}
function drawLinks() {
  const pen = pens.links, dx = width * SPARE, dy = height * SPARE;
  const beyond = (l) => {
    const s = links.source[l], t = links.target[l];
    return s === held || t === held || (px[s] < -dx && px[t] < -dx) || (px[s] > width + dx && px[t] > width + dx)
      || (py[s] < -dy && py[t] < -dy) || (py[s] > height + dy && py[t] > height + dy);
  };
  pen.clearRect(0, 0, width + 2 * dx, height + 2 * dy);
  pen.save();
  pen.translate(dx, dy);
  for (const bucket of buckets) stroke(pen, bucket, bucket.list.filter((l) => !beyond(l)));
  pen.restore();
  drawn = { scale, left: scroll.scrollLeft, top: scroll.scrollTop };
  moveLinks();
}
function emphasised() {  // the strongest links of what is pointed at, else chosen, else between pins
  if (lit !== null) return [lit];
  const i = hovered ?? state.selected;
  if (i !== null) return [...incoming[i].slice(0, 30), ...outgoing[i].slice(0, 30)].filter((l) => shown[links.source[l]] && shown[links.target[l]]);
  const pins = new Set(state.pinned);
  return state.pinned.flatMap((p) => incoming[p].filter((l) => pins.has(links.source[l])).slice(0, 30));
}
function shape(pen, i) {
  const x = px[i], y = py[i], r = radiusOf(i), kind = kindOf(i);
  pen.beginPath();
  if (isAsked(i)) pen.roundRect(x - boxWidth[i] * Math.min(1, zoomed()) / 2, y - halfHeight(i), boxWidth[i] * Math.min(1, zoomed()), 2 * halfHeight(i), 4);
  else if (kind === "token") pen.rect(x - r * .85, y - r * .85, 1.7 * r, 1.7 * r);
  else if (kind === "error") { pen.moveTo(x, y - r); pen.lineTo(x + r, y); pen.lineTo(x, y + r); pen.lineTo(x - r, y); pen.closePath(); }
  else pen.arc(x, y, r, 0, 7);
}
function drawNodes() {
  const pen = pens.nodes, strong = emphasised(), focus = hovered ?? state.selected;
  const near = new Set([focus, ...strong.flatMap((l) => [links.source[l], links.target[l]])]), pins = new Set(state.pinned);
  const dim = strong.length > 0 || focus !== null;
  byId("links").classList.toggle("faint", dim);
  pen.clearRect(0, 0, width, height);
  pen.lineCap = "round";
  if (held !== null) for (const bucket of buckets) stroke(pen, bucket, bucket.list.filter((l) => links.source[l] === held || links.target[l] === held));
  for (const l of [...strong].reverse()) {
    pen.strokeStyle = links.weight[l] < 0 ? theme.heat : theme.accent;
    pen.globalAlpha = .75;
    pen.lineWidth = Math.max(.8, Math.min(8, 14 * shares[l]));
    pen.beginPath();
    trace(pen, l);
    pen.stroke();
  }
  pen.lineWidth = 1.3;
  for (let i = 0; i < N; i++) {
    if (!shown[i] || px[i] < -200 || px[i] > width + 200 || py[i] < -20 || py[i] > height + 20) continue;
    pen.globalAlpha = dim && !near.has(i) && !pins.has(i) ? .35 : 1;
    pen.strokeStyle = pins.has(i) ? theme.accent : kindOf(i) === "error" ? theme.soft : theme.ink;
    shape(pen, i);
    pen.fillStyle = theme.card;
    pen.fill();
    if (pins.has(i)) { pen.fillStyle = theme.accent; if (isAsked(i)) pen.globalAlpha *= .3; pen.fill(); pen.globalAlpha = 1; }
    pen.stroke();
  }
  pen.globalAlpha = 1;
  if (state.selected !== null && shown[state.selected]) {
    pen.strokeStyle = theme.accent;
    pen.lineWidth = 2.5;
    shape(pen, state.selected);
    pen.stroke();
  }
  drawText(pen, near, dim, pins);
  drawEdges(pen);
}
function drawText(pen, near, dim, pins) {
  pen.font = font;
  pen.textBaseline = "middle";
  pen.textAlign = "left";
  pen.lineJoin = "round";
  for (let i = 0; i < N; i++) {
    if (!shown[i] || rows[i] === 0 || py[i] < -20 || py[i] > height) continue;
    const faded = dim && !near.has(i) && !pins.has(i), r = radiusOf(i);
    if (isAsked(i)) {
      if (zoomed() < .7) continue;
      pen.globalAlpha = faded ? .5 : 1;
      pen.fillStyle = theme.ink;
      pen.textAlign = "center";
      pen.fillText(clipped(pen, targetText(i), boxWidth[i] * Math.min(1, zoomed()) - 6), px[i], py[i] + .5);
      pen.textAlign = "left";
      continue;
    }
    if (kindOf(i) === "error" && i !== state.selected && i !== hovered) continue;
    const free = state.moved.has(i) ? 150 : Math.min(170, room[i] * scale - 2 * r - 8);
    const text = free < 26 ? "" : clipped(pen, nameOf(i), free);
    if (text.length < 3 && text !== nameOf(i)) continue;
    pen.globalAlpha = faded ? .35 : 1;
    pen.strokeStyle = theme.card;
    pen.lineWidth = 3.5;
    pen.strokeText(text, px[i] + r + 4, py[i] + .5);
    pen.fillStyle = nodes.label[i] || state.labels.has(i) || nodes.detail[i] >= 0 ? theme.ink : theme.soft;
    pen.fillText(text, px[i] + r + 4, py[i] + .5);
  }
  pen.globalAlpha = 1;
}
function drawEdges(pen) {  // layers at the left and tokens below stay where they are
  const bottom = height - BOTTOM, chosen = hovered ?? state.selected;
  pen.lineWidth = 1;
  pen.strokeStyle = theme.line;
  pen.beginPath();
  for (const c of columns.slice(1)) {
    const x = Math.round(LEFT + c.at * scale - scroll.scrollLeft) + .5;
    if (x > LEFT && x < width) { pen.moveTo(x, bottom); pen.lineTo(x, height); }
  }
  pen.clearRect(0, 0, LEFT, height);
  pen.clearRect(0, bottom, width, BOTTOM);
  pen.fillStyle = theme.card;
  pen.fillRect(0, 0, LEFT, height);
  pen.fillRect(0, bottom, width, BOTTOM);
  pen.moveTo(LEFT + .5, 0);
  pen.lineTo(LEFT + .5, bottom + .5);
  pen.lineTo(width, bottom + .5);
  pen.stroke();
  pen.textAlign = "right";
  let last = Infinity;
  for (const b of bands) {
    const y = (world.h - b.at - b.size / 2) * scale - scroll.scrollTop;
    if (b.empty || y < 6 || y > bottom - 5 || last - y < 13) continue;
    last = y;
    pen.fillStyle = chosen !== null && rows[chosen] === b.from ? theme.accent : theme.soft;
    pen.fillText(b.from === 0 ? "E" : b.from === TOP ? "out" : String(b.from - 1), LEFT - 8, y);
  }
  pen.save();
  pen.beginPath();
  pen.rect(LEFT, bottom, width - LEFT, BOTTOM);
  pen.clip();
  for (const c of columns) {
    const x = LEFT + c.at * scale - scroll.scrollLeft, wide = c.size * scale;
    if (x + wide < LEFT || x > width) continue;
    const here = chosen !== null && nodes.position[chosen] >= c.from && nodes.position[chosen] <= c.to;
    pen.fillStyle = c.empty ? theme.soft : here ? theme.accent : theme.ink;
    pen.textAlign = c.empty ? "center" : "left";
    const text = c.empty ? "\u22ef" : clipped(pen, tokenAt(c.from), wide - 8);
    pen.fillText(text, c.empty ? x + wide / 2 : x + 7, bottom + BOTTOM / 2);
  }
  pen.restore();
}
function nodeAt(x, y) {
  if (x < LEFT || y > height - BOTTOM) return null;
  let best = null, least = 1;
  for (let i = 0; i < N; i++) {
    if (!shown[i]) continue;
    const wide = isAsked(i) ? boxWidth[i] * Math.min(1, zoomed()) / 2 : radiusOf(i) + 4, high = isAsked(i) ? halfHeight(i) : wide;
    const off = Math.max(Math.abs(x - px[i]) / wide, Math.abs(y - py[i]) / high);
    if (off < least) { least = off; best = i; }
  }
  return best;
}
function columnAt(x) {
  const at = (x - LEFT + scroll.scrollLeft) / scale;
  return columns.find((c) => c.at <= at && at < c.at + c.size);
}

// ---- the view: zoom and scroll
const least = () => Math.min(1, Math.max(.15, (width - LEFT) / world.w, (height - BOTTOM) / world.h));
function stretch() {
  space.style.width = `${Math.max(width, Math.floor(LEFT + world.w * scale))}px`;
  space.style.height = `${Math.max(height, Math.floor(BOTTOM + world.h * scale))}px`;
}
function zoom(factor, x = width / 2, y = height / 2) {
  const before = scale, left = scroll.scrollLeft + x - LEFT, top = scroll.scrollTop + y;
  scale = Math.max(least(), Math.min(8, scale * factor));
  stretch();
  scroll.scrollLeft = left * scale / before - x + LEFT;
  scroll.scrollTop = top * scale / before - y;
  redraw(false);
}
function fitView() {
  scale = 1;
  stretch();
  scroll.scrollLeft = space.offsetWidth;  // the answer is at the end of a long prompt
  redraw();
}
function refresh() {
  chooseShown();
  layOut();
  scale = Math.max(scale, least());
  stretch();
  redraw();
}
function reveal(i) {
  const x = LEFT + xs[i] * scale - scroll.scrollLeft, y = ys[i] * scale - scroll.scrollTop;
  if (x < LEFT + 20 || x > width - 40) scroll.scrollLeft += x - width / 2;
  if (y < 14 || y > height - BOTTOM - 14) scroll.scrollTop += y - height / 2;
}
