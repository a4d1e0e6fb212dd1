// The load balance player: a recorded training as a film. Load and bias of every expert, MaxVio and loss beside them.
// Reads from its model: films (gamma, alpha, score, loss, load and moves by frame and layer), facts, colours, ramp, and where
// the reader stands: gamma_at, alpha_at, layer_at, frame. All of it arrives at once: no slider, hover or frame asks Python.

const WIDE = 920, HIGH = 560; // of the picture, in its own units
const FONT = "15px system-ui, sans-serif";
const PACES = [["30 frames a second", 30], ["10 frames a second", 10], ["3 frames a second", 3]];
const INK = "#1a1a1a", QUIET = "#5F5F5F", RULE = "#D8D8D8", EDGE = "#555555", PLAIN = "#999999", OWN = "#0072B2", HERE = "#D55E00";
// Where the panels stand: x, y, width, height.
const LOAD = [58, 40, 320, 200], BIAS = [58, 322, 320, 180];
const STRIP = [470, 40, 430, 110], VIO = [470, 214, 430, 110], LOSS = [470, 388, 430, 114];
const TIMES = [STRIP, VIO, LOSS];

const STYLE = `
.dsv3-player { background: white; color: ${INK}; padding: 8px; font: ${FONT}; line-height: 1.45; max-width: ${WIDE}px; box-sizing: border-box; }
.dsv3-player .row { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; margin-bottom: 6px; }
.dsv3-player label { display: inline-flex; gap: 6px; align-items: center; }
.dsv3-player button, .dsv3-player select { font: inherit; padding: 2px 10px; border: 1px solid #767676; border-radius: 4px; background: white; color: ${INK}; }
.dsv3-player input { accent-color: ${OWN}; width: 130px; }
.dsv3-player .place { flex: 1 1 160px; }
.dsv3-player output { min-width: 3.6em; }
.dsv3-player :focus-visible { outline: 3px solid ${OWN}; outline-offset: 1px; }
.dsv3-player canvas { display: block; width: 100%; height: auto; cursor: crosshair; }
.dsv3-player p { margin: 4px 0 0; }
.dsv3-player .said { min-height: 2.9em; }
.dsv3-player .score { color: ${QUIET}; min-height: 2.9em; }
`;

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const short = (value) => Number(value.toPrecision(3)).toString(); // 0.0003, not 3e-4

/** What is drawn of a film: shares and MaxVio, by layer and frame. */
function readFilm(film) {
  const mean = (counts) => counts.reduce((sum, count) => sum + count, 0) / counts.length;
  const layers = film.load[0].map((_, layer) => {
    const share = film.load.map((frame) => frame[layer].map((count) => count / mean(frame[layer])));
    const bias = film.moves.map((frame) => frame[layer].map((moves) => moves * film.gamma));
    return { share, bias, vio: share.map((row) => Math.max(...row) - 1) };
  });
  const farthest = Math.max(...film.moves.flat(2).map(Math.abs)) * film.gamma;
  return { ...film, layers, frames: film.loss.length, reach: 1.1 * (farthest || 0.01) };
}

function render({ model, el }) {
  const facts = model.get("facts"), colours = model.get("colours"), ramp = model.get("ramp");
  const films = model.get("films").map(readFilm);
  const plain = films.find((film) => film.gamma === 0 && film.alpha === 0);
  const frames = films[0].frames, experts = films[0].load[0][0].length, lastStep = frames * facts.every;
  const stepOf = (frame) => (frame + 1) * facts.every;

  // ---- controls
  const range = (name, last, label) => make("input", { type: "range", class: name, min: 0, max: last, step: 1, "aria-label": label });
  const gamma = range("gamma", facts.gammas.length - 1, "gamma, speed of the biases");
  const alpha = range("alpha", facts.alphas.length - 1, "alpha, weight of the balance loss");
  const gammaSays = make("output"), alphaSays = make("output");
  const layer = make("select", { class: "layer", "aria-label": "Layer" });
  facts.layers.forEach((number, i) => layer.append(make("option", { value: i }, `layer ${number}`)));
  const play = make("button", { type: "button", class: "play" });
  const back = make("button", { type: "button", "aria-label": "One frame back" }, "◀");
  const forth = make("button", { type: "button", "aria-label": "One frame on" }, "▶");
  const place = range("place", frames - 1, "Step of the training");
  const pace = make("select", { class: "pace", "aria-label": "Pace" });
  for (const [name, rate] of PACES) pace.append(make("option", { value: rate }, name));
  const canvas = make("canvas", { role: "img", tabindex: 0 });
  const said = make("p", { class: "said" });
  const score = make("p", { class: "score" });
  const root = make(
    "div",
    { class: "dsv3-player", role: "group", "aria-label": "Load balance player" },
    make("style", {}, STYLE),
    make("div", { class: "row" }, make("label", {}, "gamma", gamma, gammaSays), make("label", {}, "alpha", alpha, alphaSays), layer),
    make("div", { class: "row" }, play, back, forth, place, pace),
    canvas,
    said,
    score,
  );
  el.replaceChildren(root);
  const scale = Math.max(1, globalThis.devicePixelRatio || 1);
  canvas.width = WIDE * scale;
  canvas.height = HIGH * scale;
  const pen = canvas.getContext("2d");

  // ---- where the reader stands
  let playing = false, began = 0, from = 0; // a film that plays: the time and the frame at which it was started
  let peek = -1, pointed = -1; // the frame and the expert under the mouse
  let asked = 0, drawn = 0;
  let at = clamp(model.get("frame"));

  function clamp(frame) {
    return Math.max(0, Math.min(frames - 1, frame));
  }
  const film = () => {
    const [g, a] = [facts.gammas[model.get("gamma_at")], facts.alphas[model.get("alpha_at")]];
    return films.find((each) => each.gamma === g && each.alpha === a);
  };

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

  /** Title, axis and ticks of a panel; returns where a value stands. */
  function panel([x, y, width, height], title, low, high, ticks) {
    const up = (value) => y + height - ((value - low) / (high - low)) * height;
    words(title, x, y - 12, { bold: true });
    for (const tick of ticks) {
      line(x, up(tick), x + width, up(tick), RULE);
      words(short(tick), x - 8, up(tick) + 5, { align: "right", colour: QUIET });
    }
    return up;
  }

  function bars(box, up, values, base) {
    const wide = box[2] / experts;
    values.forEach((value, expert) => {
      const top = Math.min(up(value), up(base)), high = Math.abs(up(value) - up(base));
      pen.fillStyle = colours[expert % colours.length];
      pen.strokeStyle = expert === pointed ? INK : EDGE;
      pen.lineWidth = expert === pointed ? 3 : 1;
      pen.fillRect(box[0] + (expert + 0.12) * wide, top, 0.76 * wide, high);
      pen.strokeRect(box[0] + (expert + 0.12) * wide, top, 0.76 * wide, high);
      words(expert, box[0] + (expert + 0.5) * wide, box[1] + box[3] + 18, { align: "center", colour: QUIET });
    });
    line(box[0], up(base), box[0] + box[2], up(base), INK);
  }

  function curve(box, up, values, colour, width) {
    pen.strokeStyle = colour;
    pen.lineWidth = width;
    pen.beginPath();
    values.forEach((value, frame) => pen.lineTo(box[0] + ((frame + 0.5) / frames) * box[2], up(value)));
    pen.stroke();
  }

  const whole = (high, most) => {
    const by = Math.max(1, Math.ceil(high / most));
    return [...Array(Math.floor(high / by) + 1).keys()].map((tick) => tick * by);
  };

  function draw() {
    asked = 0;
    const now = performance.now();
    if (playing) {
      at = from + Math.floor(((now - began) / 1000) * Number(pace.value));
      if (at >= frames - 1) stop();
    }
    const shown = peek >= 0 ? peek : at, run = film(), here = run.layers[model.get("layer_at")];
    const grey = plain.layers[model.get("layer_at")];
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.fillStyle = "white";
    pen.fillRect(0, 0, WIDE, HIGH);

    bars(LOAD, panel(LOAD, "Load (1 = even share)", 0, facts.most, whole(facts.most, 5)), here.share[shown], 0);
    line(LOAD[0], LOAD[1] + LOAD[3] * (1 - 1 / facts.most), LOAD[0] + LOAD[2], LOAD[1] + LOAD[3] * (1 - 1 / facts.most), INK);
    const reach = run.reach;
    bars(BIAS, panel(BIAS, "Bias (added to the score)", -reach, reach, [-reach / 1.1, 0, reach / 1.1]), here.bias[shown], 0);
    words("expert", BIAS[0] + BIAS[2] / 2, BIAS[1] + BIAS[3] + 40, { align: "center", colour: QUIET });

    words("Load of the whole run", STRIP[0], STRIP[1] - 12, { bold: true });
    const wide = STRIP[2] / frames, high = STRIP[3] / experts;
    here.share.forEach((row, frame) => row.forEach((share, expert) => {
      pen.fillStyle = ramp[Math.min(ramp.length - 1, Math.round((share / facts.most) * (ramp.length - 1)))];
      pen.fillRect(STRIP[0] + frame * wide, STRIP[1] + (experts - 1 - expert) * high, wide + 0.5, high + 0.5);
    }));
    for (const expert of [0, experts - 1]) words(expert, STRIP[0] - 8, STRIP[1] + (experts - 0.5 - expert) * high + 5, { align: "right", colour: QUIET });
    if (pointed >= 0) {
      pen.strokeStyle = HERE;
      pen.lineWidth = 2;
      pen.strokeRect(STRIP[0], STRIP[1] + (experts - 1 - pointed) * high, STRIP[2], high);
    }

    let up = panel(VIO, "MaxVio (0 = even)", 0, facts.most - 1, whole(facts.most - 1, 4));
    curve(VIO, up, grey.vio, PLAIN, 1.5);
    curve(VIO, up, here.vio, OWN, 2);
    words("grey: left alone", VIO[0] + VIO[2], VIO[1] - 12, { align: "right", colour: QUIET });
    const [least, largest] = facts.losses;
    up = panel(LOSS, "Loss (nats per token)", least, largest, whole(largest, 5).filter((tick) => tick >= least));
    curve(LOSS, up, plain.loss, PLAIN, 1.5);
    curve(LOSS, up, run.loss, OWN, 2);
    for (const share of [0, 0.5, 1]) {
      words(Math.round(share * lastStep), LOSS[0] + share * LOSS[2], LOSS[1] + LOSS[3] + 18, { align: "center", colour: QUIET });
    }
    words("step", LOSS[0] + LOSS[2] / 2, LOSS[1] + LOSS[3] + 40, { align: "center", colour: QUIET });
    const x = STRIP[0] + (shown + 0.5) * wide;
    for (const box of TIMES) line(x, box[1], x, box[1] + box[3], HERE, 2);

    tell(run, here, shown);
    root.dataset.frame = shown;
    root.dataset.drawn = ++drawn;
    if (playing) ask();
  }

  /** What the picture says, in words; a voice hears it when the film stands. */
  function tell(run, here, shown) {
    const row = here.share[shown], most = row.indexOf(Math.max(...row)), who = pointed >= 0 ? pointed : most;
    const which = pointed >= 0 ? `expert ${who}` : `the busiest expert, ${who},`;
    const text = `Step ${stepOf(shown)} of ${lastStep}, ${layer.selectedOptions[0].text}: ${which} has ${row[who].toFixed(2)} even shares `
      + `and a bias of ${short(here.bias[shown][who])}. MaxVio ${here.vio[shown].toFixed(2)}, loss ${run.loss[shown].toFixed(2)}.`;
    const still = !playing && peek < 0;
    said.setAttribute("aria-live", still ? "polite" : "off");
    if (said.textContent !== text) said.textContent = text;
    const { loss, max_vio } = run.score, percent = 100 * (loss / plain.score.loss - 1);
    score.textContent = `At the end, on text that it never read: MaxVio ${max_vio.toFixed(2)} (left alone ${plain.score.max_vio.toFixed(2)}), `
      + `loss ${loss.toFixed(3)} (${percent < 0 ? "-" : "+"}${Math.abs(percent).toFixed(1)}% against left alone).`;
    const title = `gamma ${short(run.gamma)}, alpha ${short(run.alpha)}. ${text}`;
    if (still && canvas.getAttribute("aria-label") !== title) canvas.setAttribute("aria-label", title);
    place.value = at;
    place.setAttribute("aria-valuetext", `step ${stepOf(at)}`);
    const says = playing ? "❚❚ pause" : at >= frames - 1 ? "↺ again" : "► play";
    if (play.textContent !== says) play.textContent = says;
  }

  // ---- moving
  function show() {
    gamma.value = model.get("gamma_at");
    alpha.value = model.get("alpha_at");
    layer.value = model.get("layer_at");
    gammaSays.textContent = short(facts.gammas[gamma.value]);
    alphaSays.textContent = short(facts.alphas[alpha.value]);
    gamma.setAttribute("aria-valuetext", gammaSays.textContent);
    alpha.setAttribute("aria-valuetext", alphaSays.textContent);
    ask();
  }

  /** Tell Python where the reader stands. A film that plays does not. */
  function keep(values) {
    for (const [name, value] of Object.entries(values)) if (model.get(name) !== value) model.set(name, value);
    model.save_changes();
    show();
  }

  function start() {
    if (at >= frames - 1) at = 0;
    [playing, began, from, peek] = [true, performance.now(), at, -1];
    ask();
  }

  function stop() {
    playing = false;
    at = clamp(at);
    keep({ frame: at });
  }

  function go(frame) {
    playing = false;
    peek = -1;
    at = clamp(frame);
    keep({ frame: at });
  }

  /** Frame and expert under a pointer, -1 where there is none. */
  function under(event) {
    const box = canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) * WIDE) / box.width, y = ((event.clientY - box.top) * HIGH) / box.height;
    const inside = ([left, top, wide, high]) => x >= left && x < left + wide && y >= top && y < top + high;
    const time = TIMES.find(inside), bar = [LOAD, BIAS].find(inside);
    const frame = time ? clamp(Math.floor(((x - time[0]) / time[2]) * frames)) : -1;
    let expert = bar ? Math.floor(((x - bar[0]) / bar[2]) * experts) : -1;
    if (time === STRIP) expert = experts - 1 - Math.floor(((y - STRIP[1]) / STRIP[3]) * experts);
    return [frame, expert];
  }

  canvas.addEventListener("pointermove", (event) => {
    const [frame, expert] = under(event);
    if (frame === peek && expert === pointed) return;
    [peek, pointed] = [playing ? -1 : frame, expert];
    ask();
  });
  canvas.addEventListener("pointerleave", () => { peek = pointed = -1; ask(); });
  canvas.addEventListener("click", (event) => { const [frame] = under(event); if (frame >= 0) go(frame); });
  gamma.addEventListener("input", () => keep({ gamma_at: Number(gamma.value) }));
  alpha.addEventListener("input", () => keep({ alpha_at: Number(alpha.value) }));
  layer.addEventListener("change", () => keep({ layer_at: Number(layer.value) }));
  place.addEventListener("input", () => go(Number(place.value)));
  play.addEventListener("click", () => (playing ? stop() : start()));
  back.addEventListener("click", () => go(at - 1));
  forth.addEventListener("click", () => go(at + 1));
  pace.addEventListener("change", start);
  root.addEventListener("keydown", (event) => {
    event.stopPropagation(); // JupyterLab takes arrow keys and letters for its own
    if (event.target.closest("input, select")) return;
    const steps = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: frames - 1 };
    if (event.key in steps) go(steps[event.key]);
    else if (event.key === " " && !event.target.closest("button")) playing ? stop() : start();
    else return;
    event.preventDefault();
  });

  function moved() { // by Python
    if (model.get("frame") === at) return;
    playing = false;
    at = clamp(model.get("frame"));
    show();
  }
  const events = { "change:gamma_at": show, "change:alpha_at": show, "change:layer_at": show, "change:frame": moved };
  for (const [event, call] of Object.entries(events)) model.on(event, call);
  show();
  return () => {
    playing = false;
    cancelAnimationFrame(asked);
    for (const [event, call] of Object.entries(events)) model.off(event, call);
  };
}

export default { render };
