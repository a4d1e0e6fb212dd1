"""A widget as one HTML file: its module, its state, and a model that has no kernel behind it.

An anywidget's module asks of its model `get`, `set`, `on`, `off` and `save_changes`; a saved page answers them from the
state that was written into it, and calls listeners when a value changes, as the live model does. There is no `send`: a
module shows what needs Python only where the model has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from dsv3_mini.files import write_text

EXPORT = "export default { render };\n"  # a module's last line; a page of its own calls `render` itself


def save_page(
    path: str | Path, module: Path, title: str, alt: str, state: Mapping[str, Any], max_width: str = "none"
) -> Path:
    """Write a page that needs nothing else, whole or not at all: no kernel, no network. Returns the path.

    Args:
        module: the widget's JavaScript, which ends in `EXPORT`.
        alt: a sentence for those whose browser runs no scripts.
        state: the widget's synced values by name, as plain JSON.
        max_width: of the widget on the page, in CSS.
    """
    path = Path(path)
    script = module.read_text(encoding="utf-8").removesuffix(EXPORT)
    values = json.dumps(dict(state)).replace("<", "\\u003c")  # no text can end the script
    write_text(
        path,
        f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title></head>
<body style="margin: 16px; background: white">
<div id="widget" style="max-width: {max_width}"></div>
<noscript>{escape(alt, quote=True)}</noscript>
<script type="module">
{script}
const state = {values};
const listeners = {{}};
const model = {{
  get: (name) => state[name],
  set: (name, value) => {{
    if (state[name] === value) return;
    state[name] = value;
    (listeners["change:" + name] ?? []).forEach((call) => call());
  }},
  save_changes() {{}},
  on: (event, call) => (listeners[event] ??= []).push(call),
  off() {{}},
}};
render({{ model, el: document.getElementById("widget") }});
</script>
</body>
</html>
""",
    )
    return path
