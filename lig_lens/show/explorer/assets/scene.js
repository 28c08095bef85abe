// What is drawn of a View for a state: which tokens, nodes, edges and paths, in numbers.

const MOST_EDGES = 600; // of all blocks; each has its part, so that none looks empty beside a stronger one

const isHidden = (state, token) => (state.special && token.special) || (state.punct && token.punctuation);

/** Positions that are shown. */
function shownPositions(view, state) {
  return view.remember(`shown ${state.special} ${state.punct}`, () => {
    const all = view.sample.tokens.map((_, i) => i);
    const shown = all.filter((i) => !isHidden(state, view.sample.tokens[i]));
    return shown.length ? shown : all;
  });
}

/** Columns of the destinations among them. */
function shownColumns(view, state) {
  return shownPositions(view, state).map((i) => view.columnOf[i]).filter((c) => c >= 0);
}

/** Values [source, column] between positions that are shown, in no order; those of others are left out. */
function shownValues(view, state, matrix) {
  const shown = shownPositions(view, state);
  if (shown.length === view.nTokens) return matrix;
  const columns = shownColumns(view, state);
  return Float32Array.from(shown.flatMap((src) => columns.map((c) => matrix[src * view.nColumns + c])));
}

/**
 * Rows of nodes from below: what enters a layer and what leaves it are one row where layers follow each other.
 * Gives the row below and above each layer, and a label for each row.
 */
function rowsOf(view) {
  return view.remember("rows", () => {
    const low = [];
    const high = [];
    const labels = [];
    view.spec.layers.forEach((layer, i) => {
      const joined = i > 0 && view.spec.layers[i - 1] === layer - 1;
      if (joined) low.push(high[i - 1]);
      else low.push(labels.push({ into: layer, from: null }) - 1);
      labels[low[i]].into = layer;
      high.push(labels.push({ into: null, from: layer }) - 1);
    });
    return { low, high, labels };
  });
}

/** The head that is shown alone in a layer; null for all. Heads of different layers have nothing but a number in common. */
function headIn(view, state, layer) {
  return layer === state.layer && view.byHead(state.map) ? state.head : null;
}

/** Weights of a layer in the scale of the state: shares, or contributions as they are. */
function weights(view, state, layer) {
  const head = headIn(view, state, layer);
  return view.remember(`w ${state.map} ${layer} ${head} ${state.scale}`, () => {
    return scaled(view, state, layer, head, view.matrix(state.map, layer, head));
  });
}

function scaled(view, state, layer, head, matrix) {
  return state.scale === "absolute" ? matrix : divided(matrix, view.divisors(state.map, layer, head));
}

/** Same for what goes past the heads, by column; null where there is no such thing or one head stands alone. */
function pastWeights(view, state, layer) {
  if (headIn(view, state, layer) !== null) return null;
  const past = view.past(state.map, layer);
  return !past || state.scale === "absolute" ? past : divided(past, view.divisors(state.map, layer));
}

/** Whether flow can be followed through all layers in the chosen map. */
function follows(view, state) {
  return view.chained && view.composes(state.map);
}

/** Everything that is drawn, as numbers. */
function sceneOf(view, state) {
  const positions = shownPositions(view, state);
  const visible = new Uint8Array(view.nTokens);
  positions.forEach((i) => (visible[i] = 1));
  const rows = rowsOf(view);
  const cone = state.node && follows(view, state) ? view.rollout(state.map, state.node.row, state.node.pos) : null;
  const nodes = nodeValues(view, state, rows, cone);
  const counts = { above: 0, below: 0 };
  const edges = view.spec.layers.flatMap((_, layer) => edgesOf(view, state, layer, rows, visible, cone, counts));
  edges.sort((a, b) => b.size - a.size);
  const paths = cone && state.paths ? view.paths(state.map, state.node.row, state.node.pos, state.k) : [];
  return { positions, visible, rows, cone, nodes, edges, ...counts, paths, steps: stepsOf(paths) };
}

/** Value of each node [row][position], NaN where it has none. */
function nodeValues(view, state, rows, cone) {
  const n = view.nTokens;
  const values = rows.labels.map(() => new Float64Array(n).fill(NaN));
  if (cone) return cone.map((row) => Float64Array.from(row));
  view.spec.layers.forEach((_, layer) => {
    const matrix = weights(view, state, layer);
    const columns = view.nColumns;
    if (state.map === "mlp") {
      // Every part stays with its token; what heads bring is what tells tokens apart.
      const past = pastWeights(view, state, layer);
      view.destinations.forEach((j, c) => (values[rows.low[layer]][j] = matrix[j * columns + c] - past[c]));
      return;
    }
    const average = state.scale === "share" && state.map !== "metric" ? columns : 1;
    const touches = state.node && { out: rows.low[layer] === state.node.row, into: rows.high[layer] === state.node.row };
    // Contributions to a metric are in one unit throughout, so they stay in sight beside a choice.
    if (!state.node || state.map === "metric") {
      for (let i = 0; i < n; i++) {
        let sum = 0;
        for (let c = 0; c < columns; c++) sum += matrix[i * columns + c];
        values[rows.low[layer]][i] = sum / average;
      }
      return;
    }
    const column = view.columnOf[state.node.pos];
    if (touches.into && column >= 0) {
      for (let i = 0; i < n; i++) values[rows.low[layer]][i] = matrix[i * columns + column];
    }
    if (touches.out) {
      view.destinations.forEach((j, c) => (values[rows.high[layer]][j] = matrix[state.node.pos * columns + c]));
    }
  });
  return values;
}

/**
 * A layer's strongest edges above the threshold, of all, or of those that lead to the chosen node or away from it; how
 * many there are above and below is added to `counts`.
 */
function edgesOf(view, state, layer, rows, visible, cone, counts) {
  const strongest = new Strongest(Math.max(30, Math.floor(MOST_EDGES / view.nLayers)));
  const head = headIn(view, state, layer);
  const matrix = weights(view, state, layer);
  const past = pastWeights(view, state, layer);
  const columns = view.nColumns;
  const [low, high] = [rows.low[layer], rows.high[layer]];
  const node = state.node;
  const shares = cone && view.stepShares(state.map, layer, head);
  const pastShare = cone && head === null ? view.pastShares(state.map, layer) : null;
  const reference = state.scale === "absolute" && !cone ? layerTop(view, state, layer) : 1;
  const least = state.threshold * reference;
  // Contributions to a metric are in one unit throughout: those beside the chosen node stay, quietly. So do other blocks
  // beside a head that is shown alone.
  const other = state.head !== null && head === null;
  const aside = (src, dst) => Boolean(node) && !cone && !(node.row === high && node.pos === dst) && !(node.row === low && node.pos === src);
  const consider = (src, dst, value, kind) => {
    const size = Math.abs(value);
    if (!(size > 0) || !visible[src] || !visible[dst]) return;
    if (size < least) return void counts.below++;
    counts.above++;
    if (size / reference > strongest.floor) {
      strongest.add(size / reference, { layer, src, dst, value, size: size / reference, kind, head, quiet: other || aside(src, dst) });
    }
  };
  for (let c = 0; c < columns; c++) {
    const dst = view.destinations[c];
    for (let src = 0; src < view.nTokens; src++) {
      if (state.map !== "metric" && aside(src, dst)) continue;
      let value = matrix[src * columns + c];
      let beyond = past && src === dst ? past[c] : 0;
      if (cone) {
        // What passes this edge on the way to the chosen node, or on the way from it.
        const through = high <= node.row ? cone[high][dst] : cone[low][src];
        value = shares[src * columns + c] * through;
        beyond = pastShare && src === dst ? pastShare[c] * through : 0;
      }
      const size = Math.abs(value - beyond);
      // Most edges of a long prompt are weak: they are only counted.
      if (size < least) counts.below += size > 0 && visible[src] && visible[dst] ? 1 : 0;
      else consider(src, dst, value - beyond, "heads");
      if (beyond !== 0 && state.skip) consider(src, dst, beyond, "skip");
    }
  }
  return strongest.sorted();
}

/** The largest contribution of a layer among what is drawn; for the absolute scale. */
function layerTop(view, state, layer) {
  const head = headIn(view, state, layer);
  return view.remember(`t ${state.map} ${layer} ${head} ${state.skip} ${state.special} ${state.punct}`, () => {
    const past = state.skip ? pastWeights(view, state, layer) : null;
    const beyond = past ? largestSize(shownColumns(view, state).map((c) => past[c])) : 0;
    return Math.max(largestSize(shownValues(view, state, view.headsMatrix(state.map, layer, head))), beyond) || 1;
  });
}
