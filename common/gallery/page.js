// The page of collect_results.py: all runs in a table, those that are ticked side by side. The view is kept in the address, so
// that a page that is reloaded, or sent on, shows the same. Text from runs is only ever set as text, never as HTML.
"use strict";

const { place, collected, watch, experiments, runs } = JSON.parse(document.getElementById("data").textContent);
const AXES = { epoch: ["epoch", 1], step: ["step", 1], minutes: ["seconds", 1 / 60] }; // column of metrics.csv, and its scale
const N_COLOURS = 8; // in page.css
const SVG = ["svg", "line", "path", "text", "circle"];

const $ = (selector) => document.querySelector(selector);
const unique = (values) => [...new Set(values)];
const search = $("input[type=search]");
const view = {}; // experiment, search, sort, descending, run (keys of ticked runs), axis, log
for (const run of runs) for (const part of ["cells", "curves", "files"]) run[part] = new Map(Object.entries(run[part]));

// An element. Attributes that are functions listen to events; those that are null or false are left out.
function element(tag, attributes, ...children) {
  const made = document.createElementNS(`http://www.w3.org/${SVG.includes(tag) ? "2000/svg" : "1999/xhtml"}`, tag);
  for (const [name, value] of Object.entries(attributes ?? {}))
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== false) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const cell = (run, name) => run.cells.get(name) ?? "";

// Order of two cells: numbers by size, text by the alphabet, empty ones last in both directions.
function compare(a, b, sign) {
  if (!a || !b) return !a - !b;
  const [x, y] = [a, b].map((text) => parseFloat(text.replaceAll(",", "")));
  return sign * (x - y || a.localeCompare(b, "en", { numeric: true }));
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of ["experiment", "search", "sort", "descending", "axis", "log"]) view[name] = given.get(name) ?? "";
  view.run = given.getAll("run").filter((key) => runs.some((run) => run.key === key));
  if (!Object.hasOwn(AXES, view.axis)) view.axis = "epoch";
  if (!experiments.some(({ script }) => script === view.experiment)) view.experiment = "";
  search.value = view.search;
}

function writeAddress() {
  const pairs = Object.entries(view).flatMap(([name, values]) => [values].flat().map((value) => [name, value]));
  history.replaceState(null, "", `#${new URLSearchParams(pairs.filter(([, value]) => value))}`);
}

// ---- experiments -------------------------------------------------------------------------------------------------------------

const experiment = () => experiments.find(({ script }) => script === view.experiment);
const ofExperiment = (script) => runs.filter((run) => !script || cell(run, "experiment") === script);

function showExperiments() {
  const button = ({ script }) => {
    const click = () => {
      Object.assign(view, { experiment: script, search: "", sort: "", descending: "" });
      search.value = "";
      showAll();
      $("nav [aria-pressed=true]").focus();
    };
    const title = `${script || "all"} (${ofExperiment(script).length})`;
    return element("button", { "aria-pressed": String(view.experiment === script), click }, title);
  };
  $("nav").replaceChildren(...experiments.map(button));
  const { pictures, rows } = experiment();
  const row = (texts, i) => element("tr", null, ...texts.map((text) => element(i ? "td" : "th", null, text)));
  $("#overview").hidden = !rows.length;
  $("#pictures").replaceChildren(...pictures.map(([alt, src]) => element("img", { src, alt, loading: "lazy" })));
  $("#groups").replaceChildren(...rows.map(row));
}

// ---- the table of runs -------------------------------------------------------------------------------------------------------

// A cell as a word of the search.
const word = (run, name) => `${name}=${cell(run, name)}`.replaceAll(/\s+/g, "_").toLowerCase();

// Whether a run has all words of the search: NAME=VALUE is a cell, exactly; any other word may be anywhere.
function matches(run) {
  const cells = [...run.cells.keys()].map((name) => word(run, name));
  const all = [run.path, run.note, ...cells].join("\n").toLowerCase();
  const words = view.search.toLowerCase().split(/\s+/);
  return words.every((one) => cells.includes(one) || (!one.includes("=") && all.includes(one)));
}

function showHead() {
  const head = (name) => {
    const click = () => {
      Object.assign(view, { descending: view.sort === name && !view.descending ? "yes" : "", sort: name });
      showRows();
    };
    return element("th", { "data-name": name }, element("button", { click }, name));
  };
  $("#runs thead").replaceChildren(element("tr", null, element("th", null, "show"), ...experiment().columns.map(head)));
}

function showRows() {
  const shown = ofExperiment(view.experiment).filter(matches);
  if (view.sort) shown.sort((a, b) => compare(cell(a, view.sort), cell(b, view.sort), view.descending ? -1 : 1));
  const order = view.descending ? "descending" : "ascending";
  for (const head of document.querySelectorAll("#runs th[data-name]"))
    head.setAttribute("aria-sort", head.dataset.name === view.sort ? order : "none");
  $("#runs tbody").replaceChildren(...shown.map(row));
  $("#count").textContent = `${shown.length} of ${runs.length} runs`;
  writeAddress();
}

function row(run) {
  const tick = () => show(box.checked ? [...view.run, run.key] : view.run.filter((key) => key !== run.key));
  const attributes = { type: "checkbox", value: run.key, "aria-label": `show ${cell(run, "run")}`, change: tick };
  const box = element("input", { ...attributes, checked: view.run.includes(run.key) && "" });
  const alone = () => {
    show([run.key]);
    $("#shown").scrollIntoView({ behavior: "smooth" });
  };
  const others = experiment().columns.map((name) => {
    const text = cell(run, name);
    if (name === "run")
      return element("td", null, element("button", { title: run.path, click: alone }, text), element("small", null, run.note));
    const click = () => {
      search.value = view.search = `${view.search} ${word(run, name)}`.trim();
      showRows();
    };
    return element("td", { class: name === "state" && text, title: text && `only ${word(run, name)}`, click }, text);
  });
  return element("tr", null, element("td", null, box), ...others);
}

// ---- ticked runs, side by side -----------------------------------------------------------------------------------------------

function show(keys) {
  view.run = keys;
  for (const box of document.querySelectorAll("#runs input")) box.checked = keys.includes(box.value);
  const ticked = keys.map((key) => runs.find((run) => run.key === key));
  $("#shown").hidden = !keys.length;
  $("#title").textContent = keys.length === 1 ? "One run" : `${keys.length} runs side by side`;
  showCurves(ticked);
  const names = unique(ticked.flatMap((run) => [...run.cells.keys()])).filter((name) => !["run", "metric", "value"].includes(name));
  const differs = (name) => keys.length === 1 || ticked.some((run) => cell(run, name) !== cell(ticked[0], name));
  const pictures = unique(ticked.flatMap((run) => [...run.files.keys()])).filter((name) => name.endsWith(".png"));
  $("#cards").replaceChildren(...ticked.map((run, i) => card(run, i, pictures, names.filter(differs))));
  const same = names.filter((name) => !differs(name)).map((name) => `${name} ${cell(ticked[0], name)}`);
  $("#same").textContent = same.length ? `The same in all: ${same.join(", ")}.` : "";
  writeAddress();
}

const caption = (run, i) => [element("span", { class: `swatch c${i % N_COLOURS}` }), cell(run, "run")];

// A run: its pictures and cells, one below the other. The parts of all cards are in line.
function card(run, i, pictures, names) {
  const picture = (src, alt) => element("a", { href: src }, element("img", { src, alt, loading: "lazy" }));
  const parts = [
    element("h3", null, ...caption(run, i), element("small", null, run.note)),
    ...pictures.map((name) => (run.files.has(name) ? picture(run.files.get(name), name) : element("p", null, `no ${name}`))),
    ...names.map((name) => element("div", null, element("small", null, name), cell(run, name))),
    element("p", null, ...[...run.files].flatMap(([name, href]) => [element("a", { href }, name), " "])),
    element("pre", { hidden: !run.log && "" }, run.log),
  ];
  const made = element("article", null, ...parts);
  made.style.gridRow = `span ${parts.length}`;
  return made;
}

function showCurves(ticked) {
  const names = unique(ticked.flatMap((run) => [...run.curves.keys()])).filter((name) => !/^(epoch|step|seconds)$/.test(name));
  $("#curves").hidden = !names.length;
  $("#legend").replaceChildren(...ticked.map((run, i) => element("label", null, ...caption(run, i))));
  $("#charts").replaceChildren(...names.map((name) => chart(name, ticked)));
}

// Points of a curve. A metric that is measured every few epochs has none in between, and is joined.
function points(run, name) {
  const [column, factor] = AXES[view.axis];
  const [along, values] = [run.curves.get(column) ?? [], run.curves.get(name) ?? []];
  const known = values.map((y, i) => [along[i] ?? null, y]).filter(([x, y]) => x !== null && y !== null && (y > 0 || !view.log));
  return known.map(([x, y]) => [x * factor, view.log ? Math.log10(y) : y]);
}

function chart(name, ticked) {
  const [left, right, top, bottom] = [52, 350, 8, 192];
  const all = ticked.map((run) => points(run, name));
  const svg = element("svg", { viewBox: "0 0 360 220", role: "img", "aria-label": `${name} over ${view.axis}` });
  const figure = element("figure", null, element("figcaption", null, name), svg);
  if (!all.flat().length) return figure;
  const [toX, ticksX] = scale(all.flat().map(([x]) => x), left, right);
  const [toY, ticksY] = scale(all.flat().map(([, y]) => y), bottom, top);
  const label = (x, y, anchor, value) => {
    const odd = value && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5);
    return element("text", { x, y, "text-anchor": anchor }, odd ? value.toExponential(1) : Number(value.toPrecision(3)));
  };
  const grid = (y) => element("line", { x1: left, x2: right, y1: toY(y), y2: toY(y) });
  svg.append(...ticksY.flatMap((y) => [grid(y), label(left - 5, toY(y) + 4, "end", view.log ? 10 ** y : y)]));
  svg.append(...ticksX.map((x) => label(toX(x), bottom + 15, "middle", x)));
  all.forEach((curve, i) => {
    const ends = curve.map(([x, y]) => [toX(x).toFixed(1), toY(y).toFixed(1)]);
    const style = { class: `c${i % N_COLOURS}`, "stroke-dasharray": i >= N_COLOURS && "4 3" }; // when the colours begin again
    if (ends.length) svg.append(element("path", { ...style, d: `M${ends.join("L")}` }));
    if (ends.length < 15) svg.append(...ends.map(([cx, cy]) => element("circle", { ...style, cx, cy, r: 2.5 })));
  });
  return figure;
}

// A linear map from values to places between two ends, and round values for ticks.
function scale(values, from, to) {
  let [low, high] = [Math.min, Math.max].map((pick) => values.reduce((a, b) => pick(a, b)));
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const power = 10 ** Math.floor(Math.log10((high - low) / 5));
  const step = power * [1, 2, 5, 10, 20].find((factor) => 5 * factor * power >= high - low);
  const first = Math.ceil(low / step);
  const ticks = Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
  return [(value) => from + ((value - low) / (high - low)) * (to - from), ticks];
}

// ---- the page ----------------------------------------------------------------------------------------------------------------

function showAll() {
  showExperiments();
  showHead();
  showRows();
  show(view.run);
}

const states = unique(runs.map((run) => cell(run, "state")));
const counts = states.map((state) => `${runs.filter((run) => cell(run, "state") === state).length} ${state}`).join(", ") || "none";
const reloads = watch ? `; this page reloads itself every ${watch} seconds` : "";
$("#summary").textContent = `${runs.length} runs in ${place}: ${counts}. Collected ${collected}${reloads}.`;
readAddress();
[$("#axis").value, $("#log").checked] = [view.axis, view.log === "yes"];
$("#controls").addEventListener("change", () => {
  Object.assign(view, { axis: $("#axis").value, log: $("#log").checked ? "yes" : "" });
  show(view.run);
});
$("#clear").addEventListener("click", () => show([]));
search.addEventListener("input", () => {
  view.search = search.value;
  showRows();
});
showAll();
if (watch) setInterval(() => document.activeElement === search || location.reload(), 1000 * watch); // not while somebody types
