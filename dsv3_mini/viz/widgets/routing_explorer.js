// The routing explorer: a text's way through the experts. Hovering, stepping and playing happen here and ask nobody.
// Reads from its model: samples, typed (texts: name, words, chosen, gates, tint), shares, often, domains, shape, ramp, and
// where the reader stands: text, token, layer, expert; note. Sends {read: text} where there is a kernel; a page saved as
// HTML has none, and leaves that row out.

const PACES = { slow: 3, steady: 10, fast: 30 }; // tokens a second
const GLOW = 400; // milliseconds in which the halo of a visited expert fades
const WIDE = 820, LEFT = 78, ROW = 58, TILE = 36, GAP = 12; // of the picture, in its own units
const EDGE = "#BDBDBD", IDLE = "#F4F4F4", QUIET = "#5F5F5F", MARK = "#000000", LINK = "#CC79A7"; // no domain has these
const SANS = "system-ui, sans-serif";
const STYLE = `
.dsv3-routing { background: white; color: black; padding: 8px; font: 15px/1.5 system-ui, sans-serif; max-width: 860px; }
.dsv3-routing .row { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin-bottom: 8px; }
.dsv3-routing button, .dsv3-routing select, .dsv3-routing textarea { font: inherit; padding: 2px 8px; border: 1px solid #767676; border-radius: 4px; background: white; color: black; }
.dsv3-routing :focus-visible { outline: 3px solid #0072B2; outline-offset: 1px; }
.dsv3-routing textarea { flex: 1 1 320px; min-height: 2.6em; box-sizing: border-box; }
.dsv3-routing .place { flex: 1 1 160px; padding: 0; accent-color: #0072B2; }
.dsv3-routing .text { position: relative; min-height: 5em; max-height: 17em; overflow-y: auto; white-space: pre-wrap; overflow-wrap: anywhere; font: 15px/1.6 ui-monospace, monospace; }
.dsv3-routing .text span { cursor: pointer; border-radius: 3px; }
.dsv3-routing .text.looking span { color: #8A8A8A; }
.dsv3-routing .text.looking span.visits { color: black; box-shadow: inset 0 -4px #CC79A7; }
.dsv3-routing .text span.here, .dsv3-routing .text.looking span.here { background: black !important; color: white; }
.dsv3-routing .text span.peek { outline: 2px solid black; }
.dsv3-routing canvas { display: block; width: 100%; height: auto; margin-top: 8px; }
.dsv3-routing .key { margin: 6px 0 0; color: #5F5F5F; }
.dsv3-routing .key span { white-space: nowrap; }
.dsv3-routing .key i { display: inline-block; width: 12px; height: 12px; margin: 0 4px 0 10px; vertical-align: -1px; }
.dsv3-routing .said { min-height: 4.5em; margin: 2px 0 0; }
.dsv3-routing .note { color: #A34700; margin: 0 0 6px; }
`;

const visible = (text) => text.replaceAll("\n", "¶");
const within = (value, least, most) => Math.max(least, Math.min(most, value));

function make(name, attributes = {}, text = "") {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

function choice(label, name) {
  const field = make("select", { class: name });
  const row = make("label", {}, `${label} `);
  row.append(field);
  return [row, field];
}

/** Where everything stands in the picture: the layers from below, and under them one layer's experts for all tokens. */
function makeLayout({ experts, groups, sparse }) {
  const lane = within(Math.floor(400 / experts), 3, 12);
  const size = (WIDE - LEFT - GAP * (groups - 1)) / experts;
  const top = sparse * ROW + 22; // of the roll
  return {
    lane, top, wide: 0.92 * size, high: top + experts * lane + 4,
    line: (row) => (sparse - 1 - row) * ROW + 3,
    left: (expert) => LEFT + expert * size + GAP * Math.floor(expert / (experts / groups)),
    column: (count) => Math.min(16, (WIDE - LEFT) / count),
  };
}

function render({ model, el }) {
  const shape = model.get("shape"), ramp = model.get("ramp"), domains = model.get("domains");
  const shares = model.get("shares"), often = model.get("often");
  const { experts, groups, dense, sparse } = shape;
  const layout = makeLayout(shape);
  const still = globalThis.matchMedia?.("(prefers-reduced-motion: reduce)").matches ?? false;
  const live = typeof model.send === "function";

  // ---- the page ----
  const root = make("div", { class: "dsv3-routing", role: "group", "aria-label": "Routing explorer: a text and the experts that its tokens visit" });
  const field = make("textarea", { rows: 2, placeholder: "type or paste, then Enter (Shift+Enter: a new line)" });
  const ask = make("label", { class: "row" }, "Your text");
  ask.append(field);
  const [textRow, textField] = choice("Text", "texts");
  const [layerRow, layerField] = choice("Layer", "layers");
  const [expertRow, expertField] = choice("Expert", "experts");
  const back = make("button", { type: "button", "aria-label": "One token back" }, "◀");
  const play = make("button", { type: "button", class: "play" });
  const forth = make("button", { type: "button", "aria-label": "One token on" }, "▶");
  const place = make("input", { type: "range", class: "place", min: 0, max: 0, value: 0, "aria-label": "Token" });
  const pace = make("select", { class: "pace", "aria-label": "Pace" });
  for (const name of Object.keys(PACES)) pace.append(make("option", { value: name }, name));
  pace.value = "steady";
  for (let row = 0; row < sparse; row++) layerField.append(make("option", { value: row }, String(dense + row)));
  expertField.append(make("option", { value: -1 }, "none"));
  for (let expert = 0; expert < experts; expert++) expertField.append(make("option", { value: expert }, String(expert)));
  const choices = make("div", { class: "row" }), controls = make("div", { class: "row" });
  choices.append(textRow, layerRow, expertRow);
  controls.append(back, play, forth, place, pace);
  const page = make("div", { class: "text" });
  const canvas = make("canvas", { role: "img", tabindex: 0, "aria-label": "The marked token's experts in every layer, and one layer's experts for all tokens. Arrow keys: left and right for tokens, up and down for layers; space plays." });
  const key = make("p", { class: "key" }, "A tile's colour is the gate value, light to dark. Bars and tints: whom the experts serve.");
  for (const [name, colour] of domains) {
    const entry = make("span");
    entry.append(make("i", { style: `background: ${colour}` }), name);
    key.append(entry, " ");
  }
  const said = make("p", { class: "said" });
  const note = make("p", { class: "note", role: "alert" });
  root.append(make("style", {}, STYLE));
  if (live) root.append(ask, note);
  root.append(choices, controls, page, canvas, key, said);
  el.replaceChildren(root);

  const ratio = Math.min(2, globalThis.devicePixelRatio || 1);
  canvas.width = WIDE * ratio;
  canvas.height = layout.high * ratio;
  const pen = canvas.getContext("2d");
  const sheet = document.createElement("canvas"); // one layer's experts for all tokens: drawn when text or layer changes

  // ---- where the reader stands ----
  let current = -1, at = 0, layer = 0, pinned = -1; // text, token, row of the layer, expert of that layer
  let peek = -1, hover = null; // the token and the {row, expert} under the mouse
  let playing = false, position = 0, last = 0, beat = 0, due = 0, keeping = false, asked = "";
  let spans = [], most = 1; // most: the largest gate value of the text
  let marked = null, tops = null, tall = 0, view = 0, told = 0; // the words' places, what of them is seen; when last described
  const glow = new Float32Array(sparse * experts);

  const texts = () => {
    const typed = model.get("typed");
    return typed.words?.length ? [...model.get("samples"), typed] : model.get("samples");
  };
  const text = () => texts()[current];
  const shown = () => (peek >= 0 ? peek : at);
  const looked = () => hover ?? (pinned >= 0 ? { row: layer, expert: pinned } : null);

  // ---- drawing ----
  function shade(gate) {
    return ramp[Math.round(within(gate / most, 0, 1) * (ramp.length - 1))];
  }

  function drawSheet() {
    const { words, chosen, gates } = text(), column = layout.column(words.length);
    sheet.width = WIDE * ratio;
    sheet.height = experts * layout.lane * ratio;
    const ink = sheet.getContext("2d");
    ink.setTransform(ratio, 0, 0, ratio, 0, 0);
    ink.fillStyle = IDLE;
    ink.fillRect(LEFT, 0, words.length * column, experts * layout.lane);
    words.forEach((_, token) => chosen[token][layer].forEach((expert, slot) => {
      ink.fillStyle = shade(gates[token][layer][slot]);
      ink.fillRect(LEFT + token * column, expert * layout.lane, Math.max(1, column - (column > 4 ? 1 : 0)), layout.lane - 1);
    }));
    ink.fillStyle = QUIET;
    ink.font = `12px ${SANS}`;
    ink.textAlign = "right";
    ink.textBaseline = "middle";
    for (let group = 0; group < groups; group++) {
      const expert = group * (experts / groups);
      ink.fillText(`expert ${expert}`, LEFT - 6, (expert + 0.5) * layout.lane);
      if (group) ink.fillRect(LEFT, expert * layout.lane - 1, words.length * column, 1);
    }
  }

  function drawTile(row, expert, gate) {
    const x = layout.left(expert), y = layout.line(row), wide = layout.wide;
    pen.fillStyle = gate === undefined ? IDLE : shade(gate);
    pen.fillRect(x, y, wide, TILE);
    pen.strokeStyle = EDGE;
    pen.lineWidth = 1;
    pen.strokeRect(x + 0.5, y + 0.5, wide - 1, TILE - 1);
    if (wide >= 16) {
      pen.fillStyle = gate === undefined ? QUIET : gate / most > 0.4 ? "white" : "black";
      pen.textAlign = "center";
      pen.font = `13px ${SANS}`;
      const roomy = gate !== undefined && wide >= 26;
      pen.fillText(String(expert), x + wide / 2, y + (roomy ? 11 : TILE / 2));
      if (roomy) pen.fillText(gate.toFixed(2), x + wide / 2, y + 26);
    }
    let from = x;
    shares[row][expert].forEach((share, domain) => {
      pen.fillStyle = domains[domain][1];
      pen.fillRect(from, y + TILE + 3, share * wide, 8);
      from += share * wide;
    });
    const halo = glow[row * experts + expert];
    if (halo > 0.02) {
      pen.globalAlpha = halo;
      pen.strokeStyle = MARK;
      pen.lineWidth = 4;
      pen.strokeRect(x - 1, y - 1, wide + 2, TILE + 2);
      pen.globalAlpha = 1;
    }
  }

  function paint() {
    const { words, chosen, gates } = text(), step = shown(), column = layout.column(words.length), look = looked();
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, WIDE, layout.high);
    pen.textBaseline = "middle";
    for (let row = 0; row < sparse; row++) {
      pen.fillStyle = row === layer ? "black" : QUIET;
      pen.font = `${row === layer ? "bold " : ""}15px ${SANS}`;
      pen.textAlign = "left";
      pen.fillText(`${row === layer ? "▸" : " "}layer ${dense + row}`, 0, layout.line(row) + TILE / 2);
      const weight = new Map(chosen[step][row].map((expert, slot) => [expert, gates[step][row][slot]]));
      for (let expert = 0; expert < experts; expert++) drawTile(row, expert, weight.get(expert));
    }
    pen.strokeStyle = LINK;
    pen.lineWidth = 3;
    if (look) pen.strokeRect(layout.left(look.expert), layout.line(look.row), layout.wide, TILE);
    pen.fillStyle = "black";
    pen.textAlign = "left";
    pen.font = `13px ${SANS}`;
    pen.fillText(`Layer ${dense + layer}: which experts (rows) each token (columns) visits`, LEFT, layout.top - 10);
    pen.textAlign = "right";
    pen.fillText(`${PACES[pace.value]} tokens a second`, WIDE, layout.top - 10);
    pen.drawImage(sheet, 0, layout.top, WIDE, experts * layout.lane);
    if (look && look.row === layer) {
      pen.lineWidth = 2;
      pen.strokeRect(LEFT, layout.top + look.expert * layout.lane - 1, words.length * column, layout.lane + 1);
    }
    pen.strokeStyle = MARK;
    pen.lineWidth = 2;
    const head = playing && peek < 0 && !still ? within(position, 0, words.length - 1) : step;
    pen.strokeRect(LEFT + head * column - 1, layout.top - 1, Math.max(3, column) + 1, experts * layout.lane + 1);
  }

  function schedule() {
    due ||= requestAnimationFrame(() => { due = 0; paint(); });
  }

  // ---- the page's words ----
  function writePage() {
    page.replaceChildren();
    spans = text().words.map((word, token) => {
      const span = make("span", {}, word.replaceAll("\n", "¶\n"));
      span.dataset.token = token;
      page.append(span);
      return span;
    });
    most = Math.max(1e-9, ...text().gates.map((rows) => Math.max(...rows.map((row) => row[0]))));
    page.scrollTop = view = 0;
    marked = tops = null;
  }

  function tintPage() {
    text().tint.forEach((rows, token) => {
      const [domain, strength] = rows[layer];
      const alpha = Math.round(255 * strength).toString(16).padStart(2, "0");
      spans[token].style.background = strength > 0 ? domains[domain][1] + alpha : "";
    });
  }

  /** Underline the tokens that visit the expert that is looked at, and let the others step back. */
  function markVisits() {
    const look = looked();
    page.classList.toggle("looking", look !== null);
    text().chosen.forEach((rows, token) => {
      spans[token].classList.toggle("visits", look !== null && rows[look.row].includes(look.expert));
    });
  }

  function describe() {
    const { words, chosen, gates } = text(), step = shown(), look = looked();
    const visits = chosen[step].map((row, i) => `layer ${dense + i}: ${row.map((expert, slot) => (i === layer ? `${expert} (${gates[step][i][slot].toFixed(2)})` : expert)).join(", ")}`);
    let line = `Token ${step + 1} of ${words.length}, “${visible(words[step])}”. Experts, largest gate value first: ${visits.join("; ")}.`;
    if (look) {
      const count = chosen.filter((rows) => rows[look.row].includes(look.expert)).length;
      const serves = shares[look.row][look.expert].map((share, i) => `${domains[i][0]} ${Math.round(100 * share)}%`).join(", ");
      const favourites = often[look.row][look.expert].map((word) => `“${visible(word)}”`).join(" ");
      line += ` Expert ${look.expert} of layer ${dense + look.row}: visited by ${count} tokens of this text; serves ${serves}`
        + (favourites ? `; often gets ${favourites}.` : ".");
    }
    return line;
  }

  /** What moves from token to token while it plays. No layout is asked for, but once for the places of a text that scrolls. */
  function follow() {
    marked?.classList.remove("here");
    marked = spans[at];
    marked.classList.add("here");
    if (!tops) {
      tall = page.clientHeight;
      tops = page.scrollHeight > tall + 1 ? spans.map((span) => span.offsetTop) : [];
    }
    if (tops.length && (tops[at] < view || tops[at] > view + tall - 30)) page.scrollTop = view = Math.max(0, tops[at] - 40);
    place.value = at;
    place.setAttribute("aria-valuetext", `token ${at + 1} of ${spans.length}`);
  }

  /** What changes under the mouse: no layout is asked for, so that the answer fits in a frame. */
  function light() {
    spans.forEach((span, token) => span.classList.toggle("peek", token === peek));
    markVisits();
    said.textContent = describe();
    schedule();
  }

  function update() {
    follow();
    place.max = spans.length - 1;
    place.value = at;
    textField.value = current;
    layerField.value = layer;
    expertField.value = pinned;
    play.textContent = playing ? "❚❚ pause" : at >= spans.length - 1 ? "↺ again" : "► play";
    said.setAttribute("aria-live", playing ? "off" : "polite"); // else a screen reader would read every token out
    note.textContent = model.get("note");
    light();
  }

  // ---- moving about ----
  function stop() {
    playing = false;
    cancelAnimationFrame(beat);
    glow.fill(0);
  }

  /** Tell Python where the reader stands. */
  function keep() {
    keeping = true; // else each value set would be taken for a move by Python
    model.set("text", current);
    model.set("token", at);
    model.set("layer", dense + layer);
    model.set("expert", pinned);
    model.save_changes();
    keeping = false;
  }

  function open(index) {
    current = within(index, 0, texts().length - 1);
    peek = -1;
    hover = null;
    writePage();
    at = within(at, 0, spans.length - 1);
    redraw();
  }

  function redraw() {
    tintPage();
    drawSheet();
  }

  function go(token) {
    stop();
    at = within(token, 0, spans.length - 1);
    update();
    keep();
  }

  function toLayer(row) {
    layer = within(row, 0, sparse - 1);
    redraw();
    update();
    keep();
  }

  function pin(row, expert) {
    pinned = row === layer && expert === pinned ? -1 : expert;
    if (row !== layer) layer = row;
    redraw();
    update();
    keep();
  }

  function arrive(token) {
    at = token;
    if (!still) text().chosen[at].forEach((row, i) => row.forEach((expert) => { glow[i * experts + expert] = 1; }));
    follow();
  }

  function tick(now) {
    const passed = within(now - last, 0, 100);
    last = now;
    if (peek < 0) { // a token under the mouse holds the film
      position += (passed / 1000) * PACES[pace.value];
      for (let i = 0; i < glow.length; i++) glow[i] = Math.max(0, glow[i] - passed / GLOW);
      const token = Math.floor(position);
      if (token >= spans.length) { go(spans.length - 1); return; }
      if (token !== at) arrive(token);
      if (now - told > 250) { // faster than one can read
        told = now;
        said.textContent = describe();
      }
    }
    paint();
    beat = requestAnimationFrame(tick);
  }

  function start() {
    stop();
    playing = true;
    arrive(at >= spans.length - 1 ? 0 : at);
    position = at;
    last = performance.now();
    beat = requestAnimationFrame(tick);
    update();
  }

  function toggle() {
    if (playing) go(at);
    else start();
  }

  function listTexts() {
    textField.replaceChildren(...texts().map(({ name }, index) => make("option", { value: index }, name)));
  }

  function moved() { // by Python
    if (keeping) return;
    const [wanted, token] = [model.get("text"), model.get("token")];
    const row = within(model.get("layer") - dense, 0, sparse - 1), expert = model.get("expert");
    if (wanted === current && token === at && row === layer && expert === pinned) return;
    stop();
    [layer, pinned] = [row, expert];
    at = Math.max(0, token);
    open(wanted);
    update();
  }

  function typed() { // another text has come
    listTexts();
    stop();
    at = Math.max(0, model.get("token"));
    open(model.get("text"));
    update();
  }

  function send() {
    if (!field.value.trim() || field.value === asked) return;
    asked = field.value;
    model.send({ read: asked });
  }

  /** What of the picture lies under the mouse. */
  function under(event) {
    const box = canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) * WIDE) / box.width, y = ((event.clientY - box.top) * layout.high) / box.height;
    const column = layout.column(spans.length);
    const token = Math.floor((x - LEFT) / column), lane = Math.floor((y - layout.top) / layout.lane);
    if (lane >= 0 && lane < experts && token >= 0 && token < spans.length) return { token, row: layer, expert: lane };
    for (let row = 0; row < sparse; row++) {
      if (y < layout.line(row) || y > layout.line(row) + TILE + 11) continue;
      for (let expert = 0; expert < experts; expert++) {
        if (x >= layout.left(expert) && x <= layout.left(expert) + layout.wide) return { token: -1, row, expert };
      }
    }
    return null;
  }

  function point(token, look) {
    if (token === peek && look?.row === hover?.row && look?.expert === hover?.expert) return;
    peek = token;
    hover = look;
    light();
  }

  back.addEventListener("click", () => go(at - 1));
  forth.addEventListener("click", () => go(at + 1));
  play.addEventListener("click", toggle);
  place.addEventListener("input", () => go(Number(place.value)));
  pace.addEventListener("change", start);
  textField.addEventListener("change", () => { stop(); at = 0; open(Number(textField.value)); update(); keep(); });
  layerField.addEventListener("change", () => toLayer(Number(layerField.value)));
  expertField.addEventListener("change", () => { pinned = Number(expertField.value); update(); keep(); });
  field.addEventListener("change", send);
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    send();
  });
  page.addEventListener("mouseover", (event) => { if (event.target.dataset.token) point(Number(event.target.dataset.token), null); });
  page.addEventListener("mouseleave", () => point(-1, null));
  page.addEventListener("scroll", () => { view = page.scrollTop; });
  const resized = new ResizeObserver(() => { tops = null; });
  resized.observe(page);
  page.addEventListener("click", (event) => { if (event.target.dataset.token) go(Number(event.target.dataset.token)); });
  canvas.addEventListener("mousemove", (event) => {
    const found = under(event);
    canvas.style.cursor = found ? "pointer" : "";
    point(found ? found.token : -1, found && { row: found.row, expert: found.expert });
  });
  canvas.addEventListener("mouseleave", () => point(-1, null));
  canvas.addEventListener("click", (event) => {
    const found = under(event);
    if (found && found.token >= 0) go(found.token);
    else if (found) pin(found.row, found.expert);
  });
  root.addEventListener("keydown", (event) => {
    event.stopPropagation(); // JupyterLab takes arrow keys and letters for its own
    if (event.target.closest("input, select, textarea")) return;
    const moves = {
      ArrowLeft: () => go(at - 1), ArrowRight: () => go(at + 1), Home: () => go(0), End: () => go(spans.length - 1),
      ArrowUp: () => toLayer(layer + 1), ArrowDown: () => toLayer(layer - 1),
    };
    if (!event.target.closest("button")) moves[" "] = toggle; // on a button, space presses it
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault(); // the page would scroll
    moves[event.key]();
  });

  layer = within(model.get("layer") - dense, 0, sparse - 1);
  pinned = model.get("expert");
  at = Math.max(0, model.get("token"));
  listTexts();
  open(model.get("text"));
  update();
  const events = { "change:typed": typed, "change:text": moved, "change:token": moved, "change:layer": moved, "change:expert": moved, "change:note": update };
  for (const [event, act] of Object.entries(events)) model.on(event, act);
  return () => {
    stop();
    cancelAnimationFrame(due);
    resized.disconnect();
    for (const [event, act] of Object.entries(events)) model.off(event, act);
  };
}

export default { render };
