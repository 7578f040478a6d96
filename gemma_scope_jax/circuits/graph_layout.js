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
  : (Math.abs(v) >= 100 ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(3)))).replace("-", "\u2212");
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
const isLikely = (i) => kindOf(i) === "logit" && weightOf(i) > 0 && weightOf(i) < 1;  // the weight is a probability
const answerOf = (i) => isLikely(i) ? percent(weightOf(i)) : signed(inputs.value[inputOf.get(i)] ?? null);
const influence = nodes.influence.map((v) => v || 0);
const sizes = links.weight.map((w) => Math.abs(w || 0));
const shares = sizes.map((w, l) => w / (totalOf(links.target[l]) || 1));
const scores = shares.map((s, l) => s * influence[links.target[l]]);
const incoming = Array.from({ length: N }, () => []), outgoing = Array.from({ length: N }, () => []);
for (let l = 0; l < M; l++) { incoming[links.target[l]].push(l); outgoing[links.source[l]].push(l); }
// effects on different targets have different units; influence can be compared. What was asked about comes first
const toAsked = (l) => isAsked(links.target[l]) ? 1 : 0;
for (const list of [...incoming, ...outgoing]) list.sort((a, b) => toAsked(b) - toAsked(a) || scores[b] - scores[a] || shares[b] - shares[a]);
const heads = new Map(data.heads);

// what stands before each in the order of size, as a share of all: the sliders cut here
function ranked(values, some) {
  const order = some.sort((a, b) => values[b] - values[a]), before = new Float64Array(values.length);
  const all = sum(order, (i) => values[i]) || 1;
  let until = 0;
  for (const i of order) { before[i] = Math.min(until / all, 1 - 1e-9); until += values[i]; }
  return { order, before };
}
const everyNode = Array.from({ length: N }, (_, i) => i);
const asked = everyNode.filter(isAsked).sort((a, b) => weightOf(b) - weightOf(a));
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
  if (kind === "error") return `error ${layerOf(i) === "all" ? "of all layers" : layerOf(i)}${nodes.position[i] < 0 ? "" : ` at ${nodes.position[i]}`}`;
  if (isAsked(i)) return `${kind === "logit" ? "token" : "direction"} ${nodes.feature[i]}`;
  const raises = nodes.detail[i] < 0 ? [] : data.details[nodes.detail[i]][0];
  return raises.length ? [...new Set(raises.map(bare))].slice(0, 3).join(", ") : `#${nodes.feature[i]}`;
}
const tokenAt = (t) => t < 0 ? "all tokens" : bare(tokens[t] ?? "");  // errors may be merged over tokens, or layers
const layerOf = (i) => kindOf(i) === "token" || isAsked(i) ? "" : nodes.layer[i] < 0 ? "all" : String(nodes.layer[i]);
const placeOf = (i) => `${layerOf(i)}${layerOf(i) && " \u00b7 "}${tokenAt(nodes.position[i])}`;
function describe(i) {
  const t = nodes.position[i], where = t < 0 ? tokenAt(t) : `token ${t}, \u201c${tokenAt(t)}\u201d`;
  if (!layerOf(i)) return `${kindOf(i)} ${nodes.feature[i] >= 0 ? nodes.feature[i] : ""} at ${where}`;
  return `${kindOf(i)}${nodes.feature[i] >= 0 ? ` ${nodes.layer[i]}/${nodes.feature[i]}` : ""}, ${nodes.layer[i] < 0 ? "all layers" : `layer ${nodes.layer[i]}`}, ${where}`;
}

// ---- the layout, in units that are `fitting` pixels in the first view: columns of tokens, rows of layers
const LEGIBLE = .5;  // a graph that must be drawn smaller than this to be seen whole is scrolled
const SPARE = .3, LEFT = 40, BOTTOM = 34, GAP = 21, LINE = 12, PAD = 16;
const scroll = byId("scroll"), view = byId("view"), space = byId("space");
const pens = { links: byId("links").getContext("2d"), nodes: byId("nodes").getContext("2d") };
const xs = new Float32Array(N), ys = new Float32Array(N), px = new Float32Array(N), py = new Float32Array(N);
const shown = new Uint8Array(N), room = new Float32Array(N), boxWidth = new Float32Array(N);
const font = `12px ${getComputedStyle(document.documentElement).getPropertyValue("--sans")}`;
let width = 0, height = 0, scale = 1, fitting = 1, columns = [], bands = [], world = { w: 1, h: 1 }, lines = [], buckets = [];

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
function cut(first, length, busy, part, thin) {  // runs of empty columns or rows become one thin part
  const parts = [];
  for (let k = first; k < length; k++) {
    const last = parts[parts.length - 1];
    if (busy(k)) parts.push({ from: k, to: k, ...part(k) });
    else if (last && last.empty) last.to = k;
    else parts.push({ from: k, to: k, empty: true, size: thin, pull: 0 });
  }
  return parts;
}
const wished = (i) => rows[i] === 0 || kindOf(i) === "error" ? 24 : Math.min(150, pens.nodes.measureText(nameOf(i)).width) + 26;
function layOut() {
  const cells = new Map(), most = new Map(), deep = new Map(), wish = new Map(), wide = tokens.length + 1;
  pens.nodes.font = font;
  for (let i = 0; i < N; i++) {
    if (!shown[i] || isAsked(i)) continue;
    const key = rows[i] * wide + nodes.position[i] + 1;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(i);
  }
  for (const i of asked) { most.set(nodes.position[i], 1); deep.set(TOP, 1); }
  for (const [key, cell] of cells) {
    const t = key % wide - 1, row = Math.floor(key / wide);
    cell.sort((a, b) => influence[b] - influence[a]);
    most.set(t, Math.max(most.get(t) || 0, Math.min(cell.length, LINE)));
    deep.set(row, Math.max(deep.get(row) || 0, Math.ceil(cell.length / LINE)));
    wish.set(t, Math.max(wish.get(t) || 0, PAD + sum(cell.slice(0, LINE), wished)));
  }
  columns = cut(most.has(-1) ? -1 : 0, tokens.length, (t) => most.has(t), (t) => ({
    size: Math.max(most.get(t) * GAP + PAD, Math.min(96, pens.nodes.measureText(tokenAt(t)).width + 16)),
    wish: wish.get(t) || 0,
  }), 18);
  bands = cut(0, TOP + 1, (row) => deep.has(row), (row) => row === TOP ? { size: 27, pull: .2 }
    : { size: deep.get(row) * 17 + 1, pull: deep.get(row) }, 8);
  fitting = Math.min(1, (width - LEFT) / sum(columns, (c) => c.size), (height - BOTTOM) / sum(bands, (b) => b.size));
  const scrolls = fitting < LEGIBLE;  // then names may have their room
  if (scrolls) fitting = 1;
  for (const c of columns) {
    if (scrolls && !c.empty) c.size = Math.max(c.size, Math.min(c.wish, 150));
    c.pull = c.empty ? 0 : Math.max(8, c.wish - c.size);
  }
  world.w = spread(columns, (width - LEFT) / fitting);
  world.h = spread(bands, (height - BOTTOM) / fitting);
  const columnOf = new Map(columns.map((c) => [c.from, c])), bandOf = new Map(bands.map((b) => [b.from, b]));
  lines = [];
  for (const [key, cell] of cells) {
    const column = columnOf.get(key % wide - 1), band = bandOf.get(Math.floor(key / wide));
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
const targetText = (i) => `${nameOf(i)}  ${answerOf(i)}`;
function placeTargets(columnOf, band) {  // from their column to the right, or as far left as they need
  const places = new Map();
  for (const i of asked) {
    boxWidth[i] = Math.min(180, pens.nodes.measureText(targetText(i)).width + 16) / fitting;
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
