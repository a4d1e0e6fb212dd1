// The live writer: tokens appear one by one, and each one's experts light up layer by layer.
// Reads from its model: steps (a token each: text, given, chosen, gates, next), writing, run, cursor, note, shape, ramp.
// Sends {write: opening} where there is a kernel; a page saved as HTML has none, and leaves that row out.

const SVG = "http://www.w3.org/2000/svg";
const PACES = { slow: 1200, steady: 280, fast: 80 }; // milliseconds for each token
const WIDE = 800, LEFT = 84, ROW = 46, TILE = 28; // of the stage, in its own units
const STYLE = `
.dsv3-writer { background: white; color: black; padding: 8px; font: 15px/1.5 system-ui, sans-serif; max-width: 860px; }
.dsv3-writer .row { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin-bottom: 8px; }
.dsv3-writer button, .dsv3-writer select, .dsv3-writer input { font: inherit; padding: 2px 8px; }
.dsv3-writer button, .dsv3-writer select, .dsv3-writer input[type=text] { border: 1px solid #767676; border-radius: 4px; background: white; color: black; }
.dsv3-writer :focus-visible { outline: 3px solid #0072B2; outline-offset: 1px; }
.dsv3-writer .opening { flex: 1 1 260px; }
.dsv3-writer .place { flex: 1 1 160px; padding: 0; accent-color: #0072B2; }
.dsv3-writer .text { min-height: 9em; white-space: pre-wrap; overflow-wrap: anywhere; font: 15px/1.6 ui-monospace, monospace; }
.dsv3-writer .text span { cursor: pointer; border-radius: 3px; }
.dsv3-writer .text span.given { color: #5F5F5F; }
.dsv3-writer .text span.here { background: #E69F00; color: black; }
.dsv3-writer .text span.peek { outline: 2px solid #0072B2; }
.dsv3-writer svg { display: block; width: 100%; height: auto; }
.dsv3-writer svg text { font: 14px system-ui, sans-serif; }
.dsv3-writer svg .tile { transition: fill .12s; }
.dsv3-writer .key { margin: 6px 0 0; color: #5F5F5F; }
.dsv3-writer .said { min-height: 3em; margin: 2px 0 0; }
.dsv3-writer .note { color: #A34700; margin: 0; }
`;

const visible = (text) => text.replaceAll("\n", "¶");

function make(name, attributes = {}, text = "") {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

function draw(name, attributes, text = "") {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

/** The layers from below: the dense ones as a bar, each sparse one as a row of experts, the next token at the top. */
function makeStage(shape, ramp) {
  const { experts, groups, dense, sparse } = shape;
  const height = (sparse + 2) * ROW;
  const svg = draw("svg", { viewBox: `0 0 ${WIDE} ${height}`, role: "img", "aria-label": "The experts of the marked token" });
  const line = (row) => height - (row + 1) * ROW + 6; // upper edge of a row, counted from below
  const label = (row, text) => svg.append(draw("text", { x: 0, y: line(row) + 19 }, text));

  label(0, dense > 1 ? `layers 0-${dense - 1}` : "layer 0");
  const bar = draw("rect", { x: LEFT, y: line(0), width: WIDE - LEFT, height: TILE, class: "tile", stroke: "#BDBDBD", fill: "#F4F4F4" });
  svg.append(bar, draw("text", { x: (WIDE + LEFT) / 2, y: line(0) + 19, "text-anchor": "middle" }, "dense: every token passes through all of it"));

  const size = (WIDE - LEFT - 14 * (groups - 1)) / experts;
  const tiles = [];
  for (let row = 0; row < sparse; row++) {
    label(row + 1, `layer ${dense + row}`);
    tiles.push([...Array(experts).keys()].map((expert) => {
      const x = LEFT + expert * size + 14 * Math.floor(expert / (experts / groups));
      const box = draw("rect", { x, y: line(row + 1), width: 0.92 * size, height: TILE, class: "tile", stroke: "#BDBDBD", fill: "#F4F4F4" });
      const hint = draw("title", {});
      box.append(hint);
      const name = draw("text", { x: x + 0.46 * size, y: line(row + 1) + 19, "text-anchor": "middle", "pointer-events": "none" }, experts <= 32 ? expert : "");
      const visits = draw("rect", { x, y: line(row + 1) + TILE + 3, width: 0, height: 4, fill: "#0072B2" });
      svg.append(box, name, visits);
      return { box, name, visits, hint, width: 0.92 * size };
    }));
  }
  label(sparse + 1, "next token");
  const next = draw("text", { x: LEFT, y: line(sparse + 1) + 19 });
  svg.append(next);

  /** Light the first `lit` rows (the dense one counts as the first) for a token; `most` is the largest gate value. */
  function show(step, lit, most, counts) {
    bar.setAttribute("fill", step && lit > 0 ? "#CFE3F1" : "#F4F4F4");
    tiles.forEach((row, layer) => {
      const seen = step && lit > layer + 1;
      const busiest = Math.max(1, ...counts[layer]);
      row.forEach((tile, expert) => {
        const slot = seen ? step.chosen[layer].indexOf(expert) : -1;
        const share = slot < 0 ? 0 : step.gates[layer][slot] / most;
        tile.box.setAttribute("fill", slot < 0 ? "#F4F4F4" : ramp[Math.round(share * (ramp.length - 1))]);
        tile.name.setAttribute("fill", share > 0.4 ? "white" : slot < 0 ? "#5F5F5F" : "black");
        tile.visits.setAttribute("width", tile.width * counts[layer][expert] / busiest);
        tile.hint.textContent = `expert ${expert}: ` + (slot < 0 ? "not visited" : `gate value ${step.gates[layer][slot].toFixed(2)}`)
          + `, ${counts[layer][expert]} visits so far`;
      });
    });
    const ready = step && lit > sparse + 1;
    next.textContent = ready ? step.next.map(([text, share]) => `“${visible(text)}” ${Math.round(100 * share)}%`).join(" \u00b7 ") : "";
  }
  return { svg, show };
}

function render({ model, el }) {
  const shape = model.get("shape");
  const rows = shape.sparse + 2; // lit one after the other: dense, each sparse layer, next token
  const stage = makeStage(shape, model.get("ramp"));
  const still = globalThis.matchMedia?.("(prefers-reduced-motion: reduce)").matches ?? false;

  const root = make("div", { class: "dsv3-writer", role: "group", "aria-label": "Live writer: a text and the experts of its tokens" });
  const opening = make("input", { type: "text", class: "opening", placeholder: "another opening, such as: After lunch, (and Enter)" });
  const ask = make("label", { class: "row" }, "Opening");
  ask.append(opening);
  const back = make("button", { type: "button", "aria-label": "One token back" }, "◀");
  const play = make("button", { type: "button", class: "play" });
  const forth = make("button", { type: "button", "aria-label": "One token on" }, "▶");
  const place = make("input", { type: "range", class: "place", min: 0, max: 0, value: 0, "aria-label": "Token" });
  const pace = make("select", { "aria-label": "Pace" });
  for (const name of Object.keys(PACES)) pace.append(make("option", { value: name }, name));
  pace.value = "steady";
  const controls = make("div", { class: "row" });
  controls.append(back, play, forth, place, pace);
  const text = make("div", { class: "text" });
  const key = make("p", { class: "key" }, "Colour: the gate value, light to dark. Blue line below an expert: its visits so far.");
  const said = make("p", { class: "said" });
  const note = make("p", { class: "note", role: "alert" });
  root.append(make("style", {}, STYLE));
  if (typeof model.send === "function") root.append(ask, note);
  root.append(controls, text, stage.svg, key, said);
  el.replaceChildren(root);

  let at = 0, lit = 0, peek = -1, playing = false, timer = 0;
  const spans = [];
  const steps = () => model.get("steps");

  function counts(upTo) {
    const table = Array.from({ length: shape.sparse }, () => Array(shape.experts).fill(0));
    for (const step of steps().slice(0, upTo + 1)) step.chosen.forEach((row, layer) => row.forEach((expert) => table[layer][expert]++));
    return table;
  }

  function update() {
    const all = steps();
    for (let i = spans.length; i <= at && i < all.length; i++) {
      const span = make("span", { class: all[i].given ? "given" : "" }, all[i].text.replaceAll("\n", "¶\n"));
      span.addEventListener("mouseenter", () => { peek = i; update(); });
      span.addEventListener("mouseleave", () => { peek = -1; update(); });
      span.addEventListener("click", () => go(i));
      spans.push(span);
      text.append(span);
    }
    const shown = peek >= 0 ? peek : at;
    spans.forEach((span, i) => { span.classList.toggle("here", i === at); span.classList.toggle("peek", i === peek); });
    const most = Math.max(1e-9, ...all.map((step) => Math.max(...step.gates.map((row) => row[0] ?? 0))));
    stage.show(all[shown], peek >= 0 ? rows : lit, most, counts(shown));
    place.max = Math.max(0, all.length - 1);
    place.value = at;
    place.setAttribute("aria-valuetext", `token ${at + 1} of ${all.length}`);
    play.textContent = playing ? "❚❚ pause" : at >= all.length - 1 && all.length ? "↺ again" : "► play";
    said.setAttribute("aria-live", playing ? "off" : "polite"); // else a screen reader would read every token out
    said.textContent = all[shown] ? describe(all[shown], shown, all.length) : "Nothing has been written yet.";
    note.textContent = model.get("note");
  }

  function describe(step, i, count) {
    const experts = step.chosen.map((row, layer) => `layer ${shape.dense + layer}: ${row.join(", ")}`).join("; ");
    return `Token ${i + 1} of ${count}, “${visible(step.text)}”${step.given ? " (given)" : ""}. Experts, largest gate value first: ${experts}.`;
  }

  /** Every row that lights is a tick; after the last the next token appears. */
  function tick() {
    if (peek < 0) {
      if (lit <= rows) lit++;
      else if (at + 1 < steps().length) { at++; lit = 1; }
      else if (!model.get("writing")) return set(false);
      update();
    }
    timer = setTimeout(tick, PACES[pace.value] / (rows + 1));
  }

  function set(on) {
    playing = on;
    clearTimeout(timer);
    if (on) timer = setTimeout(tick, 0);
    else { lit = rows + 1; keep(); }
    update();
  }

  /** Tell Python where the reader stands. */
  function keep() {
    if (!steps().length) return;
    model.set("cursor", at);
    model.save_changes();
  }

  function go(token) {
    at = Math.max(0, Math.min(token, steps().length - 1));
    lit = rows + 1;
    set(false);
  }

  function begin() {
    at = lit = 0;
    peek = -1;
    spans.length = 0;
    text.replaceChildren();
    set(true);
  }

  /** Play on, or again from the beginning. */
  function run() {
    if (at >= steps().length - 1) begin();
    else set(true);
  }

  function moved() { // by Python
    const cursor = model.get("cursor");
    if (cursor < 0 || cursor === at) return;
    at = Math.min(cursor, steps().length - 1);
    lit = playing ? 0 : rows + 1;
    update();
  }

  function more() {
    if (still && steps().length) at = steps().length - 1;
    update();
  }

  back.addEventListener("click", () => go(at - 1));
  forth.addEventListener("click", () => go(at + 1));
  place.addEventListener("input", () => go(Number(place.value)));
  play.addEventListener("click", () => (playing ? set(false) : run()));
  // Enter, or leaving the field with another opening in it.
  opening.addEventListener("change", () => { if (opening.value.trim()) model.send({ write: opening.value }); });
  pace.addEventListener("change", run);
  root.addEventListener("keydown", (event) => {
    event.stopPropagation(); // JupyterLab takes arrow keys and letters for its own
    const field = event.target.closest("input, select");
    if (!field && event.key === "ArrowLeft") go(at - 1);
    if (!field && event.key === "ArrowRight") go(at + 1);
  });
  const begun = () => (still ? go(steps().length - 1) : begin());
  model.on("change:run", begun);
  model.on("change:steps", more);
  model.on("change:cursor", moved);
  model.on("change:note", update);
  begun();
  return () => {
    clearTimeout(timer);
    model.off("change:run", begun);
    model.off("change:steps", more);
    model.off("change:cursor", moved);
    model.off("change:note", update);
  };
}

export default { render };
