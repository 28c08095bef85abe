// What mouse and keyboard do to the state, and what is told about the place under the pointer.

/**
 * The node under the pointer. A token's name stands for what becomes of it: its node in the last row where flow can be
 * followed there, otherwise the one that leaves the block that is shown.
 */
function pointedNode(event) {
  const token = event.target.closest("[data-token]");
  if (token) {
    const view = currentView();
    const layer = follows(view, state) ? view.nLayers - 1 : state.layer;
    return { row: rowsOf(view).high[layer], pos: Number(token.dataset.token) };
  }
  const frame = byId("graph").firstElementChild.getBoundingClientRect();
  return nodeAt(scene, drawn.geometry, event.clientX - frame.left, event.clientY - frame.top);
}

function clickGraph(event) {
  const node = pointedNode(event);
  if (node) {
    const same = state.node && state.node.row === node.row && state.node.pos === node.pos;
    return choose(same ? null : node);
  }
  const layer = event.target.closest("[data-layer]")?.dataset.layer;
  if (layer !== undefined) set({ layer: Number(layer) });
}

/**
 * Chooses a node and shows the block that it comes out of, or at the bottom the one that it enters. Contributions to a
 * metric leave their node: there the block that it enters comes first.
 */
function choose(node) {
  if (!node) return set({ node });
  const rows = rowsOf(currentView());
  const blocks = [rows.high.indexOf(node.row), rows.low.indexOf(node.row)];
  if (state.map === "metric") blocks.reverse();
  set({ node, layer: blocks[0] >= 0 ? blocks[0] : blocks[1] });
}

function pressKey(event) {
  // Elsewhere than in the picture, keys belong to what has the focus.
  const elsewhere = event.target !== document.body && !event.target.closest("#graph");
  if (event.ctrlKey || event.metaKey || event.altKey || (elsewhere && event.key !== "Escape")) return;
  const view = currentView();
  const upward = state.orient === "up";
  const moves = upward
    ? { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }
    : { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const head = (step) => {
    if (!view.byHead(state.map)) return;
    const next = (state.head ?? (step > 0 ? -1 : view.nHeads)) + step;
    set({ head: next >= 0 && next < view.nHeads ? next : null });
  };
  const actions = {
    Escape: () => set({ node: null, head: null }),
    "[": () => head(-1),
    "]": () => head(1),
    p: () => set({ paths: !state.paths }),
    s: () => set({ skip: !state.skip }),
    t: () => byId("theme").click(),
    "?": toggleHelp,
  };
  if (moves[event.key]) move(view, moves[event.key]);
  else if (actions[event.key]) actions[event.key]();
  else return;
  event.preventDefault();
}

function move(view, [up, along]) {
  if (!state.node && up) {
    set({ layer: Math.min(view.nLayers - 1, Math.max(0, state.layer + up)) });
    return bringIntoSight(rowsOf(view).high[state.layer], scene.positions[0]);
  }
  const shown = scene.positions;
  const count = rowsOf(view).labels.length;
  const from = state.node ?? { row: rowsOf(view).high[state.layer], pos: null };
  const at = from.pos === null ? (along > 0 ? -1 : shown.length) : Math.max(0, shown.indexOf(from.pos));
  choose({
    row: Math.min(count - 1, Math.max(0, from.row + up)),
    pos: shown[Math.min(shown.length - 1, Math.max(0, at + along))],
  });
  bringIntoSight(state.node.row, state.node.pos);
}

function bringIntoSight(row, pos) {
  const box = byId("graph");
  const { at, upward, margin } = drawn.geometry;
  const [x, y] = at(row, pos);
  const near = 24;
  // Names at the left and at the bottom cover what lies behind them.
  const [beside, below] = upward ? [margin.rows, margin.labels] : [margin.labels, 30];
  box.scrollTo(
    Math.min(Math.max(box.scrollLeft, x + near - box.clientWidth), x - near - beside),
    Math.min(Math.max(box.scrollTop, y + near + below - box.clientHeight), y - near)
  );
}

function hoverGraph(event) {
  const data = event.target.dataset ?? {};
  const view = currentView();
  const name = (i) => tokenName(view, i);
  const node = pointedNode(event);
  byId("graph").style.cursor = node ? "pointer" : "";
  if (node) {
    const { row, pos } = node;
    const value = scene.nodes[row][pos];
    const lines = [nodeName(view, node)];
    if (value === value) lines.push(nodeMeaning(view, row, value));
    return tip(event, lines.join("\n"));
  }
  if (data.edge) {
    const edge = scene.edges[Number(data.edge)];
    const way = edge.kind === "skip" ? "by skip connection and bias" : edge.head !== null ? `through head ${edge.head}` : "through the block";
    const lines = [`Block ${view.spec.layers[edge.layer]}: ${name(edge.src)} → ${name(edge.dst)}, ${way}`];
    const below = scene.rows.high[edge.layer] <= (state.node?.row ?? 0);
    if (scene.cone && below) lines.push(`${percent(edge.value)} of the chosen token comes this way`);
    if (scene.cone && !below) lines.push(`${percent(edge.value)} of ${name(edge.dst)} comes from the chosen token this way`);
    lines.push(...edgeNumbers(view, edge));
    return tip(event, lines.join("\n"));
  }
  if (data.path) {
    const step = scene.steps[Number(data.step)];
    const way = step.head === null ? "" : step.head < 0 ? ", skip and bias" : `, head ${step.head}`;
    const which = step.paths.map((number) => number + 1).join(", ");
    return tip(event, `Path${step.paths.length > 1 ? "s" : ""} ${which}: ${percent(step.weight)} of the chosen token\nBlock ${view.spec.layers[step.layer]}${way}: ${name(step.src)} → ${name(step.dst)}, ${percent(step.share)} of the step`);
  }
  hideTip();
}

function nodeMeaning(view, row, value) {
  if (scene.cone) {
    if (row === state.node.row) return value === 1 ? "the chosen token" : "in the same row as the chosen token";
    return row < state.node.row ? `${percent(value)} of the chosen token is from here` : `${percent(value)} of this is from the chosen token`;
  }
  const amount = state.scale === "share" ? percent(value) : exact(view, value);
  if (state.map === "mlp") return `${amount} of what its output moves by comes through the heads`;
  if (state.map === "metric") return view.spec.split === "message" ? `${amount} sent from here` : `${amount} through this token`;
  if (state.node) return `${amount}: flow between it and the chosen token`;
  return `gives ${amount} to the next row${state.scale === "share" ? ", mean over destinations" : ""}`;
}

/** Exact value and share of what an edge stands for, and the gap of its column. */
function edgeNumbers(view, edge) {
  const c = view.columnOf[edge.dst];
  const head = edge.head;
  if (edge.kind === "skip") {
    const past = view.past(state.map, edge.layer);
    return past ? numbersOf(view, edge.layer, "past", past[c], c) : ["nothing moves it: it keeps what it has"];
  }
  const value = view.headsMatrix(state.map, edge.layer, head)[edge.src * view.nColumns + c];
  return numbersOf(view, edge.layer, head, value, c);
}

function numbersOf(view, layer, head, value, c) {
  const divisor = view.divisors(state.map, layer, head === "past" ? null : head)[c];
  const certain = view.certainty(state.map, layer, head, c);
  const lines = [`value ${exact(view, value)}, share ${percent(divisor === 0 ? NaN : value / divisor)}`];
  if (certain) lines.push(`gap of the ${state.map === "metric" ? "layer" : "column"} ${certain.gap.toExponential(1)}${certain.converged ? "" : ", above the tolerance"}`);
  return lines;
}

function hoverLarge(event) {
  const frame = event.target.getBoundingClientRect();
  const column = Math.floor((event.clientX - frame.left - large.box.x) / large.cellWidth);
  const row = Math.floor((event.clientY - frame.top - large.box.y) / large.cellHeight);
  const [down, across] = [large.cells.rows[row], large.cells.columns[column]];
  if (down === undefined || across === undefined) return hideTip();
  const view = currentView();
  const name = (i) => tokenName(view, i);
  const c = view.columnOf[state.map === "mlp" ? across : down];
  if (state.map === "mlp") {
    return tip(event, [`${large.cells.name(down)} → ${name(across)}`, ...numbersOf(view, state.layer, null, large.cells.raw(down, across), c)].join("\n"));
  }
  const value = view.headsMatrix(state.map, state.layer, state.head)[across * view.nColumns + c];
  tip(event, [`${name(across)} → ${name(down)}`, ...numbersOf(view, state.layer, state.head, value, c)].join("\n"));
}
