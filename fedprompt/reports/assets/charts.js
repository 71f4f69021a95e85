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
  const xTicksOf = (axis, low, high, wanted) => {
    if (axis.names.length) return axis.names.map((_, i) => i);
    if (axis.log) return logTicks(low, high, wanted, axis.format === "bytes");
    /* Round numbers of bytes are multiples of a binary unit. */
    const unit = axis.format === "bytes"
      ? 1024 ** Math.max(0, Math.floor(Math.log(Math.max(high, 1)) / Math.log(1024))) : 1;
    return ticks(low / unit, high / unit, wanted, axis.format === "count").map((v) => v * unit);
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

  /* The inner edges of a panel, and the names of its vertical axis; writes the axes' labels. */
  const frame = (svg, spec, width, height, yTicks) => {
    const names = yTicks.map((value) => TICKS[spec.y.format](value));
    const left = 10 + CHAR * Math.max(...names.map((name) => name.length), 1);
    const top = spec.y.label ? 24 : 12;
    const inner = { left, right: width - 10, top, bottom: height - (spec.x.label ? 38 : 22) };
    if (spec.y.label) label(svg, 2, 11, spec.y.label, "start");
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
    low = axis.low === null ? low - pad : Math.max(axis.low, low - pad);
    high = axis.high === null ? high + pad : Math.min(axis.high, high + pad);
    return high > low ? [low, high] : [low - 0.5, low + 0.5];
  };
  /* Edges of the band around a curve, within the bounds of the axis. */
  const edgesOf = (curve, axis) => {
    const bound = (value) => Math.min(axis.high ?? Infinity, Math.max(axis.low ?? -Infinity, value));
    const shift = (sign) => curve.y.map((value, i) => bound(value + sign * (curve.spread[i] ?? 0)));
    return curve.spread?.some((value) => value !== null) ? { low: shift(-1), high: shift(1) } : null;
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
      if (d <= least) { least = d; best = i; } /* the topmost of points in one place */
    }
    return best;
  };

  const drawLines = (svg, spec, width, height, visible) => {
    const curves = spec.curves.filter((_, i) => visible[i]);
    const levels = spec.levels.filter((_, i) => visible[spec.curves.length + i]);
    const bands = curves.map((curve) => edgesOf(curve, spec.y));
    /* Reference lines stay where they are named, even if all curves are switched off. */
    const xs = (curves.length ? curves : spec.curves).flatMap((curve) => curve.x);
    const ys = [...curves.flatMap((curve) => curve.y), ...levels.map((level) => level.value),
      ...bands.flatMap((band) => (band ? [...band.low, ...band.high] : []))];
    if (!xs.length || !ys.length) return { count: 0, find: () => null };
    const [yLow, yHigh] = extent(ys, spec.y);
    const yTicks = ticks(yLow, yHigh, height / 45, spec.y.format === "count");
    const inner = frame(svg, spec, width, height, yTicks);
    const Y = scale(yLow, yHigh, inner.bottom, inner.top);
    yAxis(svg, inner, Y, yTicks);
    let xLow = spec.x.low ?? Math.min(...xs), xHigh = spec.x.high ?? Math.max(...xs);
    if (xLow === xHigh) {
      [xLow, xHigh] = spec.x.log ? [xLow / 2, xHigh * 2] : [xLow - 0.5, xHigh + 0.5];
    }
    const gap = spec.nearest ? 14 : 5;
    const X = scale(xLow, xHigh, inner.left + gap, inner.right - gap, spec.x.log);
    const named = spec.x.names.length > 0;
    const tellX = (value) => (named ? spec.x.names[value] : FORMATS[spec.x.format](value));
    const wanted = (inner.right - inner.left) / 70;
    for (const value of xTicksOf(spec.x, xLow, xHigh, wanted)) {
      const text = named ? spec.x.names[value] : TICKS[spec.x.format](value);
      label(svg, X(value), inner.bottom + 16, text, "middle");
    }
    for (const level of levels) {
      add(svg, "line", {
        x1: inner.left, x2: inner.right, y1: Y(level.value), y2: Y(level.value), class: "curve",
        stroke: colour(level.color), "stroke-width": 1.3, "stroke-dasharray": "5 4",
      });
    }
    const points = [];
    curves.forEach((curve, c) => {
      const stroke = colour(curve.color), band = bands[c];
      const line = {
        class: "curve", stroke, "stroke-width": curve.width,
        "stroke-dasharray": curve.dashed ? "5 4" : "none",
      };
      const at = curve.x.map((x, i) => [X(x), Y(curve.y[i])]);
      if (band && at.length > 1) {
        const edge = (values) => curve.x.map((x, i) => `${X(x)},${Y(values[i])}`);
        const corners = [...edge(band.low), ...edge(band.high).reverse()].join(" ");
        add(svg, "polygon", { points: corners, class: "band", fill: stroke });
      } else if (band) {
        add(svg, "line", {
          x1: at[0][0], x2: at[0][0], y1: Y(band.low[0]), y2: Y(band.high[0]), ...line,
        });
      }
      if (at.length > 1 && curve.joined) add(svg, "polyline", { points: at.join(" "), ...line });
      const radius = at.length === 1 || !curve.joined ? 5 : at.length <= 30 ? 2 + curve.width / 4 : 0;
      if (radius) for (const [cx, cy] of at) add(svg, "circle", { cx, cy, r: radius, fill: stroke });
      at.forEach(([x, y], i) => points.push({ x, y, curve, i }));
    });
    const title = (value) => `${spec.x.noun || spec.x.label} ${tellX(value)}`;
    const tell = FORMATS[spec.y.format];
    if (spec.nearest) {
      return {
        count: points.length,
        target: (k) => {
          const { x, y, curve, i } = points[k];
          const value = tell(curve.y[i]) + tellSpread(curve, i, tell);
          const rows = [[curve.color, curve.name, value]];
          if (curve.notes[i]) rows.push([null, curve.notes[i], ""]);
          return { x, y, title: title(curve.x[i]), rows };
        },
        find: (x, y) => nearest(points.length, (k) => Math.hypot(points[k].x - x, points[k].y - y)),
      };
    }
    const at = [...new Set(curves.flatMap((curve) => curve.x))].sort((a, b) => a - b);
    return {
      count: at.length,
      target: (k) => {
        const rows = levels.map((level) => [level.color, level.name, level.value, ""]);
        for (const curve of curves) {
          const i = curve.x.indexOf(at[k]);
          if (i >= 0) rows.push([curve.color, curve.name, curve.y[i], tellSpread(curve, i, tell)]);
        }
        rows.sort((a, b) => b[2] - a[2]);
        return {
          x: X(at[k]), title: title(at[k]),
          rows: rows.slice(0, 12).map(([c, name, value, more]) => [c, name, tell(value) + more]),
        };
      },
      find: (x) => nearest(at.length, (k) => Math.abs(X(at[k]) - x)),
    };
  };

  const drawBars = (svg, spec, width, height, visible) => {
    const count = spec.labels.length;
    const series = spec.series.filter((_, i) => visible[i]);
    const levels = spec.levels.filter((_, i) => visible[spec.series.length + i]);
    const totals = spec.labels.map((_, i) => series.reduce((sum, one) => sum + (one.values[i] ?? 0), 0));
    const tops = series.flatMap((one) => one.values.map((value, i) => (value ?? 0) + (one.spread?.[i] ?? 0)));
    const marks = (spec.marks?.values ?? []).filter((value) => value !== null);
    const most = Math.max(...(spec.stacked ? totals : tops), ...marks, ...levels.map((level) => level.value), 0);
    const whole = spec.y.format === "count";
    const high = spec.y.high ?? (most > 0 ? most : 1);
    const yTicks = ticks(0, high, height / 45, whole);
    const inner = frame(svg, spec, width, height, yTicks);
    const Y = scale(0, high, inner.bottom, inner.top);
    yAxis(svg, inner, Y, yTicks);
    const step = (inner.right - inner.left) / count;
    const X = (i) => inner.left + (i + 0.5) * step;
    const longest = CHAR * Math.max(...spec.labels.map((text) => Math.min(text.length, 24))) + 8;
    const every = Math.max(1, Math.ceil(longest / step));
    const group = Math.max(0.8, 0.8 * step), w = spec.stacked ? group : group / Math.max(1, series.length);
    spec.labels.forEach((text, i) => {
      let base = 0;
      series.forEach((one, s) => {
        const value = one.values[i];
        if (value === null) return;
        const x = X(i) - group / 2 + (spec.stacked ? 0 : s * w), y = Y(base + value);
        add(svg, "rect", {
          x, y, width: Math.max(0.6, w - (w > 6 ? 1 : 0)), height: Math.max(0, Y(base) - y),
          class: "bar", fill: colour(one.color),
        });
        const spread = one.spread?.[i];
        if (spread !== null && spread !== undefined) {
          add(svg, "line", {
            x1: x + w / 2, x2: x + w / 2, y1: Y(Math.min(high, value + spread)),
            y2: Y(Math.max(0, value - spread)), class: "whisker",
          });
        }
        if (spec.stacked) base += value;
      });
      if (spec.missing && spec.series.every((one) => one.values[i] === null)) {
        label(svg, X(i), inner.bottom - 3, "×", "middle");
      }
      const mark = spec.marks?.values[i];
      if (mark !== null && mark !== undefined) {
        add(svg, "line", {
          x1: X(i) - group / 2, x2: X(i) + group / 2, y1: Y(mark), y2: Y(mark), class: "notch",
        });
      }
      if (i % every === 0) label(svg, X(i), inner.bottom + 16, cut(text, 24 * CHAR), "middle");
    });
    for (const level of levels) {
      add(svg, "line", {
        x1: inner.left, x2: inner.right, y1: Y(level.value), y2: Y(level.value), class: "curve",
        stroke: colour(level.color), "stroke-width": 1.4, "stroke-dasharray": "5 4",
      });
    }
    const tell = (value) => (value === null || value === undefined ? "-" : FORMATS[spec.y.format](value));
    return {
      count,
      target: (i) => {
        const rows = series.map((one) => {
          const absent = spec.missing && one.values[i] === null;
          return [one.color, one.name, absent ? spec.missing : tell(one.values[i]) + tellSpread(one, i, tell)];
        });
        if (spec.marks) rows.push(["ink", spec.marks.name, tell(spec.marks.values[i])]);
        for (const [name, value] of spec.notes[i] ?? []) rows.push([null, name, value]);
        return {
          box: [X(i) - step / 2, inner.top, step, inner.bottom - inner.top], x: X(i),
          title: `${spec.noun} ${spec.labels[i]}`.trim(), rows,
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
    const low = spec.low ?? Math.min(...values), high = spec.high ?? Math.max(...values);
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
    label(svg, (left + right) / 2, height - 4, spec.x.label, "middle");
    spec.cells.forEach((line, r) => line.forEach((value, c) => {
      if (value === null) return;
      const opacity = weight(value), x = left + c * w, y = top + r * h;
      add(svg, "rect", {
        x, y, width: Math.max(0.6, w - (w > 6 ? 1 : 0)), height: Math.max(0.6, h - (h > 6 ? 1 : 0)),
        fill: colour("own"), "fill-opacity": opacity.toFixed(3), class: "cell",
      });
      /* In a narrow cell, first the unit and then the decimals are left out. */
      const forms = [tell(value)];
      if (spec.format === "percent") forms.push((100 * value).toFixed(1), (100 * value).toFixed(0));
      const text = forms.find((form) => w >= CHAR * form.length + 4);
      if (h >= 11 && text !== undefined) {
        const shade = opacity > 0.55 ? "label strong" : "label ink";
        add(svg, "text", { x: x + w / 2, y: y + h / 2 + 4, "text-anchor": "middle", class: shade }, text);
      }
    }));
    add(svg, "rect", { x: left, y: top, width: right - left, height: bottom - top, class: "edge" });
    return {
      count: rows * columns,
      target: (i) => {
        const r = Math.floor(i / columns), c = i % columns, value = spec.cells[r][c];
        const text = value === null ? spec.missing : tell(value);
        return {
          box: [left + c * w, top + r * h, w, h], x: left + (c + 0.5) * w,
          title: `${spec.y.noun || spec.y.label} ${spec.rows[r]}`,
          rows: [[null, spec.x.noun || spec.x.label, spec.columns[c]], ["own", spec.name, text]],
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
            [null, spec.noun, FORMATS.count(group.count)]],
        };
      },
      find: (x, y) => (y < 0 || y > bottom ? null : Math.min(spec.groups.length - 1, Math.floor(y / step))),
    };
  };

  /* A critical-difference diagram. Heights are in pixels; each name has a row of its own. */
  const CD = { ruler: 18, axis: 44, group: 54, step: 7, row: 17 };
  const firstName = (spec) => CD.group + CD.step * spec.groups.length + 6;
  const drawRanks = (svg, spec, width) => {
    const count = spec.names.length, half = Math.ceil(count / 2), first = firstName(spec);
    const text = (i, most) => `${cut(spec.names[i], most)}  ${spec.ranks[i].toFixed(2)}`;
    /* On a narrow page, names are cut so that at least 40 % of the width is left for the axis. */
    const longest = CHAR * Math.max(...spec.names.map((name) => name.length));
    const most = Math.min(longest, 0.3 * width - 7 * CHAR);
    const room = CHAR * Math.max(...spec.names.map((_, i) => text(i, most).length)) + 8;
    const X = scale(1, Math.max(2, count), room, width - room);
    const rows = (i) => first + CD.row * ((i < half ? i : count - 1 - i) + 0.5);
    const end = X(1 + spec.difference), fits = end <= width - room;
    const told = `critical difference ${spec.difference.toFixed(2)}${fits ? "" : ", longer than the axis"}`;
    label(svg, Math.min(X(1), width - CHAR * told.length), 10, told, "start");
    if (fits) {
      add(svg, "path", { d: `M${X(1)} ${CD.ruler - 4}v8m0-4H${end}m0-4v8`, class: "whisker" });
    }
    add(svg, "line", { x1: X(1), x2: X(count), y1: CD.axis, y2: CD.axis, class: "whisker" });
    const whole = ticks(1, count, (X(count) - X(1)) / 30, true);
    for (const tick of whole[0] === 1 ? whole : [1, ...whole]) {
      add(svg, "line", { x1: X(tick), x2: X(tick), y1: CD.axis - 4, y2: CD.axis, class: "whisker" });
      label(svg, X(tick), CD.axis - 7, String(tick), "middle");
    }
    spec.ranks.forEach((rank, i) => {
      const left = i < half, edge = left ? room : width - room, y = rows(i);
      add(svg, "polyline", {
        points: `${X(rank)},${CD.axis} ${X(rank)},${y} ${edge},${y}`, class: "curve lead",
      });
      add(svg, "text", {
        x: left ? edge - 4 : edge + 4, y: y + 4, "text-anchor": left ? "end" : "start",
        class: "label ink",
      }, text(i, most));
    });
    spec.groups.forEach(([from, to], k) => {
      const y = CD.group + CD.step * k;
      add(svg, "line", {
        x1: X(spec.ranks[from]) - 3, x2: X(spec.ranks[to]) + 3, y1: y, y2: y, class: "curve",
        stroke: colour("own"), "stroke-width": 3,
      });
    });
    const alike = (i) => {
      const of = spec.groups.filter(([from, to]) => from <= i && i <= to);
      return of.length ? Math.max(...of.map(([, to]) => to)) - Math.min(...of.map(([from]) => from)) : 0;
    };
    return {
      count,
      target: (i) => {
        const left = i < half;
        return {
          box: [left ? 0 : width - room, rows(i) - CD.row / 2, room, CD.row], x: X(spec.ranks[i]),
          title: spec.names[i],
          rows: [[null, "average rank", spec.ranks[i].toFixed(2)],
            [null, "does not differ from", `${alike(i)} of ${count - 1}`]],
        };
      },
      find: (x, y) => {
        const row = Math.floor((y - first) / CD.row);
        const i = x < width / 2 ? row : count - 1 - row;
        return row < 0 || i < 0 || i >= count || (x < width / 2) !== (i < half) ? null : i;
      },
    };
  };

  const DRAW = {
    lines: drawLines, bars: drawBars, heat: drawHeat, boxes: drawBoxes, ranks: drawRanks,
  };
  const heightOf = (spec, width) => {
    if (spec.kind === "heat") return Math.min(900, Math.max(9, Math.min(26, 560 / spec.rows.length)) * spec.rows.length) + 44;
    if (spec.kind === "boxes") return 40 * spec.groups.length + 44;
    if (spec.kind === "ranks") return firstName(spec) + CD.row * Math.ceil(spec.names.length / 2) + 4;
    if (spec.small) return 140;
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

  const make = (panel, spec, title) => {
    const plot = panel.querySelector(".plot");
    const entries = [...(spec.curves ?? spec.series ?? []), ...(spec.levels ?? [])];
    const visible = entries.map((entry) => entry.on !== false);
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
        "aria-label": title,
      })) svg.setAttribute(name, value);
      drawn = DRAW[spec.kind](svg, spec, width, height, visible);
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

    const legend = panel.querySelector(".legend");
    const named = spec.kind === "lines" || entries.length > 1;
    entries.forEach((entry, i) => {
      if (!named) return;
      const chip = document.createElement("button");
      chip.type = "button";
      chip.className = "chip";
      const sample = swatch(chip, entry.color);
      if (entry.dashed || entry.value !== undefined) sample.classList.add("dash");
      else if (entry.width < 1.5) sample.classList.add("thin");
      const last = entry.value ?? (spec.nearest ? null : entry.y?.at(-1));
      const text = last === null || last === undefined ? "" : ` ${FORMATS[spec.y.format](last)}`;
      span(chip, "chip-name", spec.kind === "bars" ? entry.name : entry.name + text);
      const state = () => chip.setAttribute("aria-pressed", String(visible[i]));
      state();
      chip.addEventListener("click", () => { visible[i] = !visible[i]; state(); redraw(); });
      legend.append(chip);
    });
    if (spec.marks) {
      const sample = document.createElement("span");
      sample.className = "chip";
      swatch(sample, "ink").classList.add("thin");
      span(sample, "chip-name", spec.marks.name);
      legend.append(sample);
    }
    redraw();
    new ResizeObserver(() => { if (plot.clientWidth !== width) redraw(); }).observe(plot);
  };

  const described = JSON.parse(document.getElementById("figures").textContent);
  for (const [id, panels] of Object.entries(described)) {
    const figure = document.getElementById(id), title = figure.querySelector("h3").textContent;
    const places = figure.querySelectorAll(".panel");
    panels.forEach((spec, i) => make(places[i], spec, title));
  }
  root.dataset.ready = "yes";
})();
