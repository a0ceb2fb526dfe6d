"use strict";
// Curves as SVG with values under the pointer, a finger or the arrow keys; names that show and hide them; copies.
(() => {
  const HEIGHT = 260, LEFT = 58, RIGHT = 12, TOP = 10, BOTTOM = 36, GAP_X = 56, GAP_Y = 24;
  const COLORS = 8, DASHES = ["", "7 3", "2 2.5", "8 3 2 3"];
  const SVG = "http://www.w3.org/2000/svg";
  const sections = JSON.parse(document.getElementById("charts").textContent);

  function make(name, attributes = {}, parent = null, text = null) {
    const isSvg = ["svg", "g", "path", "line", "text", "circle", "rect"].includes(name);
    const node = isSvg ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== null) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  }

  function compact(value) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e9 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    for (const [unit, suffix] of [[1e6, "M"], [1e4, "k"]]) {
      if (size >= unit) return +(value / (suffix === "k" ? 1e3 : unit)).toPrecision(4) + suffix;
    }
    return String(+value.toPrecision(4));
  }

  const full = value => Math.abs(value) >= 1e4 && Math.abs(value) < 1e15
    ? Math.round(value).toLocaleString("en") : compact(value);

  // The marks that leave room for each other's names, round numbers first.
  function spaced(marks, place, gap) {
    const isRound = mark => Math.abs(Math.log10(mark) - Math.round(Math.log10(mark))) < 1e-9;
    const kept = [];
    for (const mark of [...marks.filter(isRound), ...marks.filter(mark => !isRound(mark))])
      if (kept.every(other => Math.abs(place(other) - place(mark)) >= gap)) kept.push(mark);
    return kept;
  }

  // A scale from values to pixels, with where it is marked.
  function scale(low, high, from, to, isLog) {
    if (isLog) {
      let [a, b] = [Math.log10(low), Math.log10(high)];
      if (b - a < 1e-9) [a, b] = [a - 0.5, b + 0.5];
      const place = value => from + (Math.log10(value) - a) / (b - a) * (to - from);
      let marks = [];
      for (const steps of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9]]) {
        marks = [];
        for (let power = Math.floor(a); power <= Math.ceil(b); power++)
          for (const step of steps) {
            const mark = step * 10 ** power;
            if (mark >= 10 ** a * 0.999 && mark <= 10 ** b * 1.001) marks.push(mark);
          }
        if (marks.length >= 3) break;
      }
      if (marks.length >= 2) return {place, marks: spaced(marks, place, from > to ? GAP_Y : GAP_X)};
      return {place, marks: scale(10 ** a, 10 ** b, from, to, false).marks};
    }
    if (high - low < 1e-12 * Math.max(1, Math.abs(high))) [low, high] = [low - 0.5 * (Math.abs(low) || 1), high + 0.5 * (Math.abs(high) || 1)];
    const place = value => from + (value - low) / (high - low) * (to - from);
    const room = Math.abs(to - from) / (from > to ? GAP_Y : GAP_X);
    const rough = (high - low) / Math.max(2, Math.min(5, Math.floor(room))), power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map(s => s * power).find(s => s >= rough);
    const marks = [];
    for (let i = Math.ceil(low / step); i * step <= high + step * 1e-6; i++) marks.push(+(i * step).toPrecision(12));
    return {place, marks};
  }

  class Chart {
    constructor(figure, chart, summary) {
      this.chart = chart;
      this.isLog = chart.isLog && chart.lines.every(line => line.y.every(y => y > 0));
      this.hidden = new Set();
      this.at = null;
      if (chart.lines.some(line => line.y.some(y => y > 0))) {
        const label = make("label", {}, figure.querySelector("figcaption"));
        const box = make("input", {type: "checkbox"}, label);
        box.checked = this.isLog;
        label.append(" log y");
        box.setAttribute("aria-label", `${chart.title}: logarithmic y axis`);
        box.addEventListener("change", () => { this.isLog = box.checked; this.draw(); });
      }
      this.svg = make("svg", {role: "img", tabindex: "0",
        "aria-label": `${summary} Left and right arrow keys read values.`}, figure);
      this.readout = make("p", {class: "readout", "aria-live": "polite"}, figure);
      this.keys = make("div", {class: "keys", role: "group", "aria-label": `Curves of ${chart.title}`}, figure);
      this.values = chart.lines.map((line, i) => {
        const button = make("button", {type: "button", "aria-pressed": "true"}, this.keys);
        const sample = make("svg", {viewBox: "0 0 24 12", "aria-hidden": "true"}, button);
        make("path", {d: "M0 6H24", ...this.stroke(i), "stroke-width": 2.5}, sample);
        make("span", {}, button, line.name);
        const value = make("span", {class: "value"}, button);
        button.addEventListener("click", () => {
          const hide = !this.hidden.has(i);
          this.hidden[hide ? "add" : "delete"](i);
          button.setAttribute("aria-pressed", String(!hide));
          this.draw();
        });
        return value;
      });
      const read = event => {
        const box = this.svg.getBoundingClientRect();
        this.point(event.clientX - box.left);
      };
      this.svg.addEventListener("pointermove", read);
      this.svg.addEventListener("pointerdown", read);
      this.svg.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") this.read(null); });
      this.svg.addEventListener("keydown", event => this.press(event));
      new ResizeObserver(() => { if (this.axis && this.svg.clientWidth !== this.width) this.draw(); }).observe(this.svg);
    }

    stroke(i) {
      return {fill: "none", style: `stroke: var(--line-${i % COLORS})`, "stroke-dasharray": DASHES[Math.floor(i / COLORS) % DASHES.length] || (i % COLORS ? DASHES[i % DASHES.length] : "")};
    }

    // Drawn anew against an axis.
    draw(axis = this.axis, isLogX = this.isLogX) {
      [this.axis, this.isLogX] = [axis, isLogX];
      this.svg.replaceChildren();
      const WIDTH = this.width = this.svg.clientWidth || 520;
      this.shown = this.chart.lines.map((line, i) => {
        if (this.hidden.has(i) || !line.x[axis.key]) return null;
        const points = line.x[axis.key].map((x, j) => [x, line.y[j]])
          .filter(([x, y]) => (!isLogX || x > 0) && (!this.isLog || y > 0));
        return points.length ? points : null;
      });
      const all = this.shown.flatMap(points => points || []);
      if (!all.length) {
        make("text", {x: WIDTH / 2, y: HEIGHT / 2, "text-anchor": "middle"}, this.svg, `Nothing to show against ${axis.label}`);
        this.places = [];
        this.read(null);
        return;
      }
      const extent = k => all.reduce(([low, high], point) => [Math.min(low, point[k]), Math.max(high, point[k])], [Infinity, -Infinity]);
      let [x0, x1] = extent(0), [y0, y1] = extent(1);
      if (!isLogX && x0 > 0 && x0 < 0.3 * x1) x0 = 0;
      if (!this.isLog && y0 > 0 && y0 < 0.5 * y1) y0 = 0;
      const room = 0.04;
      if (this.isLog) { const ratio = (y1 / y0) ** room; [y0, y1] = [y0 / ratio, y1 * ratio]; }
      else { const space = (y1 - y0) * room; [y0, y1] = [y0 === 0 ? 0 : y0 - space, y1 + space]; }
      this.x = scale(x0, x1, LEFT, WIDTH - RIGHT, isLogX);
      this.y = scale(y0, y1, HEIGHT - BOTTOM, TOP, this.isLog);
      for (const mark of this.y.marks) {
        const y = this.y.place(mark);
        make("line", {class: "rule", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y}, this.svg);
        make("text", {x: LEFT - 7, y: y + 4, "text-anchor": "end"}, this.svg, compact(mark));
      }
      for (const mark of this.x.marks) {
        const x = this.x.place(mark), anchor = x > WIDTH - RIGHT - 16 ? "end" : "middle";
        make("text", {x, y: HEIGHT - BOTTOM + 16, "text-anchor": anchor}, this.svg, compact(mark));
      }
      make("text", {x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 3, "text-anchor": "middle"}, this.svg, axis.label);
      this.shown.forEach((points, i) => {
        if (!points) return;
        const path = points.map(([x, y], j) => `${j ? "L" : "M"}${this.x.place(x).toFixed(1)} ${this.y.place(y).toFixed(1)}`).join("");
        make("path", {d: path, class: "curve", ...this.stroke(i)}, this.svg);
        if (this.chart.lines[i].isMeasured || points.length === 1)
          for (const [x, y] of points)
            make("circle", {cx: this.x.place(x), cy: this.y.place(y), r: 3.5, style: `fill: var(--line-${i % COLORS})`}, this.svg);
      });
      this.cursor = make("g", {}, this.svg);
      this.places = [...new Set(all.map(([x]) => x))].sort((a, b) => a - b);
      this.read(this.at !== null && this.places.length ? this.nearest(this.places, this.x.place(this.at)) : null);
    }

    nearest(xs, pixel) {
      return xs.reduce((best, x) => Math.abs(this.x.place(x) - pixel) < Math.abs(this.x.place(best) - pixel) ? x : best);
    }

    point(pixel) {
      if (this.places.length) this.read(this.nearest(this.places, pixel));
    }

    press(event) {
      const last = this.places.length - 1, now = this.at === null ? -1 : this.places.indexOf(this.at);
      const stride = event.shiftKey ? 10 : 1;
      const goals = {ArrowLeft: now < 0 ? last : now - stride, ArrowRight: now + stride, Home: 0, End: last};
      if (event.key === "Escape") this.read(null);
      if (!(event.key in goals) || last < 0) return;
      event.preventDefault();
      this.read(this.places[Math.min(Math.max(goals[event.key], 0), last)]);
    }

    // Values of all curves there; of one that has no point there, its nearest.
    read(at) {
      this.at = at;
      if (this.cursor) this.cursor.replaceChildren();
      this.readout.textContent = at === null ? "" : `${this.axis.label}: ${full(at)}`;
      this.values.forEach((value, i) => {
        const points = this.shown && this.shown[i];
        value.textContent = "";
        if (at === null || !points) return;
        const pixel = this.x.place(at), x = this.nearest(points.map(p => p[0]), pixel);
        const y = points.find(p => p[0] === x)[1];
        const isHere = Math.abs(this.x.place(x) - pixel) < 6;
        value.textContent = compact(y) + (isHere ? "" : ` (at ${compact(x)})`);
        if (isHere) make("circle", {cx: this.x.place(x), cy: this.y.place(y), r: 4, style: `fill: var(--line-${i % COLORS})`}, this.cursor);
      });
      if (at !== null) make("line", {class: "cursor", x1: this.x.place(at), x2: this.x.place(at), y1: TOP, y2: HEIGHT - BOTTOM}, this.cursor);
    }
  }

  for (const group of document.querySelectorAll(".charts")) {
    const contents = sections[+group.dataset.section];
    const charts = [...group.querySelectorAll(".chart")].map(figure =>
      new Chart(figure, contents[+figure.dataset.chart], figure.dataset.summary));
    const logX = group.querySelector("input[name=log-x]");
    const draw = () => {
      const chosen = group.querySelector("input[type=radio]:checked");
      const axis = {key: chosen.value, label: chosen.parentNode.textContent.trim()};
      for (const chart of charts) { chart.at = null; chart.draw(axis, logX.checked); }
    };
    group.querySelector(".axes").addEventListener("change", draw);
    draw();
  }

  const said = document.getElementById("said");
  let silence = 0;
  function say(text) {
    said.textContent = text;
    clearTimeout(silence);
    silence = setTimeout(() => { said.textContent = ""; }, 2000);
  }

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // a page from a disk may not be allowed to
      const field = make("textarea", {readonly: ""}, document.body);
      field.value = text;
      field.select();
      const isCopied = document.execCommand("copy");
      field.remove();
      if (!isCopied) return say("Could not copy: use the download beside it");
    }
    say("Copied");
  }

  for (const button of document.querySelectorAll("button.copy"))
    button.addEventListener("click", () => copy(button.dataset.copy));
})();
