// The cluster map, on the page: a token's copies travel from its GPU to those of its experts.
// Reads from its model: scene (boxes and colours), words, home, limits, chosen, journeys; keeps there: token, limit, once_per.
// Boxes come from figures/cluster_map.py, which draws the same picture with matplotlib; `path` below is that file's path.

const SVG = "http://www.w3.org/2000/svg";
const PACES = { slow: 0.4, steady: 1, fast: 3 }; // how fast the map's clock runs
const SLOT = 150, FLY = 620, HOP = 320, REST = 500; // ms: between two departures, over the network, inside a node, at the end
const LONGEST = 100; // ms that the clock moves on in one frame, at most: a page that slept does not skip tokens
const STYLE = `
.dsv3-cluster { background: white; color: black; padding: 8px; font: 15px/1.5 system-ui, sans-serif; max-width: 876px; }
.dsv3-cluster .row { display: flex; flex-wrap: wrap; gap: 6px 12px; align-items: center; margin-bottom: 8px; }
.dsv3-cluster label { display: inline-flex; gap: 6px; align-items: center; }
.dsv3-cluster button, .dsv3-cluster select { font: inherit; padding: 2px 10px; border: 1px solid #767676; border-radius: 4px;
  background: white; color: black; }
.dsv3-cluster input[type=range] { accent-color: #0072B2; }
.dsv3-cluster :focus-visible { outline: 3px solid #0072B2; outline-offset: 1px; }
.dsv3-cluster .words { white-space: pre-wrap; overflow-wrap: anywhere; font: 15px/1.7 ui-monospace, monospace; margin-bottom: 8px; }
.dsv3-cluster .words span { cursor: pointer; border-radius: 3px; }
.dsv3-cluster .words .here { background: #E69F00; }
.dsv3-cluster .words .peek { outline: 2px solid #0072B2; }
.dsv3-cluster .words .visits { box-shadow: inset 0 -4px #D55E00; }
.dsv3-cluster svg { display: block; width: 100%; height: auto; min-width: 620px; }
.dsv3-cluster .stage { overflow-x: auto; }
.dsv3-cluster svg text { font: 15px system-ui, sans-serif; pointer-events: none; }
.dsv3-cluster .wires, .dsv3-cluster .copies { pointer-events: none; }
.dsv3-cluster .pointed { stroke: black; stroke-width: 3; }
.dsv3-cluster p { margin: 6px 0 0; }
.dsv3-cluster .detail { min-height: 3em; color: #5F5F5F; }
`;

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function draw(name, attributes = {}, text = "") {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

const count = (number, thing) => `${number} ${thing}${number === 1 ? "" : "s"}`;

/** What lies where, and how a copy travels: all from the scene. */
function geography(scene) {
  const nodeOf = (gpu) => Math.floor(gpu / scene.gpus);
  const gpuOf = (expert) => Math.floor(expert / scene.experts);
  const centre = (gpu) => { const [x, y, w, h] = scene.gpu_boxes[gpu]; return [x + w / 2, y + h / 2]; };
  const middle = (scene.nodes - 1) / 2;

  function path(start, end) {
    const [[x, y], [u, v]] = [centre(start), centre(end)];
    const [sender, receiver] = [nodeOf(start), nodeOf(end)];
    if (sender === receiver) return [[x, y], [u, v]];
    const out = x + scene.spread * (receiver - middle), into = u + scene.spread * (sender - middle);
    const lane = scene.road[1] + scene.strip + scene.lane * (receiver + 0.5);
    return [[out, y], [out, lane], [into, lane], [into, v]];
  }

  /** The copies of one journey: path, departure and arrival in ms. Inside a node a copy leaves when it has come there. */
  function timetable([network, inside], home) {
    const arrived = new Map([[home, 0]]), left = new Map();
    const copies = network.map(([start, end], i) => {
      const arrival = i * SLOT + FLY;
      arrived.set(end, Math.min(arrived.get(end) ?? Infinity, arrival));
      return { kind: "network", start, end, points: path(start, end), departure: i * SLOT, arrival };
    });
    for (const [start, end] of inside) {
      const before = left.get(start) ?? 0; // what a GPU hands on leaves one after the other, faster than over the network
      left.set(start, before + 1);
      const departure = (arrived.get(start) ?? 0) + before * SLOT / scene.faster;
      copies.push({ kind: "inside", start, end, points: path(start, end), departure, arrival: departure + HOP });
      arrived.set(end, Math.min(arrived.get(end) ?? Infinity, departure + HOP));
    }
    return { copies, arrived, end: Math.max(0, ...copies.map((copy) => copy.arrival)) + REST };
  }
  return { nodeOf, gpuOf, timetable };
}

/** The point that lies a share of the way along a path. */
function along(points, share) {
  const lengths = points.slice(1).map(([x, y], i) => Math.hypot(x - points[i][0], y - points[i][1]));
  let rest = share * lengths.reduce((sum, length) => sum + length, 0);
  for (let i = 0; i < lengths.length; i++) {
    if (rest <= lengths[i] && lengths[i] > 0) {
      const [[x, y], [u, v]] = [points[i], points[i + 1]];
      return [x + (u - x) * rest / lengths[i], y + (v - y) * rest / lengths[i]];
    }
    rest -= lengths[i];
  }
  return points[points.length - 1];
}

function makeStage(scene) {
  const { colours } = scene;
  const svg = draw("svg", { viewBox: `0 0 ${scene.width} ${scene.height}`, role: "img" });
  const box = ([x, y, width, height], attributes) => {
    const node = draw("rect", { x, y, width, height, stroke: colours.line, fill: "white", ...attributes });
    svg.append(node);
    return node;
  };
  const word = (x, y, attributes, text) => {
    const node = draw("text", { x, y, ...attributes }, text);
    svg.append(node);
    return node;
  };
  box(scene.road, { fill: "#EAF2F8", stroke: "none" });
  const nodes = scene.node_boxes.map((place, number) => {
    const [x, y, width, height] = place;
    const frame = box(place, { class: "node", "data-node": number });
    const halo = { "paint-order": "stroke", stroke: "white", "stroke-width": 4 };
    const name = word(x + scene.pad, y + 18, halo, `node ${number}`);
    const total = word(x + width - scene.pad, y + 18, { ...halo, "text-anchor": "end", class: "received" }, "");
    const room = [x + scene.pad, y + height - scene.foot + 8, width - 2 * scene.pad, 7];
    box(room, { fill: colours.idle, stroke: "none", "pointer-events": "none" });
    const bar = box([room[0], room[1], 0, room[3]], { fill: colours.network, stroke: "none", class: "bar", "pointer-events": "none" });
    return { frame, name, total, bar, width: room[2] };
  });
  const gpus = scene.gpu_boxes.map((place, number) => box(place, { class: "gpu", "data-gpu": number }));
  const experts = scene.expert_boxes.map((place, number) =>
    box(place, { class: "expert", "data-expert": number, "stroke-width": 0.6 }));
  const wires = draw("g", { class: "wires", fill: "none", "stroke-linejoin": "round" });
  const copies = draw("g", { class: "copies" });
  svg.append(wires, copies, ...nodes.flatMap(({ name, total }) => [name, total])); // words stand upon wires
  const [x, y, width] = scene.road;
  const sign = { "paint-order": "stroke", stroke: "#EAF2F8", "stroke-width": 4 };
  word(x + width - 8, y + 17, { "text-anchor": "end", fill: colours.quiet, ...sign }, "network between the nodes");
  const rule = word(x + 8, y + 17, { fill: colours.quiet, class: "rule", ...sign }, "");
  return { svg, nodes, gpus, experts, wires, copies, rule };
}

function render({ model, el }) {
  const scene = model.get("scene");
  const { colours } = scene;
  const [words, home, limits] = ["words", "home", "limits"].map((name) => model.get(name));
  const { nodeOf, gpuOf, timetable } = geography(scene);
  const stage = makeStage(scene);
  const still = globalThis.matchMedia?.("(prefers-reduced-motion: reduce)").matches ?? false;

  // ---- controls
  const back = make("button", { type: "button", "aria-label": "One token back" }, "◀");
  const play = make("button", { type: "button", class: "play" });
  const forth = make("button", { type: "button", "aria-label": "One token on" }, "▶");
  const place = make("input", { type: "range", class: "place", min: 0, max: words.length - 1, "aria-label": "Token" });
  const pace = make("select", { "aria-label": "Pace, chosen to play" }, ...Object.keys(PACES).map((name) => make("option", { value: name }, name)));
  pace.value = "steady";
  const most = make("input", { type: "range", class: "most", min: 0, max: limits.length - 1, "aria-label": "At most so many nodes" });
  const mostSaid = make("output", {});
  const way = make("select", { class: "way", "aria-label": "A copy for each" },
    make("option", { value: "node" }, "node"), make("option", { value: "expert" }, "expert"));
  const text = make("div", { class: "words" });
  const ground = make("div", { class: "stage", tabindex: 0, role: "group",
    "aria-label": "Map: left and right go from token to token, up and down change the limit, space plays, a digit tells of a node" }, stage.svg);
  const said = make("p", { class: "said" });
  const detail = make("p", { class: "detail", "aria-live": "polite" });
  const key = make("p", { class: "key" });
  for (const [colour, name] of [["home", "the token's own GPU"], ["chosen", "its experts"], ["network", "a copy between nodes"], ["inside", "a copy inside a node"]]) {
    const mark = make("span", { "aria-hidden": "true" }, "■ ");
    mark.style.color = colours[colour];
    key.append(mark, `${name}  `);
  }
  const root = make("div", { class: "dsv3-cluster", role: "group", "aria-label": "Cluster map: a token's copies travel to its experts" },
    make("style", {}, STYLE),
    make("div", { class: "row" }, back, play, forth, place, pace),
    make("div", { class: "row" }, limits.length > 1 ? make("label", {}, "At most ", most, mostSaid) : make("span", {}, "At most ", mostSaid),
      make("label", {}, "a copy for each ", way)),
    text, ground, key, said, detail);
  el.replaceChildren(root);

  const spans = words.map((word, i) => {
    const span = make("span", {}, word.replaceAll("¶", "¶\n"));
    span.addEventListener("pointerenter", () => { peek = i; show(); });
    span.addEventListener("pointerleave", () => { peek = -1; show(); });
    span.addEventListener("click", () => go(i));
    return span;
  });
  text.append(...spans);

  // ---- what is shown
  let token = Math.min(model.get("token"), words.length - 1);
  let limit = Math.max(0, limits.indexOf(model.get("limit")));
  let per = model.get("once_per");
  let peek = -1; // the word under the pointer
  let clock = Infinity; // ms since the token set out; Infinity: all its copies have arrived
  let playing = false, frame = 0, last = 0;
  let telling = false; // Python, which must not be taken for Python moving us
  let trip = null; // the timetable that is drawn, and its marks

  const chosenBy = (i) => model.get("chosen")[limit][i];
  const journeyOf = (i) => model.get("journeys")[per][limit][i];

  /** Draw another token, limit or way to send: everything but the copies' places. */
  function show() {
    const i = peek >= 0 ? peek : token;
    const table = timetable(journeyOf(i), home[i]);
    const marks = table.copies.map((copy) => {
      const colour = colours[copy.kind];
      const wire = draw("polyline", { points: copy.points.map((point) => point.join(",")).join(" "), stroke: colour,
        "stroke-width": copy.kind === "network" ? 2.5 : 2, class: copy.kind, "data-start": copy.start, "data-end": copy.end });
      return { ...copy, wire, dot: draw("circle", { r: 5.5, fill: colour, stroke: "white", "stroke-width": 1.5 }) };
    });
    stage.wires.replaceChildren(...marks.map((mark) => mark.wire));
    stage.copies.replaceChildren(...marks.map((mark) => mark.dot));
    trip = { i, marks, chosen: new Set(chosenBy(i)), arrived: table.arrived, end: table.end };

    const reached = new Set(chosenBy(i).map((expert) => nodeOf(gpuOf(expert))));
    const received = Array(scene.nodes).fill(0);
    for (let j = 0; j <= i; j++) for (const [, gpu] of journeyOf(j)[0]) received[nodeOf(gpu)]++;
    const busiest = Math.max(1, ...received);
    trip.received = received;
    stage.nodes.forEach(({ frame, name, total, bar, width }, number) => {
      const here = reached.has(number);
      frame.setAttribute("stroke", here ? "black" : colours.line);
      frame.setAttribute("stroke-width", here ? 2 : 1);
      for (const label of [name, total]) label.setAttribute("fill", here ? "black" : colours.quiet);
      total.textContent = `received ${received[number]}`;
      bar.setAttribute("width", width * received[number] / busiest);
    });
    stage.gpus.forEach((gpu, number) => gpu.setAttribute("fill", number === home[i] ? colours.home : "white"));
    stage.rule.textContent = `M = ${limits[limit]}, a copy for each ${per}`;
    spans.forEach((span, j) => { span.classList.toggle("here", j === token); span.classList.toggle("peek", j === peek); });

    place.value = token;
    place.setAttribute("aria-valuetext", `token ${token + 1} of ${words.length}`);
    most.value = limit;
    most.setAttribute("aria-valuetext", `at most ${count(limits[limit], "node")}`);
    mostSaid.textContent = count(limits[limit], "node");
    way.value = per;
    play.textContent = playing ? "❚❚ pause" : "► play";
    const [network, inside] = journeyOf(i);
    const sentence = `Token ${i + 1} of ${words.length}, “${words[i]}”, on node ${nodeOf(home[i])}: ${count(chosenBy(i).length, "expert")} on `
      + `${count(reached.size, "node")}; ${count(network.length, "message")} between nodes, ${inside.length} inside.`;
    said.setAttribute("aria-live", playing || peek >= 0 ? "off" : "polite"); // a voice cannot follow the play
    said.textContent = sentence;
    stage.svg.setAttribute("aria-label", sentence);
    travel(peek >= 0 || still ? Infinity : clock);
  }

  /** Put the copies where they are at a time, and light the experts that they have come to. */
  function travel(now) {
    for (const { points, departure, arrival, wire, dot } of trip.marks) {
      const gone = now >= departure;
      const share = Math.min(1, Math.max(0, (now - departure) / (arrival - departure)));
      const [x, y] = along(points, now === Infinity ? 1 : share);
      dot.setAttribute("transform", `translate(${x.toFixed(2)} ${y.toFixed(2)})`);
      dot.setAttribute("visibility", gone ? "visible" : "hidden");
      wire.setAttribute("visibility", gone ? "visible" : "hidden");
    }
    stage.experts.forEach((cell, expert) => {
      const lit = trip.chosen.has(expert) && now >= (trip.arrived.get(gpuOf(expert)) ?? 0);
      const fill = lit ? colours.chosen : colours.idle;
      if (cell.getAttribute("fill") !== fill) cell.setAttribute("fill", fill);
    });
  }

  // ---- time
  function tick(now) {
    if (!playing) return;
    frame = requestAnimationFrame(tick);
    const passed = Math.min(LONGEST, last ? now - last : 0) * PACES[pace.value];
    last = now;
    if (peek >= 0) return; // who looks at another word stops the clock
    clock += passed;
    if (clock < trip.end) { if (!still) travel(clock); }
    else if (token + 1 < words.length) { token++; clock = 0; show(); }
    else set(false);
  }

  function set(on) {
    playing = on;
    cancelAnimationFrame(frame);
    last = 0;
    if (on) {
      if (clock === Infinity && token === words.length - 1) token = 0;
      clock = 0;
      frame = requestAnimationFrame(tick);
    } else {
      clock = Infinity;
      keep();
    }
    show();
  }

  /** Tell Python where the reader stands. */
  function keep() {
    telling = true;
    for (const [name, value] of [["token", token], ["limit", limits[limit]], ["once_per", per]]) {
      if (model.get(name) !== value) model.set(name, value);
    }
    telling = false;
    model.save_changes();
  }

  function go(i) {
    token = Math.max(0, Math.min(i, words.length - 1));
    set(false);
  }

  function change(newLimit, newWay) {
    limit = Math.max(0, Math.min(newLimit, limits.length - 1));
    per = newWay;
    if (playing) clock = 0; // the token sets out again
    keep();
    show();
  }

  function moved() { // by Python
    if (telling) return;
    const [i, m, sent] = [model.get("token"), limits.indexOf(model.get("limit")), model.get("once_per")];
    if ((i === token && m === limit && sent === per) || m < 0 || i >= words.length) return;
    [token, limit, per] = [i, m, sent];
    clock = playing ? 0 : Infinity;
    show();
  }

  // ---- what lies under the pointer
  function describe(kind, number) {
    const node = kind === "node" ? number : nodeOf(kind === "gpu" ? number : gpuOf(number));
    const has = { node: (e) => nodeOf(gpuOf(e)) === number, gpu: (e) => gpuOf(e) === number, expert: (e) => e === number }[kind];
    const guests = words.map((_, i) => chosenBy(i).some(has));
    spans.forEach((span, i) => span.classList.toggle("visits", guests[i]));
    const own = [...trip.chosen].filter(has);
    const gpu = kind === "node" ? "" : `, GPU ${(kind === "gpu" ? number : gpuOf(number)) % scene.gpus}`;
    const who = kind === "expert" ? `Expert ${number} on node ${node}${gpu}` : `Node ${node}${gpu}`;
    const here = own.length ? `: the token comes here for expert${own.length > 1 ? "s" : ""} ${own.join(", ")}` : ": not on this token's way";
    const all = `${count(guests.filter(Boolean).length, "token")} of ${words.length} come here`;
    detail.textContent = `${who}${here}. ${all}${kind === "node" ? `; received so far: ${trip.received[node]}` : ""}.`;
  }

  function forget() {
    stage.svg.querySelector(".pointed")?.classList.remove("pointed");
    spans.forEach((span) => span.classList.remove("visits"));
    detail.textContent = "Point at a word, an expert, a GPU or a node.";
  }

  stage.svg.addEventListener("pointerover", (event) => {
    const box = event.target.closest(".expert, .gpu, .node");
    if (!box) return forget();
    if (box.classList.contains("pointed")) return;
    forget();
    box.classList.add("pointed");
    for (const kind of ["expert", "gpu", "node"]) if (box.dataset[kind] !== undefined) describe(kind, Number(box.dataset[kind]));
  });
  stage.svg.addEventListener("pointerleave", forget);

  // ---- wiring
  back.addEventListener("click", () => go(token - 1));
  forth.addEventListener("click", () => go(token + 1));
  place.addEventListener("input", () => go(Number(place.value)));
  play.addEventListener("click", () => set(!playing));
  pace.addEventListener("change", () => set(true));
  most.addEventListener("input", () => change(Number(most.value), per));
  way.addEventListener("change", () => change(limit, way.value));
  root.addEventListener("keydown", (event) => {
    event.stopPropagation(); // JupyterLab takes arrow keys and letters for its own
    if (event.target !== ground || event.ctrlKey || event.metaKey || event.altKey) return;
    const acts = {
      ArrowLeft: () => go(token - 1), ArrowRight: () => go(token + 1), Home: () => go(0), End: () => go(words.length - 1),
      ArrowUp: () => change(limit + 1, per), ArrowDown: () => change(limit - 1, per), " ": () => set(!playing),
    };
    const node = /^\d$/.test(event.key) ? Number(event.key) : -1;
    if (node >= 0 && node < scene.nodes) {
      forget();
      stage.nodes[node].frame.classList.add("pointed");
      describe("node", node);
    } else if (acts[event.key]) acts[event.key]();
    else return;
    event.preventDefault();
  });
  const events = ["change:token", "change:limit", "change:once_per"];
  for (const event of events) model.on(event, moved);
  forget();
  show();
  return () => {
    playing = false;
    cancelAnimationFrame(frame);
    for (const event of events) model.off(event, moved);
  };
}

export default { render };
