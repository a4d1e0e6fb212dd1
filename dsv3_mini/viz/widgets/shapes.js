// The shape microscope, on the page: each element of a small tensor travels from its place before to its place after.
// Places, labels and arrows come from figures/shapes.py, which draws the same picture with matplotlib.

const UNIT = 34; // pixels of a cell
const LEFT = 2.4, TOP = 1.0, BETWEEN = 3.6, BELOW = 1.2, RIGHT = 0.6; // cells around the two arrays
const TICK = 350; // milliseconds from one element to the next
const FLIGHT = 500; // milliseconds that an element travels

const STYLE = `
.dsv3-microscope { background: white; color: #1a1a1a; font: 15px/1.45 system-ui, sans-serif; padding: 10px; max-width: 62rem; }
.dsv3-microscope .row { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; margin-bottom: 8px; }
.dsv3-microscope label { display: inline-flex; gap: 6px; align-items: center; max-width: 100%; }
.dsv3-microscope select { min-width: 0; }
.dsv3-microscope .stage { overflow-x: auto; }
.dsv3-microscope button, .dsv3-microscope select {
  font: inherit; padding: 3px 10px; background: white; color: #1a1a1a; border: 1px solid #767676; border-radius: 4px; max-width: 100%;
}
.dsv3-microscope button:disabled { color: #767676; border-color: #cccccc; }
.dsv3-microscope :focus-visible { outline: 3px solid #0072B2; outline-offset: 2px; }
.dsv3-microscope svg { display: block; width: 100%; height: auto; font: 15px system-ui, sans-serif; }
.dsv3-microscope .token { transition: transform ${FLIGHT}ms ease-in-out; pointer-events: none; }
.dsv3-microscope .hot { stroke: black; stroke-width: 3; }
.dsv3-microscope .status { margin: 4px 0 0; min-height: 1.45em; }
@media (prefers-reduced-motion: reduce) { .dsv3-microscope .token { transition: none; } }
`;

function element(space, name, attributes, children) {
  const node = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
  node.append(...(children || []));
  return node;
}
const html = (name, attributes, ...children) => element(null, name, attributes, children);
const svg = (name, attributes, ...children) => element("http://www.w3.org/2000/svg", name, attributes, children);

function render({ model, el }) {
  const pattern = html("select", {});
  const choice = html("label", {});
  const colour = html("select", {});
  const back = html("button", { type: "button" }, "Back");
  const play = html("button", { type: "button" }, "Play");
  const step = html("button", { type: "button" }, "Step");
  const slider = html("input", { type: "range", min: 0, step: 1 });
  const count = html("span", { class: "count" });
  const status = html("p", { class: "status", "aria-live": "polite" });
  const stage = html("div", { class: "stage" });
  const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  const root = html(
    "div",
    { class: "dsv3-microscope", role: "group", "aria-label": "Shape microscope" },
    html("style", {}, STYLE),
    html(
      "div",
      { class: "row" },
      choice,
      html("label", {}, "Colour by ", colour),
    ),
    html("div", { class: "row" }, play, back, step, html("label", {}, "Elements moved ", slider), count),
    stage,
    status,
  );
  // JupyterLab listens for arrow keys and letters: what is typed here stays here.
  root.addEventListener("keydown", (event) => event.stopPropagation());
  el.append(root);

  let timer = null; // while it plays
  let drawn = null; // the scene's moving parts
  const scene = () => model.get("scenes")[model.get("chosen")];
  const elements = () => scene().before.places.length;
  const moved = () => Math.min(Math.max(model.get("moved"), 0), elements());

  function change(values) {
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    model.save_changes();
  }

  function paint(index) {
    const letters = scene().letters;
    const axis = letters[model.get("colour")] || Object.values(letters)[0];
    const palette = model.get("palette");
    return palette[axis[index] % palette.length];
  }

  function build() {
    const { before, after, arrows, operation, pattern: text } = scene();
    const tall = Math.max(before.extent[1], after.extent[1]);
    const across = LEFT + before.extent[0] + BETWEEN + after.extent[0] + RIGHT;
    const size = [across * UNIT, (TOP + tall + BELOW) * UNIT];
    const corner = (array, x) => [x, TOP + (tall - array.extent[1]) / 2];
    const start = corner(before, LEFT);
    const end = corner(after, LEFT + before.extent[0] + BETWEEN);
    const at = (array, origin) => array.places.map(([x, y]) => [(origin[0] + x) * UNIT, (origin[1] + y) * UNIT]);
    const sources = at(before, start);
    const targets = at(after, end);

    const picture = svg("svg", { viewBox: `0 0 ${size[0]} ${size[1]}`, role: "img" });
    picture.style.maxWidth = `${size[0]}px`;
    picture.style.minWidth = `${0.8 * size[0]}px`; // narrower, the page scrolls: numbers must stay readable
    const square = (extra) => svg("rect", { x: 2, y: 2, width: UNIT - 4, height: UNIT - 4, rx: 3, ...extra });
    const word = (extra) =>
      svg("text", { x: UNIT / 2, y: UNIT / 2, "text-anchor": "middle", "dominant-baseline": "central", ...extra });
    const group = (place, name, ...children) => {
      const node = svg("g", { class: name }, ...children);
      node.style.transform = `translate(${place[0]}px, ${place[1]}px)`;
      picture.append(node);
      return node;
    };

    const ghosts = sources.map((place, i) => {
      const box = square({ stroke: "#555555", "fill-opacity": 0.22 });
      const number = word({ fill: "#333333" });
      number.textContent = i;
      const node = group(place, "ghost", box, number);
      node.addEventListener("pointerenter", () => point(i));
      node.addEventListener("pointerleave", () => refresh());
      return box;
    });
    const slots = targets.map((place, j) => {
      const box = square({ stroke: "#555555", "stroke-dasharray": "2 3", fill: "white" });
      const node = group(place, "slot", box);
      node.addEventListener("pointerenter", () => point(arrows.find(([, target]) => target === j)[0]));
      node.addEventListener("pointerleave", () => refresh());
      return box;
    });
    const links = svg("g", { fill: "none", stroke: "#1a1a1a", "stroke-width": 2 });
    picture.append(links);
    const tokens = arrows.map(([source, target]) => {
      const box = square({});
      const number = word({});
      number.textContent = source;
      return { source, target, box, number, node: group(sources[source], "token", box, number) };
    });
    const sums = targets.map((place) => {
      const number = word({});
      const node = group(place, "sum", number);
      node.style.pointerEvents = "none";
      return number;
    });
    for (const [array, origin] of [[before, start], [after, end]]) {
      for (const label of array.labels) {
        const anchor = label.anchor === "right" ? "end" : "middle";
        const x = (origin[0] + label.x) * UNIT;
        const y = (origin[1] + label.y) * UNIT;
        const node = svg("text", { x, y, "text-anchor": anchor, "dominant-baseline": "central", fill: "#1a1a1a" });
        node.textContent = label.text;
        picture.append(node);
      }
    }
    stage.replaceChildren(picture);
    drawn = { picture, ghosts, slots, links, tokens, sums, sources, targets, operation, text, fresh: true };

    const options = model.get("scenes").map((each, i) => html("option", { value: i }, `${each.name}: ${each.pattern}`));
    pattern.replaceChildren(...options);
    pattern.value = model.get("chosen");
    // A list with one entry is no choice: it stands there as text.
    choice.replaceChildren("Pattern ", options.length > 1 ? pattern : html("strong", {}, options[0].textContent));
    const letters = Object.keys(scene().letters);
    colour.replaceChildren(...letters.map((letter) => html("option", { value: letter }, letter)));
    slider.max = elements();
    refresh();
  }

  function refresh() {
    if (!drawn) return;
    const done = moved();
    const summed = drawn.operation === "reduce";
    drawn.ghosts.forEach((box, i) => box.setAttribute("fill", paint(i)[0]));
    const totals = drawn.targets.map(() => null);
    for (const { source, target, box, number, node } of drawn.tokens) {
      const here = source < done;
      const [x, y] = here ? drawn.targets[target] : drawn.sources[source];
      node.style.transform = `translate(${x}px, ${y}px)`;
      const [fill, ink] = paint(source);
      box.setAttribute("fill", fill);
      number.setAttribute("fill", ink);
      if (here) totals[target] = { sum: (totals[target] ? totals[target].sum : 0) + source, ink };
    }
    // A sum counts an element when it has landed, not when it sets out.
    const { sums, tokens, fresh } = drawn;
    const land = () => {
      sums.forEach((text, j) => {
        text.textContent = summed && totals[j] ? totals[j].sum : "";
        if (totals[j]) text.setAttribute("fill", totals[j].ink);
      });
      tokens.forEach(({ source, number }) => number.setAttribute("visibility", summed && source < done ? "hidden" : "visible"));
    };
    if (!summed || fresh || still) land();
    else setTimeout(land, FLIGHT);
    drawn.fresh = false;
    const choices = [...colour.options].map((option) => option.value);
    colour.value = choices.includes(model.get("colour")) ? model.get("colour") : choices[0];
    slider.value = done;
    slider.setAttribute("aria-valuetext", `${done} of ${elements()}`);
    count.textContent = `${done} of ${elements()}`;
    back.disabled = done === 0;
    step.disabled = done === elements();
    play.textContent = timer ? "Pause" : "Play";
    status.setAttribute("aria-live", timer ? "off" : "polite"); // a voice cannot follow the play
    drawn.picture.setAttribute("aria-label", `${drawn.operation} ${drawn.text}: ${done} of ${elements()} elements have moved`);
    if (done === 0 || done === elements()) {
      highlight(null);
      status.textContent = done ? "All elements have arrived. Point at one to see where it came from." : "No element has moved yet.";
    } else {
      point(done - 1);
    }
  }

  function point(source) {
    highlight(source);
    const { before, after, arrows } = scene();
    const where = (array, i) => `[${array.index[i].join(", ")}]`;
    const goals = arrows.filter(([from]) => from === source).map(([, to]) => where(after, to));
    const verb = drawn.operation === "reduce" ? "is added at" : drawn.operation === "repeat" ? "is copied to" : "goes to";
    status.textContent = `Element ${source}, at ${where(before, source)}, ${verb} ${goals.join(" and ")}.`;
  }

  function highlight(source) {
    const goals = drawn.tokens.filter((token) => token.source === source);
    drawn.ghosts.forEach((box, i) => box.classList.toggle("hot", i === source));
    drawn.slots.forEach((box) => box.classList.remove("hot"));
    drawn.tokens.forEach(({ box }) => box.classList.remove("hot"));
    goals.forEach(({ target, box }) => {
      drawn.slots[target].classList.add("hot");
      box.classList.add("hot");
    });
    drawn.links.replaceChildren(
      ...goals.map(({ target }) => {
        const [x, y] = [drawn.sources[source][0] + UNIT - 2, drawn.sources[source][1] + UNIT / 2];
        const [u, v] = [drawn.targets[target][0] + 2, drawn.targets[target][1] + UNIT / 2];
        return svg("path", { d: `M ${x} ${y} Q ${(x + u) / 2} ${Math.min(y, v) - UNIT} ${u} ${v}` });
      }),
    );
  }

  function stop() {
    clearInterval(timer);
    timer = null;
  }

  function tick() {
    if (moved() + 1 >= elements()) stop();
    change({ moved: Math.min(moved() + 1, elements()) });
  }

  pattern.addEventListener("change", () => {
    stop();
    const chosen = Number(pattern.value);
    change({ moved: 0, chosen, colour: model.get("scenes")[chosen].colour });
  });
  colour.addEventListener("change", () => change({ colour: colour.value }));
  slider.addEventListener("input", () => {
    stop();
    change({ moved: Number(slider.value) });
  });
  back.addEventListener("click", () => {
    stop();
    change({ moved: Math.max(moved() - 1, 0) });
  });
  step.addEventListener("click", () => {
    stop();
    change({ moved: Math.min(moved() + 1, elements()) });
  });
  play.addEventListener("click", () => {
    if (timer) {
      stop();
      refresh();
      return;
    }
    timer = setInterval(tick, TICK);
    if (moved() === elements()) change({ moved: 0 });
    refresh();
  });

  const events = { "change:scenes": build, "change:chosen": build, "change:colour": refresh, "change:moved": refresh };
  for (const [event, call] of Object.entries(events)) model.on(event, call);
  build();
  return () => {
    stop();
    for (const [event, call] of Object.entries(events)) model.off(event, call);
  };
}

export default { render };
