// The page: a state, what shows it, and what changes it.

const header = JSON.parse(byId("header").textContent);
const samples = header.samples.map((sample) => ({
  ...sample,
  views: sample.views.map((spec) => new View(spec, sample, header)),
}));

const DEFAULTS = {
  sample: 0, view: 0, map: null, layer: 0, node: null, head: null, scale: "share", threshold: null, circle: "sqrt",
  spacing: 1, orient: "up", special: false, punct: false, paths: true, k: 8, skip: true, shared: true, theme: null, sort: "size", down: true,
};
const NUMBERS = ["sample", "view", "layer", "head", "threshold", "spacing", "k"];
const FLAGS = ["special", "punct", "paths", "skip", "shared", "down"];
const CHOICES = {
  scale: ["share", "absolute"], circle: ["linear", "sqrt", "pivot"], orient: ["up", "right"], theme: ["light", "dark"],
  sort: COLUMNS.map(([key]) => key),
};

let state = { ...DEFAULTS };
let scene = null;
let drawn = null;
let large = null;
let listed = { rows: [], all: 0 };
let linkTimer = 0;

const currentView = () => samples[state.sample].views[state.view];

/** The state from the link; what does not fit is left at its default. */
function readLink() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = { ...DEFAULTS };
  for (const [key, text] of given) {
    if (NUMBERS.includes(key) && Number.isFinite(Number(text))) state[key] = Number(text);
    if (FLAGS.includes(key)) state[key] = text === "1";
    if (CHOICES[key]?.includes(text)) state[key] = text;
    if (key === "map") state.map = text;
    if (key === "node" && /^\d+,\d+$/.test(text)) {
      const [row, pos] = text.split(",").map(Number);
      state.node = { row, pos };
    }
  }
}

/** Brings a state back to what the chosen Flow has. */
function settle() {
  const within = (value, count) => (Number.isInteger(value) && value >= 0 && value < count ? value : 0);
  state.sample = within(state.sample, samples.length);
  state.view = within(state.view, samples[state.sample].views.length);
  const view = currentView();
  if (!view.maps.includes(state.map)) {
    const composed = view.forgets ? undefined : view.maps.find((map) => view.rules.get(map)?.conserves);
    state.map = composed ?? view.maps[0];
  }
  state.layer = within(state.layer, view.nLayers);
  if (state.head !== null && !(view.byHead(state.map) && Number.isInteger(state.head) && state.head >= 0 && state.head < view.nHeads)) {
    state.head = null;
  }
  const node = state.node;
  if (node && !(node.row < rowsOf(view).labels.length && shownPositions(view, state).includes(node.pos))) state.node = null;
  if (state.map === "mlp") state.head = null; // all parts of it are one small picture
  if (state.threshold !== null) state.threshold = Math.min(1, Math.max(0, state.threshold));
  state.spacing = Math.min(3, Math.max(0.5, state.spacing));
  state.k = Math.min(50, Math.max(1, Math.round(state.k)));
  state.thresholdSet = state.threshold !== null;
  // A threshold at which a picture is neither empty nor full.
  if (!state.thresholdSet) state.threshold = startThreshold(view);
}

function startThreshold(view) {
  if (state.node && follows(view, state)) return 0.02;
  if (state.scale === "absolute") return 0.15;
  if (state.map === "metric") return 0.01;
  if (state.node) return 0.02; // few edges touch one node
  return Math.min(0.2, 2.5 / Math.max(8, view.nTokens));
}

function writeLink() {
  const link = new URLSearchParams();
  for (const [key, standard] of Object.entries(DEFAULTS)) {
    const value = state[key];
    if (key === "threshold" && !state.thresholdSet) continue;
    if (value === standard || value === null) continue;
    link.set(key, key === "node" ? `${value.row},${value.pos}` : value === true ? "1" : value === false ? "0" : String(value));
  }
  try {
    history.replaceState(null, "", `#${link}`);
  } catch {
    // A frame inside a notebook has no address of its own.
  }
}

function set(changes) {
  // Heads of different blocks have nothing but a number in common.
  if ("layer" in changes && changes.layer !== state.layer && !("head" in changes)) changes.head = null;
  if (("map" in changes || "scale" in changes) && !("threshold" in changes)) {
    changes.threshold = null;
  } else if (!("threshold" in changes) && !state.thresholdSet) {
    changes.threshold = null;
  }
  Object.assign(state, changes);
  settle();
  show();
}

function palette() {
  const style = getComputedStyle(document.documentElement);
  const names = ["surface", "ink", "quiet", "line", "accent", "band", "positive", "negative", "zero", "skip"];
  const colours = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  return { ...colours, font: getComputedStyle(document.body).fontFamily };
}

function show() {
  const begun = performance.now();
  const dark = state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  const view = currentView();
  const colours = palette();
  // Asked before anything changes: afterwards the browser would have to lay the page out to answer.
  const room = roomOf(byId("graph"));
  const side = Math.min(440, Math.max(280, byId("large").parentElement.clientWidth - 30));
  scene = sceneOf(view, state);
  showControls(view);
  showGraph(view, colours, room);
  showHeads(view, colours, side);
  showKey(view);
  showPaths(view);
  showTable(view);
  showStatus(view);
  clearTimeout(linkTimer);
  linkTimer = setTimeout(writeLink, 150); // slow, and nobody waits for it
  inspect.lastMs = performance.now() - begun;
}

function showGraph(view, colours, room) {
  const box = byId("graph");
  drawn = drawScene(view, state, scene, room, colours);
  box.innerHTML = drawn.svg;
  if (room.left || room.top) box.scrollTo(room.left, room.top);
  keepLabels(room);
}

/** Moves the names of blocks and tokens to where they are in sight; `room` has scroll position and height of the box. */
function keepLabels(room) {
  const [beside, below] = byId("graph").querySelectorAll("[data-sticky]");
  beside.setAttribute("transform", `translate(${room.left} 0)`);
  below.setAttribute("transform", `translate(0 ${Math.min(0, room.top + room.height + 16 - drawn.geometry.height)})`);
}

function roomOf(box) {
  return { width: box.clientWidth - 12, height: box.clientHeight - 24, left: box.scrollLeft, top: box.scrollTop };
}

function showHeads(view, colours, side) {
  const block = view.spec.layers[state.layer];
  const what = state.map === "mlp" ? "all parts" : state.head !== null ? `head ${state.head}` : view.byHead(state.map) ? "all heads" : "whole block";
  byId("heads-title").textContent = `Block ${block}, ${what}`;
  const reading = state.map === "mlp" ? "rows: parts, columns: destinations" : "rows: destinations, columns: sources";
  const canvas = byId("large");
  canvas.setAttribute("aria-label", `Heatmap of block ${block}, ${what}: ${reading}. The numbers are in the table.`);
  large = drawLarge(canvas, view, state, scene, colours, side);
  const end = state.scale === "share" ? percent(large.top) : rounded(large.top);
  byId("note").textContent = [`${reading}; ${unitOf(view)}.`, ...notesOf(view, end)].join(" ");
  byId("warning").textContent = warningOf(view);
  byId("legend").replaceChildren(`−${end}`, document.createElement("i"), `+${end}`);
  drawSmall(byId("heads"), view, state, scene, colours, (head) => set({ head: state.head === head ? null : head }));
}

const rounded = (value) => Number(value.toPrecision(3)).toString();

/** What one should know of the heatmap: what is not in it, and where its colours end. */
function notesOf(view, end) {
  const beyond = large.cells.rows.some((row) => large.cells.columns.some((column) => Math.abs(large.cells.value(row, column)) > large.top));
  const past = state.map !== "mlp" && state.head === null ? view.past(state.map, state.layer) : null;
  return [
    past && past.some((value) => value !== 0) ? `What bypasses the heads (skip, bias) is ${state.skip ? "in the graph only" : "not shown"}.` : "",
    beyond ? `Colours saturate at ±${end}.` : "",
    view.spec.dropped ?? "",
  ].filter(Boolean);
}

function warningOf(view) {
  const warnings = [];
  if (view.forgets && view.composes(state.map)) {
    warnings.push(
      "What a token keeps of itself is not part of this flow: on this path of the mlp map the skip connection does not move. " +
        "To follow content through blocks, compute with attn_baseline='zero', mlp_baseline='zero'."
    );
  }
  const cancelling = scene.cone ? view.spec.layers.reduce((sum, _, layer) => sum + view.cancelling(state.map, layer), 0) : 0;
  if (cancelling) {
    const many = cancelling > 1 ? `${cancelling.toLocaleString("en")} steps nearly cancel` : "One step nearly cancels";
    warnings.push(`${many}: shares there, and of what passes through, are large and of both signs.`);
  }
  const head = state.map === "attn" ? state.head : null;
  const columns = state.scale === "share" && state.map !== "metric" ? view.cancelling(state.map, state.layer, head) : 0;
  if (columns && !scene.cone) {
    warnings.push(`${columns} of ${view.nColumns} destinations in this block nearly cancel: shares there are large and of both signs.`);
  }
  return warnings.join(" ");
}

/** How to read the graph, for what is in it. */
function showKey(view) {
  const weight = state.scale === "share" || scene.cone ? "share" : "contribution";
  const circles = scene.cone
    ? "circles: below, how much of the chosen token comes from there; above, how much of it comes from the chosen token"
    : state.map === "mlp" ? `circles: ${weight} of what comes through the heads`
    : state.node && state.map !== "metric" ? `circles: ${weight} exchanged with the chosen token` : `circles: what a token gives to the next row, ${weight}`;
  byId("key").replaceChildren(
    ...[
      ["●", circles], ["―", state.map === "block" ? `lines: ${weight} through the whole block` : `lines: ${weight} through the heads of a block`],
      ...(scene.edges.some((edge) => edge.kind === "skip") ? [["╌", "dashed: skip and bias"]] : []),
      ...(scene.steps.length ? [["▬", "strongest paths, coloured by head, width by weight, dashed if negative"]] : []),
      ...(scene.nodes.some((row) => row.some((value) => value !== value)) ? [["○", "no value"]] : []),
    ].map(([mark, text]) => {
      const item = document.createElement("span");
      item.append(Object.assign(document.createElement("b"), { textContent: mark }), ` ${text}`);
      return item;
    }),
    signKey()
  );
}

function signKey() {
  const item = document.createElement("span");
  const sign = (name, text) => Object.assign(document.createElement("b"), { className: name, textContent: text });
  const [red, blue] = state.scale === "share" || scene.cone ? ["sign of the total", "opposite sign"]
    : multiplies(currentView()) ? ["both maps of one sign", "of opposite signs"]
    : [`raises the ${state.map === "metric" ? "metric" : "target"}`, "lowers it"];
  item.append(sign("positive", "red"), ` ${red}, `, sign("negative", "blue"), ` ${blue}`);
  return item;
}

/** Whether the map is put together by a rule that multiplies contributions, so that it has no unit of the target. */
const multiplies = (view) => view.composes(state.map) && !view.rules.get(state.map).conserves;

function unitOf(view) {
  if (state.scale === "absolute" && multiplies(view)) return "products of the two maps' contributions";
  if (state.scale === "absolute") return `in units of ${view.spec.unit}`;
  if (state.map === "metric") return "share of the layer's total";
  return state.map === "attn" ? "share of the column" : "share of the step";
}

function showPaths(view) {
  const box = byId("path-list");
  box.replaceChildren();
  if (!state.node || !state.paths || state.map === "metric") return;
  const title = document.createElement("h2");
  box.append(title);
  if (!follows(view, state)) {
    title.textContent = view.chained
      ? view.maps.some((map) => view.composes(map)) ? "Paths are available for the composed maps only." : "Paths need the attn and mlp maps of one Flow."
      : "Paths need every layer in between and all destinations.";
    return;
  }
  const held = scene.paths.reduce((sum, path) => sum + path.weight, 0);
  title.textContent = scene.paths.length ? `Strongest ${scene.paths.length} paths, together ${percent(held)} of the total` : "No path leads there.";
  const list = document.createElement("ol");
  scene.paths.forEach((path, number) => {
    const item = document.createElement("li");
    item.addEventListener("pointerenter", () => pointOut(number));
    item.addEventListener("pointerleave", () => pointOut(null));
    item.append(`${percent(path.weight)}  ${view.sample.tokens[path.steps[0].src].shown} `);
    let waited = 0;
    if (path.steps.some((step) => !scene.visible[step.src])) item.append("(through hidden tokens) ");
    path.steps.forEach((step) => {
      if (step.head !== null && step.head < 0) return void waited++;
      const span = document.createElement("span");
      span.className = "head";
      span.style.color = step.head === null ? "inherit" : headColour(step.head);
      span.textContent = `→ ${headName(view, step.layer, step.head)} `;
      item.append(span, step.src === step.dst ? "" : `${view.sample.tokens[step.dst].shown} `);
    });
    if (waited) item.append(`(skip and bias in ${waited} block${waited > 1 ? "s" : ""})`);
    list.append(item);
  });
  box.append(list);
}

/** Leaves one path in full colour; null for all. */
function pointOut(number) {
  for (const path of byId("graph").querySelectorAll("[data-path]")) {
    const taken = number === null || path.dataset.path.split(",").includes(String(number));
    path.style.strokeOpacity = taken ? "" : 0.08;
  }
}

const headName = (view, layer, head) => `L${view.spec.layers[layer]}${head === null ? "" : `H${head}`}`;

function showTable(view) {
  listed = tableRows(view, state, scene);
  const block = `block ${view.spec.layers[state.layer]}${state.head === null ? "" : `, head ${state.head}`}`;
  const where = state.node ? `into and out of ${nodeName(view, state.node)}${state.head === null ? "" : `, ${block}`}` : `of ${block}`;
  const shown = Math.min(SHOWN_ROWS, listed.rows.length);
  const kept = listed.rows.length < listed.all ? ` (CSV: the strongest ${listed.rows.length})` : "";
  const seen = shown < listed.all ? `${shown} of ` : "";
  byId("table-title").textContent = `${seen}${listed.all.toLocaleString("en")} edges ${where}${kept}, map ${state.map}`;
  fillTable(byId("table"), view, listed.rows, state, (key) => {
    if (key === "value" && state.sort === "size") set({ sort: "value", down: true });
    else if (key === state.sort) set(key === "value" && !state.down ? { sort: "size", down: true } : { down: !state.down });
    else set({ sort: key === "value" ? "size" : key, down: key === "value" || key === "share" || key === "gap" });
  });
}

function nodeName(view, node) {
  const row = rowsOf(view).labels[node.row];
  const place = row.into === null ? `leaving block ${row.from}` : row.from === null ? `entering block ${row.into}` : `between blocks ${row.from} and ${row.into}`;
  return `${tokenName(view, node.pos)} ${place}`;
}

const tokenName = (view, i) => `‘${view.sample.tokens[i].shown}’ (${i})`;

function showStatus(view) {
  const drawn = scene.edges.length;
  const hidden = view.nTokens - scene.positions.length;
  const edges = [
    `${drawn.toLocaleString("en")} edge${drawn === 1 ? "" : "s"} drawn${scene.above > drawn ? `, the strongest of each block, of ${scene.above.toLocaleString("en")} above the threshold` : ""}`,
    scene.below ? `${scene.below.toLocaleString("en")} below the threshold` : "",
    hidden ? `${hidden} token${hidden > 1 ? "s" : ""} hidden` : allOf(view) ? "all tokens would be hidden, so none is" : "",
    scene.cone && state.head !== null ? "circles and paths are those of all heads" : "",
  ].filter(Boolean).join(", ");
  const what = state.node ? `${nodeName(view, state.node)}. ` : "";
  const top = state.node && listed.rows.length ? strongestInWords(view) : "";
  byId("status").textContent = `${what}${top}${edges}.`;
}

/** Whether all tokens are of a kind that is to be hidden. */
const allOf = (view) => view.sample.tokens.every((token) => isHidden(state, token));

function strongestInWords(view) {
  const best = listed.rows.find((row) => row.src !== row.dst) ?? listed.rows[0];
  const name = (i) => tokenName(view, i);
  const through = typeof best.head === "number" ? ` through L${best.layer}H${best.head}` : best.head === "past" ? " by skip and bias" : "";
  return `Strongest edge${best.src === best.dst ? "" : " between tokens"}: ${name(best.src)} to ${name(best.dst)}${through}, ${exact(view, best.value)}. `;
}

// Controls.

function fillSelect(select, options, chosen) {
  const same = select.options.length === options.length && options.every((text, i) => select.options[i].text === text[1]);
  if (!same) {
    select.replaceChildren(...options.map(([value, text]) => Object.assign(document.createElement("option"), { value, text })));
  }
  select.value = String(chosen);
  select.disabled = options.length < 2;
}

const MAP_NAMES = {
  attn: "attn: sources → heads", mlp: "mlp: heads → output", block: "block: direct", metric: "contributions to the metric",
  ...Object.fromEntries(header.rules.map(({ name }) => [name, `composed: ${name}`])),
};

function showControls(view) {
  fillSelect(byId("sample"), samples.map((s, i) => [i, s.label]), state.sample);
  fillSelect(byId("view"), samples[state.sample].views.map((v, i) => [i, v.spec.label]), state.view);
  fillSelect(byId("map"), view.maps.map((name) => [name, MAP_NAMES[name]]), state.map);
  byId("facts").textContent = view.spec.facts;
  byId("sample").title = samples[state.sample].label;
  byId("view").title = view.spec.label;
  for (const radio of document.getElementsByName("scale")) radio.checked = radio.value === state.scale;
  byId("threshold").value = toSlider(state.threshold);
  byId("threshold-value").textContent = percent(state.threshold) + (state.scale === "absolute" && !scene.cone ? " of max" : "");
  byId("copy-link").hidden = location.protocol === "about:"; // a frame in a notebook has no address
  for (const id of ["circle", "orient", "spacing", "k"]) byId(id).value = state[id];
  byId("shared-label").hidden = state.map !== "metric";
  for (const id of ["special", "punct", "paths", "skip", "shared"]) byId(id).checked = state[id];
  const followed = follows(view, state);
  for (const id of ["paths", "k"]) byId(id).disabled = !followed || (id === "k" && !state.paths);
  byId("paths").parentElement.title = followed ? "Strongest paths to the chosen token" : "Composed maps only, with every layer in between and all destinations";
  byId("skip").disabled = !view.spec.layers.some((_, layer) => state.map !== "mlp" && view.past(state.map, layer)?.some((value) => value !== 0));
  byId("skip").parentElement.title = byId("skip").disabled ? "Nothing bypasses the heads in this map" : "What bypasses the heads: skip connection and bias";
}

// The slider's steps are finer where thresholds are small.
const toSlider = (share) => Math.round(100 * Math.cbrt(share));
const fromSlider = (value) => (Number(value) / 100) ** 3;

function listen() {
  byId("sample").addEventListener("change", (e) => set({ sample: Number(e.target.value), view: 0, node: null, head: null }));
  byId("view").addEventListener("change", (e) => set({ view: Number(e.target.value) }));
  byId("map").addEventListener("change", (e) => set({ map: e.target.value }));
  for (const radio of document.getElementsByName("scale")) radio.addEventListener("change", () => set({ scale: radio.value }));
  byId("threshold").addEventListener("input", (e) => set({ threshold: fromSlider(e.target.value) }));
  byId("spacing").addEventListener("input", (e) => set({ spacing: Number(e.target.value) }));
  byId("k").addEventListener("change", (e) => set({ k: Number(e.target.value) || DEFAULTS.k }));
  for (const id of ["circle", "orient"]) byId(id).addEventListener("change", (e) => set({ [id]: e.target.value }));
  for (const id of ["special", "punct", "paths", "skip", "shared"]) byId(id).addEventListener("change", (e) => set({ [id]: e.target.checked }));
  byId("theme").addEventListener("click", () => set({ theme: document.documentElement.dataset.theme === "dark" ? "light" : "dark" }));
  byId("reset").addEventListener("click", () => set({ ...DEFAULTS }));
  byId("help-button").addEventListener("click", toggleHelp);
  byId("save-svg").addEventListener("click", () => save(new Blob([svgText()], { type: "image/svg+xml" }), "svg"));
  byId("save-png").addEventListener("click", savePng);
  byId("copy-link").addEventListener("click", () => (writeLink(), copy(location.href, "Link copied.")));
  byId("copy-csv").addEventListener("click", () => copy(csvOf(currentView(), listed.rows, state), `${listed.rows.length} rows copied.`));
  byId("save-csv").addEventListener("click", () => save(new Blob([csvOf(currentView(), listed.rows, state)], { type: "text/csv" }), "csv"));
  byId("graph").addEventListener("click", clickGraph);
  byId("graph").addEventListener("pointermove", hoverGraph);
  byId("graph").addEventListener("pointerleave", hideTip);
  byId("graph").addEventListener("scroll", () => (hideTip(), keepLabels(roomOf(byId("graph")))));
  addEventListener("scroll", hideTip);
  byId("large").addEventListener("pointermove", hoverLarge);
  byId("large").addEventListener("pointerleave", hideTip);
  document.addEventListener("keydown", pressKey);
  addEventListener("hashchange", () => (readLink(), settle(), show()));
  addEventListener("resize", () => requestAnimationFrame(show));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
}

function toggleHelp() {
  byId("help").hidden = !byId("help").hidden;
  byId("help-button").setAttribute("aria-expanded", String(!byId("help").hidden));
}

/** For tests and curious people: what the page shows, in numbers. */
const inspect = {
  lastMs: NaN,
  get state() { return state; },
  get scene() { return scene; },
  get view() { return currentView(); },
  get samples() { return samples; },
  get rows() { return listed.rows; },
  get large() { return large; },
  /** Where a node stands in the window. */
  placeOf(row, pos) {
    const frame = byId("graph").firstElementChild.getBoundingClientRect();
    const [x, y] = drawn.geometry.at(row, pos);
    return { x: frame.left + x, y: frame.top + y };
  },
  set,
};
window.ligLens = inspect;

readLink();
settle();
listen();
show();
requestAnimationFrame(() => requestAnimationFrame(() => {
  performance.mark("lig_lens first paint");
  prepareLayer(currentView(), 0);
}));

/** What a first click needs of every layer, one after the other while the page is at rest. */
function prepareLayer(view, layer) {
  if (layer < view.nLayers) {
    if (follows(view, state)) {
      view.stepShares(state.map, layer);
      view.bestWays(state.map, layer + 1, state.k);
    }
    if (view.byHead(state.map) && state.map !== "mlp") colourTop(view, { ...state, layer }, view.heads(state.map));
    setTimeout(() => prepareLayer(view, layer + 1), 0);
  } else if (!state.node) {
    // As a click would, without showing it: code that has run once runs faster.
    const chosen = { ...state, node: { row: rowsOf(view).labels.length - 1, pos: shownPositions(view, state)[0] } };
    tableRows(view, chosen, sceneOf(view, chosen));
  }
}
