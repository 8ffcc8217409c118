"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs, many = runs.length > 1;

// Names of figures: title, unit; those that come first are drawn first.
const FIGURES = {
  reward: ["Reward", ""], kl: ["KL to the reference", "nats per answer"], length: ["Answer length", "tokens"],
  accuracy: ["Accuracy on pairs", "share"], perplexity: ["Perplexity of the data's answers", ""],
  margin: ["Margin of scores", ""], entropy: ["Entropy", "nats per token"], ended: ["Answers that end", "share"], loss: ["Loss", ""],
  grad_norm: ["Gradient norm", "before clipping"], distinct_trigrams: ["Distinct trigrams", "share"],
  objective: ["Reward − price of the KL", ""], kl_per_token: ["KL", "nats per token"], lr: ["Learning rate", ""],
  reward_length_correlation: ["Correlation of reward and length", ""], zero_advantages: ["Answers that teach nothing", "share"],
  tokens_per_second: ["Speed", "tokens/s"], seconds_per_step: ["Time of a step", "s"],
};
const FIRST = 6;  // charts that are shown at once; the others on demand
const PAGE = 20;  // answers that are shown at once

// ------------------------------------------------------------------------------------------------------------ helpers

/** An element with attributes and children; text is text, whatever it holds. */
function make(name, attributes = {}, ...children) {
  const drawn = ["svg", "g", "path", "line", "circle", "text", "rect", "title", "clipPath"].includes(name);
  const node = drawn ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(9).filter(child => child !== null && child !== undefined));
  return node;
}
const shown = value => value === null || value === undefined ? "–"
  : Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(1) : String(+value.toPrecision(4));
const color = i => `var(--c${i % 8})`;
const title = name => FIGURES[name]?.[0] ?? name.replaceAll("_", " ");
const known = values => values.filter(value => value !== null && value !== undefined);
function quantile(values, share) {
  const sorted = known(values).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : 0;
}
function select(label, options, change, value) {
  const box = make("select", {onchange: event => change(event.target.value)},
    options.map(([key, text]) => make("option", {value: key, selected: key === value}, text)));
  return make("label", {}, label, box);
}
function section(name, ...children) {
  return children.length ? make("section", {"aria-label": name}, make("h2", {}, name), children) : null;
}
const tip = make("div", {class: "tip", hidden: true, role: "tooltip"});
function tell(event, lines) {
  tip.replaceChildren(...lines.map(line => make("div", {}, line)));
  tip.hidden = false;
  tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = Math.max(4, Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 8)) + "px";
}

// ------------------------------------------------------------------------------------------------------------- charts

const WIDTH = 370, HEIGHT = 210, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 24;
let charts = 0;

/** Round numbers that cover a range. */
function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(size => size >= rough * 0.999);
  const found = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) found.push(+tick.toPrecision(12));
  return found;
}
function frame(xs, ys, label) {
  let [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  if (!(x1 > x0)) [x0, x1] = [x0 - 0.5, x0 + 0.5];
  if (!(y1 > y0)) [y0, y1] = [y0 - Math.max(Math.abs(y0) * 0.1, 1e-9), y0 + Math.max(Math.abs(y0) * 0.1, 1e-9)];
  const room = (y1 - y0) * 0.06;
  y0 -= room; y1 += room;
  const x = value => LEFT + (value - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT);
  const y = value => HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
  const back = position => x0 + (position - LEFT) / (WIDTH - LEFT - RIGHT) * (x1 - x0);
  const id = `clip${charts++}`;
  const svg = make("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label},
    make("clipPath", {id}, make("rect", {x: LEFT, y: TOP - 4, width: WIDTH - LEFT - RIGHT + 4, height: HEIGHT - TOP - BOTTOM + 8})),
    ticks(y0, y1, 4).map(tick => [make("line", {class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick)}),
      make("text", {x: LEFT - 5, y: y(tick) + 4, "text-anchor": "end"}, shown(tick))]),
    ticks(x0, x1, 5).map(tick => make("text", {x: x(tick), y: HEIGHT - 7, "text-anchor": "middle"}, shown(tick))));
  const inside = make("g", {"clip-path": `url(#${id})`});
  svg.append(inside);
  return {svg, inside, x, y, back};
}
/** A line through the points that are there. */
function path(xs, ys, at) {
  let text = "", pen = "M";
  xs.forEach((x, i) => {
    if (ys[i] === null || ys[i] === undefined) return;
    text += `${pen}${at.x(x).toFixed(1)} ${at.y(ys[i]).toFixed(1)}`;
    pen = "L";
  });
  return text;
}
/** Means of the last `size` values that are there; null stays null. */
function smoothed(values, size) {
  const last = [];
  return values.map(value => {
    if (value === null) return null;
    last.push(value);
    if (last.length > size) last.shift();
    return last.reduce((sum, one) => sum + one, 0) / last.length;
  });
}

const view = {smooth: null, axis: "steps", off: new Set()};
/** The x of a step on the chosen axis. */
function place(run, step) {
  if (view.axis === "steps") return step;
  const group = run.train.steps.length ? run.train : run.eval;
  const i = group.steps.findIndex(other => other >= step);
  return group.minutes[i < 0 ? group.minutes.length - 1 : i] ?? 0;
}
function curveChart(name) {
  const lines = [], dots = [];
  runs.forEach((run, i) => {
    if (view.off.has(i)) return;
    const add = (figure, label, shade) => {
      const values = run.train.series[figure];
      if (!values || !known(values).length) return;
      const size = view.smooth ?? Math.max(1, Math.round(values.length / 15));
      lines.push({run, label, shade, xs: run.train[view.axis], raw: values, ys: smoothed(values, size)});
    };
    if (name === "reward" && !many) add("baseline", "greedy answers", color(1));
    add(name, many ? run.name : "training", color(i));
    const held = run.eval.series[name];
    if (held && known(held).length) {
      const errors = name === "reward" ? run.eval.series.reward_standard_error : null;
      dots.push({run, label: many ? `${run.name}, held out` : "held out", shade: many ? color(i) : "var(--text)",
        xs: run.eval[view.axis], ys: held, errors});
    }
  });
  const all = [...lines, ...dots];
  if (!all.length) return null;
  const spread = lines.flatMap(line => [quantile(line.raw, 0.02), quantile(line.raw, 0.98), ...known(line.ys)]);
  const ends = dots.flatMap(line => line.ys.flatMap((value, i) =>
    value === null ? [] : [value - (line.errors?.[i] ?? 0), value + (line.errors?.[i] ?? 0)]));
  const last = all.map(line => `${line.label} ${shown(known(line.ys).at(-1))}`).join(", ");
  const at = frame(all.flatMap(line => line.xs), [...spread, ...ends], `${title(name)}: ${last}`);
  for (const [i, run] of runs.entries()) {
    if (view.off.has(i)) continue;
    const shade = many ? color(i) : "";
    for (const step of run.resumed) mark(at, place(run, step), "resumed", `${run.name}: gone on after step ${step}`, shade);
    for (const row of run.remarks) mark(at, place(run, row.step), row.kind === "stopped" ? "bad" : "", `${row.kind}: ${row.text}`, shade);
  }
  for (const line of lines) {
    at.inside.append(make("path", {class: "curve raw", d: path(line.xs, line.raw, at), style: `stroke:${line.shade}`}),
      make("path", {class: "curve", d: path(line.xs, line.ys, at), style: `stroke:${line.shade}`}));
  }
  for (const line of dots) {
    at.inside.append(make("path", {class: "curve", d: path(line.xs, line.ys, at), style: `stroke:${line.shade};stroke-width:1`}));
    line.xs.forEach((x, i) => {
      const value = line.ys[i], error = line.errors?.[i];
      if (value === null) return;
      if (error) at.inside.append(make("line", {x1: at.x(x), x2: at.x(x), y1: at.y(value - error), y2: at.y(value + error), style: `stroke:${line.shade}`}));
      at.inside.append(make("circle", {class: "dot", cx: at.x(x), cy: at.y(value), r: 3.5, style: `fill:${line.shade}`}));
    });
  }
  follow(at, all);
  const unit = FIGURES[name]?.[1];
  const legend = make("p", {class: "quiet"}, many ? [] : all.map(line =>
    [make("span", {class: "swatch", style: `--run:${line.shade}`}), line.label + "  "]));
  return make("figure", {class: "card", style: "margin:0", "data-figure": name},
    make("h3", {}, title(name), unit ? make("span", {class: "quiet"}, `  ${unit}`) : null), at.svg, legend);
}
function mark(at, x, kind, text, shade) {
  at.svg.append(make("line", {class: `mark ${kind}`, x1: at.x(x), x2: at.x(x), y1: TOP, y2: HEIGHT - BOTTOM, style: shade && `stroke:${shade}`},
    make("title", {}, text)));
}
/** The values below the pointer. */
function follow(at, lines) {
  const pointer = make("line", {class: "pointer", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden"});
  at.svg.append(pointer);
  at.svg.addEventListener("pointermove", event => {
    const box = at.svg.getBoundingClientRect();
    const x = at.back((event.clientX - box.left) / box.width * WIDTH);
    const near = lines.map(line => {
      let best = -1;
      line.xs.forEach((value, i) => {
        if (line.ys[i] !== null && (best < 0 || Math.abs(value - x) < Math.abs(line.xs[best] - x))) best = i;
      });
      return [line, best];
    });
    const spot = at.x(near[0][0].xs[near[0][1]]);
    for (const end of ["x1", "x2"]) pointer.setAttribute(end, spot);
    pointer.setAttribute("visibility", "visible");
    tell(event, [`${view.axis === "steps" ? "step" : "minute"} ${shown(near[0][0].xs[near[0][1]])}`,
      ...near.map(([line, i]) => `${line.label}: ${shown(line.ys[i])}`)]);
  });
  at.svg.addEventListener("pointerleave", () => { tip.hidden = true; pointer.setAttribute("visibility", "hidden"); });
}
function curves() {
  const inOrder = Object.keys(FIGURES), skipped = ["reward_standard_error", ...(many ? [] : ["baseline"])];
  const names = [...new Set(runs.flatMap(run => [...Object.keys(run.train.series), ...Object.keys(run.eval.series)]))]
    .filter(name => !skipped.includes(name));
  const rank = name => inOrder.includes(name) ? inOrder.indexOf(name) : inOrder.length;
  names.sort((a, b) => rank(a) - rank(b));
  const main = make("div", {class: "grid"}), rest = make("div", {class: "grid"});
  const more = make("details", {}, make("summary", {}, `All other curves (${Math.max(0, names.length - FIRST)})`), rest);
  const draw = () => {
    main.replaceChildren(...known(names.slice(0, FIRST).map(curveChart)));
    rest.replaceChildren(...(more.open ? known(names.slice(FIRST).map(curveChart)) : []));
  };
  more.addEventListener("toggle", draw);
  const longest = Math.max(1, ...runs.map(run => run.train.steps.length)), most = Math.max(2, Math.round(longest / 3));
  const slider = make("input", {type: "range", min: 1, max: most, value: Math.round(longest / 15) || 1, "aria-label": "smoothing",
    oninput: event => { view.smooth = +event.target.value; draw(); }});
  const buttons = many ? runs.map((run, i) => make("button", {"aria-pressed": "true", onclick: event => {
    view.off.has(i) ? view.off.delete(i) : view.off.add(i);
    event.currentTarget.setAttribute("aria-pressed", String(!view.off.has(i)));
    draw();
  }}, make("span", {class: "swatch", style: `--run:${color(i)}`}), run.name)) : [];
  const averaged = Math.max(...runs.map(run => run.train.averaged));
  const bar = make("div", {class: "bar sticky"}, make("label", {}, "smoothing", slider),
    select("over", [["steps", "steps"], ["minutes", "minutes"]], value => { view.axis = value; draw(); }), buttons);
  const note = averaged > 1 ? make("p", {class: "quiet"}, `A point is the mean of up to ${averaged} steps.`) : null;
  draw();
  return names.length ? section("Curves", bar, main, names.length > FIRST ? more : null, note, remarks()) : null;
}
function remarks() {
  const rows = runs.flatMap(run => [
    ...run.resumed.map(step => [run.name, step, "resumed", `Gone on after step ${step}.`]),
    ...run.remarks.map(row => [run.name, row.step, row.kind, row.text])]);
  if (!rows.length) return null;
  const shownRows = rows.map(([name, step, kind, text]) => make("tr", {}, many ? make("td", {}, name) : null,
    make("td", {class: "figure"}, String(step)), make("td", {}, kind), make("td", {class: "wide"}, text)));
  const head = [many ? "run" : null, "step", "remark", ""].filter(text => text !== null);
  return make("details", {open: rows.length < 8, id: "remarks"}, make("summary", {}, `Remarks (${rows.length})`),
    make("div", {class: "scroll"}, make("table", {}, make("tr", {}, head.map(text => make("th", {}, text))), shownRows)));
}

// ------------------------------------------------------------------------------------------------------------ summary

function head() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches, root = document.documentElement;
  root.dataset.theme = dark ? "dark" : "light";
  const turn = make("button", {"aria-label": "light or dark", onclick: () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  }}, "◐");
  return [make("div", {class: "top"}, make("h1", {}, many ? "Report of several runs" : `Report: ${runs[0].name}`), turn),
    runs.map((run, i) => {
      const {facts} = run, main = ["state", "steps", "time", "peak memory", "device"].filter(name => facts[name]);
      return make("div", {class: "card run", style: `--run:${color(i)}`, "data-run": run.name},
        many ? make("h3", {}, run.name) : null,
        make("p", {}, make("span", {class: `level ${run.verdict.level}`}, run.verdict.words), "  ",
          make("span", {class: "quiet"}, run.stage)),
        run.verdict.sentences.map(text => make("p", {}, text)),
        make("p", {class: "quiet"}, main.map(name => make("span", {class: "chip"}, `${name} ${facts[name]}`))));
    }), figures()];
}
function figures() {
  const names = [...new Set(runs.flatMap(run => Object.keys(run.first)))];
  if (!names.length) return null;
  const heads = runs.flatMap(run => ["start", `best (${run.best_step})`, "end"]);
  const rows = names.map(name => make("tr", {}, make("td", {}, name.replaceAll("_", " ")), runs.flatMap(run =>
    [run.first, run.best, run.last].map(figures => make("td", {class: "figure"}, shown(figures[name]))))));
  return section("Held-out figures", make("div", {class: "scroll"}, make("table", {id: "figures"},
    many ? make("tr", {}, make("th"), runs.map(run => make("th", {colspan: 3}, run.name))) : null,
    make("tr", {}, make("th"), heads.map(text => make("th", {class: "figure"}, text))), rows)));
}
function resources() {
  const kinds = [...new Set(runs.flatMap(run => Object.keys(run.seconds)))];
  const bars = runs.map(run => {
    const total = Object.values(run.seconds).reduce((sum, value) => sum + value, 0);
    if (!total) return null;
    return [make("p", {class: "quiet"}, many ? `${run.name}: ` : "", Object.entries(run.seconds).map(([name, value]) =>
      [make("span", {class: "swatch", style: `--run:${color(kinds.indexOf(name))}`}), `${name} ${shown(value)} s (${Math.round(100 * value / total)} %)   `])),
    make("div", {class: "split"}, Object.entries(run.seconds).map(([name, value]) =>
      make("span", {title: name, style: `width:${100 * value / total}%;background:${color(kinds.indexOf(name))}`})))];
  });
  const lines = runs.flatMap((run, i) => run.memory.steps.length ? [{xs: run.memory.steps, ys: run.memory.values, label: run.name, shade: color(i)}] : []);
  const found = [make("div", {class: "card"}, make("h3", {}, "Where the time went"), bars)];
  if (lines.length) {
    const at = frame(lines.flatMap(line => line.xs), [0, ...lines.flatMap(line => line.ys)], `Peak memory until then, GiB: ${lines.map(line => shown(line.ys.at(-1)))}`);
    for (const line of lines) {
      at.inside.append(make("path", {class: "curve", d: path(line.xs, line.ys, at), style: `stroke:${line.shade}`}));
      line.xs.forEach((x, i) => at.inside.append(make("circle", {class: "dot", cx: at.x(x), cy: at.y(line.ys[i]), r: 3.5, style: `fill:${line.shade}`})));
    }
    follow(at, lines);
    found.push(make("div", {class: "card"}, make("h3", {}, "Peak memory", make("span", {class: "quiet"}, "  GiB, most of any rank until the step")), at.svg));
  }
  return section("Time and memory", make("div", {class: "grid"}, found));
}
function calibration() {
  const shownRuns = runs.map((run, i) => [run, i]).filter(([run]) => run.calibration.length);
  if (!shownRuns.length) return null;
  const bins = shownRuns.flatMap(([run]) => run.calibration);
  const at = frame([0.5, 1], [0.5, 1, ...bins.map(bin => bin.accuracy)], "Share of pairs ranked right, by how sure the scores are");
  at.inside.append(make("line", {class: "pointer", x1: at.x(0.5), x2: at.x(1), y1: at.y(0.5), y2: at.y(1), "stroke-dasharray": "4 4"}));
  const most = Math.max(...bins.map(bin => bin.pairs));
  for (const [run, i] of shownRuns) {
    at.inside.append(make("path", {class: "curve raw", d: path(run.calibration.map(bin => bin.confidence), run.calibration.map(bin => bin.accuracy), at), style: `stroke:${color(i)}`}));
    for (const bin of run.calibration) {
      const text = `sure of ${shown(bin.confidence)}: ${shown(bin.accuracy)} of ${bin.pairs} pairs right`;
      at.inside.append(make("circle", {class: "dot", cx: at.x(bin.confidence), cy: at.y(bin.accuracy), r: 2.5 + 7 * Math.sqrt(bin.pairs / most), style: `fill:${color(i)}`,
        onpointermove: event => tell(event, [many ? run.name : "", text]), onpointerleave: () => { tip.hidden = true; }}));
    }
  }
  const text = "Across: how sure the two scores are of a held-out pair, σ(|difference|). Up: the share of such pairs that are ranked right. "
    + "On the dashed line a reward model is as sure as it should be; below it, too sure. A circle's area is the number of pairs.";
  return section("Calibration of the reward model", make("div", {class: "grid"},
    make("div", {class: "card", id: "calibration"}, at.svg), make("p", {class: "quiet"}, text)));
}

// ------------------------------------------------------------------------------------------------------------ answers

const rows = data.rows.map((row, index) => ({...row, index}));
const firstOf = new Map();  // the answer of the run's first evaluation to the same prompt, of the same place
for (const row of rows) {
  const key = `${row.run}/${row.prompt}/${row.place}`;
  if (!firstOf.has(key)) firstOf.set(key, row);
}
const before = row => { const first = firstOf.get(`${row.run}/${row.prompt}/${row.place}`); return first === row ? null : first; };
const browser = {run: "", step: "", text: "", sort: "reward", down: true, paint: "kl", beside: "before", close: rows.some(row => row.tokens), limits: {}, count: PAGE, only: null};

function wanted() {
  const inside = (value, [low, high] = []) => (low === undefined || (value !== undefined && value >= low)) && (high === undefined || (value !== undefined && value <= high));
  const text = browser.text.toLowerCase();
  const found = rows.filter(row => browser.only ? browser.only(row)
    : (browser.run === "" || row.run === +browser.run) && (browser.step === "" || row.step === +browser.step)
    && (!browser.close || row.tokens)
    && ["reward", "length", "kl"].every(name => inside(row[name], browser.limits[name]))
    && (!text || row.answer.toLowerCase().includes(text) || data.prompts[row.prompt].toLowerCase().includes(text)));
  const gain = row => before(row)?.reward === undefined ? undefined : row.reward - before(row).reward;
  if (browser.only) return found.sort((a, b) => a.step - b.step);
  const key = row => browser.sort === "gain" ? gain(row) : row[browser.sort];
  const missing = value => value === undefined || value === null;
  return found.sort((a, b) => missing(key(a)) - missing(key(b)) || (browser.down ? key(b) - key(a) : key(a) - key(b)) || a.index - b.index);
}
/** Strength 1 of a colour: what 19 of 20 tokens of a run stay below. */
const strengths = {};
for (const paint of ["kl", "advantage"]) {
  strengths[paint] = runs.map((run, i) => quantile(rows.filter(row => row.run === i).flatMap(row => row[`token_${paint}`] ?? []).map(Math.abs), 0.95) || 1);
}
function painted(row) {
  const values = row[`token_${browser.paint}`];
  if (!values) return [row.answer.trim()];
  return row.tokens.map((token, i) => {
    const share = Math.min(1, Math.abs(values[i]) / strengths[browser.paint][row.run]) * 0.75;
    const told = ["kl", "advantage"].filter(name => row[`token_${name}`]).map(name => `${name === "kl" ? "KL" : name} ${shown(row[`token_${name}`][i])}`);
    return make("span", {class: "token", title: told.join(", "), style: `background:rgba(var(--${values[i] > 0 ? "more" : "less"}),${share.toFixed(3)})`}, token);
  });
}
/** What was taken from one text and added in the other, word by word. */
function difference(from, to) {
  const a = from.split(/(?<=\s)(?=\S)/), b = to.split(/(?<=\s)(?=\S)/);
  if (a.length * b.length > 1e6) return [make("del", {}, from), make("ins", {}, to)];
  const common = Array.from({length: a.length + 1}, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--)
    common[i][j] = a[i] === b[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
  const found = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { found.push(a[i]); i++; j++; }
    else if (i < a.length && (j === b.length || common[i + 1][j] >= common[i][j + 1])) found.push(make("del", {}, a[i++]));
    else found.push(make("ins", {}, b[j++]));
  }
  return found;
}
const same = row => other => other.run === row.run && other.prompt === row.prompt && other.place === row.place;
function answer(row, choose) {
  const chips = [many ? runs[row.run].name : null, `step ${row.step}`, `reward ${shown(row.reward)}`,
    ...Object.keys(row).filter(name => name.startsWith("reward/")).map(name => `${name.slice(7)} ${shown(row[name])}`),
    row.greedy_reward === undefined ? null : `greedy ${shown(row.greedy_reward)}`, `${row.length} tokens`,
    row.kl === undefined ? null : `KL ${shown(row.kl)}`].filter(text => text !== null);
  const block = (name, ...content) => make("div", {}, make("span", {class: "quiet"}, name), make("div", {class: "text"}, content));
  const first = before(row), columns = [block("sampled answer", painted(row))];
  if (browser.beside === "before" && first) columns.push(block(`changed since step ${first.step} (reward ${shown(first.reward)})`, difference(first.answer.trim(), row.answer.trim())));
  if (browser.beside === "greedy" && row.greedy !== undefined) columns.push(block(`greedy answer (reward ${shown(row.greedy_reward)})`, row.greedy.trim()));
  return make("article", {class: "card answer", "data-index": row.index},
    make("div", {class: "text prompt"}, data.prompts[row.prompt].trim().replace(/\n\s*\n/g, "\n")), make("div", {class: "beside"}, columns),
    make("div", {}, chips.map(text => make("span", {class: "chip"}, text)), rows.filter(same(row)).length > 1 && !browser.only
      ? make("button", {onclick: () => choose(same(row))}, "over the steps") : null));
}
function answers() {
  if (!rows.length) return null;
  const list = make("div", {id: "answers"}), count = make("span", {class: "quiet", id: "count", "aria-live": "polite"});
  const more = make("button", {onclick: () => { browser.count += PAGE; draw(); }}, "more answers");
  const all = make("button", {onclick: () => { browser.only = null; draw(); }}, "all answers again");
  function choose(only) {
    browser.only = only;
    draw();
    bar.scrollIntoView();
  }
  function draw() {
    const found = wanted();
    list.replaceChildren(...found.slice(0, browser.count).map(row => answer(row, choose)));
    count.textContent = `${found.length} of ${rows.length} answers`;
    more.hidden = found.length <= browser.count;
    all.hidden = browser.only === null;
  }
  const change = (name, convert = value => value) => value => { browser[name] = convert(value); browser.count = PAGE; browser.only = null; draw(); };
  const steps = [...new Set(rows.map(row => row.step))].sort((a, b) => a - b);
  browser.step = String(steps.at(-1));
  const limit = (name, text) => make("label", {}, text, [0, 1].map(end => make("input", {type: "number", step: "any", placeholder: end ? "to" : "from",
    "aria-label": `${text} ${end ? "at most" : "at least"}`, oninput: event => {
      const pair = browser.limits[name] ??= [undefined, undefined];
      pair[end] = event.target.value === "" ? undefined : +event.target.value;
      change("count", () => PAGE)();
    }})));
  const direct = make("button", {"aria-label": "order", onclick: event => { browser.down = !browser.down; event.currentTarget.textContent = browser.down ? "↓" : "↑"; change("count", () => PAGE)(); }}, "↓");
  const has = name => rows.some(row => row[name] !== undefined);
  const close = has("tokens") && rows.some(row => !row.tokens) ? make("label", {}, make("input", {type: "checkbox", checked: true,
    onchange: event => change("close")(event.target.checked)}), "token by token only") : null;
  const bar = make("div", {class: "bar"},
    make("input", {type: "search", placeholder: "search prompts and answers", "aria-label": "search", oninput: event => change("text")(event.target.value)}),
    many ? select("run", [["", "all"], ...runs.map((run, i) => [String(i), run.name])], change("run"), "") : null,
    select("step", [["", "all"], ...steps.map(step => [String(step), String(step)])], change("step"), browser.step),
    select("sort by", [["reward", "reward"], ["gain", "gain in reward"], ["length", "length"], ...(has("kl") ? [["kl", "KL"]] : []), ["step", "step"], ["prompt", "prompt"]], change("sort"), "reward"), direct,
    select("colour", [["kl", "KL of a token"], ["advantage", "advantage of a token"], ["", "none"]], change("paint"), "kl"),
    select("beside", [["before", "what changed"], ...(has("greedy") ? [["greedy", "greedy answer"]] : []), ["", "nothing"]], change("beside"), "before"),
    limit("reward", "reward"), limit("length", "length"), has("kl") ? limit("kl", "KL") : null, close, count, all);
  const legend = has("tokens") ? make("p", {class: "quiet"}, "less ", make("span", {class: "scale"}), " more: KL, log π − log π_ref, is positive where the policy finds a token "
    + "more probable than its reference; the advantage is that against the greedy answer.") : null;
  draw();
  const cloud = scatter(index => choose(row => row.index === index));
  return [cloud, section("Answers to held-out prompts", bar, legend, list, more)];
}
function scatter(choose) {
  const cards = ["length", "kl"].map(name => {
    const found = rows.filter(row => row[name] !== undefined && row.reward !== undefined);
    if (found.length < 2) return null;
    const at = frame(found.map(row => row[name]), found.map(row => row.reward), `Reward against ${title(name)} of ${found.length} answers`);
    const last = Math.max(...found.map(row => row.step), 1);
    for (const row of found) at.inside.append(make("circle", {cx: at.x(row[name]), cy: at.y(row.reward), r: 3, "data-index": row.index,
      style: `fill:${color(row.run)};opacity:${(0.15 + 0.65 * row.step / last).toFixed(2)};cursor:pointer`, onclick: () => choose(row.index),
      onpointermove: event => tell(event, [`step ${row.step}, reward ${shown(row.reward)}, ${title(name)} ${shown(row[name])}`, row.answer.slice(0, 160)]),
      onpointerleave: () => { tip.hidden = true; }}));
    return make("div", {class: "card"}, make("h3", {}, `Reward against ${name === "kl" ? "KL" : "length"}`, make("span", {class: "quiet"}, "  answer by answer; later steps are stronger")), at.svg);
  });
  const shownRuns = runs.map((run, i) => [run.eval, i]).filter(([held]) => held.series.kl && held.series.reward);
  if (shownRuns.length) {
    const points = shownRuns.map(([held, i]) => ({i, steps: held.steps, xs: held.series.kl, ys: held.series.reward}));
    const at = frame(points.flatMap(line => known(line.xs)), points.flatMap(line => known(line.ys)), "Reward against KL over the evaluations");
    for (const line of points) {
      at.inside.append(make("path", {class: "curve", d: path(line.xs, line.ys, at), style: `stroke:${color(line.i)};stroke-width:1`}));
      line.xs.forEach((x, j) => x === null || line.ys[j] === null || at.inside.append(make("circle", {class: "dot", cx: at.x(x), cy: at.y(line.ys[j]), r: 4, style: `fill:${color(line.i)}`,
        onpointermove: event => tell(event, [`${runs[line.i].name}, step ${line.steps[j]}`, `KL ${shown(x)}, reward ${shown(line.ys[j])}`]), onpointerleave: () => { tip.hidden = true; }})));
    }
    cards.push(make("div", {class: "card"}, make("h3", {}, "What the reward costs", make("span", {class: "quiet"}, "  held-out reward against KL, an evaluation a point")), at.svg));
  }
  const there = known(cards);
  return there.length ? section("Reward against length and KL", make("div", {class: "grid"}, there)) : null;
}

// ----------------------------------------------------------------------------------------------------------- settings

function settings() {
  const table = (heads, lines) => make("div", {class: "scroll"}, make("table", {},
    make("tr", {}, heads.map(text => make("th", {}, text))), lines.map(line => make("tr", {}, line.map(text => make("td", {class: "wide"}, text))))));
  const found = [];
  if (many) found.push(make("h3", {}, data.differences.length ? "What differs" : "Nothing differs"),
    data.differences.length ? table(["setting", ...runs.map(run => run.name)], data.differences) : null);
  for (const run of runs) {
    const lines = [...Object.entries(run.facts), ...Object.entries(run.settings).map(([name, value]) => [`--${name}`, value]),
      ...Object.entries(run.versions)];
    found.push(make("details", {}, make("summary", {}, `All settings of ${run.name}`), table(["", ""], lines)));
  }
  return section("Settings", ...known(found));
}

document.getElementById("page").append(...known([head(), curves(), resources(), calibration(), answers(), settings(), tip].flat(9)));
document.documentElement.dataset.ready = "yes";
