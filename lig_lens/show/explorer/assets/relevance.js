// The page of relevance: a state, what shows it, and what changes it.

const header = JSON.parse(byId("header").textContent);
const COLUMNS = ["position", "token", "score", "rolled", "token relevance"];
const state = { sample: 0, view: 0, part: "scores", row: 0, sort: 0, down: false };
const decoded = new Map();

const currentSample = () => header.samples[state.sample];
const currentView = () => currentSample().views[state.view];
const sign = (value) => (value > 0 ? "+" : value < 0 ? "−" : "");
const exact = (value) => (value === 0 ? "0" : sign(value) + Number(Math.abs(value).toPrecision(4)).toString().replace("-", "−"));

/** Rows of one part of a Relevance, each with a number for every position. */
function rowsOf(view, part) {
  if (!decoded.has(view.arrays[part].id)) decoded.set(view.arrays[part].id, decode(view.arrays[part]));
  const all = decoded.get(view.arrays[part].id);
  const n = all.length / view.names[part].length;
  return view.names[part].map((_, row) => all.subarray(row * n, (row + 1) * n));
}

/** Where colours end: the strongest position of the prompt's own, in all rows. */
function topOf(sample, rows) {
  let top = 0;
  for (const row of rows) row.forEach((value, i) => (top = sample.tokens[i].special ? top : Math.max(top, Math.abs(value))));
  return top || 1;
}

/** The colour of a value from -1 to 1, as `style.diverging` mixes it. */
function colourOf(share) {
  const place = ((Math.min(1, Math.max(-1, share)) + 1) / 2) * (header.colours.length - 1);
  const low = Math.min(Math.floor(place), header.colours.length - 2);
  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const [a, b] = [channels(header.colours[low]), channels(header.colours[low + 1])];
  return `rgb(${a.map((one, i) => Math.round(one + (b[i] - one) * (place - low))).join(", ")})`;
}

function colour(element, token, share) {
  element.style.background = token.special ? "" : colourOf(share);
  element.style.color = token.special ? "" : Math.abs(share) < header.dark ? header.ink : "#ffffff";
  element.classList.toggle("special", token.special);
}

/** Brings a state back to what there is, and shows it. */
function set(changes) {
  Object.assign(state, changes);
  const within = (value, count) => (Number.isInteger(value) && value >= 0 && value < count ? value : 0);
  state.sample = within(state.sample, header.samples.length);
  state.view = within(state.view, currentSample().views.length);
  if (!(state.part in currentView().names)) state.part = "scores";
  state.row = within(state.row, currentView().names[state.part].length);
  show();
}

function show() {
  const [sample, view] = [currentSample(), currentView()];
  const rows = rowsOf(view, state.part);
  options("sample", header.samples.map((one) => one.label), state.sample);
  options("view", sample.views.map((one) => one.label), state.view);
  const parts = Object.keys(view.names);
  options("part", parts, parts.indexOf(state.part));
  byId("layer-label").hidden = rows.length < 2;
  byId("copy-text").hidden = sample.grid !== null;
  byId("layer").max = rows.length - 1;
  byId("layer").value = state.row;
  byId("layer-value").textContent = view.names[state.part][state.row];
  byId("what").textContent = view.what;
  byId("note").textContent = noteOf(view);
  byId("facts").textContent = view.facts;
  byId("settings").textContent = view.settings;
  const top = topOf(sample, rows);
  byId("low").textContent = exact(-top);
  byId("high").textContent = exact(top);
  showText(sample, rows[state.row], top);
  showLayers(sample, view);
  showMethods(sample);
  showTable(sample, view);
}

function options(id, labels, chosen) {
  const box = byId(id);
  box.replaceChildren(...labels.map((label, number) => new Option(label, number, false, number === chosen)));
  box.disabled = labels.length < 2;
}

/** What a boundary's numbers add up to, and how far that is from what they have to. */
function noteOf(view) {
  const [name, row] = [view.names[state.part][state.row], rowsOf(view, state.part)[state.row]];
  const sum = `sum of all positions ${exact(row.reduce((a, b) => a + b, 0))}`;
  const where = state.part === "scores" ? "scores" : `${state.part}, ${name === "output" ? name : `layer ${name}`}`;
  if (state.part !== "token" || !view.totals) return `${where}: ${sum}`;
  const { total, gap, converged } = view.totals[state.row];
  return `${where}: ${sum}; the number's change is ${exact(total)}, gap ${gap === null ? "–" : gap.toExponential(1)}${converged ? "" : ", above the tolerance"}`;
}

function tokenElement(sample, i, values, top) {
  const element = document.createElement("span");
  element.dataset.position = i;
  element.textContent = sample.tokens[i].text;
  colour(element, sample.tokens[i], values[i] / top);
  return element;
}

/** The text as it was written, or the patches over their image. */
function showText(sample, values, top) {
  const box = byId("text");
  const { grid, image } = sample;
  box.className = grid ? "patches" : "";
  if (!grid) {
    return box.replaceChildren(...sample.tokens.flatMap((token, i) => [token.spaced ? " " : "", tokenElement(sample, i, values, top)]));
  }
  const cells = sample.tokens.map((token, i) => {
    const element = tokenElement(sample, i, values, top);
    if (token.special) return element;
    element.textContent = "";
    element.style.opacity = image ? 0.9 * Math.min(1, Math.abs(values[i]) / top) ** 0.7 : 1; // as in image_map
    return element;
  });
  const patches = document.createElement("div");
  patches.style.gridTemplateColumns = `repeat(${grid[1]}, 1fr)`;
  patches.style.aspectRatio = `${grid[1]} / ${grid[0]}`;
  patches.append(...cells.filter((_, i) => !sample.tokens[i].special));
  const picture = (alt) => Object.assign(document.createElement("img"), { src: image, alt });
  if (image) patches.prepend(picture(""));
  box.replaceChildren(...cells.filter((_, i) => sample.tokens[i].special), ...(image ? [picture("The image")] : []), patches);
}

const MOST_NAMES = 32;

/** The tokens' names below strips, where there is room for them. */
function namesBelow(sample) {
  if (sample.grid || sample.tokens.length > MOST_NAMES) return [];
  const line = document.createElement("div");
  line.className = "names";
  line.append(...sample.tokens.map((token) => Object.assign(document.createElement("b"), { textContent: token.shown })));
  return [document.createElement("span"), line];
}

/** Rows of cells with a name before each, the last first: layers upwards. */
function strips(box, sample, lines) {
  const elements = lines.flatMap(({ name, values, top, current, choose, what }) => {
    const button = document.createElement("button");
    button.textContent = name;
    button.setAttribute("aria-pressed", current);
    button.onclick = choose;
    const strip = document.createElement("div");
    strip.className = current ? "current" : "";
    strip.append(...sample.tokens.map((token, i) => {
      const cell = document.createElement("i");
      Object.assign(cell.dataset, { position: i, value: values[i], what });
      colour(cell, token, values[i] / top);
      return cell;
    }));
    strip.onclick = choose;
    return [button, strip];
  });
  byId(box).replaceChildren(...elements, ...namesBelow(sample));
}

function showLayers(sample, view) {
  const part = state.part === "scores" ? ["rolled", "token"].find((one) => one in view.names) : state.part;
  byId("by-layer").hidden = part === undefined;
  if (part === undefined) return;
  const rows = rowsOf(view, part);
  const top = topOf(sample, rows);
  const lines = rows.map((values, row) => {
    const name = view.names[part][row];
    const current = state.part === part && state.row === row;
    return { name, values, top, current, what: `${part}, ${name === "output" ? name : `layer ${name}`}`, choose: () => set({ part, row }) };
  });
  byId("by-layer").firstElementChild.textContent = `Layer by layer: ${part}`;
  strips("layers", sample, lines.reverse());
}

function showMethods(sample) {
  byId("by-method").hidden = sample.views.length < 2;
  strips("methods", sample, sample.views.map((view, number) => {
    const rows = rowsOf(view, "scores");
    const choose = () => set({ view: number });
    return { name: view.label, values: rows[0], top: topOf(sample, rows), current: number === state.view, what: view.label, choose };
  }));
}

/** Numbers of every position; `rolled` and `token` in the layer that is shown, or the first. */
function tableRows(sample, view) {
  const at = (part) => (part in view.names ? rowsOf(view, part)[state.part === part ? state.row : 0] : null);
  const columns = [at("scores"), at("rolled"), at("token")];
  const rows = sample.tokens.map((token, i) => [i, token.shown, ...columns.map((one) => (one ? one[i] : null))]);
  const by = state.sort;
  const key = (row) => (by === 1 ? row[1] : by === 0 ? row[0] : Math.abs(row[by] ?? 0));
  rows.sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : a[0] - b[0]));
  return state.down ? rows.reverse() : rows;
}

function columnName(view, number) {
  const part = { 3: "rolled", 4: "token" }[number];
  if (!part || !(part in view.names)) return COLUMNS[number];
  const name = view.names[part][state.part === part ? state.row : 0];
  return `${COLUMNS[number]}, ${name === "output" ? name : `layer ${name}`}`;
}

function showTable(sample, view) {
  const there = (number) => number < 3 || { 3: "rolled", 4: "token" }[number] in view.names;
  const numbers = COLUMNS.map((_, number) => number).filter(there);
  const heads = numbers.map((number) => {
    const cell = document.createElement("th");
    const button = document.createElement("button");
    button.textContent = columnName(view, number) + (state.sort === number ? (state.down ? " ↓" : " ↑") : "");
    button.onclick = () => set({ sort: number, down: state.sort === number ? !state.down : number > 1 });
    cell.append(button);
    return cell;
  });
  byId("table").querySelector("thead tr").replaceChildren(...heads);
  const lines = tableRows(sample, view).map((row) => {
    const line = document.createElement("tr");
    line.append(...numbers.map((number) => {
      const cell = document.createElement("td");
      cell.textContent = number < 2 ? row[number] : exact(row[number]);
      if (number > 1 && row[number]) cell.className = row[number] > 0 ? "positive" : "negative";
      return cell;
    }));
    return line;
  });
  byId("table").querySelector("tbody").replaceChildren(...lines);
}

function csv() {
  const [sample, view] = [currentSample(), currentView()];
  const quoted = (text) => `"${String(text).replaceAll('"', '""')}"`;
  const head = COLUMNS.map((_, number) => quoted(columnName(view, number))).join();
  return [head, ...tableRows(sample, view).map((row) => row.map((one, i) => (i === 1 ? quoted(one) : one ?? "")).join())].join("\n");
}

function hover(event) {
  const place = event.target.closest?.("[data-position]");
  if (!place) return hideTip();
  const [sample, view] = [currentSample(), currentView()];
  const i = Number(place.dataset.position);
  const token = sample.tokens[i];
  const lines = [`‘${token.shown}’ (${i})${token.special ? ", special" : ""}`];
  if (place.dataset.value !== undefined) lines.push(`${place.dataset.what}: ${exact(Number(place.dataset.value))}`);
  else {
    lines.push(`score ${exact(rowsOf(view, "scores")[0][i])}`);
    if (state.part !== "scores") lines.push(`${state.part}, ${view.names[state.part][state.row]}: ${exact(rowsOf(view, state.part)[state.row][i])}`);
  }
  tip(event, lines.join("\n"));
}

const plainText = () => currentSample().tokens.map((token) => (token.special ? "" : (token.spaced ? " " : "") + token.text)).join("").trim();

byId("sample").onchange = (event) => set({ sample: Number(event.target.value), view: 0 });
byId("view").onchange = (event) => set({ view: Number(event.target.value) });
byId("part").onchange = (event) => set({ part: Object.keys(currentView().names)[Number(event.target.value)], row: 0 });
byId("layer").oninput = (event) => set({ row: Number(event.target.value) });
byId("copy-text").onclick = () => copy(plainText(), "Copied the text.");
byId("copy-csv").onclick = () => copy(csv(), "Copied the table.");
byId("help-button").onclick = () => {
  byId("help").hidden = !byId("help").hidden;
  byId("help-button").setAttribute("aria-expanded", !byId("help").hidden);
};
document.body.addEventListener("pointermove", hover);
document.body.addEventListener("pointerleave", hideTip);
window.ligLens = { state, set, rowsOf, currentView, csv, plainText };

set({});
requestAnimationFrame(() => requestAnimationFrame(() => performance.mark("lig_lens first paint")));
