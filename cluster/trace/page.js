"use strict";
// Everything that comes from the trace reaches the page as text nodes, never as markup.

const trace = JSON.parse(document.getElementById("data").textContent);
const { model, request, tokens, routing, steps } = trace;
const numTokens = tokens.ids.length;
const numPrompt = request.prompt_tokens;
const numLayers = model.layers + (model.has_mtp ? 1 : 0);
const rows = new Map(trace.rows.map((row) => [row.position, row]));
const outputs = new Map(trace.outputs.map((output) => [output.position, output]));
const WINDOW = 2000; // tokens of a prompt shown at once
const MAX_STEPS = 1000; // cards of drafts
const PARTS = [
  ["attention", "attention"], ["feed", "feed-forward"], ["rest", "rest of the forward pass"], ["head", "head"],
  ["sample", "drawing"], ["draft", "drafts"], ["other", "bookkeeping"],
];

const state = {
  position: Math.min(numPrompt - 1, numTokens - 1),
  layer: 0,
  allLayers: false,
  colour: "probability",
  selectionOf: "token",
  expertsOf: "token",
  layersOf: "decode",
  windowStart: Math.max(0, numPrompt - WINDOW),
};

// --- small helpers ---

const byId = (id) => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function fill(id, ...children) {
  byId(id).replaceChildren(...children);
}

const number = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (share) =>
  share > 0 && share < 0.0005 ? "< 0.1 %" : `${number(100 * share, share >= 0.0995 || share === 0 ? 0 : 1)} %`;
const seconds = (value) =>
  value >= 1 ? `${number(value, 2)}\u00a0s` : value >= 0.001 ? `${number(1000 * value, 1)}\u00a0ms` : `${number(1e6 * value)}\u00a0µs`;
const sum = (values) => values.reduce((total, value) => total + value, 0);
const largestOf = (values) => values.reduce((most, value) => Math.max(most, value ?? 0), 1e-9);
const layerName = (layer) => (layer === model.layers ? "MTP" : String(layer));

// White space made visible; used where a token stands alone.
const shown = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "→").replaceAll(" ", "␣") || "·";

const decoded = new Map(); // "position:layer" -> positions
function selectedPositions(row, layer) {
  const gaps = row.selected[layer];
  if (gaps === null) return Array.from({ length: row.position + 1 }, (_, position) => position);
  const key = `${row.position}:${layer}`;
  if (!decoded.has(key)) {
    let position = 0;
    decoded.set(key, gaps.map((gap) => (position += gap)));
  }
  return decoded.get(key);
}

// --- tooltips ---

function showTip(event, text) {
  const tip = byId("tip");
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${event.clientY + 20 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 20}px`;
}

const hideTip = () => (byId("tip").hidden = true);

// --- canvases ---

function colours() {
  const style = getComputedStyle(document.documentElement);
  return (name) => style.getPropertyValue(`--${name}`).trim();
}

// A canvas as wide as its place; `read` says what is under the mouse, `pick` what a click does.
function canvas(id, height, label, { minWidth = 0, read, pick } = {}) {
  const host = byId(id);
  const width = Math.max(minWidth, host.clientWidth);
  const scale = devicePixelRatio || 1;
  const node = el("canvas", { width: Math.round(width * scale), height: Math.round(height * scale), role: "img", "aria-label": label });
  node.style.width = `${width}px`;
  node.style.height = `${height}px`;
  const at = (event, act) => {
    const box = node.getBoundingClientRect();
    return act?.(event.clientX - box.left, event.clientY - box.top);
  };
  node.addEventListener("mousemove", (event) => showTip(event, at(event, read)));
  node.addEventListener("mouseleave", hideTip);
  node.addEventListener("click", (event) => at(event, pick));
  host.replaceChildren(node);
  const pen = node.getContext("2d");
  pen.scale(scale, scale);
  pen.font = "12px system-ui, 'DejaVu Sans', sans-serif";
  pen.textBaseline = "middle";
  return { pen, width };
}

// The colour of a share from 0 to 1. With a power below 1, small ones are still seen.
function heat(get, power) {
  const rgb = get("blue-rgb");
  return (share) => `rgba(${rgb}, ${share > 0 ? 0.08 + 0.92 * Math.min(1, share) ** power : 0})`;
}

function rowHeight(count) {
  return Math.max(6, Math.min(20, Math.floor(420 / count)));
}

function drawRowLabels(pen, get, names, top, height, chosen) {
  const every = Math.ceil(13 / height);
  pen.textAlign = "right";
  names.forEach((name, index) => {
    const isChosen = index === chosen;
    if (!isChosen && (index % every || (chosen >= 0 && Math.abs(index - chosen) < every))) return;
    pen.fillStyle = get(isChosen ? "red" : "quiet");
    pen.fillText(name, 44, top + (index + 0.5) * height);
  });
}

function niceStep(range, count) {
  const rough = range / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(Math.max(rough, 1e-12)));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
}

// --- header ---

function drawHeader() {
  const ended = request.finish_reason === "stop" ? "ended by itself or a stop string" : "cut at its longest length";
  byId("lede").textContent =
    `${model.name}: ${model.layers} layers${model.has_mtp ? " and an MTP module" : ""}, ${model.dtype}, ${model.pages} pages, ` +
    `${model.attention} attention. ${request.temperature ? `Temperature ${request.temperature}, top-p ${request.top_p}, seed ${request.seed}` : "Greedy"}; ` +
    `the answer ${ended}.`;
  const prefill = sum(steps.filter((step) => step.phase === "prefill").map((step) => step.seconds.total));
  const decode = sum(steps.filter((step) => step.phase === "decode").map((step) => step.seconds.total));
  const guesses = steps.flatMap((step) => step.drafts);
  const accepted = guesses.filter((draft) => draft.verdict === "accepted").length;
  const figure = (name, value, unit) => el("div", {}, el("dt", {}, name), el("dd", {}, value, " ", el("small", {}, unit)));
  const copies = routing.copies;
  fill(
    "figures",
    figure("Prompt", number(numPrompt), `tokens in ${seconds(prefill)}`),
    figure("Answer", number(request.output_tokens), `tokens in ${seconds(decode)}`),
    figure("Drafts accepted", guesses.length ? percent(accepted / guesses.length) : "none", guesses.length ? `of ${guesses.length}` : "were made"),
    figure("Steps", number(steps.length), `${number(request.output_tokens / Math.max(1, steps.filter((step) => step.drawn.length).length), 2)} tokens each`),
    figure("Copies of a token", number(copies.sent, 2), `a layer; ${number(copies.unrestricted, 2)} unlimited`),
    figure("Indexer", number(model.index_topk), `positions at most, in ${numLayers} layers`),
  );
}

// --- buttons ---

function choice(id, key, options, onChange) {
  const draw = () =>
    fill(
      id,
      ...options.map(([value, name]) =>
        el("button", {
          type: "button", "aria-pressed": String(state[key] === value),
          onclick: () => { state[key] = value; draw(); onChange(); },
        }, name),
      ),
    );
  draw();
}

// --- the text ---

const spans = new Map();

function tokenSpan(position) {
  const text = tokens.texts[position];
  const node = el("span", { class: "tok", "data-p": position });
  const parts = text.split("\n");
  parts.forEach((part, index) => {
    if (index) node.append(el("span", { class: "mark" }, "↵"), "\n");
    node.append(part);
  });
  if (/^<.*>$/.test(text)) node.classList.add("added");
  if (!text) node.append(el("span", { class: "mark" }, "·"));
  spans.set(position, node);
  return node;
}

function drawText() {
  spans.clear();
  const stop = Math.min(numPrompt, state.windowStart + WINDOW);
  const range = (from, to) => Array.from({ length: to - from }, (_, index) => tokenSpan(from + index));
  fill("prompt", ...range(state.windowStart, stop));
  fill("answer", ...range(numPrompt, numTokens));
  drawWindow(stop);
  paintText();
}

function drawWindow(stop) {
  if (numPrompt <= WINDOW) return fill("window", `${number(numPrompt)} tokens`);
  const move = (start) => () => showWindow(start);
  const earlier = el("button", { type: "button", onclick: move(state.windowStart - WINDOW) }, "earlier");
  const later = el("button", { type: "button", onclick: move(state.windowStart + WINDOW) }, "later");
  earlier.disabled = state.windowStart === 0;
  later.disabled = stop === numPrompt;
  return fill("window", `tokens ${number(state.windowStart)} to ${number(stop - 1)} of ${number(numPrompt)} `, earlier, later);
}

function showWindow(start) {
  state.windowStart = Math.max(0, Math.min(start, numPrompt - WINDOW));
  drawText();
}

// How strongly each position is marked: the share of the asked layers that selected it for the chosen token.
function marks() {
  const row = rows.get(state.position);
  const weight = new Map();
  if (!row) return weight;
  const layers = state.allLayers ? row.selected.map((_, layer) => layer) : [state.layer].filter((layer) => layer < row.selected.length);
  for (const layer of layers)
    for (const position of selectedPositions(row, layer)) weight.set(position, (weight.get(position) ?? 0) + 1 / layers.length);
  return weight;
}

// Who moves the layer wants to see what it selected.
function showSelectionInText() {
  if (state.colour !== "selection") document.querySelector("#colour button:last-child").click();
  else paintText();
}

function paintText() {
  const get = colours();
  const rgb = get("blue-rgb");
  const isSelection = state.colour === "selection";
  const weight = isSelection ? marks() : new Map();
  for (const [position, node] of spans) {
    const output = outputs.get(position);
    node.classList.remove("accepted", "own", "odd", "even", "chosen");
    node.style.backgroundColor = "";
    if (position === state.position) node.classList.add("chosen");
    if (isSelection) {
      const mark = weight.get(position) ?? 0;
      if (mark) node.style.backgroundColor = `rgba(${rgb}, ${0.08 + 0.34 * mark})`;
    } else if (output && state.colour === "drafts") node.classList.add(output.drafted ? "accepted" : "own");
    else if (output && state.colour === "steps") node.classList.add(output.step % 2 ? "odd" : "even");
    else if (output) node.style.backgroundColor = `rgba(${rgb}, ${0.5 * (1 - Math.exp(output.logprob))})`;
  }
  drawColourLegend(get);
}

function drawColourLegend(get) {
  const swatch = (background, name) => {
    const box = el("i", { class: "swatch" });
    box.style.background = background;
    return el("span", {}, box, name);
  };
  const rgb = get("blue-rgb");
  const legends = {
    probability: [swatch("transparent", "certain"), swatch(`rgba(${rgb}, .25)`, "probability 1/2"), swatch(`rgba(${rgb}, .5)`, "unlikely")],
    drafts: [swatch(get("green-soft"), "a draft had guessed it"), swatch("transparent", "drawn by the model alone")],
    steps: [swatch(get("amber-soft"), "even steps"), swatch(get("cell"), "odd steps")],
    selection: [swatch(`rgba(${rgb}, .42)`, state.allLayers ? "selected by all layers; paler by fewer" : `selected by layer ${layerName(state.layer)} for the chosen token`)],
  };
  fill("colour-legend", ...legends[state.colour]);
}

function tokenTip(position) {
  const output = outputs.get(position);
  const lines = [`position ${position}, id ${tokens.ids[position]}: ${shown(tokens.texts[position])}`];
  if (output) lines.push(`probability ${percent(Math.exp(output.logprob))}, step ${output.step}${output.drafted ? ", guessed by a draft" : ""}`);
  if (!rows.has(position)) lines.push(position === numTokens - 1 ? "the last token: drawn and never read" : "no details were kept");
  return lines.join("\n");
}

function choose(position, { follow = false } = {}) {
  if (position < 0 || position >= numTokens) return;
  state.position = position;
  if (position < numPrompt && !spans.has(position)) showWindow(position - WINDOW / 2);
  if (follow) scrollTo(position);
  paintText();
  drawChosen();
  drawSelection();
  drawExperts();
}

// Brings a token into view inside its box, leaving the page where it is.
function scrollTo(position) {
  const node = spans.get(position);
  if (!node) return;
  const box = node.parentElement;
  const top = node.offsetTop;
  if (top < box.scrollTop + 10 || top > box.scrollTop + box.clientHeight - 30) box.scrollTop = top - box.clientHeight / 2;
}

function drawChosen() {
  const { position } = state;
  const output = outputs.get(position);
  const children = [
    el("h3", {}, "Chosen token"),
    el("span", { class: "token mono" }, shown(tokens.texts[position])),
    el("p", { class: "quiet" }, `position ${number(position)}, id ${tokens.ids[position]}, ${position < numPrompt ? "prompt" : "answer"}`),
  ];
  if (output) {
    const guessed = output.drafted ? "guessed by a draft" : "not guessed";
    children.push(el("p", {}, `Drawn in step ${output.step}, ${guessed}, from:`), alternatives(output));
  }
  const next = outputs.get(position + 1);
  if (next && position === numPrompt - 1) children.push(el("p", {}, "The last of the prompt. Next comes:"), alternatives(next));
  if (!rows.has(position))
    children.push(el("p", { class: "hint" }, position === numTokens - 1
      ? "The last token is drawn and never read: there is no row of it."
      : "No details of this row were kept; the last section says which were."));
  fill("chosen", ...children);
}

function alternatives(output) {
  const table = el("div", { class: "rows" });
  const own = tokens.ids[output.position];
  const listed = output.top.some((entry) => entry.id === own)
    ? output.top
    : [...output.top, { id: own, text: tokens.texts[output.position], logprob: output.logprob }];
  for (const entry of listed) {
    const share = Math.exp(entry.logprob);
    const name = el("span", { class: "mono" }, shown(entry.text));
    if (entry.id === own) name.style.fontWeight = "700";
    tableRow(table, name, meter(share), percent(share));
  }
  return table;
}

// A row of a table of meters: each cell is an element, for neighbouring texts would run together.
function tableRow(table, ...cells) {
  table.append(...cells.map((cell) => (typeof cell === "string" ? el("span", {}, cell) : cell)));
}

function meter(share, kind = "") {
  const fillNode = el("i", { class: kind });
  fillNode.style.width = `${100 * Math.min(1, share)}%`;
  return el("span", { class: "meter" }, fillNode);
}

// --- what the indexer selected ---

const SIDE = 52; // left of the charts, for names of rows

function selectionColumns(count) {
  const row = rows.get(state.position);
  if (state.selectionOf !== "token") {
    const shares = trace.coverage[state.selectionOf];
    const perBucket = trace.coverage.bucket;
    return shares.map((layer) => Array.from({ length: count }, (_, column) => layer[Math.floor((column * numTokens) / count / perBucket)] ?? null));
  }
  if (!row) return [];
  return row.selected.map((_, layer) => {
    const size = numTokens / count;
    const values = new Array(count).fill(0);
    if (row.selected[layer] === null) return values.fill(1, 0, Math.ceil((row.position + 1) / size));
    for (const position of selectedPositions(row, layer)) values[Math.min(count - 1, Math.floor(position / size))] += 1 / Math.max(1, size);
    return values;
  });
}

function drawSelection() {
  const height = rowHeight(numLayers);
  const top = 6;
  const chartHeight = numLayers * height;
  const inner = Math.max(60, byId("selection").clientWidth - SIDE - 8);
  const columns = Math.min(numTokens, Math.floor(inner));
  const values = selectionColumns(columns);
  const positionAt = (x) => Math.floor(((x - SIDE) / inner) * numTokens);
  const inside = (x, y) => x >= SIDE && x < SIDE + inner && y >= top && y < top + chartHeight;
  const { pen } = canvas("selection", top + chartHeight + 30, "Selected positions by layer", {
    read: (x, y) => {
      if (!inside(x, y)) return "";
      const layer = Math.floor((y - top) / height);
      const position = positionAt(x);
      return `layer ${layerName(layer)}, ${selectionTip(layer, position, values, columns)}`;
    },
    pick: (x, y) => {
      if (!inside(x, y)) return;
      setLayer(Math.floor((y - top) / height));
      const position = positionAt(x);
      if (position < numPrompt && !spans.has(position)) showWindow(position - WINDOW / 2);
      scrollTo(position);
    },
  });
  const get = colours();
  const paint = heat(get, state.selectionOf === "token" ? 0.5 : 1.5);
  const largest = state.selectionOf === "token" ? 1 : largestOf(values.flat());
  pen.fillStyle = get("cell");
  pen.fillRect(SIDE, top, inner, chartHeight);
  const step = inner / columns;
  values.forEach((layer, index) =>
    layer.forEach((value, column) => {
      if (!value) return;
      pen.fillStyle = paint(value / largest);
      pen.fillRect(SIDE + column * step, top + index * height, Math.max(1, step) + 0.3, height - (height > 8 ? 1 : 0));
    }),
  );
  drawSelectionFrame(pen, get, { top, height, chartHeight, inner });
  drawSelectionWords();
}

function drawSelectionFrame(pen, get, { top, height, chartHeight, inner }) {
  const xOf = (position) => SIDE + (position / numTokens) * inner;
  drawRowLabels(pen, get, Array.from({ length: numLayers }, (_, layer) => layerName(layer)), top, height, state.layer);
  pen.strokeStyle = get("red");
  pen.lineWidth = 1.5;
  pen.strokeRect(SIDE, top + state.layer * height, inner, height);
  pen.beginPath();
  pen.moveTo(xOf(state.position + 0.5), top);
  pen.lineTo(xOf(state.position + 0.5), top + chartHeight);
  pen.stroke();
  pen.setLineDash([3, 3]);
  pen.strokeStyle = get("ink");
  pen.beginPath();
  pen.moveTo(xOf(numPrompt), top);
  pen.lineTo(xOf(numPrompt), top + chartHeight + 4);
  pen.stroke();
  pen.setLineDash([]);
  pen.textAlign = "center";
  pen.fillStyle = get("quiet");
  const every = Math.max(1, niceStep(numTokens, inner / 90));
  for (let position = 0; position < numTokens; position += every)
    if (Math.abs(xOf(position) - xOf(numPrompt)) > 80) pen.fillText(number(position), xOf(position) + (position ? 0 : 4), top + chartHeight + 12);
  pen.fillStyle = get("ink");
  pen.textAlign = xOf(numPrompt) > SIDE + inner - 40 ? "right" : "center";
  pen.fillText("answer ▸", xOf(numPrompt), top + chartHeight + 14);
}

function selectionTip(layer, position, values, columns) {
  const where = `position ${number(position)}: ${shown(tokens.texts[position])}`;
  const value = values[layer]?.[Math.min(columns - 1, Math.floor((position * columns) / numTokens))];
  if (state.selectionOf !== "token") return `${where}\nselected in ${value == null ? "no row: none had to choose" : `${percent(value)} of the rows that saw it`}`;
  const row = rows.get(state.position);
  if (!row || layer >= row.selected.length) return where;
  if (position > row.position) return `${where}\nlies behind the chosen token`;
  const isSelected = row.selected[layer] === null || selectedPositions(row, layer).includes(position);
  return `${where}\n${isSelected ? "selected" : "not selected"}`;
}

function drawSelectionWords() {
  byId("layer-name").textContent = layerName(state.layer);
  byId("layer").value = String(state.layer);
  byId("selection-words").textContent = selectionWords();
}

function selectionWords() {
  const row = rows.get(state.position);
  if (state.selectionOf !== "token") {
    const whose = state.selectionOf === "prompt" ? "prompt" : "answer";
    const some = trace.coverage[state.selectionOf][state.layer]?.some((value) => value !== null);
    return some
      ? `How often each position was selected by the rows of the ${whose} that had to choose, in buckets of ${number(trace.coverage.bucket)}.`
      : `No row of the ${whose} had to choose: up to ${number(model.index_topk)} positions are read without a choice.`;
  }
  if (!row) return "No details of the chosen token were kept.";
  if (state.layer >= row.selected.length) return "The MTP module did not run over the chosen token.";
  const visible = row.position + 1;
  if (row.selected[state.layer] === null)
    return model.attention === "dense"
      ? `Dense attention: all ${number(visible)} positions were read.`
      : `All ${number(visible)} visible positions were read: a choice begins beyond ${number(model.index_topk)}.`;
  const chosen = selectedPositions(row, state.layer);
  const near = chosen.filter((position) => position > row.position - 64).length;
  const inPrompt = chosen.filter((position) => position < numPrompt).length;
  return (
    `Layer ${layerName(state.layer)} selected ${number(chosen.length)} of ${number(visible)} visible positions (${percent(chosen.length / visible)}): ` +
    `${near} of the nearest 64, ${number(inPrompt)} in the prompt and ${number(chosen.length - inPrompt)} in the answer.`
  );
}

function setLayer(layer) {
  state.layer = layer;
  showSelectionInText();
  drawSelection();
}

// --- experts ---

function expertValues() {
  const row = rows.get(state.position);
  if (state.expertsOf === "token") {
    if (!row) return [];
    return row.experts.map((experts, layer) => {
      const values = new Array(model.experts).fill(0);
      experts.forEach((expert, index) => (values[expert] = row.weights[layer][index]));
      return values;
    });
  }
  return routing.layers.map((_, layer) => routing.answer_load[layer].map((load, expert) =>
    load + (state.expertsOf === "all" ? routing.prompt_load[layer][expert] : 0)));
}

function drawExperts() {
  const values = expertValues();
  const names = model.moe_layers.map(layerName);
  const height = rowHeight(names.length);
  const [top, gap] = [24, 8];
  const width = Math.max(520, byId("experts").clientWidth);
  const cell = (width - SIDE - 8 - gap * (routing.nodes.length - 1)) / model.experts;
  const nodeOf = (expert) => routing.nodes.findIndex((node) => expert < node.experts[1]);
  const xOf = (expert) => SIDE + expert * cell + nodeOf(expert) * gap;
  const expertAt = (x) => Array.from({ length: model.experts }, (_, expert) => expert).find((expert) => x >= xOf(expert) && x < xOf(expert) + cell);
  const { pen } = canvas("experts", top + names.length * height + 6, "Experts by layer", {
    minWidth: 520,
    read: (x, y) => {
      const layer = Math.floor((y - top) / height);
      const expert = expertAt(x);
      if (expert === undefined || layer < 0 || layer >= names.length) return "";
      return `layer ${names[layer]}, expert ${expert} on ${routing.nodes[nodeOf(expert)].name}\n${expertTip(values[layer], expert)}`;
    },
  });
  const get = colours();
  const paint = heat(get, state.expertsOf === "token" ? 0.5 : 1);
  drawRowLabels(pen, get, names, top, height, -1);
  pen.textAlign = "center";
  for (const node of routing.nodes) {
    const middle = (xOf(node.experts[0]) + xOf(node.experts[1] - 1) + cell) / 2;
    pen.fillStyle = get("quiet");
    pen.fillText(routing.nodes.length > 8 ? node.name.replace("node-", "") : node.name, middle, 11);
  }
  names.forEach((_, layer) => {
    const largest = largestOf(values[layer] ?? []);
    for (let expert = 0; expert < model.experts; expert++) {
      const [x, y, w, h] = [xOf(expert), top + layer * height, cell - (cell > 5 ? 1 : 0), height - (height > 8 ? 1 : 0)];
      pen.fillStyle = get("cell");
      pen.fillRect(x, y, w, h);
      const value = values[layer]?.[expert] ?? 0;
      if (!value) continue;
      pen.fillStyle = paint(value / largest);
      pen.fillRect(x, y, w, h);
    }
  });
  byId("experts-words").textContent = expertWords(values);
}

function expertTip(values, expert) {
  if (!values) return "did not run";
  const value = values[expert];
  if (state.expertsOf === "token") return value ? `weight ${number(value, 3)}` : "not chosen";
  const mean = sum(values) / values.length;
  return `${number(value)} tokens, ${number(value / Math.max(mean, 1e-9), 2)} of the mean`;
}

function expertWords(values) {
  const row = rows.get(state.position);
  if (state.expertsOf === "token") {
    if (!row) return "No details of the chosen token were kept.";
    const needed = row.nodes.map((nodes) => nodes.length);
    const [least, most] = [Math.min(...needed), Math.max(...needed)];
    return `The chosen token went to ${model.experts_per_token} experts a layer, on ${least === most ? most : `${least} to ${most}`} nodes; ${model.topk_group} are allowed.`;
  }
  const worst = values.map((layer) => Math.max(...layer) / Math.max(1e-9, sum(layer) / layer.length));
  const layer = worst.indexOf(Math.max(...worst));
  const shares = routing.nodes.map((node) => sum(values.map((loads) => sum(loads.slice(...node.experts)))));
  const most = shares.indexOf(Math.max(...shares));
  return (
    `The busiest expert of a layer has ${number(worst[layer], 1)} times the mean (layer ${layerName(routing.layers[layer])}); ` +
    `the busiest node is ${routing.nodes[most].name} with ${percent(shares[most] / Math.max(1, sum(shares)))} of all choices.`
  );
}

function drawCopies() {
  const { copies } = routing;
  const table = el("div", { class: "rows" });
  const line = (name, value, kind) =>
    tableRow(table, name, meter(value / copies.one_an_expert, kind), `${number(value, 2)} = ${number((value * copies.bytes_each) / 1024, 1)} KiB`);
  line("one to each node", copies.sent);
  line("same, groups unlimited", copies.unrestricted, "second");
  line("one to each expert", copies.one_an_expert, "second");
  const rejected = routing.rejected_rows
    ? ` ${number(routing.rejected_rows)} rows of rejected drafts went to experts too and are not counted.`
    : "";
  fill("copies", table, el("p", { class: "hint" }, `A copy has ${number(copies.bytes_each)} bytes.${rejected}`));
}

function drawNodes() {
  const total = (histograms) => routing.nodes.concat([0]).map((_, n) => sum(histograms.map((layer) => layer[n])));
  const [limited, free] = [total(routing.nodes_per_token), total(routing.unrestricted_nodes_per_token)];
  const all = Math.max(1, sum(limited));
  const table = el("div", { class: "rows" });
  limited.forEach((count, n) => {
    if (!count && !free[n]) return;
    const both = el("span", {}, meter(count / all), meter(free[n] / all, "second"));
    tableRow(table, `${n} node${n === 1 ? "" : "s"}`, both, `${percent(count / all)} / ${percent(free[n] / all)}`);
  });
  fill("nodes", table, el("p", { class: "hint" }, "Share of tokens, over all layers: as routed (blue), and without the limit on groups (orange)."));
}

// --- drafts ---

function drawDrafts() {
  const decode = steps.map((step, index) => [step, index]).filter(([step]) => step.drawn.length);
  const made = sum(steps.map((step) => step.drafts.length));
  byId("drafts-hint").textContent = made
    ? "Each card is a step: drafts that stand (filled), the first that does not (struck through), what was never judged (dashed), then the model's own token."
    : "No drafts were made: every step drew one token.";
  fill("drafts", ...decode.slice(0, MAX_STEPS).map(([step, index]) => draftCard(step, index)));
  if (decode.length > MAX_STEPS) byId("drafts").append(el("li", {}, `and ${number(decode.length - MAX_STEPS)} steps more`));
}

function draftCard(step, index) {
  const first = step.phase === "prefill" ? numPrompt : step.start + 1;
  const jump = (position) => () => choose(position, { follow: true });
  const accepted = step.drafts.filter((draft) => draft.verdict === "accepted").length;
  const guesses = step.drafts.map((draft, place) =>
    el("span", { class: `guess ${draft.verdict}`, title: draft.verdict, onclick: draft.verdict === "accepted" ? jump(first + place) : () => {} }, shown(draft.text)));
  const own = step.drawn.slice(accepted).map((_, place) =>
    el("span", { class: "own-token", title: "drawn by the model", onclick: jump(first + accepted + place) }, shown(tokens.texts[first + accepted + place])));
  return el("li", {}, el("small", {}, `step ${index}, ${seconds(step.seconds.total)}`), ...guesses, ...own);
}

// --- time ---

function partsOf(time) {
  const attention = sum(time.attention);
  const feed = sum(time.feed_forward);
  return { attention, feed, rest: Math.max(0, time.forward - attention - feed), head: time.head, sample: time.sample, draft: time.draft, other: time.other };
}

const partColour = (part) => (part === "rest" ? "other" : part);

function drawParts() {
  const bars = ["prefill", "decode"].map((phase) => {
    const list = steps.filter((step) => step.phase === phase).map((step) => partsOf(step.seconds));
    const totals = PARTS.map(([part]) => sum(list.map((parts) => parts[part])));
    const all = Math.max(1e-12, sum(totals));
    const stack = el("div", { class: "stack" });
    totals.forEach((value, index) => {
      const [part, name] = PARTS[index];
      const piece = el("i", { class: partColour(part), onmousemove: (event) => showTip(event, `${name}: ${seconds(value)}, ${percent(value / all)}`), onmouseleave: hideTip });
      piece.style.width = `${(100 * value) / all}%`;
      stack.append(piece);
    });
    const legend = el("div", { class: "legend" }, ...PARTS.map(([part, name], index) => ["rest", "other"].includes(part) && totals[index] / all < 0.01 ? "" :
      el("span", {}, el("i", { class: `swatch ${partColour(part)}` }), `${name} ${percent(totals[index] / all)}`)));
    const title = `${phase === "prefill" ? "Prefill" : "Decode"}: ${seconds(sum(totals))} in ${number(list.length)} step${list.length === 1 ? "" : "s"}`;
    return list.length ? el("div", {}, el("h3", {}, title), stack, legend) : el("div");
  });
  fill("parts", ...bars);
}

function drawColumns(id, label, columns, keys, tip, name) {
  const height = 170;
  const [top, bottom] = [8, 22];
  const inner = Math.max(80, byId(id).clientWidth - SIDE - 8);
  const step = inner / columns.length;
  const { pen } = canvas(id, height, label, {
    read: (x) => {
      const index = Math.floor((x - SIDE) / step);
      return columns[index] ? tip(index) : "";
    },
  });
  const get = colours();
  const largest = largestOf(columns.map((parts) => sum(keys.map((key) => parts[key]))));
  const yOf = (value) => height - bottom - (value / largest) * (height - top - bottom);
  pen.textAlign = "right";
  const every = niceStep(largest, 3);
  for (let value = 0; value <= largest; value += every) {
    pen.fillStyle = get("quiet");
    pen.fillText(value ? seconds(value).replace(/\.0+(?=\u00a0)/, "") : "0", SIDE - 6, yOf(value));
    pen.fillStyle = get("line");
    pen.fillRect(SIDE, yOf(value), inner, 1);
  }
  columns.forEach((parts, index) => {
    let base = 0;
    for (const key of keys) {
      pen.fillStyle = get(partColour(key));
      pen.fillRect(SIDE + index * step, yOf(base + parts[key]), Math.min(36, Math.max(1, step - (step > 4 ? 1.5 : 0))), yOf(base) - yOf(base + parts[key]));
      base += parts[key];
    }
  });
  pen.fillStyle = get("quiet");
  pen.textAlign = "left";
  const labels = Math.max(1, Math.ceil(columns.length / (inner / 40)));
  columns.forEach((_, index) => index % labels || pen.fillText(name(index), SIDE + index * step, height - 9));
}

function drawSteps() {
  const drawn = steps.map((step) => partsOf(step.seconds));
  const decode = steps.map((_, index) => index).filter((index) => steps[index].phase === "decode");
  const indices = decode.length ? decode : steps.map((_, index) => index);
  const tip = (place) => {
    const step = steps[indices[place]];
    const lines = PARTS.map(([part, name]) => `${name} ${seconds(drawn[indices[place]][part])}`);
    return [`step ${indices[place]} (${step.phase}): ${seconds(step.seconds.total)}, ${step.rows} rows, ${step.drawn.length} tokens`, ...lines].join("\n");
  };
  drawColumns("steps", "Seconds of each decode step by part", indices.map((index) => drawn[index]), PARTS.map(([part]) => part), tip, (place) => String(indices[place]));
}

function drawLayers() {
  const list = steps.filter((step) => step.phase === state.layersOf);
  const columns = Array.from({ length: model.layers }, (_, layer) => ({
    attention: sum(list.map((step) => step.seconds.attention[layer] ?? 0)),
    feed: sum(list.map((step) => step.seconds.feed_forward[layer] ?? 0)),
  }));
  const tip = (layer) => `layer ${layer}: attention ${seconds(columns[layer].attention)}, feed-forward ${seconds(columns[layer].feed)}${model.moe_layers.includes(layer) ? "" : " (dense)"}`;
  drawColumns("layers", "Seconds of each layer, attention and feed-forward", columns, ["attention", "feed"], tip, String);
}

// --- the rest ---

function drawLimits() {
  const notes = [...trace.limits.notes];
  if (numPrompt > WINDOW) notes.push(`The prompt is shown ${number(WINDOW)} tokens at a time.`);
  if (steps.length > MAX_STEPS) notes.push(`Cards of drafts end after ${number(MAX_STEPS)} steps.`);
  if (!model.has_mtp) notes.push("No drafts were made, so the MTP module did not run.");
  notes.push("Seconds are wall time on one machine; what recording cost is taken out. Norms count with the feed-forward part. Copies are reckoned for the nodes asked for, whatever this run used.");
  fill("limits", ...notes.map((note) => el("li", {}, note)));
}

function drawCharts() {
  drawSelection();
  drawExperts();
  drawSteps();
  drawLayers();
}

function listen() {
  for (const id of ["prompt", "answer"]) {
    const box = byId(id);
    const positionOf = (event) => event.target.closest?.(".tok")?.dataset.p;
    box.addEventListener("click", (event) => positionOf(event) !== undefined && choose(Number(positionOf(event))));
    box.addEventListener("mousemove", (event) => showTip(event, positionOf(event) === undefined ? "" : tokenTip(Number(positionOf(event)))));
    box.addEventListener("mouseleave", hideTip);
    box.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      choose(state.position + by, { follow: true });
    });
  }
  byId("layer").max = String(numLayers - 1);
  byId("layer").addEventListener("input", (event) => setLayer(Number(event.target.value)));
  byId("all-layers").addEventListener("change", (event) => {
    state.allLayers = event.target.checked;
    showSelectionInText();
  });
  let waiting = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(drawCharts);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    paintText();
    drawCharts();
  });
}

function start() {
  byId("selection-hint").textContent =
    `Across: positions of the text. Down: layers. Each row attends to at most ${number(model.index_topk)} positions, chosen anew in every layer. ` +
    "The line is the chosen token; a click shows the place in the text.";
  byId("experts-hint").textContent =
    `Across: ${model.experts} experts, by the ${routing.nodes.length} nodes that hold their groups. Down: layers with experts. ` +
    `A token goes to ${model.experts_per_token} experts in at most ${model.topk_group} groups.`;
  choice("colour", "colour", [["probability", "probability"], ["drafts", "drafts"], ["steps", "steps"], ["selection", "what the chosen token selected"]], paintText);
  choice("selection-of", "selectionOf", [["token", "chosen token"], ["prompt", "all of the prompt"], ["answer", "all of the answer"]], drawSelection);
  choice("experts-of", "expertsOf", [["token", "chosen token"], ["all", "whole request"], ["answer", "answer"]], drawExperts);
  choice("layers-of", "layersOf", [["prefill", "prefill"], ["decode", "decode"]], drawLayers);
  listen();
  drawHeader();
  drawText();
  drawChosen();
  drawCharts();
  drawCopies();
  drawNodes();
  drawDrafts();
  drawParts();
  drawLimits();
  const prompt = byId("prompt");
  prompt.scrollTop = prompt.scrollHeight;
}

start();
