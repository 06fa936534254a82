// One SVG plot: axes, curves, a cursor line. It knows nothing about losses.
"use strict";

const MARGIN = { left: 46, right: 18, top: 8, bottom: 36 };

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// About `count` round numbers (1, 2 or 5 times a power of ten) that cover [low, high].
function ticks([low, high], count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const first = Math.ceil(low / step - 1e-9);
  const length = Math.floor(high / step + 1e-9) - first + 1;
  return Array.from({ length }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

// host: the element to fill. xLabel, yLabel: axis titles. onPick(x): the user pointed at x.
// xTick, yTick: how a tick's number is written.
function createPlot(host, { xLabel, yLabel, onPick, xTick = String, yTick = String }) {
  const root = svg("svg", { role: "img", "aria-label": `${yLabel} over ${xLabel}` });
  host.append(root);
  let scene = null;
  let toX = null;

  function pick(event) {
    if (event.type === "pointermove" && !root.hasPointerCapture(event.pointerId)) return;
    if (event.type === "pointerdown") root.setPointerCapture(event.pointerId);
    onPick(toX(event.clientX - root.getBoundingClientRect().left));
  }
  root.addEventListener("pointerdown", pick);
  root.addEventListener("pointermove", pick);

  function axes({ x, y }, frame, scaleX, scaleY) {
    const grid = svg("g", { class: "grid" });
    for (const tick of ticks(x, frame.width / 60)) {
      const at = scaleX(tick);
      grid.append(svg("line", { x1: at, x2: at, y1: frame.top, y2: frame.bottom, class: tick === 0 ? "zero" : "" }));
      grid.append(svg("text", { x: at, y: frame.bottom + 15, "text-anchor": "middle" }, xTick(tick)));
    }
    for (const tick of ticks(y, frame.height / 34)) {
      const at = scaleY(tick);
      grid.append(svg("line", { x1: frame.left, x2: frame.right, y1: at, y2: at, class: tick === 0 ? "zero" : "" }));
      grid.append(svg("text", { x: frame.left - 5, y: at + 4, "text-anchor": "end" }, yTick(tick)));
    }
    const middle = (frame.left + frame.right) / 2;
    grid.append(svg("text", { x: middle, y: frame.bottom + 31, "text-anchor": "middle", class: "title" }, xLabel));
    return grid;
  }

  // A path through the finite values; far outside the frame it is held back, for SVG's sake.
  function path(curve, { x, y }, frame, scaleX, scaleY) {
    const reach = 5 * (y[1] - y[0]);
    const commands = [];
    let pen = "M";
    for (let i = 0; i <= frame.width; i += 1) {
      const at = x[0] + ((x[1] - x[0]) * i) / frame.width;
      const value = curve.at(at);
      if (Number.isNaN(value)) {
        pen = "M";
        continue;
      }
      const held = Math.min(Math.max(value, y[0] - reach), y[1] + reach);
      commands.push(`${pen}${scaleX(at).toFixed(1)},${scaleY(held).toFixed(1)}`);
      pen = "L";
    }
    return svg("path", { d: commands.join(""), class: `curve ${curve.name}` });
  }

  function render() {
    const width = host.clientWidth;
    if (scene === null || width === 0) return;
    const height = Math.round(Math.min(300, Math.max(200, 0.62 * width)));
    const frame = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
    frame.width = frame.right - frame.left;
    frame.height = frame.bottom - frame.top;
    const { x, y, curves, cursor, target } = scene;
    const scaleX = (value) => frame.left + (frame.width * (value - x[0])) / (x[1] - x[0]);
    const scaleY = (value) => frame.bottom - (frame.height * (value - y[0])) / (y[1] - y[0]);
    toX = (pixel) => x[0] + ((x[1] - x[0]) * Math.min(Math.max(pixel - frame.left, 0), frame.width)) / frame.width;

    root.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const window = svg("svg", {
      x: frame.left,
      y: frame.top,
      width: frame.width,
      height: frame.height,
      viewBox: `${frame.left} ${frame.top} ${frame.width} ${frame.height}`,
      class: "window",
    });
    if (target !== undefined) {
      const at = scaleX(target);
      window.append(svg("line", { x1: at, x2: at, y1: frame.top, y2: frame.bottom, class: "target" }));
    }
    for (const curve of curves) window.append(path(curve, scene, frame, scaleX, scaleY));
    if (cursor >= x[0] && cursor <= x[1]) {
      const at = scaleX(cursor);
      window.append(svg("line", { x1: at, x2: at, y1: frame.top, y2: frame.bottom, class: "cursor" }));
      for (const curve of curves) {
        const value = curve.at(cursor);
        if (Number.isFinite(value)) window.append(svg("circle", { cx: at, cy: scaleY(value), r: 3.5, class: curve.name }));
      }
    }
    root.replaceChildren(axes(scene, frame, scaleX, scaleY), window);
  }

  new ResizeObserver(render).observe(host);
  return {
    // x, y: [low, high] of the axes. curves: {name, at(x)}; name is the CSS class. cursor: an x.
    // target: an x that is marked, if there is one.
    draw(next) {
      scene = next;
      render();
    },
  };
}
