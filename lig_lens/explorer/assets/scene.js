// What is drawn of a View for a state: which tokens, nodes, edges and paths, in numbers; then as SVG text.

const MOST_EDGES = 600;
const HEAD_COLOURS = [
  "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
  "#8c564b", "#7f3fbf", "#4c9a2a", "#b8860b", "#17becf", "#a0325a",
];

/** Positions that are shown. */
function shownPositions(view, state) {
  const all = view.sample.tokens.map((_, i) => i);
  const shown = all.filter((i) => {
    const token = view.sample.tokens[i];
    return !(state.special && token.special) && !(state.punct && token.punctuation);
  });
  return shown.length ? shown : all;
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

/** Weights of a layer in the scale of the state: shares, or contributions as they are. */
function weights(view, state, layer) {
  const head = state.head !== null && view.byHead(state.map) ? state.head : null;
  return view.remember(`w ${state.map} ${layer} ${head} ${state.scale}`, () => {
    return scaled(view, state, layer, head, view.matrix(state.map, layer, head));
  });
}

function scaled(view, state, layer, head, matrix) {
  if (state.scale === "absolute") return matrix;
  const divisors = view.divisors(state.map, layer, head);
  const result = new Float32Array(matrix.length);
  for (let i = 0, c = 0; i < matrix.length; i++) {
    if (divisors[c] !== 0) result[i] = matrix[i] / divisors[c];
    if (++c === view.nColumns) c = 0;
  }
  return result;
}

/** Same for what goes past the heads, by column; null where there is no such thing or one head stands alone. */
function pastWeights(view, state, layer) {
  if (state.head !== null || state.map === "mlp") return null;
  const past = view.past(state.map, layer);
  if (!past || state.scale === "absolute") return past;
  const divisors = view.divisors(state.map, layer);
  return past.map((value, c) => (divisors[c] === 0 ? 0 : value / divisors[c]));
}

/** Whether flow can be followed through all layers in the chosen map. */
function follows(view, state) {
  return view.chained && (state.map === "product" || state.map === "conserving");
}

/** Everything that is drawn, as numbers. */
function sceneOf(view, state) {
  const positions = shownPositions(view, state);
  const visible = new Uint8Array(view.nTokens);
  positions.forEach((i) => (visible[i] = 1));
  const rows = rowsOf(view);
  const cone = state.node && follows(view, state)
    ? view.remember(`x ${state.map} ${state.node.row} ${state.node.pos}`, () =>
        rolloutOf(view, state.map, state.node.row, state.node.pos))
    : null;
  const nodes = nodeValues(view, state, rows, cone);
  const found = { strongest: new Strongest(MOST_EDGES), above: 0, below: 0 };
  view.spec.layers.forEach((_, layer) => edgesOf(view, state, layer, rows, visible, cone, found));
  const paths = state.node && state.node.row > 0 && state.paths && follows(view, state)
    ? strongestPaths(view, state.map, state.node.row, state.node.pos, state.k)
    : [];
  return { positions, visible, rows, cone, nodes, edges: found.strongest.sorted(), above: found.above, below: found.below, paths };
}

/** Value of each node [row][position], NaN where it has none. */
function nodeValues(view, state, rows, cone) {
  const n = view.nTokens;
  const values = rows.labels.map(() => new Float64Array(n).fill(NaN));
  if (cone) return cone.map((row) => Float64Array.from(row));
  view.spec.layers.forEach((_, layer) => {
    const matrix = weights(view, state, layer);
    const columns = view.nColumns;
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

/** Adds a layer's edges above the threshold to `found`: all, or those that lead to the chosen node or away from it. */
function edgesOf(view, state, layer, rows, visible, cone, found) {
  const matrix = weights(view, state, layer);
  const past = pastWeights(view, state, layer);
  const columns = view.nColumns;
  const [low, high] = [rows.low[layer], rows.high[layer]];
  const node = state.node;
  const shares = cone && stepShares(view, state.map, layer, state.head);
  const pastShare = cone && state.head === null ? pastShares(view, state.map, layer) : null;
  const reference = state.scale === "absolute" && !cone ? layerTop(view, state, layer) : 1;
  const least = state.threshold * reference;
  // Contributions to a metric are in one unit throughout: those beside the chosen node stay, quietly.
  const aside = (src, dst) => node && !cone && !(node.row === high && node.pos === dst) && !(node.row === low && node.pos === src);
  const consider = (src, dst, value, kind) => {
    const size = Math.abs(value);
    if (!(size > 0) || !visible[src] || !visible[dst]) return;
    if (size < least) return void found.below++;
    found.above++;
    if (size / reference > found.strongest.floor) {
      found.strongest.add(size / reference, { layer, src, dst, value, size: size / reference, kind, quiet: aside(src, dst) });
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
      if (size < least) found.below += size > 0 && visible[src] && visible[dst] ? 1 : 0;
      else consider(src, dst, value - beyond, "heads");
      if (beyond !== 0 && state.skip) consider(src, dst, beyond, "skip");
    }
  }
}

/** The largest contribution of a layer among what is drawn; for the absolute scale. */
function layerTop(view, state, layer) {
  const head = state.head !== null && view.byHead(state.map) ? state.head : null;
  return view.remember(`t ${state.map} ${layer} ${head} ${state.skip}`, () => {
    let top = 0;
    for (const value of view.headsMatrix(state.map, layer, head)) top = Math.max(top, Math.abs(value));
    const past = state.skip ? pastWeights(view, state, layer) : null;
    if (past) for (const value of past) top = Math.max(top, Math.abs(value));
    return top || 1;
  });
}

/** Sizes of circles from 0 to 1 for values; `pivot` draws the median at half size. */
function circleSizes(values, mapping) {
  const sizes = values.flatMap((row) => Array.from(row)).filter((v) => v === v && v !== 0).map(Math.abs);
  if (!sizes.length) return () => 0;
  sizes.sort((a, b) => a - b);
  const top = sizes[sizes.length - 1];
  const median = sizes[sizes.length >> 1];
  if (mapping === "pivot") return (v) => Math.abs(v) / (Math.abs(v) + median);
  return (v) => (mapping === "sqrt" ? Math.sqrt(Math.abs(v) / top) : Math.abs(v) / top);
}

/** Where nodes stand: layers upwards and tokens across, or layers to the right and tokens down. */
function geometry(view, state, scene, room) {
  const upward = state.orient === "up";
  const nRows = scene.rows.labels.length;
  const labelRoom = Math.min(150, 12 + 6.4 * Math.max(...scene.positions.map((i) => view.sample.tokens[i].shown.length)));
  const margin = { rows: 64, labels: labelRoom + 14, end: 26 };
  const alongTokens = upward ? room.width : room.height;
  const alongRows = upward ? room.height : room.width;
  const fitTokens = (alongTokens - (upward ? margin.rows + margin.end : 2 * margin.end)) / Math.max(1, scene.positions.length);
  const fitRows = (alongRows - margin.labels - margin.end) / Math.max(1, nRows - 1);
  const token = state.spacing * Math.max(upward ? 11 : 13, Math.min(upward ? 72 : 40, fitTokens));
  const row = state.spacing * Math.max(30, Math.min(132, fitRows));
  const place = new Float64Array(view.nTokens).fill(NaN);
  scene.positions.forEach((i, number) => (place[i] = (number + 0.5) * token));
  const across = scene.positions.length * token;
  const tall = (nRows - 1) * row;
  const at = upward
    ? (r, i) => [margin.rows + place[i], margin.end + tall - r * row]
    : (r, i) => [margin.labels + r * row, margin.end + place[i]];
  return {
    upward, token, row, at, margin,
    radius: Math.min(15, 0.46 * token, 0.3 * row),
    width: upward ? margin.rows + across + margin.end : margin.labels + tall + margin.end + 30,
    height: upward ? margin.end + tall + margin.labels : margin.end + across + margin.end + 18,
  };
}

const escapes = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escapeText = (text) => String(text).replace(/[&<>"']/g, (char) => escapes[char]);
const short = (number) => number.toFixed(1);

/** The scene as SVG; every colour is written out, so that it can be saved as it is. */
function drawScene(view, state, scene, room, palette) {
  const g = geometry(view, state, scene, room);
  const out = [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${Math.ceil(g.width)}" height="${Math.ceil(g.height)}" ` +
      `viewBox="0 0 ${Math.ceil(g.width)} ${Math.ceil(g.height)}" font-family="${escapeText(palette.font)}" font-size="12">`,
    `<rect width="100%" height="100%" fill="${palette.surface}"/>`,
  ];
  drawRows(out, view, state, scene, g, palette);
  const largest = scene.edges.length ? scene.edges[0].size : 1;
  for (let number = scene.edges.length - 1; number >= 0; number--) {
    const edge = scene.edges[number];
    const share = edge.size / largest;
    const ends = [g.at(scene.rows.low[edge.layer], edge.src), g.at(scene.rows.high[edge.layer], edge.dst)];
    const colour = edge.kind === "skip" ? palette.skip : edge.value < 0 ? palette.negative : palette.positive;
    const dash = edge.kind === "skip" ? ' stroke-dasharray="3 3"' : "";
    const faded = edge.quiet ? 0.3 : scene.paths.length ? 0.35 : 1;
    out.push(
      `<path d="${curve(ends, g.upward)}" fill="none" stroke="${colour}" stroke-width="${short(0.5 + 5.5 * share)}" ` +
        `stroke-opacity="${((0.22 + 0.68 * share) * faded).toFixed(2)}"${dash} data-edge="${number}"/>`
    );
  }
  drawPaths(out, view, scene, g, palette);
  drawNodes(out, view, state, scene, g, palette);
  out.push("</svg>");
  return { svg: out.join(""), geometry: g };
}

function curve([[x1, y1], [x2, y2]], upward) {
  const bend = upward ? [x1, (y1 + y2) / 2, x2, (y1 + y2) / 2] : [(x1 + x2) / 2, y1, (x1 + x2) / 2, y2];
  return `M${short(x1)} ${short(y1)}C${bend.map(short).join(" ")} ${short(x2)} ${short(y2)}`;
}

/** The band of the current layer, row names and token names. */
function drawRows(out, view, state, scene, g, palette) {
  const first = scene.positions[0];
  const last = scene.positions[scene.positions.length - 1];
  view.spec.layers.forEach((number, layer) => {
    const [low, high] = [g.at(scene.rows.low[layer], first), g.at(scene.rows.high[layer], first)];
    const end = g.at(scene.rows.low[layer], last);
    const box = g.upward
      ? [2, high[1], end[0] + g.token / 2, low[1] - high[1]]
      : [low[0], low[1] - g.token / 2, high[0] - low[0], end[1] - low[1] + g.token + 22];
    const current = layer === state.layer;
    out.push(
      `<rect x="${short(box[0])}" y="${short(box[1])}" width="${short(box[2])}" height="${short(box[3])}" ` +
        `fill="${current ? palette.band : palette.surface}" fill-opacity="${current ? 1 : 0}" data-layer="${layer}"/>`
    );
    const label = g.upward ? [8, (low[1] + high[1]) / 2 + 4] : [(low[0] + high[0]) / 2, box[1] + box[3] - 6];
    out.push(
      `<text x="${short(label[0])}" y="${short(label[1])}" fill="${current ? palette.ink : palette.quiet}" ` +
        `text-anchor="${g.upward ? "start" : "middle"}" font-weight="${current ? 600 : 400}" data-layer="${layer}" ` +
        `style="cursor:pointer">${g.upward ? "block " : ""}${number}</text>`
    );
  });
  if (!g.upward) {
    const [x, y] = g.at(0, last);
    out.push(`<text x="${short(x - 18)}" y="${short(y + g.token / 2 + 16)}" fill="${palette.quiet}" text-anchor="end">block</text>`);
  }
  const size = Math.min(12, Math.max(8, g.token * 0.8));
  for (const i of scene.positions) {
    const token = view.sample.tokens[i];
    const [x, y] = g.at(0, i);
    const chosen = state.node && state.node.pos === i;
    const below = short(y + Math.max(20, g.radius + 14));
    const place = g.upward
      ? `x="${short(x)}" y="${below}" transform="rotate(-${g.token > 64 ? 0 : 55} ${short(x)} ${below})" ` +
        `text-anchor="${g.token > 64 ? "middle" : "end"}"`
      : `x="${short(x - 18)}" y="${short(y + 4)}" text-anchor="end"`;
    out.push(
      `<text ${place} font-size="${size.toFixed(1)}" fill="${token.special && !chosen ? palette.quiet : palette.ink}" ` +
        `font-style="${token.special ? "italic" : "normal"}" font-weight="${chosen ? 700 : 400}" data-token="${i}" ` +
        `style="cursor:pointer">${tokenMarkup(token, palette)}</text>`
    );
  }
}

/** A token's text with its marks for white space drawn quietly. */
function tokenMarkup(token, palette) {
  return Array.from(token.shown)
    .map((char) => ("·↵⇥".includes(char) ? `<tspan fill="${palette.quiet}" fill-opacity="0.7">${char}</tspan>` : escapeText(char)))
    .join("");
}

function drawPaths(out, view, scene, g, palette) {
  const largest = scene.paths.length ? Math.abs(scene.paths[0].weight) : 1;
  for (let number = scene.paths.length - 1; number >= 0; number--) {
    const path = scene.paths[number];
    path.steps.forEach((step) => {
      if (!scene.visible[step.src] || !scene.visible[step.dst]) return;
      const ends = [g.at(scene.rows.low[step.layer], step.src), g.at(scene.rows.high[step.layer], step.dst)];
      const colour = step.head === null || step.head < 0 ? palette.skip : headColour(step.head);
      const dash = path.weight < 0 ? ' stroke-dasharray="6 3"' : "";
      const width = 1.2 + 5 * Math.sqrt(Math.abs(path.weight) / largest);
      out.push(
        `<path d="${curve(ends, g.upward)}" fill="none" stroke="${colour}" stroke-width="${short(width)}" ` +
          `stroke-opacity="${(0.35 + 0.55 * Math.sqrt(Math.abs(path.weight) / largest)).toFixed(2)}" stroke-linecap="round"${dash} data-path="${number}" data-step="${step.layer}"/>`
      );
    });
  }
}

const headColour = (head) => HEAD_COLOURS[head % HEAD_COLOURS.length];

/** Circles of one colour are one path: thousands of elements would take longer to build than all else. */
function drawNodes(out, view, state, scene, g, palette) {
  const size = circleSizes(scene.nodes, state.circle);
  const drawn = { positive: [], negative: [], dots: [], rings: [] };
  scene.rows.labels.forEach((_, row) => {
    for (const i of scene.positions) {
      if (state.node && state.node.row === row && state.node.pos === i) continue;
      const value = scene.nodes[row][i];
      const at = g.at(row, i);
      if (value !== value) drawn.rings.push(disc(at, 2.5));
      else if (value === 0) drawn.dots.push(disc(at, 1.2));
      else drawn[value < 0 ? "negative" : "positive"].push(disc(at, Math.max(0.8, g.radius * size(value))));
    }
  });
  const path = (name, fill, stroke, width) =>
    drawn[name].length &&
    out.push(`<path d="${drawn[name].join("")}" fill="${fill}" stroke="${stroke}" stroke-width="${width}" pointer-events="none"/>`);
  path("dots", palette.line, "none", 0);
  path("rings", palette.surface, palette.line, 1);
  path("positive", palette.positive, palette.surface, 0.7);
  path("negative", palette.negative, palette.surface, 0.7);
  if (state.node && scene.visible[state.node.pos]) {
    const chosen = disc(g.at(state.node.row, state.node.pos), Math.max(5, g.radius * 0.8));
    out.push(`<path d="${chosen}" fill="${palette.accent}" stroke="${palette.ink}" stroke-width="2" pointer-events="none"/>`);
  }
}

function disc([x, y], radius) {
  const r = short(radius);
  const across = short(2 * radius);
  return `M${short(x - radius)} ${short(y)}a${r} ${r} 0 1 0 ${across} 0a${r} ${r} 0 1 0 -${across} 0`;
}

/** The node at a point of the picture, or null where none is near. */
function nodeAt(scene, g, x, y) {
  const [first, origin] = [g.at(0, scene.positions[0]), g.upward ? y : x];
  const row = Math.round(Math.abs(origin - (g.upward ? first[1] : first[0])) / g.row);
  const number = Math.round((g.upward ? x - first[0] : y - first[1]) / g.token);
  const pos = scene.positions[number];
  if (pos === undefined || row >= scene.rows.labels.length) return null;
  const [nx, ny] = g.at(row, pos);
  return Math.hypot(nx - x, ny - y) <= Math.max(g.radius, Math.min(7, g.token / 2)) + 1 ? { row, pos } : null;
}
