// The page of collect_results.py: all runs in a table, those that are ticked side by side. The view is kept in the address, so
// that a page that is reloaded, or sent on, shows the same. Text from runs is only ever set as text, never as HTML.
"use strict";

const { place, collected, watch, experiments, runs } = JSON.parse(document.getElementById("data").textContent);
const STATES = ["finished", "running", "stopped", "failed", "broken"];
const AXES = { epoch: ["epoch", 1], step: ["step", 1], minutes: ["seconds", 1 / 60] }; // column of metrics.csv, and its scale
const N_COLOURS = 8; // in page.css
const SVG = ["svg", "line", "path", "text", "circle"];

const $ = (selector) => document.querySelector(selector);
const search = $("input[type=search]");
const view = {}; // experiment, search, sort, descending, run (keys of ticked runs), axis, log
for (const run of runs) for (const part of ["options", "results", "curves"]) run[part] = new Map(Object.entries(run[part]));

// An element. Attributes that are functions listen to events; those that are null or false are left out.
function element(tag, attributes, ...children) {
  const made = document.createElementNS(`http://www.w3.org/${SVG.includes(tag) ? "2000/svg" : "1999/xhtml"}`, tag);
  for (const [name, value] of Object.entries(attributes ?? {}))
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== false) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function table(attributes, head, rows) {
  const line = (cells) => element("tr", null, ...cells);
  const parts = [element("thead", null, line(head)), element("tbody", null, ...rows.map(line))];
  return element("div", { class: "scroll" }, element("table", attributes, ...parts));
}

// Order of two cells: numbers by size, text by the alphabet, empty ones last in both directions.
function compare(a, b, sign) {
  if (!a || !b) return !a - !b;
  const [x, y] = [a, b].map((text) => parseFloat(text.replaceAll(",", "")));
  return sign * (x - y || a.localeCompare(b, "en", { numeric: true }));
}

const unique = (values) => [...new Set(values)];

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of ["experiment", "search", "sort", "descending", "axis", "log"]) view[name] = given.get(name) ?? "";
  view.run = given.getAll("run").filter((key) => runs.some((run) => run.key === key));
  if (!Object.hasOwn(AXES, view.axis)) view.axis = "epoch";
  if (!experiment()) view.experiment = "";
  search.value = view.search;
}

function writeAddress() {
  const pairs = Object.entries(view).flatMap(([name, values]) => [values].flat().map((value) => [name, value]));
  history.replaceState(null, "", `#${new URLSearchParams(pairs.filter(([, value]) => value))}`);
}

// ---- experiments -------------------------------------------------------------------------------------------------------------

const experiment = () => experiments.find((one) => one.script === view.experiment);

function showExperiments() {
  const button = (script, count) => {
    const click = () => {
      Object.assign(view, { experiment: script, search: "", sort: "", descending: "" });
      search.value = "";
      showAll();
      $("nav [aria-pressed=true]").focus();
    };
    return element("button", { "aria-pressed": String(view.experiment === script), click }, `${script || "all"} (${count})`);
  };
  const count = (script) => runs.filter((run) => run.script === script).length;
  $("nav").replaceChildren(button("", runs.length), ...experiments.map(({ script }) => button(script, count(script))));
  const one = experiment();
  $("#overview").hidden = !one;
  if (!one) return;
  const [head, ...rows] = one.rows.map((row, i) => row.map((text) => element(i ? "td" : "th", null, text)));
  $("#overview").replaceChildren(
    element("summary", null, "over seeds"),
    ...one.pictures.map(([alt, src]) => element("img", { src, alt, loading: "lazy" })),
    table({ id: "groups" }, head, rows),
    "± is the standard deviation over runs that differ by their seed alone; ",
    "of a single run, over what it repeats within itself (pairs, matrices).",
  );
}

// ---- the table of runs -------------------------------------------------------------------------------------------------------

function columns() {
  const one = experiment();
  const measured = one ? [...one.options, "seed", ...one.metrics] : ["seed", "metric", "value"];
  return [...(one ? [] : ["experiment"]), "run", "state", ...measured, "parameters", "minutes", "device", "written"];
}

function cell(run, name) {
  const own = { experiment: run.script, run: run.name, state: run.state, metric: run.metric, value: run.results.get(run.metric) };
  return run.results.get(name) ?? run.options.get(name) ?? new Map(Object.entries(own)).get(name) ?? "";
}

// A cell as a word of the search.
const word = (run, name) => `${name}=${cell(run, name)}`.replaceAll(/\s+/g, "_").toLowerCase();

// Whether a run has all words of the search: NAME=VALUE is a cell, exactly; any other word may be anywhere.
function matches(run) {
  const cells = ["state", ...run.options.keys(), ...run.results.keys()].map((name) => word(run, name));
  const all = [run.path, run.script, run.note, ...cells].join("\n").toLowerCase();
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
  $("#runs thead").replaceChildren(element("tr", null, element("th", null, "show"), ...columns().map(head)));
}

function showRows() {
  const shown = runs.filter((run) => (!view.experiment || run.script === view.experiment) && matches(run));
  if (view.sort) shown.sort((a, b) => compare(cell(a, view.sort), cell(b, view.sort), view.descending ? -1 : 1));
  for (const head of document.querySelectorAll("#runs th[data-name]"))
    head.ariaSort = head.dataset.name !== view.sort ? "none" : view.descending ? "descending" : "ascending";
  $("#runs tbody").replaceChildren(...shown.map((run) => element("tr", null, ...cells(run))));
  $("#count").textContent = `${shown.length} of ${runs.length} runs`;
  writeAddress();
}

function cells(run) {
  const tick = () => show(box.checked ? [...view.run, run.key] : view.run.filter((key) => key !== run.key));
  const ticked = view.run.includes(run.key) && "";
  const box = element("input", { type: "checkbox", value: run.key, checked: ticked, "aria-label": `show ${run.name}`, change: tick });
  const alone = () => {
    show([run.key]);
    $("#shown").scrollIntoView({ behavior: "smooth" });
  };
  const others = columns().map((name) => {
    const text = cell(run, name);
    if (name === "run")
      return element("td", null, element("button", { title: run.path, click: alone }, text), element("small", null, run.note));
    if (!text || ["experiment", "metric", "value"].includes(name)) return element("td", null, text);
    const filter = () => {
      search.value = view.search = `${view.search} ${word(run, name)}`.trim();
      showRows();
    };
    return element("td", { class: name === "state" && run.state, title: `only ${word(run, name)}`, click: filter }, text);
  });
  return [element("td", null, box), ...others];
}

// ---- ticked runs, side by side -----------------------------------------------------------------------------------------------

function show(keys) {
  view.run = keys;
  for (const box of document.querySelectorAll("#runs input")) box.checked = keys.includes(box.value);
  const ticked = keys.map((key) => runs.find((run) => run.key === key));
  const title = keys.length === 1 ? "One run" : `${keys.length} runs side by side`;
  const clear = element("button", { click: () => show([]) }, "clear");
  $("#shown").hidden = !keys.length;
  if (keys.length)
    $("#shown").replaceChildren(
      element("h2", null, title, " ", clear), ...comparison(ticked), ...curves(ticked), ...pictures(ticked),
      ...(ticked.some((run) => run.log) ? beside("end of the log", ticked, (run) => element("pre", null, run.log)) : []),
    );
  writeAddress();
}

const caption = (run, i) => [element("span", { class: `swatch c${i % N_COLOURS}` }), run.name];

function comparison(ticked) {
  const names = (part) => unique(ticked.flatMap((run) => [...run[part].keys()]));
  const same = (name) => ticked.every((run) => run.options.get(name) === ticked[0].options.get(name));
  const line = (name, content) => [element("th", null, name), ...ticked.map((run) => element("td", null, ...content(run)))];
  const links = (run) => run.files.flatMap(([name, href]) => [element("a", { href }, name), " "]);
  const rows = [
    line("state", (run) => [element("span", { class: run.state }, run.state), ` ${run.note}`]),
    line("experiment", (run) => [run.script]),
    ...names("options").filter((name) => !same(name)).map((name) => line(name, (run) => [run.options.get(name) ?? ""])),
    ...names("results").map((name) => line(name, (run) => [run.results.get(name) ?? ""])),
    line("files", links),
  ];
  const head = [element("th"), ...ticked.map((run, i) => element("th", null, ...caption(run, i)))];
  const alike = names("options").filter(same).map((name) => `${name} ${ticked[0].options.get(name)}`);
  return [table({ id: "comparison" }, head, rows), element("p", null, alike.length ? `options of all: ${alike.join(", ")}` : "")];
}

// A part of each run, beside each other.
function beside(title, ticked, content) {
  const figure = (run, i) => element("figure", null, element("figcaption", null, ...caption(run, i)), content(run));
  return [element("h2", null, title), element("div", { class: "beside" }, ...ticked.map(figure))];
}

function pictures(ticked) {
  const names = unique(ticked.flatMap((run) => run.files.map(([name]) => name))).filter((name) => name.endsWith(".png"));
  const picture = (run, name) => {
    const src = new Map(run.files).get(name);
    const image = () => element("img", { src, alt: `${name} of ${run.name}`, loading: "lazy" });
    return src ? element("a", { href: src }, image()) : "none";
  };
  return names.flatMap((name) => beside(name, ticked, (run) => picture(run, name)));
}

function curves(ticked) {
  const all = unique(ticked.flatMap((run) => [...run.curves.keys()]));
  const names = all.filter((name) => !["epoch", "step", "seconds"].includes(name));
  if (!names.length) return [];
  const charts = element("div", { class: "charts" });
  const options = Object.keys(AXES).map((name) => element("option", { selected: name === view.axis && "" }, name));
  const draw = () => {
    Object.assign(view, { axis: axis.value, log: log.checked ? "yes" : "" });
    charts.replaceChildren(...names.map((name) => chart(name, ticked)));
    writeAddress();
  };
  const axis = element("select", { "aria-label": "axis of the curves", change: draw }, ...options);
  const log = element("input", { type: "checkbox", checked: view.log === "yes" && "", change: draw });
  draw();
  return [element("h2", null, "curves"), element("label", null, "over ", axis), element("label", null, log, " logarithmic"), charts];
}

// Points of a curve. A metric that is measured every few epochs has none in between, and is joined.
function points(run, name) {
  const [column, factor] = AXES[view.axis];
  const [along, values] = [run.curves.get(column) ?? [], run.curves.get(name) ?? []];
  const known = values.map((y, i) => [along[i] ?? null, y]).filter(([x, y]) => x !== null && y !== null && (y > 0 || !view.log));
  return known.map(([x, y]) => [x * factor, view.log ? Math.log10(y) : y]);
}

function chart(name, ticked) {
  const [width, left, right, top, bottom] = [360, 52, 350, 8, 192];
  const all = ticked.map((run) => points(run, name));
  const svg = element("svg", { viewBox: `0 0 ${width} 220`, role: "img", "aria-label": `${name} over ${view.axis}` });
  if (all.flat().length) {
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
      const dashes = i < N_COLOURS ? null : "4 3"; // when the colours begin again
      svg.append(element("path", { class: `c${i % N_COLOURS}`, "stroke-dasharray": dashes, d: ends.length && `M${ends.join("L")}` }));
      if (ends.length < 15) svg.append(...ends.map(([cx, cy]) => element("circle", { class: `c${i % N_COLOURS}`, cx, cy, r: 2.5 })));
    });
  }
  return element("figure", { class: "chart" }, element("figcaption", null, name), svg);
}

// A linear map from values to places between two ends, and round values for ticks.
function scale(values, from, to) {
  let [low, high] = [Math.min, Math.max].map((pick) => values.reduce((a, b) => pick(a, b)));
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const power = 10 ** Math.floor(Math.log10((high - low) / 4));
  const step = power * [1, 2, 5, 10, 20].find((factor) => 4 * factor * power >= high - low);
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

const counts = STATES.map((state) => [runs.filter((run) => run.state === state).length, state]).filter(([count]) => count);
const states = counts.map((count) => count.join(" ")).join(", ") || "none";
const reloads = watch ? `; this page reloads itself every ${watch} seconds` : "";
$("#summary").textContent = `${runs.length} runs in ${place}: ${states}. Collected ${collected}${reloads}.`;
search.addEventListener("input", () => {
  view.search = search.value;
  showRows();
});
window.addEventListener("hashchange", () => {
  readAddress();
  showAll();
});
readAddress();
showAll();
if (watch) setInterval(() => document.activeElement === search || location.reload(), 1000 * watch); // not while somebody types
