"use strict";
(() => {
  const root = document.documentElement;
  const holder = document.createElement("div");
  holder.innerHTML = "<svg></svg>";
  const SVG = holder.firstChild.namespaceURI;
  const CHAR = 6.3; /* pixels of a letter in a chart */
  const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

  /* ---------------------------------------------------------------- theme */
  const toggle = document.getElementById("theme");
  const dark = () => root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  const nameToggle = () => { toggle.textContent = dark() ? "Light" : "Dark"; };
  const kept = (value) => {
    try {
      if (value) localStorage.setItem("fedprompt-theme", value);
      return localStorage.getItem("fedprompt-theme");
    } catch { return null; }
  };
  if (["light", "dark"].includes(kept())) root.dataset.theme = kept();
  nameToggle();
  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    kept(root.dataset.theme);
    nameToggle();
  });

  /* --------------------------------------------------------------- tables */
  const cellValue = (cell) => {
    const text = cell.dataset.v ?? cell.textContent.trim();
    if (text === "" || text === "-") return null;
    const bytesOf = /^([0-9.]+)\s(B|KiB|MiB|GiB|TiB)$/.exec(text);
    if (bytesOf) return Number(bytesOf[1]) * 1024 ** UNITS.indexOf(bytesOf[2]);
    const number = Number.parseFloat(text.replace(/,/g, ""));
    return Number.isNaN(number) ? text : number;
  };
  const sortBy = (table, column, head) => {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [cellValue(row.cells[column]), row]);
    const known = rows.filter(([value]) => value !== null);
    const numeric = known.every(([value]) => typeof value === "number");
    const before = head.getAttribute("aria-sort");
    const first = numeric ? "descending" : "ascending";
    const second = numeric ? "ascending" : "descending";
    const order = before === first ? second : first;
    const sign = order === "ascending" ? 1 : -1;
    known.sort(([a], [b]) => sign * (numeric ? a - b : String(a).localeCompare(String(b))));
    body.append(...known.map(([, row]) => row));
    body.append(...rows.filter(([value]) => value === null).map(([, row]) => row));
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sortBy(table, column, head));
    });
  }

  /* -------------------------------------------------------------- numbers */
  const short = (value) => Number(value.toPrecision(4)).toLocaleString("en");
  const bytes = (value) => {
    let unit = 0;
    while (value >= 1024 && unit < UNITS.length - 1) { value /= 1024; unit += 1; }
    return `${unit ? Number(value.toFixed(1)) : Math.round(value)} ${UNITS[unit]}`;
  };
  const FORMATS = {
    percent: (value) => `${(100 * value).toFixed(1)} %`,
    number: short,
    count: (value) => Math.round(value).toLocaleString("en"),
    bytes,
  };
  const TICKS = { ...FORMATS, percent: (value) => `${short(100 * value)} %` };

  const ticks = (low, high, wanted, whole) => {
    const raw = Math.max((high - low) / Math.max(1, wanted), whole ? 1 : 1e-12);
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = power * ([1, 2, 5].find((m) => m * power >= raw * 0.999) ?? 10);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i += 1) {
      found.push(i * step + 0); /* + 0: no minus zero */
    }
    return found;
  };
  const logTicks = (low, high, wanted, binary) => {
    const found = [];
    for (let p = Math.floor(Math.log2(low)); binary && p <= Math.log2(high); p += 1) {
      found.push(2 ** p);
    }
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high) && !binary; p += 1) {
      for (const m of [1, 2, 5]) found.push(m * 10 ** p);
    }
    const inside = found.filter((v) => v >= low * 0.999 && v <= high * 1.001);
    const step = Math.ceil(inside.length / Math.max(2, wanted));
    return inside.filter((_, i) => i % step === 0);
  };
  const scale = (low, high, from, to, log) => {
    const on = log ? Math.log10 : (v) => v;
    const span = on(high) - on(low) || 1;
    return (value) => from + ((to - from) * (on(value) - on(low))) / span;
  };

  /* ------------------------------------------------------------------ svg */
  const add = (parent, tag, attributes, text) => {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "fill" || name === "stroke") node.style[name] = value;
      else node.setAttribute(name, value);
    }
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };
  const colour = (name) => `var(--${name})`;
  const cut = (text, room) => {
    const most = Math.max(3, Math.floor(room / CHAR));
    return text.length > most ? `${text.slice(0, most - 1)}…` : text;
  };
  const label = (svg, x, y, text, anchor) =>
    add(svg, "text", { x, y, "text-anchor": anchor, class: "label" }, text);

  /* Grid lines and labels; returns the inner edges. */
  const frame = (svg, spec, width, height, yTicks) => {
    const names = yTicks.map((value) => TICKS[spec.y.format](value));
    const left = 10 + CHAR * Math.max(...names.map((name) => name.length), 1);
    const inner = { left, right: width - 10, top: 12, bottom: height - (spec.x.label ? 38 : 22) };
    if (spec.x.label) label(svg, (left + inner.right) / 2, height - 4, spec.x.label, "middle");
    return { ...inner, names };
  };
  const yAxis = (svg, inner, Y, yTicks) => {
    yTicks.forEach((value, i) => {
      const y = Y(value);
      add(svg, "line", { x1: inner.left, x2: inner.right, y1: y, y2: y, class: "grid" });
      label(svg, inner.left - 6, y + 4, inner.names[i], "end");
    });
  };
  const extent = (values, axis) => {
    let low = Math.min(...values), high = Math.max(...values);
    const pad = axis.log ? 0 : 0.06 * (high - low || Math.abs(high) || 1);
    low = axis.min === undefined ? low - pad : Math.max(axis.min, low - pad);
    high = axis.max === undefined ? high + pad : Math.min(axis.max, high + pad);
    return high > low ? [low, high] : [low - 0.5, low + 0.5];
  };
  const tellSpread = (series, i, tell) => {
    const spread = series.spread?.[i];
    return spread === undefined || spread === null ? "" : ` ± ${tell(spread)}`;
  };

  /* -------------------------------------------------------------- drawing */
  /* Every one returns {count, target(i), find(x, y)}; a target is {x, y?, box?, title, rows}. */
  const nearest = (count, distance) => {
    let best = null, least = Infinity;
    for (let i = 0; i < count; i += 1) {
      const d = distance(i);
      if (d < least) { least = d; best = i; }
    }
    return best;
  };

  const drawLines = (svg, spec, width, height, shown) => {
    const series = spec.series.filter((_, i) => shown[i]);
    const curves = series.filter((one) => !one.flat);
    const xs = curves.flatMap((one) => one.x);
    const ys = series.flatMap((one) => [...one.y, ...(one.low ?? []), ...(one.high ?? [])]);
    if (!xs.length) return { count: 0, find: () => null };
    const [yLow, yHigh] = extent(ys, spec.y);
    const yTicks = ticks(yLow, yHigh, height / 45);
    const inner = frame(svg, spec, width, height, yTicks);
    const Y = scale(yLow, yHigh, inner.bottom, inner.top);
    yAxis(svg, inner, Y, yTicks);
    let xLow = Math.min(...xs), xHigh = Math.max(...xs);
    if (xLow === xHigh) {
      [xLow, xHigh] = spec.x.log ? [xLow / 2, xHigh * 2] : [xLow - 0.5, xHigh + 0.5];
    }
    const gap = spec.nearest ? 14 : 5;
    const X = scale(xLow, xHigh, inner.left + gap, inner.right - gap, spec.x.log);
    const wanted = (inner.right - inner.left) / 70;
    const xTicks = spec.x.log
      ? logTicks(xLow, xHigh, wanted, spec.x.format === "bytes") : ticks(xLow, xHigh, wanted, spec.x.format === "count");
    for (const value of xTicks) {
      label(svg, X(value), inner.bottom + 16, TICKS[spec.x.format](value), "middle");
    }
    const points = [];
    for (const one of series) {
      const stroke = colour(one.color);
      const line = {
        class: "curve", stroke, "stroke-width": one.width ?? 2,
        "stroke-dasharray": one.dash ? "5 4" : "none",
      };
      if (one.flat) {
        const y = Y(one.y[0]);
        add(svg, "line", { x1: inner.left, x2: inner.right, y1: y, y2: y, ...line });
        continue;
      }
      const at = one.x.map((x, i) => [X(x), Y(one.y[i])]);
      if (one.low && one.x.length > 1) {
        const edge = (values) => one.x.map((x, i) => `${X(x)},${Y(values[i])}`);
        const band = [...edge(one.low), ...edge(one.high).reverse()].join(" ");
        add(svg, "polygon", { points: band, class: "band", fill: stroke });
      } else if (one.low) {
        add(svg, "line", {
          x1: at[0][0], x2: at[0][0], y1: Y(one.low[0]), y2: Y(one.high[0]), ...line,
        });
      }
      if (at.length > 1) add(svg, "polyline", { points: at.join(" "), ...line });
      const radius = at.length === 1 ? 5 : at.length <= 30 ? 2 + (one.width ?? 2) / 4 : 0;
      if (radius) for (const [cx, cy] of at) add(svg, "circle", { cx, cy, r: radius, fill: stroke });
      at.forEach(([x, y], i) => points.push({ x, y, one, i }));
    }
    const tellX = (value) => `${spec.x.name ?? spec.x.label} ${FORMATS[spec.x.format](value)}`;
    const tell = FORMATS[spec.y.format];
    if (spec.nearest) {
      return {
        count: points.length,
        target: (k) => {
          const { x, y, one, i } = points[k];
          const value = tell(one.y[i]) + tellSpread(one, i, tell);
          return { x, y, title: tellX(one.x[i]), rows: [[one.color, one.name, value]] };
        },
        find: (x, y) => nearest(points.length, (k) => Math.hypot(points[k].x - x, points[k].y - y)),
      };
    }
    const at = [...new Set(xs)].sort((a, b) => a - b);
    return {
      count: at.length,
      target: (k) => {
        const rows = [];
        for (const one of series) {
          const i = one.flat ? 0 : one.x.indexOf(at[k]);
          if (i >= 0) rows.push([one.color, one.name, one.y[i], tellSpread(one, i, tell)]);
        }
        rows.sort((a, b) => b[2] - a[2]);
        return {
          x: X(at[k]), title: tellX(at[k]),
          rows: rows.slice(0, 12).map(([c, name, value, more]) => [c, name, tell(value) + more]),
        };
      },
      find: (x) => nearest(at.length, (k) => Math.abs(X(at[k]) - x)),
    };
  };

  const drawBars = (svg, spec, width, height) => {
    const count = spec.labels.length;
    const known = [...spec.values, ...(spec.marks ?? []), spec.mean].filter((v) => v !== null && v !== undefined);
    const high = spec.y.max ?? Math.max(...known, 1);
    const yTicks = ticks(0, high, height / 45, spec.y.format === "count");
    const inner = frame(svg, spec, width, height, yTicks);
    const Y = scale(0, high, inner.bottom, inner.top);
    yAxis(svg, inner, Y, yTicks);
    const step = (inner.right - inner.left) / count;
    const X = (i) => inner.left + (i + 0.5) * step;
    const longest = CHAR * Math.max(...spec.labels.map((text) => text.length)) + 8;
    const every = Math.max(1, Math.ceil(longest / step));
    spec.labels.forEach((text, i) => {
      const value = spec.values[i], w = Math.max(0.8, 0.8 * step);
      if (value === null) label(svg, X(i), inner.bottom - 3, "×", "middle");
      else {
        const y = Y(value);
        add(svg, "rect", {
          x: X(i) - w / 2, y, width: w, height: Math.max(0, inner.bottom - y),
          class: "bar", fill: colour(spec.color),
        });
      }
      const mark = spec.marks?.[i];
      if (mark !== null && mark !== undefined) {
        const y = Y(mark);
        add(svg, "line", { x1: X(i) - w / 2, x2: X(i) + w / 2, y1: y, y2: y, class: "notch" });
      }
      if (i % every === 0) label(svg, X(i), inner.bottom + 16, text, "middle");
    });
    if (spec.mean !== null && spec.mean !== undefined) {
      const y = Y(spec.mean);
      add(svg, "line", {
        x1: inner.left, x2: inner.right, y1: y, y2: y, class: "curve",
        stroke: colour(spec.color), "stroke-width": 1.4, "stroke-dasharray": "5 4",
      });
    }
    const tell = FORMATS[spec.y.format];
    return {
      count,
      target: (i) => {
        const rows = [[spec.color, spec.name, spec.values[i] === null ? "-" : tell(spec.values[i])]];
        if (spec.marks) rows.push(["ink", spec.mark_name, spec.marks[i] === null ? "-" : tell(spec.marks[i])]);
        for (const [name, value] of spec.notes?.[i] ?? []) rows.push([null, name, value]);
        return {
          box: [X(i) - step / 2, inner.top, step, inner.bottom - inner.top], x: X(i),
          title: `${spec.each} ${spec.labels[i]}`, rows,
        };
      },
      find: (x) => Math.min(count - 1, Math.max(0, Math.floor((x - inner.left) / step))),
    };
  };

  const drawHeat = (svg, spec, width, height) => {
    const rows = spec.rows.length, columns = spec.columns.length;
    const room = Math.min(0.36 * width, 10 + CHAR * Math.max(...spec.rows.map((r) => r.length)));
    const left = Math.max(24, room), top = 4, bottom = height - 38, right = width - 6;
    const w = (right - left) / columns, h = (bottom - top) / rows;
    const values = spec.cells.flat().filter((v) => v !== null);
    const low = spec.from ?? Math.min(...values), high = Math.max(...values);
    const weight = (v) => {
      const share = high > low ? (v - low) / (high - low) : 1;
      return 0.08 + 0.92 * (spec.root ? Math.sqrt(share) : share);
    };
    const tell = FORMATS[spec.format];
    const named = Math.max(1, Math.ceil(12 / h));
    spec.rows.forEach((name, r) => {
      if (r % named === 0) label(svg, left - 5, top + (r + 0.5) * h + 4, cut(name, left - 8), "end");
    });
    const longest = CHAR * Math.max(...spec.columns.map((name) => name.length)) + 8;
    const every = Math.max(1, Math.ceil(longest / w));
    spec.columns.forEach((name, c) => {
      if (c % every === 0) label(svg, left + (c + 0.5) * w, bottom + 15, name, "middle");
    });
    label(svg, (left + right) / 2, height - 4, spec.x_label, "middle");
    spec.cells.forEach((line, r) => line.forEach((value, c) => {
      if (value === null) return;
      const opacity = weight(value), x = left + c * w, y = top + r * h;
      add(svg, "rect", {
        x, y, width: Math.max(0.6, w - (w > 6 ? 1 : 0)), height: Math.max(0.6, h - (h > 6 ? 1 : 0)),
        fill: colour(spec.color), "fill-opacity": opacity.toFixed(3), class: "cell",
      });
      const text = tell(value);
      if (h >= 11 && w >= CHAR * text.length + 4) {
        const shade = opacity > 0.55 ? "label strong" : "label ink";
        add(svg, "text", { x: x + w / 2, y: y + h / 2 + 4, "text-anchor": "middle", class: shade }, text);
      }
    }));
    add(svg, "rect", { x: left, y: top, width: right - left, height: bottom - top, class: "edge" });
    return {
      count: rows * columns,
      target: (i) => {
        const r = Math.floor(i / columns), c = i % columns, value = spec.cells[r][c];
        const text = value === null ? spec.none : tell(value);
        return {
          box: [left + c * w, top + r * h, w, h], x: left + (c + 0.5) * w,
          title: `${spec.y_name} ${spec.rows[r]}`,
          rows: [[null, spec.x_name, spec.columns[c]], [spec.color, spec.name, text]],
        };
      },
      find: (x, y) => {
        const c = Math.floor((x - left) / w), r = Math.floor((y - top) / h);
        return c < 0 || r < 0 || c >= columns || r >= rows ? null : r * columns + c;
      },
    };
  };

  const drawBoxes = (svg, spec, width) => {
    const step = 40, left = 14, right = width - 20, bottom = step * spec.groups.length + 6;
    const all = spec.groups.flatMap((group) => [group.low, group.high]);
    const [low, high] = extent(all, spec.x);
    const X = scale(low, high, left, right);
    for (const value of ticks(low, high, width / 90)) {
      add(svg, "line", { x1: X(value), x2: X(value), y1: 4, y2: bottom, class: "grid" });
      label(svg, X(value), bottom + 16, TICKS[spec.x.format](value), "middle");
    }
    label(svg, (left + right) / 2, bottom + 32, spec.x.label, "middle");
    const tell = FORMATS[spec.x.format];
    spec.groups.forEach((group, i) => {
      const y = i * step + 20, stroke = colour(group.color), h = 14;
      label(svg, left, y - 3, cut(group.name, width - 20), "start");
      const line = { class: "curve", stroke, "stroke-width": 1.5 };
      add(svg, "line", { x1: X(group.low), x2: X(group.high), y1: y + h / 2, y2: y + h / 2, ...line });
      add(svg, "rect", {
        x: X(group.q1), y, width: Math.max(1, X(group.q3) - X(group.q1)), height: h,
        fill: stroke, class: "box",
      });
      add(svg, "line", { x1: X(group.median), x2: X(group.median), y1: y, y2: y + h, class: "notch" });
    });
    return {
      count: spec.groups.length,
      target: (i) => {
        const group = spec.groups[i];
        const parts = [["highest", "high"], ["upper quartile", "q3"], ["median", "median"],
          ["lower quartile", "q1"], ["lowest", "low"]];
        return {
          box: [left, i * step + 4, right - left, step - 4], x: X(group.median), title: group.name,
          rows: [...parts.map(([name, key]) => [group.color, name, tell(group[key])]),
            [null, "accuracies", FORMATS.count(group.n)]],
        };
      },
      find: (x, y) => (y < 0 || y > bottom ? null : Math.min(spec.groups.length - 1, Math.floor(y / step))),
    };
  };

  const DRAW = { lines: drawLines, bars: drawBars, heat: drawHeat, boxes: drawBoxes };
  const heightOf = (spec, width) => {
    if (spec.kind === "heat") return Math.min(900, Math.max(9, Math.min(26, 560 / spec.rows.length)) * spec.rows.length) + 44;
    if (spec.kind === "boxes") return 40 * spec.groups.length + 44;
    return width < 520 ? 230 : 270;
  };

  /* ---------------------------------------------------------- interaction */
  const span = (parent, kind, text) => {
    const node = document.createElement("span");
    node.className = kind;
    node.textContent = text;
    parent.append(node);
    return node;
  };
  const swatch = (parent, name) => {
    const node = span(parent, "swatch", "");
    if (name) node.style.background = colour(name);
    else node.style.visibility = "hidden";
    return node;
  };

  const make = (figure, spec) => {
    const plot = figure.querySelector(".plot");
    const shown = (spec.series ?? []).map((one) => one.on !== false);
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    let drawn = null, mark = null, current = null, width = 0;

    const hide = () => { tip.hidden = true; current = null; mark?.replaceChildren(); };
    const show = (i) => {
      const target = drawn.target(i);
      current = i;
      mark.replaceChildren();
      if (target.box) {
        const [x, y, w, h] = target.box;
        add(mark, "rect", { x, y, width: w, height: h, class: "hit" });
      } else if (target.y === undefined) {
        add(mark, "line", { x1: target.x, x2: target.x, y1: 8, y2: heightOf(spec, width) - 36, class: "rule" });
      } else add(mark, "circle", { cx: target.x, cy: target.y, r: 8, class: "ring" });
      tip.replaceChildren();
      span(tip, "tip-title", target.title);
      for (const [name, text, value] of target.rows) {
        const row = document.createElement("div");
        swatch(row, name);
        span(row, "tip-name", text);
        span(row, "tip-value", value);
        tip.append(row);
      }
      tip.hidden = false;
      const room = plot.clientWidth - tip.offsetWidth;
      const beside = target.x + 14 > room ? target.x - tip.offsetWidth - 14 : target.x + 14;
      tip.style.left = `${Math.max(0, Math.min(room, beside))}px`;
      const level = target.box && spec.kind !== "bars" ? target.box[1] + target.box[3] + 6 : 10;
      tip.style.top = `${Math.max(0, Math.min(level, plot.clientHeight - tip.offsetHeight))}px`;
    };

    const redraw = () => {
      width = plot.clientWidth;
      if (!width) return;
      const height = heightOf(spec, width);
      const svg = document.createElementNS(SVG, "svg");
      for (const [name, value] of Object.entries({
        width, height, viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0",
        "aria-label": figure.querySelector("h3").textContent,
      })) svg.setAttribute(name, value);
      drawn = DRAW[spec.kind](svg, spec, width, height, shown);
      mark = add(svg, "g", {});
      const point = (event) => {
        const edge = svg.getBoundingClientRect();
        const i = drawn.count ? drawn.find(event.clientX - edge.left, event.clientY - edge.top) : null;
        if (i === null) hide(); else show(i);
      };
      svg.addEventListener("pointermove", point);
      svg.addEventListener("pointerdown", point);
      svg.addEventListener("pointerleave", hide);
      svg.addEventListener("blur", hide);
      svg.addEventListener("keydown", (event) => {
        const move = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
        if (event.key === "Escape") hide();
        if (!move || !drawn.count) return;
        event.preventDefault();
        const rows = spec.kind === "heat" && event.key.length > 7 && "ArrowDown ArrowUp".includes(event.key);
        const by = rows ? move * spec.columns.length : move;
        show(Math.max(0, Math.min(drawn.count - 1, current === null ? 0 : current + by)));
      });
      plot.replaceChildren(svg, tip);
      hide();
    };

    const legend = figure.querySelector(".legend");
    (spec.series ?? []).forEach((one, i) => {
      const chip = document.createElement("button");
      chip.type = "button";
      chip.className = "chip";
      const sample = swatch(chip, one.color);
      if (one.dash) sample.classList.add("dash");
      else if (one.width < 1.5) sample.classList.add("thin");
      const last = one.y[one.y.length - 1];
      span(chip, "chip-name", `${one.name} ${FORMATS[spec.y.format](last)}`);
      const state = () => chip.setAttribute("aria-pressed", String(shown[i]));
      state();
      chip.addEventListener("click", () => { shown[i] = !shown[i]; state(); redraw(); });
      legend.append(chip);
    });
    redraw();
    new ResizeObserver(() => { if (plot.clientWidth !== width) redraw(); }).observe(plot);
  };

  const specs = JSON.parse(document.getElementById("charts").textContent);
  for (const [id, spec] of Object.entries(specs)) make(document.getElementById(id), spec);
  root.dataset.ready = "yes";
})();
