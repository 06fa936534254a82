// The page: settings -> losses -> plots and tables. The settings also live in the address (#beta=1).
"use strict";

const identity = { toSlider: (v) => v, fromSlider: (v) => v };
const logarithmic = { toSlider: Math.log10, fromSlider: (v) => 10 ** v };
const SETTINGS = {
  beta: { start: 0.1, low: 0.01, high: 5, scale: logarithmic },
  rewardGap: { start: 1, low: 0.1, high: 5, scale: logarithmic },
  linearBelow: { start: -1, low: -10, high: 0.9, scale: identity },
  labelSmoothing: { start: 0, low: 0, high: 0.45, scale: identity },
  reach: { start: 30, low: 3, high: 300, scale: logarithmic },
  margin: { start: 0, low: -750, high: 750, scale: identity },
  factor: { start: 4, low: 1, high: 8, scale: identity },
};
const start = () => Object.fromEntries(Object.entries(SETTINGS).map(([name, setting]) => [name, setting.start]));
const state = {};
const inputs = {};

// SPO and the squared loss have their minimum here, in nats.
const target = () => state.rewardGap / state.beta;
// The range follows the target, so that it is in sight and the curves fill the plots.
const reachOfPlots = () => Math.min(Math.max(state.reach, 1.5 * target()), 15 * target());

// The site's switch between light and dark also counts here.
document.documentElement.style.colorScheme = { light: "light", dark: "dark" }[localStorage.getItem("theme")] ?? "";

const byId = (id) => document.getElementById(id);
// Eight significant digits.
function digits(value) {
  if (!Number.isFinite(value)) return String(value);
  const tiny = value !== 0 && Math.abs(value) < 1e-4;
  return tiny ? value.toExponential(7) : Number(value.toPrecision(8)).toString();
}
const short = (value) => Number(value.toPrecision(4));
const powerOfTen = (exponent) => (exponent === 0 ? "1" : `1e${exponent}`);

function set(name, value) {
  const { low, high } = SETTINGS[name];
  state[name] = Math.min(Math.max(value, low), high);
  update();
}

function createControl(host) {
  const name = host.dataset.name;
  const { low, high, scale } = SETTINGS[name];
  const slider = document.createElement("input");
  const number = document.createElement("input");
  Object.assign(slider, { type: "range", id: name, step: "any", min: scale.toSlider(low), max: scale.toSlider(high) });
  Object.assign(number, { type: "number", step: "any", min: low, max: high });
  number.setAttribute("aria-label", `${name}, as a number`);
  slider.addEventListener("input", () => set(name, short(scale.fromSlider(slider.valueAsNumber))));
  number.addEventListener("change", () => set(name, Number.isNaN(number.valueAsNumber) ? state[name] : number.valueAsNumber));
  slider.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 }[event.key];
    if (steps === undefined) return;
    event.preventDefault();
    const step = (slider.max - slider.min) / 200;
    set(name, short(scale.fromSlider(slider.valueAsNumber + steps * step)));
  });
  host.append(slider, number);
  inputs[name] = { slider, number, scale };
}

function showControls() {
  const shown = { ...state, reach: reachOfPlots() };
  inputs.margin.slider.min = -shown.reach;
  inputs.margin.slider.max = shown.reach;
  for (const [name, { slider, number, scale }] of Object.entries(inputs)) {
    slider.value = scale.toSlider(shown[name]);
    slider.setAttribute("aria-valuetext", digits(shown[name]));
    number.value = digits(shown[name]);
  }
  byId("guarded").checked = state.guarded;
  inputs.linearBelow.slider.disabled = inputs.linearBelow.number.disabled = !state.guarded;
}

const pickMargin = (h) => set("margin", short(h));
const marginPlot = (id, yLabel) => createPlot(byId(id), { xLabel: "margin h (nats)", yLabel, onPick: pickMargin });
const plots = {
  value: marginPlot("value", "value"),
  slope: marginPlot("slope", "slope"),
  curvature: marginPlot("curvature", "curvature"),
  twinValue: marginPlot("twin-value", "value"),
  twinSlope: marginPlot("twin-slope", "slope"),
  vanishing: createPlot(byId("vanishing"), {
    xLabel: "π_l / π_ref,l",
    yLabel: "gradient in the rejected probability",
    onPick: (decades) => pickMargin(decades * Math.LN10),
    xTick: (decades) => powerOfTen(-decades),
    yTick: powerOfTen,
  }),
};

function fillRow(id, values) {
  const row = byId(id);
  while (row.children.length > 1) row.lastChild.remove();
  for (const value of values) row.insertCell().textContent = digits(value);
}

function showLosses(losses) {
  const { beta, margin } = state;
  const x = [-reachOfPlots(), reachOfPlots()];
  const units = { value: [1, [-0.7, 3.3]], slope: [beta, [-3.2, 1.2]], curvature: [beta ** 2, [-0.4, 3.6]] };
  for (const [part, [unit, range]] of Object.entries(units)) {
    const curves = Object.entries(losses).map(([name, loss]) => {
      const factor = name === "squared" ? beta ** 2 : 1;
      return { name, at: (h) => factor * loss[part](h) };
    });
    plots[part].draw({ x, y: range.map((end) => end * unit), curves, cursor: margin, target: target() });
  }
  for (const [name, loss] of Object.entries(losses)) {
    fillRow(name, [loss.value(margin), loss.slope(margin), loss.curvature(margin), byRejectedProbability(loss)(margin)]);
  }
  byId("at-margin").textContent = digits(margin);
  byId("at-x").textContent = digits(beta * margin);
}

function showTwins() {
  const { beta, factor, margin } = state;
  const published = spo({ beta, rewardGap: 1, linearBelow: null });
  const other = dpo({ beta: factor * beta, labelSmoothing: 0 });
  const scaled = {
    value: (h) => (2 / factor) * (other.value(h) - Math.LN2),
    slope: (h) => (2 / factor) * other.slope(h),
  };
  const scene = { x: [-reachOfPlots(), reachOfPlots()], cursor: margin, target: 1 / beta };
  for (const [part, plot, y] of [["value", plots.twinValue, [-0.8, 2.2]], ["slope", plots.twinSlope, [-3.2 * beta, 0.6 * beta]]]) {
    plot.draw({ ...scene, y, curves: [{ name: "spo", at: published[part] }, { name: "dpo", at: scaled[part] }] });
  }
  fillRow("twin-spo", [published.value(margin), published.slope(margin)]);
  fillRow("twin-dpo", [scaled.value(margin), scaled.slope(margin)]);
  byId("factor-in-title").textContent = digits(factor);
}

function showVanishing(losses) {
  const curves = Object.entries(losses).map(([name, loss]) => {
    const gradient = byRejectedProbability(loss);
    return { name, at: (decades) => Math.log10(Math.abs(gradient(decades * Math.LN10))) };
  });
  plots.vanishing.draw({ x: [0, 20], y: [-10, 22], curves, cursor: state.margin / Math.LN10 });
}

function update() {
  state.margin = Math.min(Math.max(state.margin, -reachOfPlots()), reachOfPlots());
  const settings = { ...state, linearBelow: state.guarded ? state.linearBelow : null };
  const losses = { spo: spo(settings), dpo: dpo(settings), squared: squared(settings) };
  showControls();
  showLosses(losses);
  showTwins();
  showVanishing(losses);
  const address = new URLSearchParams(Object.entries(state).filter(([name, value]) => value !== (SETTINGS[name]?.start ?? false)));
  history.replaceState(null, "", `#${address}`);
}

function readAddress() {
  Object.assign(state, start(), { guarded: false });
  for (const [name, text] of new URLSearchParams(location.hash.slice(1))) {
    if (name === "guarded") state.guarded = text === "true";
    else if (name in SETTINGS && Number.isFinite(Number(text))) state[name] = Number(text);
  }
  update();
}

document.querySelectorAll(".control").forEach(createControl);
document.querySelectorAll("form").forEach((form) => form.addEventListener("submit", (event) => event.preventDefault()));
byId("guarded").addEventListener("change", () => {
  state.guarded = byId("guarded").checked;
  update();
});
window.addEventListener("hashchange", readAddress);
readAddress();
