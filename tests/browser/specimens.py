"""Widgets that work and widgets that do not: what the browser tests are tested with. Each is one notebook cell."""

from __future__ import annotations

SETUP = """
# setup
import html
import anywidget, ipywidgets as w, traitlets

def drawing(*values):
    text = html.escape(repr(values))
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="40"><text y="25">{text}</text></svg>'.encode()

def explorer(*controls, draw=drawing):
    picture = w.Image(format="svg+xml")
    def refresh(_=None):
        picture.value = draw(*[control.value for control in controls])
    for control in controls:
        control.style.description_width = "initial"
        control.observe(refresh, "value")
    refresh()
    return w.VBox([*controls, picture])

def player(script):
    class Player(anywidget.AnyWidget):
        _esm = "export default {render({model, el}) {" + script + "}}"
    return Player()
"""

# A canvas, which `draw()` fills by `step`, `colour` and `frame`; keys stay within.
CANVAS = """
let step = 0, timer = null;
el.addEventListener('keydown', e => e.stopPropagation());
el.innerHTML = `<canvas width=400 height=30 role="img" aria-label="a bar"></canvas><div>
  <button>Back</button><button>Next</button><button>Play</button>
  <input type="range" min="0" max="9" value="0" aria-label="step">
  <select aria-label="colour"><option>teal<option>maroon</select>
  <label><input type="checkbox"> frame</label><input aria-label="caption" value="a"></div>`;
const [back, next, play] = el.querySelectorAll('button'), [range, frame, caption] = el.querySelectorAll('input');
const select = el.querySelector('select'), pen = el.querySelector('canvas').getContext('2d');
const draw = () => {
  pen.clearRect(0, 0, 400, 30);
  pen.fillStyle = select.value;
  pen.fillRect(0, 0, 20 * step + 20, 30);
  pen.fillText(caption.value, 300, 20);
  if (frame.checked) pen.strokeRect(0, 0, 400, 30);
  range.value = step;
  back.disabled = step === 0;
};
const go = to => { step = Math.max(0, Math.min(9, to)); draw(); };
back.onclick = () => go(step - 1);
next.onclick = () => go(step + 1);
range.oninput = () => go(+range.value);
select.onchange = frame.onchange = caption.oninput = draw;
play.onclick = () => {
  if (timer) { clearInterval(timer); timer = null; } else timer = setInterval(() => go((step + 1) % 10), 150);
  play.textContent = timer ? 'Pause' : 'Play';
};
draw();
"""

GOOD = {
    "sliders": """
explorer(w.IntSlider(description="whole", max=9), w.FloatSlider(description="part", value=10.0),
         w.IntRangeSlider(description="range", value=(2, 7), max=9), w.SelectionSlider(description="of", options="abc"),
         w.FloatLogSlider(description="power", continuous_update=False))
""",
    "choices": """
explorer(w.Dropdown(description="letter", options="abc"), w.RadioButtons(description="one of", options="abc"),
         w.ToggleButtons(description="either", options=["this", "that"]), w.Select(description="list", options="abc"),
         w.Checkbox(description="tick"), w.ToggleButton(description="toggle"))
""",
    "boxes": """
explorer(w.Text(description="text", value="abc"), w.Text(description="late", continuous_update=False),
         w.Textarea(description="lines", value="abc"), w.IntText(description="number"),
         w.BoundedFloatText(description="bounded", max=1, step=0.5),
         w.Combobox(description="combo", options=list("abc")))
""",
    "a button": """
count, picture, button = [], w.Image(format="svg+xml", value=drawing(0)), w.Button(description="press")
def press(_):
    count.append(1)
    picture.value = drawing(len(count))
button.on_click(press)
w.VBox([button, picture])
""",
    "a table for a picture": """
from IPython.display import display
table, rows = w.HTML(), w.IntSlider(value=2, min=1, max=9, description="rows")
rows.observe(lambda change: setattr(table, "value", "<table>" + "<tr><td>a row" * change.new + "</table>"), "value")
w.VBox([rows, table])
""",
    "interact": """
w.interactive(lambda n: display(w.Image(format="svg+xml", value=drawing(n))), n=w.IntSlider(max=5, description="n"))
""",
    "a player": f"player('''{CANVAS}''')",
    "a player that plays at once": f"player('''{CANVAS} play.onclick();''')",
    "a control that is not for now": """
box = explorer(w.IntSlider(max=9, description="here"), w.IntSlider(max=9, description="hidden"))
box.children[1].layout.display = "none"
box
""",
    "an svg": """
player('''el.innerHTML = `<svg width=300 height=30><rect height=30 width=50 /></svg><button>Grow</button>`;
el.querySelector('button').onclick = () => el.querySelector('rect').setAttribute('width', 80);''')
""",
}

# What is wrong -> the cell, and a piece of every problem that must be reported of it. No other may be.
BROKEN: dict[str, tuple[str, list[str]]] = {
    "moves nothing": (
        'explorer(w.IntSlider(max=9, description="dead"), draw=lambda n: drawing(0))',
        ['slider "dead": no picture of its widget changed'],
    ),
    "draws the same anew": (
        """
picture, button = w.Image(format="svg+xml", value=drawing(0)), w.Button(description="redraw")
def redraw(_):
    picture.value = b""
    picture.value = drawing(0)
button.on_click(redraw)
w.VBox([button, picture])
""",
        ['button "redraw": no picture of its widget changed'],
    ),
    "moves its readout alone": (
        """
slider, text = w.IntSlider(description="n", max=9), w.HTML("0")
slider.observe(lambda change: setattr(text, "value", str(change.new)), "value")
w.VBox([slider, text, w.Image(format="svg+xml", value=drawing(0))])
""",
        ['slider "n": no picture of its widget changed'],
    ),
    "speaks but does not draw": (
        """
player('''el.innerHTML = `<svg width=30 height=30 aria-label="0"><title>0</title></svg><button>Say</button>`;
el.querySelector('button').onclick = () => {
  el.querySelector('svg').setAttribute('aria-label', '1'); el.querySelector('title').textContent = '1'; };''')
""",
        ['button "Say": no picture of its widget changed'],
    ),
    "raises": (
        """
button = w.Button(description="raise")
button.on_click(lambda _: [][0])
w.VBox([button, w.Image(format="svg+xml", value=drawing(0))])
""",
        ['button "raise": a callback raised IndexError', 'button "raise": no picture of its widget changed'],
    ),
    "raises at its end": (
        """
explorer(w.IntSlider(max=30, description="n"), draw=lambda n: drawing(1 / (30 - n)))
""",
        ['slider "n": a callback raised ZeroDivisionError'],
    ),
    "one option raises": (
        'explorer(w.Dropdown(options=[1, 2, 0], description="option"), draw=lambda n: drawing(1 / n))',
        ['dropdown "option": a callback raised ZeroDivisionError'],
    ),
    "long label": (
        """
box = explorer(w.IntSlider(max=9, description="a label that is longer than its place"))
box.children[0].style.description_width = "60px"
box
""",
        ['text cut off: "a label that is longer than its place"'],
    ),
    "long button": (
        """
explorer(w.ToggleButton(description="a button with much to say", layout=w.Layout(width="90px")))
""",
        ['text cut off: "a button with much to say"'],
    ),
    "long option": (
        """
explorer(w.Dropdown(options=["a", "an option of many words"], layout=w.Layout(width="110px")))
""",
        ['text cut off: "an option of many words"'],
    ),
    "readout that grows": (
        """
player('''el.innerHTML = `<svg width=99 height=9></svg><button>Count</button><output>1</output>`;
const [button, output] = [el.querySelector('button'), el.querySelector('output')];
output.style = 'display: inline-block; width: 30px; overflow: hidden; white-space: nowrap';
button.onclick = () => { output.value += '000 000'; el.querySelector('svg').innerHTML += '<circle r=9 />'; };''')
""",
        ['text cut off: "1000 000'],
    ),
    "word off the picture": (
        """
player('''el.innerHTML = `<svg width=80 height=30><text y=20>words that end outside</text></svg><button>Go</button>`;
el.querySelector('button').onclick = () => el.querySelector('svg').append(document.createElement('g'));''')
""",
        ['text cut off: "words that end outside"'],
    ),
    "too wide": (
        'w.HBox([explorer(w.IntSlider(max=9, description="n"))], layout=w.Layout(width="3000px"))',
        ["a widget is wider than the page"],
    ),
    "throws at once": (
        "player('''throw new Error('at once');''')",
        ["a widget drew nothing", "a script raised at once"],
    ),
    "throws when clicked": (
        """
player('''el.innerHTML = `<svg width=30 height=30></svg><button>Throw</button>`;
el.querySelector('button').onclick = () => { throw new Error("when clicked"); };''')
""",
        ["a script raised when clicked", 'button "Throw": no picture of its widget changed'],
    ),
    "lets JupyterLab take its keys": (
        """
player('''el.innerHTML = `<svg width=300 height=30><rect height=30 width=5 /></svg>
  <input type="range" aria-label="deaf" value=0 max=9>`;
el.querySelector('input').oninput = e => el.querySelector('rect').setAttribute('width', 9 * e.target.value + 5);''')
""",
        ['slider "deaf": the arrow keys do not move it', 'slider "deaf": no picture of its widget changed'],
    ),
    "unknown view": (
        'w.IntSlider(_view_name="NoSuchView", _view_module="no-such-module", _view_module_version="1")',
        ['shows "'],
    ),
    "never switched on": (
        'w.VBox([w.Button(description="off", disabled=True), w.Image(format="svg+xml", value=drawing(0))])',
        ['button "off": never switched on'],
    ),
    "never at rest": (
        """
player('''el.innerHTML = `<svg width=300 height=30><rect height=30 width=5 /></svg><button>Lost</button>`; let n = 0;
setInterval(() => el.querySelector('rect').setAttribute('width', n++ % 200), 50);''')
""",
        ['button "Lost": its picture moves by itself all the time'],
    ),
    "a slow player": (
        """
player('''el.innerHTML = `<svg width=300 height=30><rect height=30 width=5 /></svg>
  <button>Slow</button><button>Dead</button>`;
let n = 0, timer = null;
const grow = () => el.querySelector('rect').setAttribute('width', n++ % 200);
el.querySelector('button').onclick = () => { timer = timer ? clearInterval(timer) : setInterval(grow, 700); };''')
""",
        ['button "Dead": no picture of its widget changed'],
    ),
    "asks the network": (
        """
player('''el.innerHTML = `<svg width=30 height=30></svg>`; fetch("https://cdn.example.org/d3.js").catch(() => 0);''')
""",
        ["asks the network for https://cdn.example.org/d3.js"],
    ),
}
