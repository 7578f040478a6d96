// ---- drawing: all links on one canvas, and above it nodes, text and the links that matter now.
// The lower one is larger than the view and moves with it, for thousands of links are slow to draw
let theme = {}, hovered = null, lit = null, held = null, stale = true, drawn = null, settle = 0;
function readTheme() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["card", "ink", "soft", "line", "heat", "accent"]) theme[name] = style.getPropertyValue(`--${name}`).trim();
}
const zoomed = () => scale < 1 ? Math.max(.4, scale) : Math.min(1.7, Math.sqrt(scale));
const strongest = Math.max(1e-9, ...nodeRank.order.slice(0, 1).map((i) => influence[i]));
const radiusOf = (i) => (3.6 + 5 * Math.sqrt(Math.min(1, influence[i] / strongest))) * zoomed();
const halfHeight = (i) => isAsked(i) ? 11 * Math.max(.75, Math.min(1, zoomed())) : radiusOf(i);
const halfWidth = (i) => isAsked(i) ? boxWidth[i] * Math.min(1, zoomed()) / 2 : radiusOf(i);
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
  const by = scale / drawn.scale, whole = (1 + 2 * SPARE) * by;
  const x = LEFT - scroll.scrollLeft + (drawn.left - LEFT - width * SPARE) * by;
  const y = -scroll.scrollTop + (drawn.top - height * SPARE) * by;
  if (by > 1.6 || x > LEFT || y > 0 || x + width * whole < width || y + height * whole < height) return false;
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
function emphasised() {  // the strongest links of what is pointed at, else chosen, else between single pins
  if (lit !== null) return [lit];
  const i = hovered ?? state.selected;
  const both = (l) => shown[links.source[l]] && shown[links.target[l]];
  if (i !== null) return [...incoming[i].slice(0, 30), ...outgoing[i].slice(0, 30)].filter(both);
  const grouped = new Set(state.groups.flatMap((g) => g.nodes));  // their links are summed below
  const pins = new Set(state.pinned.filter((p) => !grouped.has(p)));
  return [...pins].flatMap((p) => incoming[p].filter((l) => pins.has(links.source[l])).slice(0, 10));
}
function shape(pen, i) {
  const x = px[i], y = py[i], r = radiusOf(i), kind = kindOf(i);
  pen.beginPath();
  if (isAsked(i)) pen.roundRect(x - halfWidth(i), y - halfHeight(i), 2 * halfWidth(i), 2 * halfHeight(i), 4);
  else if (kind === "token") pen.rect(x - r * .85, y - r * .85, 1.7 * r, 1.7 * r);
  else if (kind === "error") {
    for (const [dx, dy] of [[0, -r], [r, 0], [0, r], [-r, 0]]) pen.lineTo(x + dx, y + dy);
    pen.closePath();
  } else pen.arc(x, y, r, 0, 7);
}
function drawNodes() {
  const pen = pens.nodes, strong = emphasised(), focus = hovered ?? state.selected;
  const near = new Set([focus, ...strong.flatMap((l) => [links.source[l], links.target[l]])]), pins = new Set(state.pinned);
  const dim = strong.length > 0 || focus !== null;
  byId("links").classList.toggle("faint", dim);
  pen.clearRect(0, 0, width, height);
  pen.lineCap = "round";
  const ofHeld = (l) => links.source[l] === held || links.target[l] === held;
  if (held !== null) for (const bucket of buckets) stroke(pen, bucket, bucket.list.filter(ofHeld));
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
      if (zoomed() < Math.min(.7, fitting)) continue;
      pen.globalAlpha = faded ? .5 : 1;
      pen.fillStyle = theme.ink;
      pen.textAlign = "center";
      pen.fillText(clipped(pen, targetText(i), 2 * halfWidth(i) - 6), px[i], py[i] + .5);
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
    const easy = isAsked(i) ? 0 : 4;  // a small node may be missed by so much
    const off = Math.max(Math.abs(x - px[i]) / (halfWidth(i) + easy), Math.abs(y - py[i]) / (halfHeight(i) + easy));
    if (off < least) { least = off; best = i; }
  }
  return best;
}
function columnAt(x) {
  const at = (x - LEFT + scroll.scrollLeft) / scale;
  return columns.find((c) => c.at <= at && at < c.at + c.size);
}

// ---- the view: zoom and scroll
const least = () => Math.min(1, Math.max(.15, Math.min((width - LEFT) / world.w, (height - BOTTOM) / world.h)));
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
  scale = fitting;
  stretch();
  scroll.scrollLeft = space.offsetWidth;  // the answer is at the end of a long prompt
  redraw();
}
function refresh() {
  const whole = Math.abs(scale - fitting) < 1e-6;  // then all stays in view
  chooseShown();
  layOut();
  scale = whole ? fitting : Math.max(scale, least());
  stretch();
  redraw();
}
function reveal(i) {
  const x = LEFT + xs[i] * scale - scroll.scrollLeft, y = ys[i] * scale - scroll.scrollTop;
  if (x < LEFT + 20 || x > width - 40) scroll.scrollLeft += x - width / 2;
  if (y < 14 || y > height - BOTTOM - 14) scroll.scrollTop += y - height / 2;
}
