// The page's side of the browser tests: what an open lesson shows, its widgets, their controls and their pictures.
// lesson_page.py puts this into JupyterLab's page and calls `lesson.*`. A control is named by two numbers, its widget
// and its place in it: elements would not do, for a widget may draw its buttons anew at each click.
window.lesson = (() => {
  const OUTPUT = '.jp-OutputArea-output';
  const VIEW = `${OUTPUT}.lm-Panel:not([data-mime-type])`; // JupyterLab's frame of a widget: no type
  const CLICKED = 'button, [role=button], [role=tab], [role=switch], [role=checkbox], [role=radio]';
  const CONTROL = `${CLICKED}, select, textarea, input:not([type=hidden], [type=file]), [role=slider]`;
  const PICTURE = 'img, canvas, svg:not(svg svg), [role=img]:not(img, canvas, svg)';
  const BROKEN = new RegExp([
    'Error displaying widget', 'Loading widget', 'Failed to load (model|view) class', 'Error creating widget',
    'Error rendering output', 'Javascript Error', 'No widget manager', 'Model not found'].join('|'), 'i');

  const panel = () => window.jupyterapp.shell.currentWidget;
  const kernel = () => panel()?.sessionContext?.session?.kernel;
  const idle = () => kernel()?.status === 'idle';
  const wait = ms => new Promise(done => setTimeout(done, ms));
  const all = (root, selector) => [...root.querySelectorAll(selector)];
  const visible = e => e.checkVisibility({visibilityProperty: true}) && e.getBoundingClientRect().width > 0;
  const outputs = () => all(panel().node, `.jp-Cell-outputWrapper ${OUTPUT}`)
    .filter(o => !o.parentElement.closest(OUTPUT));
  const widgets = () => outputs().filter(o => o.querySelector(CONTROL));
  const controls = widget => all(widgets()[widget], CONTROL);
  const element = (widget, i) => controls(widget)[i];

  // ---- the notebook
  const callbackErrors = [];
  const cellOf = e => all(panel().node, '.jp-Cell').indexOf(e.closest('.jp-Cell'));
  const where = index => {
    const first = panel().content.widgets[index].model.sharedModel.getSource().trim().split('\n')[0];
    return `cell ${index + 1} (${first.slice(0, 50)})`;
  };

  const state = () => {
    const p = panel();
    const dialog = document.querySelector('.jp-Dialog');
    return {ready: !!(p?.context?.isReady && p.sessionContext.isReady && idle()), dialog: dialog && dialog.innerText};
  };

  // A callback's error shows nowhere on the page; the kernel only says it.
  const watch = () => kernel().iopubMessage.connect((_, message) => {
    const {ename, evalue} = message.content;
    if (message.header.msg_type === 'error' && message.parent_header.msg_type !== 'execute_request')
      callbackErrors.push(`${ename}: ${evalue}`);
  });

  const topViews = index => outputs().filter(o => o.matches(VIEW) && cellOf(o) === index).length;

  const ran = () => panel().content.widgets.flatMap(({model}, index) => {
    if (model.type !== 'code' || !model.sharedModel.getSource().trim()) return [];
    const found = model.executionCount === null ? ['was not run'] : [];
    let widgetsDue = 0;
    for (let i = 0; i < model.outputs.length; i++) {
      const o = model.outputs.get(i).toJSON();
      if (o.output_type === 'error') found.push(`error: ${o.ename}: ${o.evalue}`);
      if (o.name === 'stderr') found.push(`wrote to stderr: ${[].concat(o.text).join('').slice(0, 200)}`);
      if (o.data?.['application/vnd.jupyter.widget-view+json']) widgetsDue++;
    }
    if (topViews(index) < widgetsDue) found.push('a widget shows as a still picture or as text');
    return found.map(what => `${where(index)}: ${what}`);
  });

  // ---- faults that can be seen at any moment
  const textOf = e => (e.innerText || '').trim().replace(/\s+/g, ' ').slice(0, 60);
  const pen = document.createElement('canvas').getContext('2d');

  const cutOff = root => {
    const found = [];
    for (const e of all(root, '*')) {
      const apart = e.matches('input, textarea, option') || e.clientWidth <= 2; // 1 px: for screen readers
      if (!(e instanceof HTMLElement) || apart || !visible(e)) continue;
      const style = getComputedStyle(e);
      if (e.matches('select') && e.size <= 1) { // a select does not tell: measure its options
        pen.font = style.font;
        const arrow = style.appearance === 'none' ? 0 : 16; // drawn by the browser, inside
        const room = e.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight) - arrow;
        const long = [...e.options].find(o => pen.measureText(o.text).width > room + 1);
        if (long) found.push(long.text.replace(/\s+/g, ' ')); // ipywidgets puts hard spaces
        continue;
      }
      const hides = axis => /hidden|clip/.test(style[`overflow${axis}`]);
      const own = [...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.data.trim());
      const wide = e.scrollWidth > e.clientWidth + 1 && (hides('X') || own && style.overflowX === 'visible');
      const high = e.scrollHeight > e.clientHeight + 8 && hides('Y') && own;
      if ((wide || high) && textOf(e)) found.push(textOf(e));
    }
    for (const text of all(root, 'svg text').filter(visible)) {
      let svg = text.ownerSVGElement;
      while (svg.ownerSVGElement) svg = svg.ownerSVGElement;
      const t = text.getBoundingClientRect(), s = svg.getBoundingClientRect();
      if (t.left < s.left - 2 || t.right > s.right + 2 || t.top < s.top - 3 || t.bottom > s.bottom + 3)
        found.push(text.textContent.trim());
    }
    return found;
  };

  const faults = () => outputs().flatMap(o => {
    const found = [], live = o.matches(VIEW) || widgets().includes(o);
    const broken = o.innerText.match(BROKEN);
    if (broken) found.push(`shows "${broken[0]}"`);
    // An anywidget whose render threw leaves an empty element and not a word.
    const views = all(o, '.lm-Widget').filter(e => e.parentElement.matches(`${VIEW}, .widget-container`)
      && !e.matches('[class*="jupyter-"], [class*="widget-"], .jp-OutputArea'));
    if ((o.matches(VIEW) ? [o, ...views] : views).some(e => !e.firstElementChild && !e.textContent.trim()))
      found.push('a widget drew nothing');
    if (all(o, 'img').some(i => i.complete && !i.naturalWidth)) found.push('an image is broken');
    if (live && !broken) found.push(...cutOff(o).map(text => `text cut off: "${text}"`));
    if (live && o.scrollWidth > o.clientWidth + 1) found.push('a widget is wider than the page');
    return found.map(what => `${where(cellOf(o))}: ${what}`);
  });

  // ---- controls
  const kind = e => e.matches('[role=slider], [type=range]') ? 'slider'
    : e.matches('select') ? 'dropdown'
    : e.matches(`${CLICKED}, [type=button], [type=submit]`) ? 'button'
    : e.matches('textarea, input:not([type]), [type=text], [type=search]') ? 'text'
    : e.type; // checkbox, radio, number, or one that nobody knows how to move

  const value = e => e.matches('[role=slider]') ? e.getAttribute('aria-valuenow') : e.value;

  const describe = (widget, i) => {
    const e = element(widget, i), slider = kind(e) === 'slider';
    const label = e.closest('.widget-inline-hbox, .widget-inline-vbox')?.querySelector('.widget-label');
    const name = textOf(kind(e) === 'button' ? e : e.labels?.[0] ?? label ?? {});
    const top = e.matches('[role=slider]') ? e.getAttribute('aria-valuemax') : e.max;
    return {
      cell: where(cellOf(e)), kind: kind(e), name: name || e.getAttribute('aria-label') || e.title || `number ${i + 1}`,
      value: value(e), visible: visible(e),
      disabled: e.disabled || e.ariaDisabled === 'true' || !!e.closest('[disabled]'),
      chosen: e.type === 'radio' ? e.checked : e.matches('.widget-toggle-buttons .mod-active, [aria-selected=true]'),
      atMax: slider && +value(e) >= +top, options: e.options?.length ?? 0, selected: e.selectedIndex ?? 0,
    };
  };

  const pause = widget => {
    const says = e => `${e.innerText} ${e.title} ${e.ariaLabel}`;
    const at = controls(widget).findIndex(e => visible(e) && /pause|stop/i.test(says(e)));
    return at < 0 ? null : at;
  };

  // ---- pictures
  const digest = numbers => {
    let h = 2166136261;
    for (let i = 0; i < numbers.length; i++) h = Math.imul(h ^ numbers[i], 16777619);
    return (h >>> 0).toString(16);
  };
  const scratch = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const known = new WeakMap(); // an image's pixels by its address: an Image widget takes a new one for each picture

  const pixels = async e => {
    if (e.matches('img')) {
      await e.decode().catch(() => {});
      if (known.get(e)?.src === e.src) return known.get(e).seen;
    }
    const width = e.naturalWidth || e.width, height = e.naturalHeight || e.height;
    if (!width || !height) return 'nothing';
    Object.assign(scratch.canvas, {width, height}); // which also wipes it
    scratch.drawImage(e, 0, 0, width, height);
    const seen = digest(new Uint32Array(scratch.getImageData(0, 0, width, height).data.buffer));
    if (e.matches('img')) known.set(e, {src: e.src, seen});
    return seen;
  };

  const markup = e => { // without what only a screen reader gets: a picture that changes there alone has not changed
    const silent = e.outerHTML.replace(/ (aria-[\w-]+|tabindex|title|src)="[^"]*"/g, '')
      .replace(/<(title|desc)\b[^]*?<\/\1>/g, '');
    return digest([...silent].map(c => c.codePointAt(0)));
  };

  // What a widget's pictures look like. Where it has none, its text is the picture, without controls and readouts.
  const look = async widget => {
    const root = widgets()[widget];
    const pictures = all(root, PICTURE).filter(e => visible(e) && !e.parentElement.closest('button'));
    if (pictures.length)
      return (await Promise.all(pictures.map(e => e.matches('img, canvas') ? pixels(e) : markup(e)))).join(' ');
    const copy = root.cloneNode(true);
    all(copy, `${CONTROL}, label, .widget-readout, .noUi-target`).forEach(e => e.remove());
    return markup(copy);
  };

  // Looks until `enough(picture, ms since it changed or the kernel worked)`, or the kernel was idle for `limit` ms.
  const watchUntil = async (widget, limit, enough) => {
    let last = await look(widget), since = performance.now(), end = since + limit;
    const latest = since + 10 * limit;
    for (;;) {
      const now = performance.now();
      if (idle() && enough(last, now - since)) return {look: last, enough: true};
      if (now > Math.min(end, latest)) return {look: last, enough: false};
      await wait(60);
      const next = await look(widget);
      if (!idle()) end = performance.now() + limit;
      if (next !== last || !idle()) [last, since] = [next, performance.now()];
    }
  };
  const rest = (widget, quiet, limit) => watchUntil(widget, limit, (_, still) => still >= quiet);
  const changes = async (widget, before, limit) => (await watchUntil(widget, limit, seen => seen !== before)).enough;

  return {
    state, watch, ran, faults, element, describe, value: (w, i) => value(element(w, i)),
    pause, rest, changes, runAll: () => window.jupyterapp.commands.execute('notebook:run-all-cells'),
    idle, counts: () => widgets().map((_, widget) => controls(widget).length),
    errors: () => callbackErrors.splice(0),
    show: (w, i) => { const e = element(w, i); e.scrollIntoView({block: 'center'}); e.focus({preventScroll: true}); },
    scroll: y => {
      const view = panel().node.querySelector('.jp-WindowedPanel-outer');
      view.scrollTop = y;
      return [view.scrollTop, view.clientHeight];
    },
  };
})();
