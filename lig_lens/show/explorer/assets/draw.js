// A scene as SVG text, and where its nodes stand.

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
  const longest = 6.4 * Math.max(...scene.positions.map((i) => view.sample.tokens[i].shown.length));
  const labelRoom = Math.min(150, 12 + longest);
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
    upward, token, row, at, margin, longest,
    radius: Math.min(15, 0.46 * token, 0.3 * row),
    width: upward ? margin.rows + across + margin.end : margin.labels + tall + margin.end + 30,
    height: upward ? margin.end + tall + margin.labels : margin.end + across + margin.end + 22,
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
  drawBands(out, view, state, scene, g, palette);
  // A share of more than all comes from a sum that nearly cancels: it is not to make all others thin.
  const strongest = scene.edges.length ? scene.edges[0].size : 1;
  const largest = state.scale === "share" || scene.cone ? Math.min(1, strongest) : strongest;
  for (let number = scene.edges.length - 1; number >= 0; number--) {
    const edge = scene.edges[number];
    const share = Math.min(1, edge.size / largest);
    const ends = [g.at(scene.rows.low[edge.layer], edge.src), g.at(scene.rows.high[edge.layer], edge.dst)];
    const colour = edge.value < 0 ? palette.negative : palette.positive;
    const dash = edge.kind === "skip" ? ' stroke-dasharray="7 3"' : "";
    const faded = edge.quiet ? 0.3 : scene.paths.length ? 0.6 : 1;
    out.push(
      `<path d="${curve(ends, g.upward)}" fill="none" stroke="${colour}" stroke-width="${short(0.5 + 5.5 * share)}" ` +
        `stroke-opacity="${((0.22 + 0.68 * share) * faded).toFixed(2)}"${dash} data-edge="${number}"/>`
    );
  }
  drawPaths(out, view, scene, g, palette);
  drawNodes(out, state, scene, g, palette);
  drawLabels(out, view, state, scene, g, palette);
  out.push("</svg>");
  return { svg: out.join(""), geometry: g };
}

function curve([[x1, y1], [x2, y2]], upward) {
  const bend = upward ? [x1, (y1 + y2) / 2, x2, (y1 + y2) / 2] : [(x1 + x2) / 2, y1, (x1 + x2) / 2, y2];
  return `M${short(x1)} ${short(y1)}C${bend.map(short).join(" ")} ${short(x2)} ${short(y2)}`;
}

/** Where a layer's band lies: x, y, width, height. */
function bandOf(scene, g, layer) {
  const [first, last] = [scene.positions[0], scene.positions[scene.positions.length - 1]];
  const [low, high] = [g.at(scene.rows.low[layer], first), g.at(scene.rows.high[layer], first)];
  const end = g.at(scene.rows.low[layer], last);
  return g.upward
    ? [2, high[1], end[0] + g.token / 2, low[1] - high[1]]
    : [low[0], low[1] - g.token / 2, high[0] - low[0], end[1] - low[1] + g.token];
}

/** The band of the current layer; the others can be clicked. */
function drawBands(out, view, state, scene, g, palette) {
  view.spec.layers.forEach((_, layer) => {
    const [x, y, width, height] = bandOf(scene, g, layer).map(short);
    const current = layer === state.layer;
    out.push(
      `<rect x="${x}" y="${y}" width="${width}" height="${height}" fill="${current ? palette.band : palette.surface}" ` +
        `fill-opacity="${current ? 1 : 0}" data-layer="${layer}"/>`
    );
  });
}

/**
 * Names of blocks and tokens, in two groups that stay in sight while the picture is scrolled: `left` moves sideways,
 * `bottom` up and down.
 */
function drawLabels(out, view, state, scene, g, palette) {
  const blocks = [];
  view.spec.layers.forEach((number, layer) => {
    const [x, y, width, height] = bandOf(scene, g, layer);
    const at = g.upward ? [8, y + height / 2 + 4] : [x + width / 2, g.height - 14];
    const current = layer === state.layer;
    blocks.push(
      `<text x="${short(at[0])}" y="${short(at[1])}" fill="${current ? palette.ink : palette.quiet}" ` +
        `text-anchor="${g.upward ? "start" : "middle"}" font-weight="${current ? 600 : 400}" data-layer="${layer}" ` +
        `style="cursor:pointer">${g.upward ? "block " : ""}${number}</text>`
    );
  });
  const ends = [["input", 0], ["output", scene.rows.labels.length - 1]];
  const quiet = `fill="${palette.quiet}" font-size="11" font-style="italic"`;
  for (const [name, row] of ends) {
    const [x, y] = g.at(row, scene.positions[0]);
    if (g.upward) blocks.push(`<text x="8" y="${short(y + 4)}" ${quiet}>${name}</text>`);
    else if (name === "output") blocks.push(`<text x="${short(x)}" y="${short(g.height - 14)}" text-anchor="start" ${quiet}>out</text>`);
  }
  if (!g.upward) {
    const x = g.at(0, scene.positions[0])[0];
    blocks.push(`<text x="${short(x - 18)}" y="${short(g.height - 14)}" fill="${palette.quiet}" text-anchor="end">block</text>`);
  }
  const tokens = scene.positions.map((i) => tokenLabel(view, state, g, i, palette));
  const strip = (x, y, width, height) =>
    `<rect x="${short(x)}" y="${short(y)}" width="${short(width)}" height="${short(height)}" fill="${palette.surface}"/>`;
  const low = g.at(0, scene.positions[0]);
  const bottom = g.upward ? low[1] + g.radius + 3 : g.height - 30;
  const beside = g.upward ? g.margin.rows - 4 : low[0] - g.radius - 3;
  out.push(`<g data-sticky="left">${strip(0, 0, beside, g.height)}${(g.upward ? blocks : tokens).join("")}</g>`);
  out.push(`<g data-sticky="bottom">${strip(0, bottom, g.width, g.height - bottom)}${(g.upward ? tokens : blocks).join("")}</g>`);
}

/** Names stand upright where the longest has room. */
const upright = (g) => g.token > g.longest + 6;

function tokenLabel(view, state, g, i, palette) {
  const token = view.sample.tokens[i];
  const size = Math.min(12, Math.max(8, g.token * 0.8));
  const [x, y] = g.at(0, i);
  const chosen = state.node && state.node.pos === i;
  const below = short(y + Math.max(20, g.radius + 14));
  const place = g.upward
    ? `x="${short(x)}" y="${below}" transform="rotate(-${upright(g) ? 0 : 55} ${short(x)} ${below})" ` +
      `text-anchor="${upright(g) ? "middle" : "end"}"`
    : `x="${short(x - 18)}" y="${short(y + 4)}" text-anchor="end"`;
  return (
    `<text ${place} font-size="${size.toFixed(1)}" fill="${token.special && !chosen ? palette.quiet : palette.ink}" ` +
    `font-style="${token.special ? "italic" : "normal"}" font-weight="${chosen ? 700 : 400}" data-token="${i}" ` +
    `style="cursor:pointer">${tokenMarkup(token, palette)}</text>`
  );
}

/** A token's text with its marks for white space drawn quietly. */
function tokenMarkup(token, palette) {
  return Array.from(token.shown)
    .map((char) => ("·↵⇥‑".includes(char) ? `<tspan fill="${palette.quiet}" fill-opacity="0.7">${char}</tspan>` : escapeText(char)))
    .join("");
}

const MOST_NAMES = 16;

/**
 * Width and depth of colour are the weight itself, so that paths which carry next to nothing look like it. Heads between
 * the same two tokens run beside each other; the strongest are named.
 */
function drawPaths(out, view, scene, g, palette) {
  const beside = new Map(); // how many steps there are between two nodes, and have been drawn
  const between = (step) => `${step.layer} ${step.src} ${step.dst}`;
  for (const step of scene.steps) beside.set(between(step), { all: (beside.get(between(step))?.all ?? 0) + 1, drawn: 0 });
  const names = [];
  scene.steps.forEach((step, number) => {
    if (!scene.visible[step.src] || !scene.visible[step.dst]) return;
    const place = beside.get(between(step));
    const shift = 6 * (place.drawn++ - (place.all - 1) / 2);
    const ends = [g.at(scene.rows.low[step.layer], step.src), g.at(scene.rows.high[step.layer], step.dst)]
      .map(([x, y]) => (g.upward ? [x + shift, y] : [x, y + shift]));
    const byHead = step.head !== null && step.head >= 0;
    const colour = byHead ? headColour(step.head) : palette.skip;
    if (byHead) names.push({ size: Math.abs(step.weight), text: headName(view, step.layer, step.head), at: ends[0].map((one, i) => (one + ends[1][i]) / 2) });
    const size = Math.sqrt(Math.min(1, Math.abs(step.weight)));
    const dash = step.weight < 0 ? ' stroke-dasharray="6 4"' : "";
    out.push(
      `<path d="${curve(ends, g.upward)}" fill="none" stroke="${colour}" stroke-width="${short(1 + 6 * size)}" ` +
          `stroke-opacity="${(0.35 + 0.6 * size).toFixed(2)}"${dash} data-path="${step.paths.join()}" data-step="${number}"/>`
    );
  });
  names.sort((a, b) => b.size - a.size);
  const taken = [];
  for (const { text, at: [x, y] } of names) {
    if (taken.length === MOST_NAMES || taken.some(([a, b]) => Math.abs(a - x) < 44 && Math.abs(b - y) < 13)) continue;
    taken.push([x, y]);
    out.push(
      `<text x="${short(x)}" y="${short(y + 3.5)}" text-anchor="middle" font-size="10" font-weight="600" fill="${palette.ink}" ` +
        `stroke="${palette.surface}" stroke-width="3" paint-order="stroke" pointer-events="none">${text}</text>`
    );
  }
}

const headColour = (head) => header.colours[head % header.colours.length];

/** Circles of one colour are one path: thousands of elements would take longer to build than all else. */
function drawNodes(out, state, scene, g, palette) {
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
  const across = short(2 * Number(r)); // twice what is written, or the arcs do not close to a circle
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
