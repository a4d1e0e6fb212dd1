// The collective player: ranks one below the other, each with its row of pieces; pieces fly where a round sends them, and bars
// count what each rank has sent. Reads from its model: films (states, rounds, lengths, sent), facts, colours, and where the reader
// stands: film_at, ranks_at, moment (in rounds). All films arrive at once, so that nothing asks Python.

const WIDE = 900, ROW = 52, LEFT = 70, TOP = 12, FOOT = 34, BARS = 600; // of the picture, in its own units
const FONT = "15px system-ui, sans-serif", SHARP = 2, ROUND = { slow: 2400, normal: 1200, fast: 500 }; // ms of a round
const INK = "#1a1a1a", QUIET = "#5F5F5F", EDGE = "#B8B8B8", OWN = "#0072B2";

const STYLE = `
.dsv3-collective { background: white; color: ${INK}; padding: 8px; font: ${FONT}; line-height: 1.45; max-width: ${WIDE + 16}px; box-sizing: border-box; }
.dsv3-collective .row { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; margin-bottom: 6px; }
.dsv3-collective label { display: inline-flex; gap: 6px; align-items: center; }
.dsv3-collective button, .dsv3-collective select { font: inherit; padding: 2px 10px; border: 1px solid #767676; border-radius: 4px; background: white; color: ${INK}; }
.dsv3-collective input { accent-color: ${OWN}; width: 90px; }
.dsv3-collective .moment { flex: 1 1 160px; }
.dsv3-collective output { min-width: 1.4em; }
.dsv3-collective :focus-visible { outline: 3px solid ${OWN}; outline-offset: 1px; }
.dsv3-collective canvas { display: block; width: 100%; height: auto; }
.dsv3-collective p { margin: 4px 0 0; }
.dsv3-collective .said { min-height: 2.9em; }
`;

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function render({ model, el }) {
  const films = model.get("films"), facts = model.get("facts"), colours = model.get("colours");

  // ---- controls
  const choose = (name, label, texts) => {
    const select = make("select", { class: name, "aria-label": label });
    texts.forEach((text, i) => select.append(make("option", { value: i }, text)));
    return select;
  };
  const which = choose("film_at", "Collective", facts.names), pace = choose("pace", "Pace", Object.keys(ROUND));
  const size = make("input", { type: "range", class: "ranks_at", min: 0, max: facts.ranks.length - 1, step: 1, "aria-label": "ranks" });
  const says = make("output"), play = make("button", { type: "button", class: "play" });
  const back = make("button", { type: "button", "aria-label": "One round back" }, "◀");
  const forth = make("button", { type: "button", "aria-label": "One round on" }, "▶");
  const place = make("input", { type: "range", class: "moment", min: 0, step: 0.01, "aria-label": "Moment, in rounds" });
  const canvas = make("canvas", { role: "img", tabindex: 0 }), said = make("p", { class: "said" }), score = make("p", { class: "score" });
  const root = make(
    "div",
    { class: "dsv3-collective", role: "group", "aria-label": "Collective player" },
    make("style", {}, STYLE),
    make("div", { class: "row" }, which, make("label", {}, "ranks", size, says)),
    make("div", { class: "row" }, play, back, forth, place, pace),
    canvas, said, score,
  );
  pace.value = 1;
  el.append(root);

  let film, moment = model.get("moment"), playing = false, began = 0, from = 0, asked = 0, drawn = 0;
  const last = () => film.rounds.length, clamp = (value) => Math.min(last(), Math.max(0, value));
  const short = (value) => Number(value.toFixed(2)).toString();
  const ask = () => { if (!asked) asked = requestAnimationFrame(draw); };

  // ---- the picture
  function cell(pen, x, y, wide, [number, ranks], edge) {
    pen.fillStyle = "white";
    pen.fillRect(x, y, wide, wide);
    ranks.forEach((rank, i) => {
      pen.fillStyle = colours[rank % colours.length];
      pen.fillRect(x + (i * wide) / ranks.length, y, wide / ranks.length, wide);
    });
    [pen.strokeStyle, pen.lineWidth] = [edge ?? (ranks.length ? QUIET : EDGE), edge ? 2.5 : 1];
    pen.strokeRect(x, y, wide, wide);
    if (!ranks.length) return;
    pen.fillStyle = "white";
    pen.beginPath();
    pen.arc(x + wide / 2, y + wide / 2, 10, 0, 7);
    pen.fill();
    [pen.fillStyle, pen.textAlign] = [INK, "center"];
    pen.fillText(number, x + wide / 2, y + wide / 2 + 5);
  }

  function draw(time) {
    asked = 0;
    if (playing) {
      moment = clamp(from + (performance.now() - began) / Object.values(ROUND)[pace.value]);
      if (moment >= last()) stop();
    }
    const n = film.ranks, high = TOP + n * ROW + FOOT, step = Math.min(ROW, (BARS - LEFT - 60) / n), side = Math.min(step, ROW) - 8;
    if (canvas.height !== high * SHARP || canvas.width !== WIDE * SHARP) [canvas.width, canvas.height] = [WIDE * SHARP, high * SHARP];
    const pen = canvas.getContext("2d"), done = Math.floor(moment), part = moment - done, state = film.states[done];
    pen.setTransform(SHARP, 0, 0, SHARP, 0, 0);
    pen.font = FONT;
    pen.fillStyle = "white";
    pen.fillRect(0, 0, WIDE, high);
    const at = (rank, spot) => [LEFT + spot * step, TOP + rank * ROW];
    const moves = part > 0 ? film.rounds[done] : [], gone = new Set(film.leaves[done] ? moves.map(([s, p]) => `${s} ${p}`) : []);
    state.forEach((row, rank) => {
      [pen.fillStyle, pen.textAlign] = [INK, "left"];
      pen.fillText(`rank ${rank}`, 6, TOP + rank * ROW + side / 2 + 5);
      row.forEach((piece, spot) => cell(pen, ...at(rank, spot), side, gone.has(`${rank} ${spot}`) ? [spot, []] : piece));
    });
    const ease = part * part * (3 - 2 * part);
    for (const [source, piece, target, spot] of moves) {
      const [x0, y0] = at(source, piece), [x1, y1] = at(target, spot);
      cell(pen, x0 + (x1 - x0) * ease, y0 + (y1 - y0) * ease, side, state[source][piece], INK);
    }
    const most = Math.max(...film.sent[last()]), unit = (WIDE - BARS - 60) / most;
    for (let rank = 0; rank < n; rank++) {
      const now = film.sent[done][rank] + part * (film.sent[Math.min(done + 1, last())][rank] - film.sent[done][rank]);
      const y = TOP + rank * ROW + side * 0.15;
      [pen.fillStyle, pen.textAlign] = [OWN, "left"];
      pen.fillRect(BARS, y, now * unit, side * 0.7);
      [pen.strokeStyle, pen.lineWidth, pen.fillStyle] = [EDGE, 1, INK];
      pen.strokeRect(BARS, y, film.sent[last()][rank] * unit, side * 0.7);
      pen.fillText(short(now / n), BARS + Math.max(now, film.sent[last()][rank]) * unit + 6, y + side * 0.35 + 5);
    }
    [pen.fillStyle, pen.textAlign] = [INK, "left"];
    pen.fillText("sent, in sizes of a rank's tensor", BARS, high - 12);
    tell(done, part);
    root.dataset.moment = moment;
    root.dataset.drawn = ++drawn;
    if (playing) ask();
  }

  /** What the picture says, in words; a voice hears it when the film stands. */
  function tell(done, part) {
    const stands = !playing, moves = film.rounds[Math.min(done, last() - 1)];
    const pairs = [...new Set(moves.map(([source, , target]) => `${source} to ${target}`))];
    const some = pairs.slice(0, 4).join(", ") + (pairs.length > 4 ? ", ..." : "");
    const text = moment >= last()
      ? `All ${last()} rounds are over; the busiest rank has sent ${short(Math.max(...film.sent[last()]) / film.ranks)} times its tensor.`
      : `${part > 0 ? "In" : "Next"}: round ${done + 1} of ${last()}, ${film.lengths[done]} of ${film.ranks} pieces in a message. Rank ${some}.`;
    said.setAttribute("aria-live", stands ? "polite" : "off");
    if (said.textContent !== text) said.textContent = text;
    const time = film.lengths.reduce((sum, one) => sum + one, 0) / film.ranks;
    score.textContent = `Without latency all rounds together take as long as ${short(time)} times the tensor on one wire.`;
    const title = `${film.name}, ${film.ranks} ranks. ${text}`;
    if (stands && canvas.getAttribute("aria-label") !== title) canvas.setAttribute("aria-label", title);
    place.value = moment;
    place.setAttribute("aria-valuetext", `round ${short(moment)}`);
    const does = playing ? "❚❚ pause" : moment >= last() ? "↺ again" : "► play";
    if (play.textContent !== does) play.textContent = does;
  }

  // ---- moving
  function show() {
    const name = facts.names[model.get("film_at")], ranks = facts.ranks[model.get("ranks_at")];
    film = films.find((each) => each.name === name && each.ranks === ranks);
    moment = clamp(moment);
    which.value = model.get("film_at");
    size.value = model.get("ranks_at");
    says.textContent = ranks;
    size.setAttribute("aria-valuetext", `${ranks} ranks`);
    place.max = last();
    ask();
  }

  /** Tell Python where the reader stands. A film that plays does not. */
  function keep(values) {
    for (const [name, value] of Object.entries(values)) if (model.get(name) !== value) model.set(name, value);
    model.save_changes();
    show();
  }

  function start() {
    if (moment >= last()) moment = 0;
    [playing, began, from] = [true, performance.now(), moment];
    ask();
  }

  function go(to) {
    [playing, moment] = [false, clamp(to)];
    keep({ moment });
  }

  const stop = () => go(moment);
  const on = () => go(Math.floor(moment + 1e-9) + 1), off = () => go(Math.ceil(moment - 1e-9) - 1);
  const other = (values) => { [playing, moment] = [false, 0]; keep({ ...values, moment: 0 }); };
  which.addEventListener("change", () => other({ film_at: Number(which.value) }));
  size.addEventListener("input", () => other({ ranks_at: Number(size.value) }));
  place.addEventListener("input", () => go(Number(place.value)));
  play.addEventListener("click", () => (playing ? stop() : start()));
  back.addEventListener("click", off);
  forth.addEventListener("click", on);
  pace.addEventListener("change", start);
  root.addEventListener("keydown", (pressed) => {
    pressed.stopPropagation(); // JupyterLab takes arrow keys and letters for its own
    if (pressed.target.closest("input, select")) return;
    const steps = { ArrowLeft: off, ArrowRight: on, Home: () => go(0), End: () => go(last()) };
    if (pressed.key in steps) steps[pressed.key]();
    else if (pressed.key === " " && !pressed.target.closest("button")) playing ? stop() : start();
    else return;
    pressed.preventDefault();
  });

  function moved() { // by Python
    if (model.get("moment") === moment) return;
    [playing, moment] = [false, model.get("moment")];
    show();
  }
  const listeners = { "change:moment": moved, "change:film_at": show, "change:ranks_at": show };
  for (const [event, call] of Object.entries(listeners)) model.on(event, call);
  show();
  return () => {
    playing = false;
    cancelAnimationFrame(asked);
    for (const [event, call] of Object.entries(listeners)) model.off(event, call);
  };
}

export default { render };
