// ---- choosing
const panel = byId("panel"), tip = byId("tip");
const say = (text) => { byId("said").textContent = text; };
function choose(i) {
  const was = state.selected;
  state.selected = i;
  lit = null;
  byId("search").value = "";
  if ((i !== null && !shown[i]) || (was !== null && nodeRank.before[was] >= state.nodes)) refresh();
  if (i !== null) reveal(i);
  drawPanel();
  drawPinned();
  redraw(false);
  say(i === null ? "nothing chosen"
    : `${nameOf(i)}: ${describe(i)}, ${incoming[i].length} links in, ${outgoing[i].length} out`);
}
function hover(i, event) {
  if (i !== hovered) {
    hovered = i;
    scroll.classList.toggle("over", i !== null);
    redraw(false);
  }
  tip.hidden = i === null;
  if (i === null) return;
  tip.replaceChildren(make("bdi", "", nameOf(i)), make("div", "", describe(i)), make("div", "",
    isAsked(i) ? `${isLikely(i) ? "probability" : "value"} ${answerOf(i)}`
      : `activation ${number(nodes.activation[i])}, influence ${percent(influence[i])}`));
  const below = event.clientY + 18, fits = below + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${fits ? below : Math.max(4, event.clientY - tip.offsetHeight - 12)}px`;
}
function walk(key) {  // along a row, or to the nearest node of the next row that has some
  const all = everyNode.filter((i) => shown[i]), from = state.selected;
  if (!all.length) return;
  if (from === null || !shown[from]) { choose(asked[0] ?? all[0]); return; }
  const order = (i) => Math.round(ys[i] / 9) * 1e6 + xs[i];
  if (key === "ArrowLeft" || key === "ArrowRight") {
    const row = all.filter((i) => rows[i] === rows[from]).sort((a, b) => order(a) - order(b));
    const next = row[row.indexOf(from) + (key === "ArrowRight" ? 1 : -1)];
    if (next !== undefined) choose(next);
    return;
  }
  const up = key === "ArrowUp", beyond = all.filter((i) => up ? rows[i] > rows[from] : rows[i] < rows[from]);
  if (!beyond.length) return;
  const row = up ? Math.min(...beyond.map((i) => rows[i])) : Math.max(...beyond.map((i) => rows[i]));
  choose(beyond.filter((i) => rows[i] === row).sort((a, b) => Math.abs(xs[a] - xs[from]) - Math.abs(xs[b] - xs[from]))[0]);
}

// ---- the panel
function heading(text, note) {
  const h = make("h2", "", visible(text));
  if (note) h.append(make("small", "", ` ${note}`));
  return h;
}
function rowOfNode(text, share, down, i, link = null) {
  const item = make("li"), row = make("div", "row"), bar = make("i", down ? "down" : ""), name = make("button");
  bar.style.setProperty("--share", `${Math.min(100, 100 * share)}%`);
  name.type = "button";
  name.append(make("bdi", "", nameOf(i)));
  name.title = describe(i);
  bar.title = link === null ? "" : `${percent(shares[link])} of the target\u2019s input, ${percent(scores[link])} of the influence`;
  name.addEventListener("click", () => choose(i));
  const more = make("small", "", placeOf(i));
  row.append(make("b", link === null ? "" : down ? "down" : "up", text), bar, name, more);
  item.append(row);
  if (link === null) return item;
  item.addEventListener("pointerenter", () => { lit = link; item.classList.add("lit"); redraw(false); });
  item.addEventListener("pointerleave", () => { lit = null; item.classList.remove("lit"); redraw(false); });
  if (heads.has(link)) {
    const open = make("button", "more", "heads");
    open.type = "button";
    open.setAttribute("aria-expanded", "false");
    open.addEventListener("click", () => {
      const shut = open.getAttribute("aria-expanded") === "true";
      open.setAttribute("aria-expanded", String(!shut));
      if (shut) item.lastChild.remove(); else item.append(headTable(heads.get(link)));
    });
    more.append(open);
    row.addEventListener("click", (e) => { if (!e.target.closest("button")) open.click(); });
  }
  return item;
}
function table(head, some) {
  const all = make("table"), top = make("tr"), body = make("tbody"), thead = make("thead");
  const right = head.map((_, k) => some.length > 0 && some.every((row) => typeof row[k] === "number" || row[k] === null));
  head.forEach((text, k) => {
    const th = make("th", right[k] ? "n" : "", visible(String(text)));
    th.scope = "col";
    top.append(th);
  });
  for (const row of some) {
    const tr = make("tr");
    row.forEach((v, k) => {
      const td = make("td", right[k] ? "n" : "");
      td.append(make("bdi", "", typeof v === "number" || v === null ? number(v) : visible(v)));
      tr.append(td);
    });
    body.append(tr);
  }
  thead.append(top);
  all.append(thead, body);
  return all;
}
function headTable(some) {
  const sorted = [...some].sort((a, b) => Math.abs(b[3]) - Math.abs(a[3]));
  return table(["layer", "head", "reads from", "effect"], sorted.map(([layer, head, key, effect]) =>
    [String(layer), head < 0 ? "none" : String(head), `${key} ${tokenAt(key)}`, effect]));
}
function listOf(items, many = 30) {
  const list = make("ul", "list");
  list.append(...items.slice(0, many).map((one) => one()));
  const box = make("div");
  box.append(list);
  if (items.length > many) {
    const all = make("button", "all", `all ${count(items.length)}`);
    all.type = "button";
    all.addEventListener("click", () => { list.append(...items.slice(many).map((one) => one())); all.remove(); });
    box.append(all);
  }
  return box;
}
function drawPanel() {
  panel.scrollTop = 0;
  const query = byId("search").value.trim();
  if (query) drawFound(query);
  else if (state.selected === null) drawStrongest();
  else drawChosen(state.selected);
}
function drawStrongest() {
  const top = nodeRank.order.filter((i) => influence[i] > 0).slice(0, 200), most = top.length ? influence[top[0]] : 1;
  panel.replaceChildren(heading("Targets"), listOf(asked.map((i) => () => rowOfNode(answerOf(i), weightOf(i), false, i))),
    heading("Strongest nodes", "by influence on the targets"),
    listOf(top.map((i) => () => rowOfNode(percent(influence[i]), influence[i] / most, false, i)), 16),
    make("p", "soft", "Choose a node for its links; pin some to see how they act on each other."));
  if (!top.length) panel.append(make("p", "soft", "No node has any influence."));
}
function drawFound(query) {
  const words = query.toLowerCase().split(/\s+/);
  const text = (i) => [nameOf(i), nodes.label[i], kindOf(i), `${nodes.layer[i]}/${nodes.feature[i]}`,
    tokenAt(nodes.position[i]), tokens[nodes.position[i]]].join(" ").toLowerCase();
  const hits = [...asked, ...nodeRank.order].filter((i) => { const own = text(i); return words.every((w) => own.includes(w)); });
  panel.replaceChildren(heading("Found", `${count(hits.length)} node${hits.length === 1 ? "" : "s"}`),
    listOf(hits.map((i) => () => rowOfNode(isAsked(i) ? answerOf(i) : percent(influence[i]), influence[i] / strongest, false, i))));
  drawFound.first = hits[0];
}
function drawChosen(i) {
  const label = make("input", "label"), facts = make("dl"), k = inputOf.get(i);
  label.type = "text";
  label.maxLength = 200;
  label.setAttribute("aria-label", "Label");
  label.value = nameOf(i);
  label.addEventListener("change", () => {
    if (label.value.trim()) state.labels.set(i, label.value.trim()); else state.labels.delete(i);
    label.value = nameOf(i);
    refresh();
    drawPinned();
  });
  const fact = (name, text) => { const dd = make("dd"); dd.append(make("bdi", "", text)); facts.append(make("dt", "", name), dd); };
  fact(kindOf(i) === "logit" ? "logit" : "activation", number(nodes.activation[i]));
  if (!isAsked(i)) fact("influence", percent(influence[i]));
  else if (isLikely(i)) fact("probability", percent(weightOf(i)));
  else fact("weight", number(weightOf(i)));
  if (k !== undefined) {
    const [all, rest, bias] = [inputs.value[k], inputs.rest[k], inputs.bias[k]];
    fact("value", `${number(all)} = links ${signed(all - rest - bias)}, rest ${signed(rest)}, bias ${signed(bias)}`);
  }
  const act = make("div", "act"), pin = make("button", "", state.pinned.includes(i) ? "Unpin" : "Pin");
  pin.type = "button";
  pin.setAttribute("aria-pressed", String(state.pinned.includes(i)));
  pin.addEventListener("click", () => togglePin(i));
  act.append(pin);
  const what = make("p", "soft what");
  what.append(make("bdi", "", describe(i)));
  panel.replaceChildren(label, what, facts, act);
  const lists = [["Incoming", "effect, and as a share of the input", incoming[i], links.source, shares],
    ["Outgoing", "effect, and its share of the influence", outgoing[i], links.target, scores],
  ].filter(([, , some]) => some.length).flatMap(([name, note, some, end, part]) => {
    const most = some.reduce((best, l) => Math.max(best, part[l]), 1e-9);
    const item = (l) => rowOfNode(signed(links.weight[l]), part[l] / most, links.weight[l] < 0, end[l], l);
    return [heading(name, note), listOf(some.map((l) => () => item(l)), 12)];
  });
  const [tokenLists, examples] = nodes.detail[i] >= 0 ? detailsOf(data.details[nodes.detail[i]]) : [[], []];
  panel.append(...tokenLists, ...lists, ...examples);
}
function detailsOf([raises, lowers, examples]) {
  const parts = [], texts = [];
  for (const [name, some] of [["Raises", raises], ["Lowers", lowers]]) {
    if (!some.length) continue;
    const box = make("div", "tokens");
    box.append(...some.map((t) => make("span", "", bare(t))));
    parts.push(heading(name), box);
  }
  if (examples.length) texts.push(heading("Examples"));
  for (const [words, values] of examples) {
    const p = make("p", "example"), most = Math.max(1e-9, ...values);
    words.forEach((word, t) => {
      const span = make("span", "", visible(word));
      if (values[t] > 0) {
        const part = Math.round(8 + 70 * Math.sqrt(values[t] / most));
        span.style.setProperty("--shade", `color-mix(in srgb, var(--heat) ${part}%, transparent)`);
        span.title = number(values[t]);
      }
      p.append(span);
    });
    texts.push(p);
  }
  return [parts, texts];
}

// ---- pinned nodes and their groups
let marked = new Set(), boxes = [];
const groupOf = (i) => state.groups.find((g) => g.nodes.includes(i));
function units() {  // what has a box: groups, and the pinned nodes in none
  const single = state.pinned.filter((i) => !groupOf(i)).map((i) => ({ key: ids[i], name: nameOf(i), nodes: [i] }));
  return [...state.groups.map((g) => ({ key: ids[g.nodes[0]], name: visible(g.name), nodes: g.nodes, group: g })), ...single];
}
function togglePin(i) {
  if (state.pinned.includes(i)) {
    state.pinned = state.pinned.filter((p) => p !== i);
    for (const g of state.groups) g.nodes = g.nodes.filter((p) => p !== i);
    state.groups = state.groups.filter((g) => g.nodes.length);
  } else state.pinned.push(i);
  say(`${nameOf(i)} ${state.pinned.includes(i) ? "pinned" : "let go"}`);
  changed();
}
function group(name) {
  const some = units().filter((u) => marked.size ? marked.has(u.key) : !u.group), all = some.flatMap((u) => u.nodes);
  if (!all.length) return;
  state.groups = state.groups.filter((g) => !all.includes(g.nodes[0]));
  state.groups.push({ name: name.trim() || some.map((u) => u.name)[0], nodes: all });
  marked.clear();
  say(`grouped ${all.length} nodes`);
  changed();
}
function ofMarked(change) {
  for (const u of units()) if (!marked.size || marked.has(u.key)) change(u);
  marked.clear();
  changed();
}
function changed() {
  const sub = byId("sub"), had = !sub.hidden;
  sub.hidden = state.pinned.length === 0;
  if (had === sub.hidden) { size(); refresh(); } else redraw(false);
  drawPinned();
  drawPanel();
}
function drawPinned() {
  const area = byId("boxes"), some = units();
  if (!some.length) return;
  boxes = some.map((u) => {
    const box = make("div", "box"), mark = make("input"), name = make("button");
    box.classList.toggle("super", Boolean(u.group));
    box.classList.toggle("here", u.nodes.includes(state.selected));
    mark.type = "checkbox";
    mark.checked = marked.has(u.key);
    mark.setAttribute("aria-label", `Mark ${u.name}`);
    mark.addEventListener("change", () => { if (mark.checked) marked.add(u.key); else marked.delete(u.key); hint(); });
    name.type = "button";
    name.append(make("bdi", "", u.name));
    name.title = u.nodes.map((i) => `${nameOf(i)}: ${describe(i)}`).join("\n");
    name.addEventListener("click", (e) => {
      if (box.dataset.dragged) return;
      if (e.shiftKey) mark.click(); else choose(u.nodes[(u.nodes.indexOf(state.selected) + 1) % u.nodes.length]);
    });
    box.append(mark, name, make("small", "", u.group ? `\u00d7${u.nodes.length}` : layerOf(u.nodes[0])));
    dragBox(box, u.key);
    return { ...u, box };
  });
  area.replaceChildren(byId("between"), ...boxes.map((b) => b.box));
  placeBoxes(area);
  hint();
}
function hint() {
  byId("group-hint").textContent = marked.size ? `${marked.size} marked` : "mark boxes to group them; links of a group are summed";
}
function placeBoxes(area) {  // each above what acts on it; in a line no box hides another
  const w = area.clientWidth, mean = (some, of) => sum(some, of) / some.length, found = between(), lines = [];
  for (const b of boxes) {
    [b.w, b.h] = [b.box.offsetWidth, b.box.offsetHeight];
    b.x = LEFT + (w - LEFT) * mean(b.nodes, (i) => xs[i]) / world.w;
    b.y = mean(b.nodes, (i) => ys[i]);
    b.line = 0;
  }
  for (const b of [...boxes].sort((one, other) => other.y - one.y)) {
    const below = found.filter((link) => link.to === b && link.from.y > b.y && link.share > .02);
    b.line = Math.max(0, ...below.map((link) => link.from.line + 1));
    (lines[b.line] ||= []).push(b);
  }
  const fitting = lines.filter(Boolean).flatMap((line) => {  // those that are too long go on above
    const parts = [[]];
    let used = 12;
    for (const b of line.sort((one, other) => one.x - other.x)) {
      if (used + b.w + 12 > w && parts.at(-1).length) { parts.push([]); used = 12; }
      parts.at(-1).push(b);
      used += b.w + 12;
    }
    return parts;
  }).reverse();
  const h = Math.max(area.clientHeight, 42 * fitting.length);
  fitting.forEach((some, line) => {
    let left = 6, right = w - 6;
    for (const b of some) { b.x = Math.max(b.x, left + b.w / 2); left = b.x + b.w / 2 + 12; }
    for (const b of some.reverse()) { b.x = Math.min(b.x, right - b.w / 2); right = b.x - b.w / 2 - 12; }
    for (const b of some) b.y = h * (line + .5) / fitting.length;
  });
  for (const b of boxes) if (state.boxes.has(b.key)) { const [x, y] = state.boxes.get(b.key); b.x = w * x; b.y = h * y; }
  area.dataset.height = h;
  drawBetween();
}
function between() {  // the summed links from box to box, the strongest first
  const of = new Map(), sums = new Map(), found = [];
  boxes.forEach((b, k) => b.nodes.forEach((i) => of.set(i, k)));
  for (const [i, to] of of) for (const l of incoming[i]) {
    const from = of.get(links.source[l]), key = from * boxes.length + to;
    if (from !== undefined && from !== to) sums.set(key, (sums.get(key) || 0) + links.weight[l]);
  }
  for (const [key, all] of sums) {
    const from = boxes[Math.floor(key / boxes.length)], to = boxes[key % boxes.length];
    found.push({ from, to, all, share: Math.abs(all) / (sum(to.nodes, totalOf) || 1) });
  }
  return found.sort((a, b) => b.share - a.share).slice(0, 60);
}
function drawBetween() {
  const area = byId("boxes"), pen = byId("between").getContext("2d");
  sharpen(pen, area.clientWidth, Number(area.dataset.height));
  for (const b of boxes) b.box.style.transform = `translate(${b.x - b.w / 2}px, ${b.y - b.h / 2}px)`;
  const found = between(), texts = [];
  for (const { from, to, all, share } of found.reverse()) {
    const up = from.y > to.y ? 1 : -1, y0 = from.y - up * from.h / 2, y1 = to.y + up * (to.h / 2 + 5);
    const bend = Math.max(14, Math.abs(y0 - y1) / 2) * up;
    pen.strokeStyle = pen.fillStyle = all < 0 ? theme.heat : theme.accent;
    pen.globalAlpha = .35 + .5 * Math.min(1, 3 * share);
    pen.lineWidth = Math.max(.8, Math.min(9, 16 * share));
    pen.beginPath();
    pen.moveTo(from.x, y0);
    pen.bezierCurveTo(from.x, y0 - bend, to.x, y1 + bend, to.x, y1);
    pen.stroke();
    pen.beginPath();
    pen.moveTo(to.x, y1 - 5 * up);
    pen.lineTo(to.x - 4, y1 + 2 * up);
    pen.lineTo(to.x + 4, y1 + 2 * up);
    pen.fill();
    texts.push([signed(all), from.x, y0, to.x, y1, all]);
  }
  pen.globalAlpha = 1;
  pen.font = font.replace("12px", "11px");
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.lineWidth = 3;
  pen.strokeStyle = theme.card;
  const taken = boxes.map((b) => [b.x, b.y, b.w / 2, b.h / 2]);
  for (const [text, x0, y0, x1, y1, all] of texts.slice(-16).reverse()) {  // where there is room, the strongest first
    const half = pen.measureText(text).width / 2 + 3;
    const free = ([x, y]) => taken.every(([a, b, w, h]) => Math.abs(x - a) > w + half || Math.abs(y - b) > h + 7);
    const along = (p) => [x0 + (x1 - x0) * p * p * (3 - 2 * p), y0 + (y1 - y0) * p * (1.5 - 1.5 * p + p * p)];
    const place = [.5, .4, .6, .3, .7, .2, .8].map(along).find(free);
    if (!place) continue;
    taken.push([...place, half, 7]);
    pen.strokeText(text, ...place);
    pen.fillStyle = all < 0 ? theme.heat : theme.accent;
    pen.fillText(text, ...place);
  }
}
function dragBox(box, key) {
  box.addEventListener("pointerdown", (e) => {
    const b = boxes.find((one) => one.box === box), from = [e.clientX - b.x, e.clientY - b.y], start = [e.clientX, e.clientY];
    delete box.dataset.dragged;
    const move = (m) => {
      if (!box.dataset.dragged && Math.hypot(m.clientX - start[0], m.clientY - start[1]) < 4) return;
      box.dataset.dragged = "yes";
      const area = byId("boxes");
      b.x = Math.max(b.w / 2, Math.min(area.clientWidth - b.w / 2, m.clientX - from[0]));
      b.y = Math.max(b.h / 2, Math.min(area.dataset.height - b.h / 2, m.clientY - from[1]));
      state.boxes.set(key, [b.x / area.clientWidth, b.y / area.dataset.height]);
      drawBetween();
    };
    const over = new AbortController(), { signal } = over;
    addEventListener("pointermove", move, { signal });
    for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => over.abort(), { signal });
  });
}
byId("group").addEventListener("click", () => { group(byId("group-name").value); byId("group-name").value = ""; });
byId("group-name").addEventListener("keydown", (e) => { if (e.key === "Enter") { byId("group").click(); scroll.focus(); } });
byId("ungroup").addEventListener("click", () => ofMarked((u) => { state.groups = state.groups.filter((g) => g !== u.group); }));
byId("unpin").addEventListener("click", () => ofMarked((u) => {
  state.groups = state.groups.filter((g) => g !== u.group);
  state.pinned = state.pinned.filter((i) => !u.nodes.includes(i));
}));
