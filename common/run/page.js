// The page of collect_results.py: all runs in a table, chosen ones side by side. What is chosen is kept in the address, so that
// a page that reloads itself, or is sent on, shows the same. All that comes from runs is put in as text, never as HTML.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const experiments = data.experiments;
const COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C", "#7B3F00"];
const STATES = ["finished", "running", "stopped", "failed", "broken"];
const ALL = "all"; // of an option's values
const NOT_CURVES = ["epoch", "step", "seconds"];
const AXES = { epoch: 1, step: 1, minutes: 1 / 60 }; // minutes from seconds
const FEW = 15; // points of a curve that are marked
const HUGE = 1e100; // beyond, nothing is drawn
const [SMALL, LARGE] = [1e-3, 1e5]; // beyond, figures are shown with an exponent

const view = readAddress();
const byKey = new Map(runs.map((run) => [run.key, run]));

// ---- small things --------------------------------------------------------------------------------------------------------

// An HTML element; attributes that begin with "on" are listeners.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// An SVG element.
function drawn(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// A measured number, rounded.
function number(value, digits = 4) {
  if (value === null || value === undefined) return "";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size && (size < SMALL || size >= LARGE) ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
}

// An option, exactly.
function text(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number")
    return Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(12)));
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

// What tells values apart: 1 and "1" are two.
function exactly(value) {
  return JSON.stringify(value ?? null);
}

// Order of two values: numbers by size, lists part by part, what is empty last in both directions.
function compare(a, b, sign = 1) {
  if (Array.isArray(a) && Array.isArray(b)) return compare(a[0], b[0], sign) || compare(a[1], b[1], sign);
  const empty = (value) => value === null || value === undefined || value === "";
  if (empty(a) || empty(b)) return empty(a) - empty(b);
  if (typeof a === "number" && typeof b === "number") return sign * (a - b);
  return sign * text(a).localeCompare(text(b), "en", { numeric: true });
}

function experimentOf(script) {
  return experiments.find((one) => one.script === script);
}

// Draw a part anew; what had the focus in it has it again.
function keepingFocus(part, draw) {
  const before = document.activeElement;
  const names = (one) => [one.tagName, one.getAttribute("aria-label"), one.textContent].join();
  const name = part.contains(before) ? names(before) : null;
  draw();
  if (name) [...part.querySelectorAll("button, input, select")].find((one) => names(one) === name)?.focus();
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const options = {};
  const experiment = experimentOf(given.get("experiment"));
  for (const name of experiment?.varying ?? []) if (given.has(`o.${name}`)) options[name] = given.get(`o.${name}`);
  return {
    experiment: experiment?.script ?? "",
    state: STATES.includes(given.get("state")) ? given.get("state") : "",
    search: given.get("search") ?? "",
    options,
    sort: given.get("sort") ?? "",
    descending: given.get("order") === "descending",
    chosen: given.getAll("run"),
    axis: Object.hasOwn(AXES, given.get("axis")) ? given.get("axis") : "epoch",
    logarithmic: given.get("scale") === "log",
  };
}

function writeAddress() {
  const kept = new URLSearchParams();
  for (const name of ["experiment", "state", "search", "sort"]) if (view[name]) kept.set(name, view[name]);
  if (view.descending) kept.set("order", "descending");
  for (const [name, value] of Object.entries(view.options)) if (value) kept.set(`o.${name}`, value);
  for (const key of view.chosen) kept.append("run", key);
  if (view.axis !== "epoch") kept.set("axis", view.axis);
  if (view.logarithmic) kept.set("scale", "log");
  history.replaceState(null, "", `#${kept}`);
}

// ---- the table of runs ---------------------------------------------------------------------------------------------------

function columns() {
  const experiment = experimentOf(view.experiment);
  const figures = experiment ? experiment.figures : [];
  return [
    ...(experiment ? [] : [{ name: "experiment", of: (run) => run.script }]),
    { name: "run", of: (run) => run.name },
    { name: "state", of: (run) => run.state },
    ...(experiment ? experiment.varying.map((name) => ({ name, option: name, of: (run) => run.options[name] })) : []),
    { name: "seed", of: (run) => run.seed },
    ...(experiment
      ? []
      : [{ name: "first figure", of: firstFigure, label: (run) => firstFigure(run).map((part) => `${text(part)} `) }]),
    ...figures.map((name) => ({ name, of: (run) => run.figures[name]?.[0], label: (run) => withDeviation(run.figures[name]) })),
    { name: "parameters", of: (run) => run.parameters },
    { name: "minutes", of: (run) => run.minutes },
    { name: "device", of: (run) => run.device },
    { name: "written", of: (run) => run.written },
  ];
}

function firstFigure(run) {
  const [first] = Object.entries(run.figures);
  return first ? [first[0], Number(first[1][0].toPrecision(4))] : [];
}

function withDeviation(figure) {
  if (!figure) return [];
  const [mean, deviation, n] = figure;
  if (deviation === null) return [number(mean)];
  return [number(mean), element("span", { class: "deviation", title: `deviation of ${n}` }, ` ± ${number(deviation, 2)}`)];
}

function matching() {
  const words = view.search.toLowerCase().split(/\s+/).filter(Boolean);
  return runs.filter((run) => {
    if (view.experiment && run.script !== view.experiment) return false;
    if (view.state && run.state !== view.state) return false;
    for (const [name, value] of Object.entries(view.options)) if (exactly(run.options[name]) !== value) return false;
    const all = `${run.path} ${run.script} ${run.state} ${run.note} ${JSON.stringify(run.options)}`.toLowerCase();
    return words.every((word) => all.includes(word));
  });
}

function sorted(found, shown) {
  const column = shown.find((one) => one.name === view.sort);
  if (!column) return found;
  return [...found].sort((a, b) => compare(column.of(a), column.of(b), view.descending ? -1 : 1));
}

function showTable() {
  keepingFocus(document.getElementById("runs"), drawTable);
}

function drawTable() {
  const shown = columns();
  const found = sorted(matching(), shown);
  const numeric = new Set(shown.filter((column) => found.some((run) => typeof column.of(run) === "number")));
  const heads = shown.map((column) => {
    const direction = column.name !== view.sort ? "none" : view.descending ? "descending" : "ascending";
    const sort = () => {
      view.descending = column.name === view.sort && !view.descending;
      view.sort = column.name;
      showTable();
    };
    const attributes = { scope: "col", "aria-sort": direction, class: numeric.has(column) ? "number" : null };
    return element("th", attributes, element("button", { type: "button", onclick: sort }, column.name));
  });
  const head = element("tr", {}, element("th", { scope: "col" }, "show"), ...heads);
  document.querySelector("#runs thead").replaceChildren(head);
  document.querySelector("#runs tbody").replaceChildren(...found.map((run) => row(run, shown, numeric)));
  document.getElementById("count").textContent = `${found.length} of ${runs.length} runs`;
  writeAddress();
}

function row(run, shown, numeric) {
  const isChosen = view.chosen.includes(run.key);
  const change = () => choose(run, box.checked);
  const box = element("input", { type: "checkbox", checked: isChosen, "aria-label": `show ${run.name}`, onchange: change });
  const cells = shown.map((column) => {
    if (column.name === "run") return nameCell(run);
    if (column.name === "state") return element("td", { class: `state ${run.state}` }, run.state);
    const content = column.label ? column.label(run) : [text(column.of(run))];
    return element("td", { class: numeric.has(column) ? "number" : null }, ...content);
  });
  return element("tr", { class: isChosen ? "chosen" : null }, element("td", {}, box), ...cells);
}

function nameCell(run) {
  const alone = () => {
    view.chosen = [run.key];
    showTable();
    showChosen();
    document.getElementById("shown").scrollIntoView({ behavior: "smooth" });
  };
  const button = element("button", { type: "button", title: run.path, onclick: alone }, run.name);
  return element("td", { class: "name" }, button, run.note ? element("small", {}, run.note) : null);
}

function choose(run, wanted) {
  view.chosen = view.chosen.filter((key) => key !== run.key);
  if (wanted) view.chosen.push(run.key);
  showTable();
  showChosen();
}

// ---- experiments and filters ---------------------------------------------------------------------------------------------

function showExperiments() {
  const button = (script, title, count) => {
    const pick = () => {
      Object.assign(view, { experiment: script, options: {}, sort: "", descending: false });
      showAll();
    };
    return element(
      "button",
      { type: "button", "aria-pressed": String(view.experiment === script), onclick: pick },
      `${title} (${count})`,
    );
  };
  const count = (script) => runs.filter((run) => run.script === script).length;
  const buttons = experiments.map((one) => button(one.script, one.script, count(one.script)));
  const place = document.getElementById("experiments");
  keepingFocus(place, () => place.replaceChildren(button("", "all", runs.length), ...buttons));
}

function showFilters() {
  // pairs of a value and its name; one that no run has any more can still be seen, and given up
  const choice = (label, value, pairs, change) => {
    const known = pairs.some(([one]) => one === value) || value === ALL ? pairs : [...pairs, [value, value]];
    const options = [[ALL, "any"], ...known].map(([one, name]) =>
      element("option", { value: one, selected: one === value }, name),
    );
    return element(
      "label",
      {},
      label,
      element("select", { "aria-label": label, onchange: (event) => change(event.target.value) }, ...options),
    );
  };
  const search = element("input", { type: "search", value: view.search, placeholder: "name, option, message", size: 22 });
  search.addEventListener("input", () => {
    view.search = search.value;
    showTable();
  });
  const found = STATES.filter((state) => runs.some((run) => run.state === state));
  const states = choice(
    "state",
    view.state || ALL,
    found.map((state) => [state, state]),
    (value) => {
      view.state = value === ALL ? "" : value;
      showTable();
    },
  );
  const experiment = experimentOf(view.experiment);
  const options = (experiment?.varying ?? []).map((name) => {
    const values = new Map(
      runs.filter((run) => run.script === view.experiment).map((run) => [exactly(run.options[name]), run.options[name]]),
    );
    const pairs = [...values].sort((a, b) => compare(a[1], b[1])).map(([key, value]) => [key, text(value) || "none"]);
    return choice(name, view.options[name] ?? ALL, pairs, (value) => {
      if (value === ALL) delete view.options[name];
      else view.options[name] = value;
      showTable();
    });
  });
  document.getElementById("filters").replaceChildren(element("label", {}, "search", search), states, ...options);
}

function showOverview() {
  const place = document.getElementById("overview");
  const experiment = experimentOf(view.experiment);
  place.hidden = !experiment || (!experiment.pictures.length && !experiment.groups.length);
  if (place.hidden) return;
  const pictures = experiment.pictures.map((picture) =>
    element("img", { src: picture.source, alt: picture.name, loading: "lazy" }),
  );
  const [head, ...rows] = experiment.groups;
  const cells = (tag, row) =>
    row.map((value) => element(tag, { class: typeof value === "number" ? "number" : null }, text(value)));
  const table = head
    ? element(
        "div",
        { class: "scroll" },
        element(
          "table",
          { id: "groups" },
          element("thead", {}, element("tr", {}, ...cells("th", head))),
          element("tbody", {}, ...rows.map((values) => element("tr", {}, ...cells("td", values)))),
        ),
      )
    : null;
  const note =
    "All runs, whatever is filtered below. ± is the standard deviation over runs that differ by their seed alone; " +
    "of a single run, over what it repeats within itself (pairs, matrices).";
  place.replaceChildren(
    element(
      "details",
      { open: true },
      element("summary", {}, `${experiment.script}, over seeds`),
      element("div", { class: "figures" }, ...pictures),
      table,
      element("p", { class: "note" }, note),
    ),
  );
}

// ---- chosen runs, side by side -------------------------------------------------------------------------------------------

function showChosen() {
  view.chosen = view.chosen.filter((key) => byKey.has(key));
  const chosen = view.chosen.map((key) => byKey.get(key));
  const place = document.getElementById("shown");
  place.hidden = !chosen.length;
  const title = chosen.length > 1 ? `${chosen.length} runs side by side` : "One run";
  place.replaceChildren(element("h2", {}, title), differences(chosen), curves(chosen), pictures(chosen), logs(chosen));
  const bar = document.getElementById("bar");
  bar.hidden = !chosen.length;
  const none = () => {
    view.chosen = [];
    showTable();
    showChosen();
  };
  bar.replaceChildren(
    element("span", {}, chosen.length === 1 ? "1 run chosen" : `${chosen.length} runs chosen`),
    element("button", { type: "button", onclick: () => place.scrollIntoView({ behavior: "smooth" }) }, "show"),
    element("button", { type: "button", onclick: none }, "clear"),
  );
  writeAddress();
}

function colour(chosen, run) {
  return COLOURS[chosen.indexOf(run) % COLOURS.length];
}

function caption(chosen, run) {
  const swatch = element("span", { class: "swatch" });
  swatch.style.background = colour(chosen, run);
  return [swatch, run.name];
}

function differences(chosen) {
  const names = [...new Set(chosen.flatMap((run) => Object.keys(run.options)))];
  const differ = names.filter((name) => new Set(chosen.map((run) => exactly(run.options[name]))).size > 1);
  const figures = [...new Set(chosen.flatMap((run) => Object.keys(run.figures)))];
  const line = (name, of) =>
    element("tr", {}, element("th", { scope: "row" }, name), ...chosen.map((run) => element("td", {}, ...of(run))));
  const plain = (name, key) =>
    chosen.some((run) => run[key] !== null && run[key] !== "") ? [line(name, (run) => [text(run[key])])] : [];
  const links = (run) => run.files.flatMap((file) => [element("a", { href: file.source }, file.name), " "]);
  const rows = [
    line("state", (run) => [element("span", { class: `state ${run.state}` }, run.state)]),
    ...plain("note", "note"),
    ...plain("experiment", "script"),
    ...differ.map((name) => line(name, (run) => [text(run.options[name])])),
    ...plain("seed", "seed"),
    ...figures.map((name) => line(name, (run) => withDeviation(run.figures[name]))),
    ...plain("parameters", "parameters"),
    line("minutes", (run) => [number(run.minutes)]),
    ...plain("device", "device"),
    ...plain("protocol", "protocol"),
    ...plain("code", "revision"),
    ...plain("written", "written"),
    line("files", links),
  ];
  const head = element(
    "tr",
    {},
    element("th", {}),
    ...chosen.map((run) => element("th", { scope: "col" }, ...caption(chosen, run))),
  );
  const table = element("table", { class: "differences" }, element("thead", {}, head), element("tbody", {}, ...rows));
  const same = names.filter((name) => !differ.includes(name) && text(chosen[0].options[name]) !== "");
  const rest = same.map((name) => `${name} ${text(chosen[0].options[name])}`).join(", ");
  return element(
    "div",
    {},
    element("div", { class: "scroll" }, table),
    rest
      ? element(
          "details",
          {},
          element("summary", {}, chosen.length > 1 ? "options of all" : "options"),
          element("p", { class: "note" }, rest),
        )
      : null,
  );
}

function pictures(chosen) {
  const names = [...new Set(chosen.flatMap((run) => run.pictures.map((picture) => picture.name)))];
  const parts = names.flatMap((name) => {
    const beside = chosen.map((run) => {
      const found = run.pictures.find((picture) => picture.name === name);
      const image = found
        ? element(
            "a",
            { href: found.source },
            element("img", { src: found.source, alt: `${name} of ${run.name}`, loading: "lazy" }),
          )
        : element("p", { class: "note" }, "none");
      return element("figure", {}, element("figcaption", {}, ...caption(chosen, run)), image);
    });
    return [element("h2", {}, name), element("div", { class: "beside" }, ...beside)];
  });
  return element("div", { id: "pictures" }, ...parts);
}

function logs(chosen) {
  const some = chosen.filter((run) => run.log);
  const parts = some.map((run) =>
    element("figure", {}, element("figcaption", {}, ...caption(chosen, run)), element("pre", {}, run.log)),
  );
  return some.length
    ? element(
        "details",
        { id: "logs", open: chosen.length === 1 },
        element("summary", {}, "end of the log"),
        element("div", { class: "beside" }, ...parts),
      )
    : "";
}

// ---- curves --------------------------------------------------------------------------------------------------------------

function curves(chosen) {
  const place = element("div", { id: "curves" });
  const names = [...new Set(chosen.flatMap((run) => Object.keys(run.metrics)))].filter((name) => !NOT_CURVES.includes(name));
  if (!names.length) return place;
  const redraw = () => {
    writeAddress();
    charts.replaceChildren(...names.map((name) => chart(name, chosen)));
  };
  const axes = Object.keys(AXES).filter((name) => chosen.some((run) => Object.hasOwn(run.metrics, columnOf(name))));
  if (!axes.includes(view.axis)) view.axis = axes[0];
  const axis = element(
    "select",
    {
      "aria-label": "axis of the curves",
      onchange: () => {
        view.axis = axis.value;
        redraw();
      },
    },
    ...axes.map((name) => element("option", { value: name, selected: name === view.axis }, name)),
  );
  const scale = element("input", {
    type: "checkbox",
    checked: view.logarithmic,
    onchange: () => {
      view.logarithmic = scale.checked;
      redraw();
    },
  });
  const charts = element("div", { class: "charts" });
  place.append(
    element("h2", {}, "curves"),
    element("div", { class: "controls" }, element("label", {}, "over ", axis), element("label", {}, scale, " logarithmic")),
    charts,
  );
  redraw();
  return place;
}

function columnOf(axis) {
  return axis === "minutes" ? "seconds" : axis;
}

// The known points of a curve. What is measured every few epochs has none in between, and is joined.
function points(run, name) {
  if (!Object.hasOwn(run.metrics, columnOf(view.axis)) || !Object.hasOwn(run.metrics, name)) return [];
  const [along, values] = [run.metrics[columnOf(view.axis)], run.metrics[name]];
  const found = values
    .map((y, i) => [along[i], y])
    .filter(([x, y]) => x !== null && y !== null && (y > 0 || !view.logarithmic));
  return found.map(([x, y]) => [x * AXES[view.axis], y]);
}

function chart(name, chosen) {
  const [width, height, left, bottom, top] = [360, 220, 52, 28, 8];
  const all = chosen.map((run) => points(run, name));
  const known = all.flat();
  const box = element("div", { class: "chart" }, element("h3", {}, name));
  if (!known.length || known.some(([, y]) => Math.abs(y) > HUGE)) {
    box.append(element("p", { class: "note" }, "nothing to draw"));
    return box;
  }
  const up = view.logarithmic ? Math.log10 : (y) => y;
  const [x0, x1] = range(known.map(([x]) => x));
  const [y0, y1] = range(known.map(([, y]) => up(y)));
  const toX = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - 10);
  const toY = (y) => height - bottom - ((up(y) - y0) / (y1 - y0)) * (height - bottom - top);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${name} over ${view.axis}` });
  for (const y of ticks(y0, y1)) {
    const value = view.logarithmic ? 10 ** y : y;
    svg.append(
      drawn("line", { class: "grid", x1: left, x2: width - 10, y1: toY(value), y2: toY(value) }),
      drawn("text", { x: left - 5, y: toY(value) + 4, "text-anchor": "end" }, number(value, 3)),
    );
  }
  for (const x of ticks(x0, x1))
    svg.append(drawn("text", { x: toX(x), y: height - bottom + 15, "text-anchor": "middle" }, number(x, 3)));
  all.forEach((curve, i) => {
    const ink = COLOURS[i % COLOURS.length];
    const path = curve.map(([x, y], j) => `${j ? "L" : "M"}${toX(x).toFixed(1)},${toY(y).toFixed(1)}`).join("");
    const dashes = i < COLOURS.length ? "none" : "4 3"; // the second time around
    svg.append(drawn("path", { d: path, fill: "none", stroke: ink, "stroke-width": 1.6, "stroke-dasharray": dashes }));
    if (curve.length < FEW)
      svg.append(...curve.map(([x, y]) => drawn("circle", { cx: toX(x), cy: toY(y), r: 2.5, fill: ink })));
  });
  const readout = element("p", { class: "readout" });
  svg.addEventListener("pointermove", (event) => {
    const x = x0 + (((event.offsetX * width) / svg.clientWidth - left) / (width - left - 10)) * (x1 - x0);
    readout.replaceChildren(...all.flatMap((curve, i) => at(curve, x, chosen[i], chosen)));
  });
  box.append(svg, readout);
  return box;
}

// What a curve has next to a place on the axis.
function at(curve, x, run, chosen) {
  if (!curve.length) return [];
  const nearest = curve.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
  const swatch = element("span", { class: "swatch" });
  swatch.style.background = colour(chosen, run);
  return [swatch, `${number(nearest[1])} at ${number(nearest[0], 3)}  `];
}

function range(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
  if (low === high) return [low - (Math.abs(low) || 1) * 0.5, high + (Math.abs(high) || 1) * 0.5];
  return [low, high];
}

function ticks(low, high) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  const first = Math.ceil(low / step - 1e-9);
  for (let i = 0; i < 12 && (first + i) * step <= high + step * 1e-9; i++) found.push((first + i) * step);
  return found;
}

// ---- the page ------------------------------------------------------------------------------------------------------------

function showAll() {
  showExperiments();
  showFilters();
  showOverview();
  showTable();
  showChosen();
}

const counts = STATES.map((state) => [runs.filter((run) => run.state === state).length, state]).filter(([n]) => n);
const states = counts.map((count) => count.join(" ")).join(", ") || "none";
const live = data.watch ? `; this page reloads itself every ${data.watch} seconds` : "";
document.getElementById("summary").textContent =
  `${runs.length} runs in ${data.place}: ${states}. Collected ${data.collected}${live}.`;
showAll();
window.addEventListener("hashchange", () => {
  Object.assign(view, readAddress());
  showAll();
});
if (data.watch) {
  // what a reload would undo, beside what is in the address: parts that were opened or closed, and where the table stands
  const parts = () => [...document.querySelectorAll("details")];
  const table = document.querySelector("#runs").parentElement;
  const kept = JSON.parse(sessionStorage.getItem("kept") ?? "null");
  if (kept) {
    parts().forEach((part, i) => (part.open = kept.open[i] ?? part.open));
    [table.scrollTop, table.scrollLeft] = kept.scroll;
  }
  setInterval(() => {
    if (document.activeElement.type === "search") return; // somebody is typing
    sessionStorage.setItem(
      "kept",
      JSON.stringify({ open: parts().map((part) => part.open), scroll: [table.scrollTop, table.scrollLeft] }),
    );
    location.reload();
  }, 1000 * data.watch);
}
