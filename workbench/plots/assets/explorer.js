/* Draws exported explorers: no kernel, no modules, no fetch, no eval. Load after plotly.min.js and
 * before the script files of the explorers. Python's twin of the first half is plots/bindings.py,
 * plots/fields.py and plots/passages.py; a test compares the two. */
(function (root) {
  "use strict";

  var specs = {};
  var formulas = {};
  var mounted = {};

  // ---- numbers and text

  function escapeText(text) {
    return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;")
      .replace(/%\{/g, "% {");
  }

  function exponent(text) {
    return text.replace(/e([+-])(\d)$/, "e$10$2");
  }

  function general(value, digits) {
    if (value === 0) { return "0"; }
    var power = Number(value.toExponential(digits - 1).split("e")[1]);
    if (power < -4 || power >= digits) {
      var parts = value.toExponential(digits - 1).split("e");
      if (parts[0].indexOf(".") >= 0) { parts[0] = parts[0].replace(/\.?0+$/, ""); }
      return exponent(parts.join("e"));
    }
    var text = fixed(value, Math.max(0, digits - 1 - power));
    return text.indexOf(".") >= 0 ? text.replace(/\.?0+$/, "") : text;
  }

  function fixed(value, digits) { // as Python: a tie goes to the even neighbour
    var scale = Math.pow(10, digits);
    var scaled = value * scale;
    if (Math.abs(scaled % 1) === 0.5) { scaled = 2 * Math.round(scaled / 2); value = scaled / scale; }
    return value.toFixed(digits);
  }

  function number(value, spec) {
    if (typeof value === "string") { return value; }
    if (value === null || value === undefined || Number.isNaN(value)) { return "\u2013"; }
    if (typeof value === "boolean") { return value ? "yes" : "no"; }
    if (!Number.isFinite(value)) { return value > 0 ? "\u221e" : "\u2212\u221e"; }
    spec = spec || (Number.isInteger(value) ? "d" : ".4g");
    var match = /^(\+?)(,?)(?:(d)|\.(\d+)([fge%]))?$/.exec(spec);
    var digits = Number(match[4]);
    var text;
    if (match[3]) { text = fixed(value, 0); }
    else if (match[5] === "f") { text = fixed(value, digits); }
    else if (match[5] === "e") { text = exponent(value.toExponential(digits)); }
    else if (match[5] === "%") { text = fixed(value * 100, digits) + "%"; }
    else { text = general(value, Math.max(1, digits || 4)); }
    if (match[2]) { text = text.replace(/^(-?\d+)/, function (whole) {
      return whole.replace(/\B(?=(\d{3})+$)/g, ",");
    }); }
    if (!/[1-9]/.test(text)) { text = text.replace("-", ""); }
    if (match[1] && text[0] !== "-") { text = "+" + text; }
    return text.replace("-", "\u2212");
  }

  function fill(template, values) {
    return template.replace(/\{\{|\}\}|\{(\w+)(?::([^}]*))?\}/g, function (all, name, spec) {
      return name === undefined ? all[0] : number(values[name], spec);
    });
  }

  function wrap(text, width) {
    var lines = [];
    text.split(" ").forEach(function (word) {
      var last = lines.length - 1;
      if (last >= 0 && lines[last].length + 1 + word.length <= width) { lines[last] += " " + word; }
      else { lines.push(word); }
    });
    return lines;
  }

  // ---- bindings

  function each(value, change) {
    return Array.isArray(value) ? value.map(function (v) { return each(v, change); }) : change(value);
  }

  function listed(value) { return Array.isArray(value) ? value : [value]; }

  function present(value) {
    return typeof value === "string" || (typeof value === "number" && Number.isFinite(value));
  }

  function log10(value) {
    return typeof value === "number" && value > 0 ? Math.log10(value) : null;
  }

  function drawn(x, y) {
    x = listed(x); y = listed(y);
    var last = -1;
    for (var i = 0; i < x.length; i++) { if (present(x[i]) && present(y[i])) { last = i; } }
    return last;
  }

  function escaped(value) {
    if (Array.isArray(value) && typeof value[0] === "number") { return value; }
    return each(value, function (v) { return typeof v === "string" ? escapeText(v) : v; });
  }

  var operations = {
    value: function (r, a) { return escaped(r[a[0]]); },
    minus: function (r, a) {
      var second = r[a[1]];
      return r[a[0]].map(function (v, i) {
        return present(v) && present(second[i]) ? v - second[i] : null;
      });
    },
    log10: function (r, a) { return each(r[a[0]], log10); },
    finite: function (r, a) { return present(r[a[0]]); },
    drawn: function (r, a) { return drawn(r[a[0]], r[a[1]]) >= 0; },
    last: function (r, a) {
      var at = drawn(r[a[1]], r[a[2]]);
      return at < 0 ? 0 : escaped(listed(r[a[0]])[at]);
    },
    lastlog: function (r, a) {
      var at = drawn(r[a[1]], r[a[2]]);
      return at < 0 ? 0 : log10(listed(r[a[0]])[at]);
    },
    rim: function (r, a) { return r[a[0]] > a[2] ? r[a[0]] - r[a[1]] : r[a[0]] + r[a[1]]; },
    text: function (r, a) { return escapeText(fill(a[0], r)); },
    title: function (r, a) {
      return "<b>" + wrap(fill(a[0], r), a[1]).map(escapeText).join("<br>") + "</b>" + a[2];
    }
  };

  function put(target, prop, value) {
    var keys = [];
    prop.split(".").forEach(function (part) {
      var pieces = part.split("[");
      keys.push(pieces[0]);
      pieces.slice(1).forEach(function (index) { keys.push(parseInt(index, 10)); });
    });
    keys.slice(0, -1).forEach(function (key, i) {
      if (target[key] === undefined) { target[key] = typeof keys[i + 1] === "number" ? [] : {}; }
      target = target[key];
    });
    target[keys[keys.length - 1]] = value;
  }

  // The face of a name; what a narrow one leaves out is as in the wide one.
  function face(spec, name) {
    var wide = spec.faces.wide;
    var own = spec.faces[name];
    function merged(key) {
      return wide[key].map(function (item, i) { return own[key] && own[key][i] || item; });
    }
    return {
      traces: merged("traces"),
      bindings: merged("bindings"),
      layout: Object.assign({}, wide.layout, own.layout)
    };
  }

  function filled(face, result) {
    var figure = JSON.parse(JSON.stringify({ data: face.traces, layout: face.layout }));
    face.bindings.forEach(function (binding) {
      var target = binding.trace === null ? figure.layout : figure.data[binding.trace];
      put(target, binding.prop, operations[binding.op](result, binding.args));
    });
    return figure;
  }

  // ---- results

  function result(spec, formula, state, indices) {
    var found = spec.result;
    if (formula) {
      found = formula(state, spec.data);
    } else if (spec.grid) {
      var grid = spec.grid;
      var cell = 0;
      grid.names.forEach(function (name) {
        var control = spec.controls.find(function (c) { return c.name === name; });
        cell = cell * control.values.length + indices[name];
      });
      found = {};
      grid.keys.forEach(function (key, i) { found[key] = grid.pool[grid.cells[cell][i]]; });
    }
    return Object.assign({}, state, found);
  }

  function readout(spec, values) {
    var text = number(values[spec.key], spec.format) + (spec.unit ? " " + spec.unit : "");
    if (!spec.low || !spec.high) { return [text, ""]; }
    return [text, "[" + number(values[spec.low], spec.format) + ", "
      + number(values[spec.high], spec.format) + "]"];
  }

  function shade(value, scale) {
    if (!present(value)) { return "#FFFFFF"; }
    var part = Math.min(1, Math.max(0, (value - scale[0]) / (scale[1] - scale[0])));
    return "#" + [0xE6, 0x9F, 0x00].map(function (c) {
      var mixed = Math.floor(255 + part * (c - 255) + 0.5);
      return (mixed < 16 ? "0" : "") + mixed.toString(16).toUpperCase();
    }).join("");
  }

  function literal(value) {
    if (typeof value === "string") { return JSON.stringify(value); }
    if (typeof value === "boolean") { return value ? "True" : "False"; }
    return value === null ? "None" : String(value);
  }

  function restoring(spec, state) {
    var words = Object.keys(state).map(function (name) { return name + "=" + literal(state[name]); });
    var call = words.length ? spec.call : spec.call.replace(", {state}", "{state}");
    return call.split("{state}").join(words.join(", "));
  }

  // ---- handles: points of a figure that are dragged

  function wanted(handle, x, y, state) {
    var found = {};
    if (handle.radius) {
      found[handle.radius] = Math.max(Math.abs(x - state[handle.x]), Math.abs(y - state[handle.y]));
    } else { found[handle.x] = x; found[handle.y] = y; }
    return found;
  }

  function closest(values, wanted) {
    return values.reduce(function (best, value, i) {
      return Math.abs(value - wanted) < Math.abs(values[best] - wanted) ? i : best;
    }, 0);
  }

  // Calls moved(index, x, y) while handle number index is dragged over `plot`. plotly's own dragging
  // of shapes would move every shape of the figure, and tell only at the end.
  function watchHandles(plot, moved, works) {
    var held = null;
    function at(handle, event, change) {
      var box = plot.querySelector(".main-svg").getBoundingClientRect();
      return handle.axes.map(function (name, i) {
        var axis = plot._fullLayout[name];
        return change(axis, event[i ? "clientY" : "clientX"] - (i ? box.top : box.left) - axis._offset, i);
      });
    }
    function under(event) {
      var best = null, least = 14;
      ((plot.layout && plot.layout.meta || {}).handles || []).forEach(function (handle, index) {
        var shape = plot.layout.shapes[handle.shape];
        var apart = at(handle, event, function (axis, pixel, i) {
          return axis.d2p(i ? shape.yanchor : shape.xanchor) - pixel;
        });
        var distance = Math.hypot(apart[0], apart[1]);
        if (distance <= least && (!works || works(handle))) {
          best = { index: index, handle: handle };
          least = distance;
        }
      });
      return best;
    }
    function move(event) {
      if (!held) { return; }
      var to = at(held.handle, event, function (axis, pixel) { return axis.p2d(pixel); });
      moved(held.index, to[0], to[1]);
    }
    function release() {
      held = null;
      root.removeEventListener("pointermove", move);
      root.removeEventListener("pointerup", release);
      root.removeEventListener("pointercancel", release);
    }
    function stop(event) { event.preventDefault(); event.stopPropagation(); }
    plot.addEventListener("pointerdown", function (event) {
      held = event.button ? null : under(event);
      if (!held) { return; }
      stop(event); // plotly would zoom
      root.addEventListener("pointermove", move);
      root.addEventListener("pointerup", release);
      root.addEventListener("pointercancel", release);
    }, true);
    ["mousedown", "touchstart"].forEach(function (name) {
      plot.addEventListener(name, function (event) { if (held) { stop(event); } },
        { capture: true, passive: false });
    });
    plot.addEventListener("mousemove", function (event) {
      var over = held || under(event);
      if (event.target.style) { event.target.style.cursor = over ? "grab" : ""; }
      if (!over) { return; }
      event.stopPropagation(); // no hover label over the handle
      if (event.target.onmouseout) { event.target.onmouseout(event); }
    }, true);
  }

  // ---- the page

  function make(tag, className, text) {
    var element = document.createElement(tag);
    if (className) { element.className = className; }
    if (text !== undefined) { element.textContent = text; }
    return element;
  }

  function controlText(control, index) {
    if (control.labels) { return control.labels[index]; }
    return (number(control.values[index], control.format) + " " + control.unit).trim();
  }

  function buildControl(control, id, moved) {
    var row = make("div", "wb-control wb-" + control.type);
    var label = make("label", "wb-label", control.label);
    label.htmlFor = id;
    var input;
    var output = null;
    if (control.type === "choice") {
      input = make("select");
      control.labels.forEach(function (text) { input.appendChild(make("option", "", text)); });
    } else {
      input = make("input");
      input.type = control.type === "toggle" ? "checkbox" : "range";
    }
    input.id = id;
    function show(index) {
      if (control.type === "toggle") { input.checked = index === 1; return; }
      if (control.type === "choice") { input.selectedIndex = index; return; }
      input.value = index;
      input.setAttribute("aria-valuetext", controlText(control, index));
      output.textContent = controlText(control, index);
    }
    if (input.type === "range") {
      input.min = 0;
      input.max = control.values.length - 1;
      input.step = 1;
      output = make("output", "wb-value");
      output.htmlFor.add(id);
      output.setAttribute("aria-live", "off");
    }
    show(control.index);
    input.addEventListener(input.type === "range" ? "input" : "change", function () {
      var index = control.type === "toggle" ? (input.checked ? 1 : 0)
        : control.type === "choice" ? input.selectedIndex : Number(input.value);
      show(index);
      moved(control, index);
    });
    row.appendChild(label);
    row.appendChild(input);
    if (output) { row.appendChild(output); }
    return { row: row, show: show };
  }

  function Explorer(host, id) {
    var self = this;
    self.spec = specs[id];
    self.formula = formulas[id];
    self.indices = {};
    self.state = Object.assign({}, self.spec.state);
    self.controls = {};
    self.pending = false;
    self.width = 0;
    var spec = self.spec;
    var works = !("data" in spec) || self.formula;

    host.textContent = "";
    host.classList.add("wb-explorer");
    host.setAttribute("role", "group");
    host.setAttribute("aria-label", spec.title);
    host.appendChild(make("div", "wb-title", spec.title));
    if (spec.about) { host.appendChild(make("p", "wb-about", spec.about)); }
    var bar = make("div", "wb-controls");
    (works ? spec.controls : []).forEach(function (control) {
      self.indices[control.name] = control.index;
      var built = buildControl(control, "wb-" + id + "-" + control.name, function (c, index) {
        self.move(c, index);
      });
      self.controls[control.name] = { spec: control, show: built.show };
      bar.appendChild(built.row);
    });
    if (works && spec.controls.length) {
      var reset = make("button", "wb-reset", "Reset");
      reset.type = "button";
      reset.addEventListener("click", function () { self.reset(); });
      bar.appendChild(reset);
      host.appendChild(bar);
    }
    self.readouts = make("dl", "wb-readouts");
    self.readouts.setAttribute("aria-live", "polite");
    self.numbers = spec.readouts.map(function (readout) {
      var box = make("div", "wb-readout");
      box.appendChild(make("dt", "", readout.label));
      var number = box.appendChild(make("dd", ""));
      self.readouts.appendChild(box);
      return number;
    });
    if (spec.readouts.length) { host.appendChild(self.readouts); }
    self.message = host.appendChild(make("div", "wb-message"));
    self.message.setAttribute("role", "alert");
    self.plot = host.appendChild(make("div", "wb-plot"));
    self.passages = spec.passages.map(function (passage) {
      var box = host.appendChild(make("div", "wb-passage"));
      box.appendChild(make("div", "wb-passage-title", passage.title));
      return box.appendChild(make("pre", ""));
    });
    if (works && spec.controls.length) {
      var details = host.appendChild(make("details", "wb-state"));
      details.appendChild(make("summary", "", "Share this state"));
      self.line = details.appendChild(make("code", ""));
    }
    self.host = host;
    self.draw(true);
    if (root.ResizeObserver) {
      new root.ResizeObserver(function () { self.resized(); }).observe(host);
    }
  }

  Explorer.prototype.face = function () {
    return this.host.clientWidth && this.host.clientWidth < 620 ? "narrow" : "wide";
  };

  Explorer.prototype.move = function (control, index) {
    var self = this;
    self.indices[control.name] = index;
    self.state[control.name] = control.values[index];
    if (self.pending) { return; }
    self.pending = true;
    root.requestAnimationFrame(function () { self.pending = false; self.draw(false); });
  };

  Explorer.prototype.reset = function () {
    var self = this;
    Object.keys(self.controls).forEach(function (name) {
      var control = self.controls[name];
      control.show(control.spec.index);
      self.move(control.spec, control.spec.index);
    });
  };

  Explorer.prototype.draw = function (first) {
    var self = this;
    var values;
    try {
      values = first ? Object.assign({}, self.state, self.spec.result)
        : result(self.spec, self.formula, self.state, self.indices);
      self.now = self.face();
      var figure = filled(face(self.spec, self.now), values);
      self.values = values;
      root.Plotly.react(self.plot, figure.data, figure.layout, {
        displaylogo: false, responsive: false,
        modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]
      });
    } catch (error) {
      self.message.textContent = "This position cannot be drawn: " + error.message;
      return;
    }
    self.message.textContent = "";
    self.write(values);
    if (first) {
      self.plot.on("plotly_click", function (event) { self.clicked(event.points[0]); });
      watchHandles(self.plot, function (index, x, y) { self.dragged(index, x, y); },
        function (handle) { return self.sliders(handle).every(function (c) { return c; }); });
    }
  };

  Explorer.prototype.write = function (values) {
    var self = this;
    self.spec.readouts.forEach(function (spec, i) {
      var texts = readout(spec, values);
      self.numbers[i].textContent = texts[0];
      if (texts[1]) { self.numbers[i].appendChild(make("small", "", texts[1])); }
    });
    self.spec.passages.forEach(function (spec, i) {
      self.passages[i].textContent = "";
      values[spec.tokens].forEach(function (token, t) {
        var span = make("span", "wb-token", token);
        var value = values[spec.shade][t];
        span.style.background = shade(value, spec.scale);
        if (present(value)) { span.title = number(value, ".3g"); }
        self.passages[i].appendChild(span);
      });
    });
    if (self.line) { self.line.textContent = restoring(self.spec, self.state); }
  };

  Explorer.prototype.clicked = function (point) {
    var meta = point.data.meta || {};
    var at = point.pointIndex === undefined ? point.pointNumber : point.pointIndex;
    var self = this;
    function go(name, index) {
      var control = name && self.controls[name];
      if (!control || !(index < control.spec.values.length)) { return; }
      control.show(index);
      self.move(control.spec, index);
    }
    if (meta.click) { go(meta.click, Array.isArray(at) ? at[0] : at); }
    if (Array.isArray(at)) { go(meta.click_y, at[0]); go(meta.click_x, at[1]); }
  };

  Explorer.prototype.sliders = function (handle) {
    var self = this;
    return (handle.radius ? [handle.radius] : [handle.x, handle.y]).map(function (name) {
      return self.controls[name];
    });
  };

  Explorer.prototype.dragged = function (index, x, y) {
    var self = this;
    var moves = wanted(self.plot.layout.meta.handles[index], x, y, self.state);
    Object.keys(moves).forEach(function (name) {
      var control = self.controls[name];
      var nearest = closest(control.spec.values, moves[name]);
      control.show(nearest);
      self.move(control.spec, nearest);
    });
  };

  Explorer.prototype.resized = function () {
    var width = this.host.clientWidth;
    if (!width || width === this.width) { return; }
    var first = this.width === 0;
    this.width = width;
    if (this.face() !== this.now) { this.draw(false); }
    else if (!first) { root.Plotly.Plots.resize(this.plot); }
  };

  function mount(host) {
    var id = host.getAttribute("data-explorer");
    if (mounted[id] && mounted[id].host === host) { return; }
    if (!specs[id] || ("formula" in formulas && !formulas[id])) { return; }
    if (!root.Plotly) { host.textContent = "plotly.js is missing: this figure cannot be drawn."; return; }
    mounted[id] = new Explorer(host, id);
  }

  function mountAll() {
    var hosts = document.querySelectorAll(".workbench-explorer[data-explorer]");
    if (!root.IntersectionObserver) { hosts.forEach(mount); return; }
    var watcher = new root.IntersectionObserver(function (entries) {
      entries.forEach(function (entry) {
        if (entry.isIntersecting) { watcher.unobserve(entry.target); mount(entry.target); }
      });
    }, { rootMargin: "800px" });
    hosts.forEach(function (host) { watcher.observe(host); });
  }

  root.workbench = {
    register: function (id, spec) { specs[id] = spec; },
    formula: function (id, compute) { formulas[id] = compute; },
    explorers: mounted,
    core: {
      number: number, fill: fill, face: face, filled: filled, result: result, shade: shade, specs: specs,
      formulas: formulas, restoring: restoring, wanted: wanted, watchHandles: watchHandles
    }
  };

  if (typeof document !== "undefined") {
    if (document.readyState === "complete") { mountAll(); }
    else { root.addEventListener("load", mountAll); }
  }
})(typeof window !== "undefined" ? window : globalThis);
