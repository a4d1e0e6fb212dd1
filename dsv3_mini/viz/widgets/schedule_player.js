// The schedule player: a pipeline's step as a film. Ranks one below the other, time to the right, what each rank keeps beside it.
// Reads from its model: schedules (lines of slots such as "2F5" or "2F5&1B3", a line for each rank), costs, facts, colours, and
// where the reader stands: schedule_at, ranks_at, microbatches_at, cost_at, share (of the step, 0 to 1). All of it arrives at once:
// when each slot runs is computed here, as schedule_simulator.py does, so that no slider asks Python.

const WIDE = 980, FOOT = 8, ROW = 44; // of the picture, in its own units; a row is lower where there are many ranks
const TIMES = [52, 34, 790, 420], KEPT = [862, 34, 108, 420]; // x, y, width and largest height of the two panels
const FONT = "15px system-ui, sans-serif", SHARP = 2;
const PACES = [["whole step in 20 s", 20], ["in 10 s", 10], ["in 5 s", 5]];
const INK = "#1a1a1a", QUIET = "#5F5F5F", OWN = "#0072B2", NEAR = 1e-9;
const WORDS = { F: "forward", B: "backward", I: "backward for the input", W: "backward for the weights" };
const CONTROLS = ["schedule_at", "ranks_at", "microbatches_at", "cost_at"];

const STYLE = `
.dsv3-schedule { background: white; color: ${INK}; padding: 8px; font: ${FONT}; line-height: 1.45; max-width: ${WIDE + 16}px; box-sizing: border-box; }
.dsv3-schedule .row { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; margin-bottom: 6px; }
.dsv3-schedule label { display: inline-flex; gap: 6px; align-items: center; }
.dsv3-schedule button, .dsv3-schedule select { font: inherit; padding: 2px 10px; border: 1px solid #767676; border-radius: 4px; background: white; color: ${INK}; }
.dsv3-schedule input { accent-color: ${OWN}; width: 90px; }
.dsv3-schedule .share { flex: 1 1 160px; }
.dsv3-schedule output { min-width: 2.6em; }
.dsv3-schedule :focus-visible { outline: 3px solid ${OWN}; outline-offset: 1px; }
.dsv3-schedule canvas { display: block; width: 100%; height: auto; cursor: crosshair; }
.dsv3-schedule p { margin: 4px 0 0; }
.dsv3-schedule .said { min-height: 2.9em; }
.dsv3-schedule .key { display: flex; flex-wrap: wrap; gap: 2px 16px; }
.dsv3-schedule .key i { display: inline-block; width: 18px; height: 13px; margin-right: 6px; vertical-align: -1px; border: 1px solid ${QUIET}; }
`;

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const short = (value) => Number(value.toPrecision(4)).toString();

/** "2F5&1B3'" -> two ops. */
const readSlot = (text) => text.split("&").map((part) => {
  const [, stage, phase, microbatch, other] = part.match(/^(\d+)([FBIW])(\d+)('?)$/);
  return { phase, stage: Number(stage), microbatch: Number(microbatch), direction: other ? 1 : 0 };
});

/** What an op waits for and what it gives, as names: "F" an activation, "G" a gradient. */
function needs({ phase, stage, microbatch, direction }, stages) {
  const name = (kind, where) => `${kind} ${where} ${microbatch} ${direction}`;
  if (phase === "F") return stage > 0 ? [name("F", stage - 1)] : [];
  if (phase === "W") return [name("G", stage)];
  return stage < stages - 1 ? [name("F", stage), name("G", stage + 1)] : [name("F", stage)];
}
const gives = ({ phase, stage, microbatch, direction }) => `${phase === "F" ? "F" : "G"} ${stage} ${microbatch} ${direction}`;

/** When each slot runs: it begins when its rank is free and all that it needs is there. */
function simulate(entry, cost) {
  const size = entry.ranks / entry.stages; // of a stage, in a rank's share of the model, which is what `cost` is for
  const time = { F: cost.F, I: cost.I, W: cost.W, B: cost.I + cost.W, "F&B": cost.FB };
  const given = new Map(), rows = entry.lines.map((line) => line.split(" ").map(readSlot)), slots = rows.map(() => []);
  for (let moving = true; moving; ) {
    moving = false;
    rows.forEach((row, rank) => {
      for (let next = slots[rank].length; next < row.length; next++) {
        const ops = row[next], wants = ops.flatMap((op) => needs(op, entry.stages));
        if (!wants.every((want) => given.has(want))) break;
        const start = Math.max(slots[rank].at(-1)?.end ?? 0, ...wants.map((want) => given.get(want)));
        const end = start + size * time[ops.map((op) => op.phase).join("&")];
        for (const op of ops) if (op.phase !== "W") given.set(gives(op), end);
        const before = slots[rank].at(-1)?.after ?? 0, during = before + ops.filter((op) => op.phase === "F").length;
        slots[rank].push({ rank, ops, start, end, during, after: during - ops.filter((op) => "BW".includes(op.phase)).length });
        moving = true;
      }
    });
  }
  const all = slots.flat(), span = Math.max(...all.map((slot) => slot.end));
  const idle = slots.map((row) => span - row.reduce((sum, slot) => sum + slot.end - slot.start, 0));
  return {
    entry, slots, span, all,
    events: [0, ...new Set(all.flatMap((slot) => [slot.start, slot.end]))].sort((a, b) => a - b),
    bubble: Math.max(...idle),
    idleShare: idle.reduce((sum, one) => sum + one, 0) / (idle.length * span),
    peaks: slots.map((row) => Math.max(...row.map((slot) => slot.during))),
  };
}

function render({ model, el }) {
  const facts = model.get("facts"), schedules = model.get("schedules"), costs = model.get("costs"), colours = model.get("colours");

  // ---- controls
  const choose = (name, label, texts) => {
    const select = make("select", { class: name, "aria-label": label });
    texts.forEach((text, i) => select.append(make("option", { value: i }, text)));
    return select;
  };
  const range = (name, last, label) => make("input", { type: "range", class: name, min: 0, max: last, step: 1, "aria-label": label });
  const which = choose("schedule_at", "Schedule", facts.names);
  const sliders = {
    ranks_at: range("ranks_at", facts.ranks.length - 1, "ranks of the pipeline"),
    microbatches_at: range("microbatches_at", facts.rounds.length - 1, "microbatches"),
    cost_at: range("cost_at", costs.length - 1, "communication, as a share of computation"),
  };
  const says = Object.fromEntries(Object.keys(sliders).map((name) => [name, make("output")]));
  const play = make("button", { type: "button", class: "play" });
  const back = make("button", { type: "button", "aria-label": "One event back" }, "◀");
  const forth = make("button", { type: "button", "aria-label": "One event on" }, "▶");
  const place = make("input", { type: "range", class: "share", min: 0, max: 1, step: 0.001, "aria-label": "Moment of the step" });
  const pace = choose("pace", "Pace", PACES.map(([text]) => text));
  pace.value = 1;
  const canvas = make("canvas", { role: "img", tabindex: 0 });
  const said = make("p", { class: "said" }), score = make("p", { class: "score" });
  const key = make("p", { class: "key" }, ...Object.entries(WORDS).map(([phase, words]) => make("span", {}, make("i", { style: `background: ${colours[phase]}` }), `${phase}, ${words}`)),
    make("span", {}, make("i", { style: `background: ${colours.idle}` }), "idle"), make("span", {}, make("i", { style: `background: ${colours["F lighter"]}` }), make("i", { style: `background: ${colours["B lighter"]}` }), "lighter: second stage or other direction"));
  const label = (text, name) => make("label", {}, text, sliders[name], says[name]);
  const root = make(
    "div",
    { class: "dsv3-schedule", role: "group", "aria-label": "Schedule player" },
    make("style", {}, STYLE),
    make("div", { class: "row" }, which, label("ranks", "ranks_at"), label("microbatches", "microbatches_at"), label("communication", "cost_at")),
    make("div", { class: "row" }, play, back, forth, place, pace),
    canvas, key, said, score,
  );
  el.replaceChildren(root);
  const scale = Math.max(SHARP, globalThis.devicePixelRatio || 1); // small numbers stay legible where the picture is made narrower
  canvas.width = WIDE * scale;
  const still = make("canvas"); // the whole step, drawn once
  still.width = canvas.width;

  // ---- where the reader stands
  let run = null, playing = false, began = 0, from = 0;
  let share = clamp(model.get("share")), pointed = null; // where the film stands, and the op under the mouse
  let asked = 0, drawn = 0;

  function clamp(value) {
    return Math.max(0, Math.min(1, value));
  }
  const row = () => Math.min(ROW, TIMES[3] / run.entry.ranks);
  const across = (time) => TIMES[0] + (time / run.span) * TIMES[2];

  /** Where an op stands in the picture: x, y, width, height. */
  function boxOf(slot, op) {
    const high = row() * 0.86, part = high / slot.ops.length;
    return [across(slot.start), TIMES[1] + slot.rank * row() + row() * 0.07 + part * slot.ops.indexOf(op), across(slot.end) - across(slot.start), part];
  }

  // ---- drawing
  const ask = () => { asked ||= requestAnimationFrame(draw); };

  function words(pen, text, x, y, { align = "left", colour = INK, font = FONT } = {}) {
    [pen.font, pen.textAlign, pen.fillStyle] = [font, align, colour];
    pen.fillText(text, x, y);
  }

  function drawStill() {
    const { entry } = run, pen = still.getContext("2d");
    canvas.height = still.height = scale * (TIMES[1] + entry.ranks * row() + FOOT); // which also wipes them
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.fillStyle = "white";
    pen.fillRect(0, 0, WIDE, still.height);
    words(pen, "time →", TIMES[0], TIMES[1] - 14, { colour: QUIET });
    words(pen, "activations", KEPT[0], KEPT[1] - 14, { colour: QUIET });
    words(pen, "rank", TIMES[0] - 8, TIMES[1] - 14, { colour: QUIET, align: "right" });
    for (let rank = 0; rank < entry.ranks; rank++) {
      pen.fillStyle = colours.idle;
      pen.fillRect(TIMES[0], TIMES[1] + (rank + 0.07) * row(), TIMES[2], row() * 0.86);
      words(pen, rank, TIMES[0] - 8, TIMES[1] + (rank + 0.5) * row() + 5, { align: "right", colour: QUIET });
    }
    for (const slot of run.all) {
      for (const op of slot.ops) {
        const [x, y, wide, high] = boxOf(slot, op), second = op.direction || Math.floor(op.stage / entry.ranks) % 2;
        pen.fillStyle = colours[second ? `${op.phase} lighter` : op.phase];
        pen.fillRect(x, y, wide, high);
        if (wide > 6) { // thin boxes would be all border
          [pen.strokeStyle, pen.lineWidth] = ["white", 0.7];
          pen.strokeRect(x, y, wide, high);
        }
        const size = Math.min(14, high - 2, (wide - 1) / (0.62 * `${op.microbatch}`.length));
        if (size >= 8) words(pen, op.microbatch, x + wide / 2, y + high / 2 + size * 0.36, { align: "center", font: `${size}px system-ui, sans-serif` });
      }
      if (slot.ops.length > 1) {
        const [x, y, wide, high] = boxOf(slot, slot.ops[0]);
        [pen.strokeStyle, pen.lineWidth] = [INK, wide > 6 ? 1 : 0.3];
        pen.strokeRect(x, y, wide, 2 * high);
      }
    }
  }

  const slotAt = (rank, time) => run.slots[rank].findLast((slot) => slot.start <= time + NEAR);
  function kept(rank, time) {
    const slot = slotAt(rank, time);
    return slot ? (slot.end <= time + NEAR ? slot.after : slot.during) : 0;
  }

  function draw() {
    asked = 0;
    if (playing) {
      share = from + (performance.now() - began) / 1000 / PACES[pace.value][1];
      if (share >= 1) stop();
    }
    const now = share * run.span, pen = canvas.getContext("2d");
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.drawImage(still, 0, 0);
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    const x = across(now), bottom = run.entry.ranks * row();
    pen.fillStyle = "rgba(255, 255, 255, 0.72)"; // what is still to come is pale
    pen.fillRect(x, TIMES[1], TIMES[0] + TIMES[2] - x, bottom);
    if (pointed) drawPath(pen);
    pen.fillStyle = colours.now;
    pen.fillRect(x - 1, TIMES[1], 2, bottom);
    const most = Math.max(...run.peaks), unit = (KEPT[2] - 30) / most;
    run.peaks.forEach((peak, rank) => {
      const y = KEPT[1] + (rank + 0.07) * row(), high = row() * 0.86, count = share < 1 ? kept(rank, now) : peak; // at the end all are gone: the most stands there
      [pen.strokeStyle, pen.lineWidth, pen.fillStyle] = [QUIET, 1, OWN];
      pen.fillRect(KEPT[0], y, count * unit, high);
      pen.strokeRect(KEPT[0], y, peak * unit, high);
      words(pen, count, KEPT[0] + peak * unit + 5, y + high / 2 + 5);
    });
    tell(now);
    root.dataset.share = share;
    root.dataset.drawn = ++drawn;
    if (playing) ask();
  }

  /** The way of the microbatch under the mouse: its boxes, and a line through them in the order of time. */
  function drawPath(pen) {
    const mine = run.all.flatMap((slot) => slot.ops.map((op) => [slot, op]))
      .filter(([, op]) => op.microbatch === pointed.op.microbatch && op.direction === pointed.op.direction)
      .sort(([a], [b]) => a.start - b.start);
    [pen.strokeStyle, pen.lineWidth] = [INK, 2.5];
    for (const [slot, op] of mine) pen.strokeRect(...boxOf(slot, op));
    [pen.strokeStyle, pen.lineWidth] = [colours.now, 1.5];
    pen.beginPath();
    for (const [slot, op] of mine.filter(([, op]) => op.phase !== "W")) {
      const [x, y, wide, high] = boxOf(slot, op);
      pen.lineTo(x + wide / 2, y + high / 2);
    }
    pen.stroke();
  }

  const named = (op) => `${WORDS[op.phase]} of microbatch ${op.microbatch}${op.direction ? " (other direction)" : ""} at stage ${op.stage}`;

  /** What the picture says, in words; a voice hears it when the film stands. */
  function tell(now) {
    const busy = run.slots.filter((row, rank) => (slotAt(rank, now)?.end ?? 0) > now + NEAR).length;
    let text = share < 1
      ? `Time ${short(now)} of ${short(run.span)}: ${busy} of ${run.entry.ranks} ranks compute; the fullest keeps `
        + `${Math.max(...run.peaks.map((_, rank) => kept(rank, now)))} activations.`
      : `The whole step, time 0 to ${short(run.span)}; the bars show the most activations that each rank keeps.`;
    if (pointed) {
      const { slot } = pointed;
      text += ` Rank ${slot.rank}, ${short(slot.start)} to ${short(slot.end)}: ${slot.ops.map(named).join(", overlapped with ")}.`;
    }
    const stands = !playing;
    said.setAttribute("aria-live", stands ? "polite" : "off");
    if (said.textContent !== text) said.textContent = text;
    const { entry } = run, formula = entry.formula[model.get("cost_at")];
    score.textContent = `A step takes ${short(run.span)}; bubble ${short(run.bubble)}, by the formula ${short(formula)}; `
      + `${(100 * run.idleShare).toFixed(1)}% of all ranks' time is idle. A rank holds ${entry.parameters} of ${entry.stages} stages and `
      + `at most ${Math.max(...run.peaks)} activations of a stage.`;
    const title = `${entry.name}, ${entry.ranks} ranks, ${entry.microbatches} microbatches. ${text}`;
    if (stands && canvas.getAttribute("aria-label") !== title) canvas.setAttribute("aria-label", title);
    place.value = share;
    place.setAttribute("aria-valuetext", `time ${short(share * run.span)}`);
    const does = playing ? "❚❚ pause" : share >= 1 ? "↺ again" : "► play";
    if (play.textContent !== does) play.textContent = does;
  }

  // ---- moving
  function show() {
    const [schedule, ranks, rounds, cost] = CONTROLS.map((name) => model.get(name));
    const entry = schedules.find((each) => each.name === facts.names[schedule] && each.ranks === facts.ranks[ranks]
      && each.microbatches === facts.rounds[rounds] * facts.ranks[ranks]);
    if (run?.entry !== entry || run.cost !== cost) {
      run = { ...simulate(entry, costs[cost]), cost };
      pointed = null;
      drawStill();
    }
    which.value = schedule;
    for (const [name, slider] of Object.entries(sliders)) slider.value = model.get(name);
    says.ranks_at.textContent = entry.ranks;
    says.microbatches_at.textContent = entry.microbatches;
    says.cost_at.textContent = costs[cost].name;
    for (const [name, slider] of Object.entries(sliders)) slider.setAttribute("aria-valuetext", says[name].textContent);
    ask();
  }

  /** Tell Python where the reader stands. A film that plays does not. */
  function keep(values) {
    for (const [name, value] of Object.entries(values)) if (model.get(name) !== value) model.set(name, value);
    model.save_changes();
    show();
  }

  function start() {
    if (share >= 1) share = 0;
    [playing, began, from] = [true, performance.now(), share];
    ask();
  }

  function go(to) {
    [playing, share] = [false, clamp(to)];
    keep({ share });
  }

  const stop = () => go(share);

  /** The next moment at which a slot begins or ends, in either sense. */
  function event(sense) {
    const now = share * run.span, { events } = run;
    const next = sense > 0 ? events.find((time) => time > now + NEAR) : events.findLast((time) => time < now - NEAR);
    return next === undefined ? share : next / run.span;
  }

  /** The share and the op under a pointer. */
  function under(event) {
    const box = canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) * WIDE) / box.width, y = ((event.clientY - box.top) * WIDE) / box.width;
    const rank = Math.floor((y - TIMES[1]) / row()), at = (x - TIMES[0]) / TIMES[2];
    if (at < 0 || at > 1 || rank < 0 || rank >= run.entry.ranks) return [-1, null];
    const slot = run.slots[rank].find((each) => each.start <= at * run.span && at * run.span < each.end);
    const op = slot?.ops.find((each) => y < boxOf(slot, each)[1] + boxOf(slot, each)[3]) ?? slot?.ops.at(-1);
    return [at, slot ? { slot, op } : null];
  }

  canvas.addEventListener("pointermove", (event) => {
    const [, what] = under(event);
    if (what?.op === pointed?.op) return;
    pointed = what;
    ask();
  });
  canvas.addEventListener("pointerleave", () => { pointed = null; ask(); });
  canvas.addEventListener("click", (event) => { const [at] = under(event); if (at >= 0) go(at); });
  which.addEventListener("change", () => keep({ schedule_at: Number(which.value) }));
  for (const [name, slider] of Object.entries(sliders)) slider.addEventListener("input", () => keep({ [name]: Number(slider.value) }));
  place.addEventListener("input", () => go(Number(place.value)));
  play.addEventListener("click", () => (playing ? stop() : start()));
  back.addEventListener("click", () => go(event(-1)));
  forth.addEventListener("click", () => go(event(1)));
  pace.addEventListener("change", start);
  root.addEventListener("keydown", (pressed) => {
    pressed.stopPropagation(); // JupyterLab takes arrow keys and letters for its own
    if (pressed.target.closest("input, select")) return;
    const steps = { ArrowLeft: () => event(-1), ArrowRight: () => event(1), Home: () => 0, End: () => 1 };
    if (pressed.key in steps) go(steps[pressed.key]());
    else if (pressed.key === " " && !pressed.target.closest("button")) playing ? stop() : start();
    else return;
    pressed.preventDefault();
  });

  function moved() { // by Python
    if (model.get("share") === share) return;
    [playing, share] = [false, clamp(model.get("share"))];
    show();
  }
  const listeners = { "change:share": moved, ...Object.fromEntries(CONTROLS.map((name) => [`change:${name}`, show])) };
  for (const [event, call] of Object.entries(listeners)) model.on(event, call);
  show();
  return () => {
    playing = false;
    cancelAnimationFrame(asked);
    for (const [event, call] of Object.entries(listeners)) model.off(event, call);
  };
}

export default { render };
