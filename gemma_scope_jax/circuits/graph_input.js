// ---- the view as a file
function written() {
  const byName = (map) => Object.fromEntries([...map].map(([i, v]) => [ids[i], v]));
  return {
    gemma_scope_graph_view: 1, nodes: state.nodes, links: state.links,
    selected: state.selected === null ? null : ids[state.selected], pinned: state.pinned.map((i) => ids[i]),
    groups: state.groups.map((g) => ({ name: g.name, nodes: g.nodes.map((i) => ids[i]) })),
    labels: byName(state.labels), moved: byName(state.moved), boxes: Object.fromEntries(state.boxes),
  };
}
function readBack(view) {  // what does not fit this graph is left out, and counted
  if (view?.gemma_scope_graph_view !== 1) throw new Error("not a saved view of a graph");
  const lost = new Set(), list = (v) => Array.isArray(v) ? v : [];
  const pairs = (v) => v && typeof v === "object" ? Object.entries(v) : [];
  const node = (id) => { if (!nodeWithId.has(id)) lost.add(id); return nodeWithId.get(id); };
  const every = (some) => [...new Set(list(some).map(node).filter((i) => i !== undefined))];
  const part = (v, other) => Number.isFinite(v) ? Math.max(0, Math.min(1, v)) : other;
  const two = (v) => Array.isArray(v) && v.length === 2 && v.every(Number.isFinite);
  state.nodes = part(view.nodes, state.nodes);
  state.links = part(view.links, state.links);
  state.pinned = every(view.pinned);
  const free = new Set(state.pinned);
  const group = (g) => ({ name: String(g?.name ?? "group").slice(0, 80), nodes: every(g?.nodes).filter((i) => free.delete(i)) });
  state.groups = list(view.groups).map(group).filter((g) => g.nodes.length);
  const known = (some, fits) => new Map(pairs(some).map(([id, v]) => [node(id), v]).filter(([i, v]) => i !== undefined && fits(v)));
  state.labels = known(view.labels, (v) => typeof v === "string" && v.trim());
  state.moved = known(view.moved, two);
  state.boxes = new Map(pairs(view.boxes).filter(([, v]) => two(v)));
  state.selected = view.selected === null || view.selected === undefined ? null : node(view.selected) ?? null;
  marked.clear();
  return lost.size;
}
byId("save").addEventListener("click", () => {
  const a = make("a"), url = URL.createObjectURL(new Blob([JSON.stringify(written(), null, 1)], { type: "application/json" }));
  a.href = url;
  a.download = "graph-view.json";
  a.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
});
byId("open").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", async () => {
  const file = byId("file").files[0];
  byId("file").value = "";
  if (!file) return;
  let text = "";
  try {
    const lost = readBack(JSON.parse(await file.text()));
    byId("sub").hidden = state.pinned.length === 0;
    size();
    refresh();
    drawPinned();
    drawPanel();
    text = lost ? `View opened; ${lost} of its nodes are not in this graph.` : "";
  } catch (error) { text = `This file cannot be opened: ${error.message}`; }
  if (text) panel.prepend(make("p", "", text));
  say(text || "view opened");
});

// ---- mouse, touch and keys
const at = (e) => { const box = view.getBoundingClientRect(); return [e.clientX - box.left, e.clientY - box.top]; };
let drag = null, pinch = 0;
view.addEventListener("pointerdown", (e) => {
  if (e.button !== 0) return;
  const i = nodeAt(...at(e));
  tip.hidden = true;
  drag = { i, x: e.clientX, y: e.clientY, left: scroll.scrollLeft, top: scroll.scrollTop, touch: e.pointerType === "touch", far: false };
  if (i !== null) Object.assign(drag, { fromX: xs[i], fromY: ys[i], moved: state.moved.get(i) || [0, 0] });
  view.setPointerCapture(e.pointerId);
});
view.addEventListener("pointermove", (e) => {
  if (!drag) { if (e.pointerType !== "touch") hover(nodeAt(...at(e)), e); return; }
  const dx = e.clientX - drag.x, dy = e.clientY - drag.y;
  if (!drag.far && Math.hypot(dx, dy) < 4) return;
  if (!drag.far) { drag.far = true; held = drag.i; redraw(held !== null); }
  scroll.classList.add("moving");
  if (drag.i !== null) {
    xs[drag.i] = drag.fromX + dx / scale;
    ys[drag.i] = drag.fromY + dy / scale;
    state.moved.set(drag.i, [drag.moved[0] + dx / scale, drag.moved[1] + dy / scale]);
    redraw(false);
  } else if (!drag.touch) { scroll.scrollLeft = drag.left - dx; scroll.scrollTop = drag.top - dy; }
});
function letGo() {
  drag = null;
  scroll.classList.remove("moving");
  if (held !== null) { held = null; redraw(); }
}
view.addEventListener("pointerup", () => {
  if (drag && !drag.far && !pinch) choose(drag.i);
  letGo();
});
view.addEventListener("pointercancel", letGo);
view.addEventListener("pointerleave", (e) => { if (!drag) hover(null, e); });
view.addEventListener("dblclick", (e) => { const i = nodeAt(...at(e)); if (i !== null) togglePin(i); });
view.addEventListener("wheel", (e) => {
  if (e.shiftKey || Math.abs(e.deltaX) > Math.abs(e.deltaY)) return;  // the browser scrolls
  if (!e.ctrlKey && e.deltaY > 0 && scale <= least() + 1e-6) return;  // all is seen: the page scrolls on
  e.preventDefault();
  zoom(Math.exp(-e.deltaY * (e.deltaMode === 1 ? .05 : e.ctrlKey ? .01 : .0016)), ...at(e));
}, { passive: false });
const apart = (e) => Math.hypot(e.touches[0].clientX - e.touches[1].clientX, e.touches[0].clientY - e.touches[1].clientY);
view.addEventListener("touchstart", (e) => { pinch = e.touches.length === 2 ? apart(e) : 0; }, { passive: true });
view.addEventListener("touchmove", (e) => {
  if (pinch && e.touches.length === 2) {
    const now = apart(e), [a, b] = e.touches;
    zoom(now / pinch, ...at({ clientX: (a.clientX + b.clientX) / 2, clientY: (a.clientY + b.clientY) / 2 }));
    pinch = now;
    drag = null;
  } else if (!drag || drag.i === null) return;
  if (e.cancelable) e.preventDefault();
}, { passive: false });
scroll.addEventListener("scroll", () => redraw(false));
byId("in").addEventListener("click", () => zoom(1.4));
byId("out").addEventListener("click", () => zoom(1 / 1.4));
byId("fit").addEventListener("click", fitView);
byId("help").addEventListener("click", () => byId("keys").showModal());
byId("close").addEventListener("click", () => byId("keys").close());
for (const [id, part] of [["node-range", "nodes"], ["link-range", "links"]]) {
  byId(id).addEventListener("input", (e) => { state[part] = Number(e.target.value) / 1000; refresh(); });
}
byId("search").addEventListener("input", drawPanel);
byId("search").addEventListener("keydown", (e) => {
  if (e.key !== "Enter" || drawFound.first === undefined || !e.target.value.trim()) return;
  choose(drawFound.first);
  scroll.focus();
});
const actions = {
  "/": () => { byId("search").focus(); byId("search").select(); },
  "?": () => byId("keys").showModal(),
  "g": () => { if (state.pinned.length) byId("group-name").focus(); },
  "+": () => zoom(1.4), "=": () => zoom(1.4), "-": () => zoom(1 / 1.4), "0": fitView,
};
document.addEventListener("keydown", (e) => {
  if (byId("keys").open || e.ctrlKey || e.metaKey || e.altKey) return;
  if (e.key === "Escape") {
    hover(null, e);
    choose(null);
    scroll.focus();
    return;
  }
  if (/^(text|search|range)$/.test(e.target.type)) return;
  const inGraph = e.target === scroll || e.target === document.body;
  if (inGraph && e.key.startsWith("Arrow")) walk(e.key);
  else if (inGraph && e.key === "Enter" && state.selected !== null) togglePin(state.selected);
  else if (actions[e.key.toLowerCase()]) actions[e.key.toLowerCase()]();
  else return;
  e.preventDefault();
});

// ---- the start
function drawHead() {
  const all = tokens.length && /^<[^>]*>$/.test(tokens[0]) ? tokens.slice(1) : tokens;
  const prompt = visible(all.join("")).trim(), end = [...prompt].slice(-120).join("");
  const text = end === prompt ? prompt : `\u2026 ${end.trimStart()}`, answer = byId("answer");
  byId("title").append(make("bdi", "", visible(data.title) || text));
  if (data.title) { answer.append(make("bdi", "", text), " "); }
  if (asked.length) answer.append("\u2192 ");
  asked.slice(0, 3).forEach((i, k) => {
    const one = make("span", k ? "other" : "");
    one.append(make(k ? "bdi" : "b", "", nameOf(i)));
    one.append(make("small", "", answerOf(i)));
    answer.append(one);
  });
  if (links.all > M) byId("left-out").textContent = `The page holds the ${count(M)} strongest of ${count(links.all)} links.`;
  const about = data.about.length ? [["About this graph", [["", ""], ...data.about]]] : [];
  for (const [title, some] of [...data.notes, ...about]) {
    const section = make("section");
    section.append(heading(title), table(some[0] || [], some.slice(1)));
    byId("notes").append(section);
  }
}
function firstView() {
  const last = nodeRank.order[NODES];
  if (last !== undefined) state.nodes = nodeRank.before[last];
  const free = new Set(everyNode);  // a node is in one group
  state.groups = data.groups.map(([name, some]) => ({ name, nodes: some.filter((i) => free.delete(i)) })).filter((g) => g.nodes.length);
  state.pinned = state.groups.flatMap((g) => g.nodes);
  if (state.pinned.length && asked.length) state.pinned.push(asked[0]);
  byId("sub").hidden = state.pinned.length === 0;
  chooseShown();
  let seen = 0;
  for (const l of linkRank.order) {
    if (shown[links.source[l]] && shown[links.target[l]] && ++seen > LINKS) { state.links = linkRank.before[l]; break; }
  }
}
function arrange() {
  byId("stage").style.setProperty("--top", `${document.querySelector("header").offsetHeight}px`);
  size();
  refresh();
  if (state.pinned.length) placeBoxes(byId("boxes"));
}
readTheme();
drawHead();
firstView();
arrange();
fitView();
drawPinned();
drawPanel();
new ResizeObserver(() => { if (scroll.clientWidth !== width || scroll.clientHeight !== height) arrange(); }).observe(scroll);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  readTheme();
  redraw();
  if (boxes.length) drawBetween();
});
