// The training board: a run while it runs. Python trains and sends the lines of its log; this draws them, and sends wishes:
// train, pause, step, reset, another length. Reads from its model: lines (steps), measured (evaluations), sample, facts,
// colours, load_ramp, bias_ramp, status, speed, note, and `at`, the line that the reader stands on (-1: the last).

const WIDE = 920, HIGH = 500; // of the picture, in its own units
const FONT = "14px system-ui, sans-serif";
const INK = "#1a1a1a", QUIET = "#5F5F5F", RULE = "#D8D8D8", PALE = "#BBBBBB", OWN = "#0072B2", HERE = "#D55E00";
// Where the panels stand: x, y, width, height.
const COLUMNS = [46, 278, 510, 742], ROWS = [34, 284], SIZE = [170, 164];
const at = (column, row) => [COLUMNS[column], ROWS[row], ...SIZE];
const LOSS = at(0, 0), BITS = at(1, 0), JUDGED = at(2, 0), NORM = at(3, 0);
const RATE = at(0, 1), LOAD = at(1, 1), BIAS = at(2, 1), VIO = at(3, 1);
const TIMES = [LOSS, BITS, JUDGED, NORM, RATE, VIO];
const SAYS = { training: "❚❚ pause", paused: "► train", ended: "↺ train again" };
const GRAMMAR = { sentences_well_formed: ["sentences", "#1a1a1a"], story_answers: ["answers", "#CC79A7"], sum_answers: ["sums", "#56B4E9"] };

const STYLE = `
.dsv3-board { background: white; color: ${INK}; padding: 8px; font: 15px system-ui, sans-serif; line-height: 1.45; max-width: ${WIDE}px; box-sizing: border-box; }
.dsv3-board .row { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; margin-bottom: 6px; }
.dsv3-board label { display: inline-flex; gap: 6px; align-items: center; }
.dsv3-board button, .dsv3-board select { font: inherit; padding: 2px 10px; border: 1px solid #767676; border-radius: 4px; background: white; color: ${INK}; }
.dsv3-board button:disabled { color: #949494; border-color: #BDBDBD; }
.dsv3-board .train { min-width: 8.5em; }
.dsv3-board :focus-visible { outline: 3px solid ${OWN}; outline-offset: 1px; }
.dsv3-board canvas { display: block; width: 100%; height: auto; cursor: crosshair; }
.dsv3-board p { margin: 4px 0 0; }
.dsv3-board .said { min-height: 2.9em; }
.dsv3-board .sample { min-height: 2.9em; color: ${QUIET}; }
.dsv3-board .sample b { font-weight: normal; color: ${INK}; }
.dsv3-board i { display: inline-block; width: 14px; height: 4px; margin: 0 5px 3px 0; }
.dsv3-board .note { color: #A34700; }
`;

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const short = (value) => Number(value.toPrecision(3)).toString();
const sum = (values) => values.reduce((total, value) => total + value, 0);

/** Round numbers from low to high, few of them. */
function ticks(low, high, most = 4) {
  const rough = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
  const by = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
  const found = [];
  for (let tick = Math.ceil(low / by) * by; tick <= high + by / 1000; tick += by) found.push(Number(tick.toPrecision(6)));
  return found;
}

/** Each value replaced by the mean of its neighbourhood, which is cut at the ends. */
const smooth = (values, half = 4) => values.map((_, i) => {
  const near = values.slice(Math.max(0, i - half), i + half + 1);
  return sum(near) / near.length;
});

function count(tokens) {
  const [unit, word] = tokens >= 1e6 ? [1e6, "million"] : [1e3, "thousand"];
  return `${short(tokens / unit)} ${word}`;
}

function render({ model, el }) {
  const colours = model.get("colours"), loadRamp = model.get("load_ramp"), biasRamp = model.get("bias_ramp");
  const live = typeof model.send === "function"; // a saved page has no Python to ask

  // ---- controls
  const train = make("button", { type: "button", class: "train" });
  const step = make("button", { type: "button" }, "one step");
  const reset = make("button", { type: "button" }, "begin again");
  const length = make("select", { class: "length", "aria-label": "Length of the run" });
  const state = make("span", { class: "state" });
  const controls = make("div", { class: "row" }, train, step, reset, make("label", {}, "length", length), state);
  const canvas = make("canvas", { role: "img", tabindex: 0 });
  const legend = make("p", { class: "row" });
  const said = make("p", { class: "said" });
  const sample = make("p", { class: "sample" });
  const note = make("p", { class: "note", role: "status" });
  const root = make("div", { class: "dsv3-board", role: "group", "aria-label": "Training board" }, make("style", {}, STYLE), controls, canvas, legend, said, sample, note);
  if (!live) controls.style.display = "none";
  el.replaceChildren(root);
  const scale = Math.max(1, globalThis.devicePixelRatio || 1);
  canvas.width = WIDE * scale;
  canvas.height = HIGH * scale;
  const pen = canvas.getContext("2d");

  let peek = -1, cell = null; // the line under the pointer; or a panel, a layer and an expert
  let asked = 0, drawn = 0;
  const lines = () => model.get("lines");
  const total = () => Math.max(model.get("facts").total, lines().at(-1)?.tokens ?? 0);
  const shownAt = () => (peek >= 0 && peek < lines().length ? peek : model.get("at") >= 0 ? Math.min(model.get("at"), lines().length - 1) : lines().length - 1);

  // ---- drawing
  const ask = () => { asked ||= requestAnimationFrame(draw); };

  function words(text, x, y, { align = "left", colour = INK, bold = false } = {}) {
    pen.font = bold ? `bold ${FONT}` : FONT;
    pen.textAlign = align;
    pen.fillStyle = colour;
    pen.fillText(text, x, y);
  }

  function line(x1, y1, x2, y2, colour, width = 1) {
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    pen.beginPath();
    pen.moveTo(x1, y1);
    pen.lineTo(x2, y2);
    pen.stroke();
  }

  const along = (box, tokens) => box[0] + (tokens / total()) * box[2];

  /** Title, axes and ticks of a panel by tokens; returns where a value stands. */
  function panel(box, title, low, high, marks, by = (value) => value) {
    const [x, y, width, height] = box;
    const up = (value) => y + height - ((by(value) - by(low)) / (by(high) - by(low))) * height;
    words(title, x, y - 12, { bold: true });
    for (const mark of marks) {
      line(x, up(mark), x + width, up(mark), RULE);
      words(short(mark), x - 6, up(mark) + 5, { align: "right", colour: QUIET });
    }
    line(x, y + height, x + width, y + height, INK);
    const unit = total() >= 1e6 ? 1e6 : 1e3;
    for (const mark of ticks(0, total() / unit, 3)) words(short(mark), along(box, mark * unit), y + height + 17, { align: "center", colour: QUIET });
    words(`tokens (${unit === 1e6 ? "millions" : "thousands"})`, x + width / 2, y + height + 35, { align: "center", colour: QUIET });
    return up;
  }

  function curve(box, up, tokens, values, colour, { width = 2, dash = [], dots = false } = {}) {
    pen.strokeStyle = pen.fillStyle = colour;
    pen.lineWidth = width;
    pen.setLineDash(dash);
    pen.beginPath();
    values.forEach((value, i) => pen.lineTo(along(box, tokens[i]), up(value)));
    pen.stroke();
    pen.setLineDash([]);
    if (dots) values.forEach((value, i) => { pen.beginPath(); pen.arc(along(box, tokens[i]), up(value), 3, 0, 7); pen.fill(); });
  }

  function matrix(box, title, table, colour, kind) {
    const [x, y, width, height] = box, layers = Object.keys(table).sort((a, b) => a - b);
    words(title, x, y - 12, { bold: true });
    if (!layers.length) return words("no step yet", x, y + 20, { colour: QUIET });
    const high = height / layers.length, wide = width / table[layers[0]].length;
    layers.forEach((layer, row) => {
      words(layer, x - 6, y + (row + 0.5) * high + 5, { align: "right", colour: QUIET });
      table[layer].forEach((value, expert) => {
        pen.fillStyle = colour(value);
        pen.fillRect(x + expert * wide, y + row * high, wide + 0.5, high - 1);
        if (cell && cell.kind === kind && cell.layer === layer && cell.expert === expert) {
          pen.strokeStyle = HERE;
          pen.lineWidth = 3;
          pen.strokeRect(x + expert * wide + 1, y + row * high + 1, wide - 2, high - 3);
        }
      });
    });
    const experts = table[layers[0]].length;
    for (const expert of [0, experts - 1]) words(expert, x + (expert + 0.5) * wide, y + height + 17, { align: "center", colour: QUIET });
    words("expert, by layer", x + width / 2, y + height + 35, { align: "center", colour: QUIET });
  }

  const shares = (load) => Object.fromEntries(Object.entries(load).map(([layer, counts]) => [layer, counts.map((n) => (n * counts.length) / Math.max(1, sum(counts)))]));
  const ramp = (colours, share) => colours[Math.max(0, Math.min(colours.length - 1, Math.round(share * (colours.length - 1))))];

  function draw() {
    asked = 0;
    const steps = lines(), measured = model.get("measured"), facts = model.get("facts"), shown = steps[shownAt()];
    const tokens = steps.map((each) => each.tokens), when = measured.map((each) => each.tokens);
    const domains = Object.keys(measured.at(-1)?.bits_per_byte ?? {});
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.fillStyle = "white";
    pen.fillRect(0, 0, WIDE, HIGH);

    const losses = steps.map((each) => each.loss), held = measured.flatMap((each) => Object.values(each.validation_loss));
    let high = 1.05 * Math.max(1, ...losses, ...held), up = panel(LOSS, "Loss (nats per token)", 0, high, ticks(0, high));
    curve(LOSS, up, tokens, losses, PALE, { width: 1 });
    curve(LOSS, up, tokens, smooth(losses), INK);
    const second = steps.filter((each) => each.mtp_loss);
    curve(LOSS, up, second.map((each) => each.tokens), smooth(second.map((each) => each.mtp_loss)), INK, { dash: [2, 4] });
    for (const name of domains) curve(LOSS, up, when, measured.map((each) => each.validation_loss[name]), colours.domains[name] ?? QUIET, { dots: true });

    high = 1.05 * Math.max(1, ...measured.flatMap((each) => Object.values(each.bits_per_byte)));
    up = panel(BITS, "Bits per byte, held out", 0, high, ticks(0, high));
    for (const name of domains) curve(BITS, up, when, measured.map((each) => each.bits_per_byte[name]), colours.domains[name] ?? QUIET, { dots: true });

    up = panel(JUDGED, "Judged (% right)", 0, 100, [0, 25, 50, 75, 100]);
    let named = 0;
    for (const [key, [name, colour]] of Object.entries(GRAMMAR)) {
      const judged = measured.filter((each) => each.judged && key in each.judged);
      if (!judged.length) continue;
      curve(JUDGED, up, judged.map((each) => each.tokens), judged.map((each) => 100 * each.judged[key]), colour, { dots: true });
      words(name, JUDGED[0] + 6, JUDGED[1] + 16 + 17 * named++, { colour });
    }

    const norms = steps.map((each) => each.grad_norm), low = 10 ** Math.floor(Math.log10(Math.min(0.5, ...norms)));
    high = 10 ** Math.ceil(Math.log10(Math.max(2, ...norms)));
    const powers = [];
    for (let power = low; power <= high * 1.001; power *= 10) powers.push(power);
    up = panel(NORM, "Gradient norm", low, high, powers, Math.log10);
    curve(NORM, up, tokens, norms, PALE, { width: 1 });
    curve(NORM, up, tokens, smooth(norms), OWN);
    line(NORM[0], up(facts.clip), NORM[0] + NORM[2], up(facts.clip), INK);
    words(`cut at ${short(facts.clip)}`, NORM[0] + NORM[2], up(facts.clip) - 5, { align: "right", colour: QUIET });

    const rates = steps.map((each) => 1000 * each.learning_rate);
    high = 1.1 * Math.max(0.1, ...rates);
    up = panel(RATE, "Learning rate (thousandths)", 0, high, ticks(0, high));
    curve(RATE, up, tokens, rates, OWN);

    matrix(LOAD, "Load (1 = even share)", shares(shown?.load ?? {}), (share) => ramp(loadRamp, share / facts.most), "load");
    const reach = Math.max(0.01, ...Object.values(shown?.bias ?? {}).flat().map(Math.abs));
    matrix(BIAS, "Bias on the score", shown?.bias ?? {}, (bias) => ramp(biasRamp, (bias / reach + 1) / 2), "bias");

    const layers = [...new Set(steps.flatMap((each) => Object.keys(each.max_vio)))].sort((a, b) => a - b);
    high = 1.05 * Math.max(1, ...steps.flatMap((each) => Object.values(each.max_vio)));
    up = panel(VIO, "MaxVio (0 = even)", 0, high, ticks(0, high));
    layers.forEach((layer, i) => {
      const ran = steps.filter((each) => layer in each.max_vio);
      curve(VIO, up, ran.map((each) => each.tokens), smooth(ran.map((each) => each.max_vio[layer])), colours.layers[i % colours.layers.length]);
    });
    if (shown && shownAt() < steps.length - 1) for (const box of TIMES) line(along(box, shown.tokens), box[1], along(box, shown.tokens), box[1] + box[3], HERE, 2);

    tell(shown, domains, layers);
    root.dataset.step = shown?.step ?? 0;
    root.dataset.drawn = ++drawn;
  }

  const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };

  /** What the picture says, in words. */
  function tell(shown, domains, layers) {
    const status = model.get("status"), facts = model.get("facts");
    put(train, SAYS[status]);
    step.disabled = status === "ended";
    put(state, status === "training" && model.get("speed") ? `${Math.round(model.get("speed")).toLocaleString("en")} tokens/s` : status);
    let text = `Nothing trained yet. The run is ${count(facts.total)} tokens long.`;
    if (shown && cell && shown[cell.kind]?.[cell.layer]) {
      const value = cell.kind === "load" ? shares(shown.load)[cell.layer][cell.expert] : shown.bias[cell.layer][cell.expert];
      const own = cell.kind === "load" ? `${value.toFixed(2)} even shares of the load` : `a bias of ${short(value)}`;
      text = `Step ${shown.step}, layer ${cell.layer}: expert ${cell.expert} has ${own}.`;
    } else if (shown) {
      const uneven = Object.entries(shown.max_vio).map(([layer, vio]) => `${vio.toFixed(2)} in layer ${layer}`).join(", ");
      text = `Step ${shown.step}, ${count(shown.tokens)} of ${count(facts.total)} tokens: loss ${shown.loss.toFixed(3)}`
        + (shown.mtp_loss ? `, of the second token ${shown.mtp_loss.toFixed(3)}` : "")
        + `, gradient norm ${short(shown.grad_norm)}, learning rate ${short(shown.learning_rate)}, ${shown.batch_size} sequences, `
        + `gamma ${short(shown.gamma)}, lambda ${short(shown.mtp_lambda)}. MaxVio ${uneven}.`;
    }
    said.setAttribute("aria-live", status === "training" || peek >= 0 ? "off" : "polite");
    put(said, text);
    if (status !== "training" && peek < 0) canvas.setAttribute("aria-label", text);
    put(note, model.get("note"));
    const key = JSON.stringify([domains, layers]);
    if (legend.dataset.key !== key) {
      legend.dataset.key = key;
      const one = (name, colour) => make("span", {}, make("i", { style: `background: ${colour}` }), name);
      legend.replaceChildren(
        one("training (dotted: second token)", INK),
        ...domains.map((name) => one(name, colours.domains[name] ?? QUIET)),
        ...layers.map((layer, i) => one(`layer ${layer}`, colours.layers[i % colours.layers.length])),
      );
    }
  }

  function read() {
    const judged = model.get("sample").map(([text, right]) => make(right === true ? "b" : "span", {}, `${text}${{ true: " ✓ ", false: " ✗ " }[right] ?? " … "}`));
    sample.replaceChildren("It writes: ", ...judged);
  }

  function offer() {
    const facts = model.get("facts");
    const lengths = [...new Set([...facts.lengths, facts.total])].sort((a, b) => a - b);
    length.replaceChildren(...lengths.map((tokens) => make("option", { value: tokens }, `${count(tokens)} tokens`)));
    length.value = facts.total;
    ask();
  }

  // ---- moving
  const wish = (content) => { if (live) model.send(content); };
  const toggle = () => wish({ do: model.get("status") === "training" ? "pause" : "train" });

  function stand(line) {
    const last = lines().length - 1;
    peek = -1;
    model.set("at", line >= last || last < 0 ? -1 : Math.max(0, line));
    model.save_changes();
    ask();
  }

  /** The line that is nearest to a pointer in a panel by tokens; and the cell that is under it. */
  function under(event) {
    const box = canvas.getBoundingClientRect(), steps = lines();
    const x = ((event.clientX - box.left) * WIDE) / box.width, y = ((event.clientY - box.top) * HIGH) / box.height;
    const inside = ([left, top, wide, high]) => x >= left && x < left + wide && y >= top && y < top + high;
    const time = TIMES.find(inside), kind = inside(LOAD) ? "load" : inside(BIAS) ? "bias" : null;
    let near = -1, found = null;
    if (time && steps.length) {
      const tokens = ((x - time[0]) / time[2]) * total();
      near = steps.reduce((best, each, i) => (Math.abs(each.tokens - tokens) < Math.abs(steps[best].tokens - tokens) ? i : best), 0);
    }
    const table = kind && steps[shownAt()]?.[kind];
    if (table && Object.keys(table).length) {
      const [left, top, wide, high] = kind === "load" ? LOAD : BIAS, layers = Object.keys(table).sort((a, b) => a - b);
      const layer = layers[Math.floor(((y - top) / high) * layers.length)];
      found = { kind, layer, expert: Math.floor(((x - left) / wide) * table[layer].length) };
    }
    return [near, found];
  }

  canvas.addEventListener("pointermove", (event) => { [peek, cell] = under(event); ask(); });
  canvas.addEventListener("pointerleave", () => { [peek, cell] = [-1, null]; ask(); });
  canvas.addEventListener("click", (event) => { const [near] = under(event); if (near >= 0) stand(near); });
  train.addEventListener("click", toggle);
  step.addEventListener("click", () => wish({ do: "step" }));
  reset.addEventListener("click", () => wish({ do: "reset" }));
  length.addEventListener("change", () => wish({ tokens: Number(length.value) }));
  root.addEventListener("keydown", (event) => {
    event.stopPropagation(); // JupyterLab takes arrow keys and letters for its own
    if (event.target.closest("input, select")) return;
    const steps = { ArrowLeft: shownAt() - 1, ArrowRight: shownAt() + 1, Home: 0, End: lines().length };
    if (event.key in steps) stand(steps[event.key]);
    else if (event.key === " " && !event.target.closest("button")) toggle();
    else return;
    event.preventDefault();
  });

  const events = { "change:sample": read, "change:facts": offer };
  for (const name of ["lines", "measured", "status", "speed", "note", "at"]) events[`change:${name}`] = ask;
  for (const [event, call] of Object.entries(events)) model.on(event, call);
  read();
  offer();
  return () => {
    cancelAnimationFrame(asked);
    for (const [event, call] of Object.entries(events)) model.off(event, call);
  };
}

export default { render };
