// Heatmaps of the current layer: small ones for all heads, a large one for what is chosen.

const MARGIN = 92; // for the tokens beside the large heatmap
const SHADES = 255; // on each side of 0

/** Matrix, in the scale of the state, of one head or of all, without what goes past them. */
function headWeights(view, state, head) {
  return view.remember(`e ${state.map} ${state.layer} ${head} ${state.scale}`, () =>
    scaled(view, state, state.layer, head, view.headsMatrix(state.map, state.layer, head)));
}

/**
 * Value at which colours end, over the heads that are compared: the largest, or three times the 99.5th percentile of
 * what is not 0 where few cells are far above all others. Shares end at 1: beyond are columns that nearly cancel. Contributions to a
 * metric have one unit throughout, and may have one scale for all blocks; that ends at the largest.
 */
function colourTop(view, state, heads) {
  const shared = state.map === "metric" && state.shared;
  const layers = shared ? view.spec.layers.map((_, layer) => layer) : [state.layer];
  return view.remember(`k ${state.map} ${layers} ${state.scale} ${heads} ${state.special} ${state.punct}`, () => {
    const total = layers.length * heads.length * view.nTokens * view.nColumns;
    const stride = Math.max(1, Math.floor(total / 20000)); // a sample of many cells is enough for a percentile
    const sizes = new Float32Array(Math.ceil(total / stride) + layers.length * heads.length);
    let count = 0;
    let largest = 0;
    for (const layer of layers) {
      for (const head of heads) {
        const values = shownValues(view, state, headWeights(view, { ...state, layer }, head));
        largest = Math.max(largest, largestSize(values));
        for (let i = 0; i < values.length; i += stride) if (values[i]) sizes[count++] = Math.abs(values[i]);
      }
    }
    if (!count) return 1;
    const usual = sizes.subarray(0, count).sort()[Math.ceil(0.995 * (count - 1))];
    const top = shared ? largest : Math.min(largest, 3 * usual);
    return state.scale === "share" ? Math.min(1, top) : top;
  });
}

function largestOf(cells) {
  let top = 0;
  for (const row of cells.rows) for (const column of cells.columns) top = Math.max(top, Math.abs(cells.value(row, column)));
  return top || 1;
}

/** Pixels for values from -1 to 1, as a canvas stores them. */
function colourScale(palette) {
  const parse = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const [low, middle, high] = [palette.negative, palette.zero, palette.positive].map(parse);
  const colours = new Uint32Array(2 * SHADES + 1);
  for (let shade = -SHADES; shade <= SHADES; shade++) {
    const end = shade < 0 ? low : high;
    const t = (Math.abs(shade) / SHADES) ** 0.8;
    const [r, g, b] = middle.map((channel, i) => Math.round(channel + t * (end[i] - channel)));
    colours[shade + SHADES] = (255 << 24) | (b << 16) | (g << 8) | r;
  }
  return colours;
}

/** Rows are destinations, columns sources, as in a pattern; for the mlp map rows are heads, columns destinations. */
function heatCells(view, state, scene, head) {
  if (state.map === "mlp") {
    const rows = Array.from({ length: view.nHeads + 2 }, (_, h) => h);
    const columns = scene.positions.filter((i) => view.columnOf[i] >= 0);
    const skip = view.slice("skip", state.layer);
    const bias = view.slice("bias", state.layer);
    const divisors = state.scale === "share" ? view.divisors("mlp", state.layer) : null;
    const raw = (h, j) =>
      (h < view.nHeads ? view.slice("mlp", state.layer, h, view.nColumns) : h === view.nHeads ? skip : bias)[view.columnOf[j]];
    const value = (h, j) => {
      const divisor = divisors ? divisors[view.columnOf[j]] : 1;
      return divisor === 0 ? 0 : raw(h, j) / divisor;
    };
    return { rows, columns, value, raw, name: (h) => (h < view.nHeads ? `head ${h}` : h === view.nHeads ? "skip" : "bias") };
  }
  const matrix = headWeights(view, state, head);
  return {
    rows: scene.positions.filter((i) => view.columnOf[i] >= 0),
    columns: scene.positions,
    value: (dst, src) => matrix[src * view.nColumns + view.columnOf[dst]],
    name: (dst) => `${view.sample.tokens[dst].shown} ${dst}`,
  };
}

function paintCells(context, cells, top, colours, box) {
  const image = new ImageData(Math.max(1, cells.columns.length), Math.max(1, cells.rows.length));
  const pixels = new Uint32Array(image.data.buffer);
  let at = 0;
  for (const row of cells.rows) {
    for (const column of cells.columns) {
      const shade = Math.round((SHADES * cells.value(row, column)) / top);
      pixels[at++] = colours[SHADES + Math.max(-SHADES, Math.min(SHADES, shade))];
    }
  }
  const small = document.createElement("canvas");
  small.width = image.width;
  small.height = image.height;
  small.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, box.x, box.y, box.width, box.height);
}

/** The large heatmap; gives where its cells lie, for the pointer. */
function drawLarge(canvas, view, state, scene, palette, width) {
  const cells = heatCells(view, state, scene, state.head);
  const side = width - MARGIN - 10;
  const cellWidth = side / cells.columns.length;
  const cellHeight = state.map === "mlp" ? Math.min(22, side / cells.rows.length) : cellWidth;
  const height = cellHeight * cells.rows.length + MARGIN * 0.8 + 8;
  const context = sized(canvas, width, height);
  const box = { x: MARGIN, y: 6, width: side, height: cellHeight * cells.rows.length };
  const largest = state.map === "mlp" ? largestOf(cells) : 0;
  const top = state.map === "mlp" ? (state.scale === "share" ? Math.min(1, largest) : largest) : colourTop(view, state, state.head === null ? [null] : view.heads(state.map));
  paintCells(context, cells, top, colourScale(palette), box);
  context.strokeStyle = palette.line;
  context.strokeRect(box.x - 0.5, box.y - 0.5, box.width + 1, box.height + 1);
  outlineNode(context, view, state, cells, box, cellWidth, cellHeight, palette);
  const label = (size) => `${Math.min(11, Math.max(7, size))}px ${palette.font}`;
  const every = (size) => Math.max(1, Math.ceil(8 / size));
  context.fillStyle = palette.ink;
  context.textBaseline = "middle";
  context.textAlign = "right";
  context.font = label(cellHeight - 1);
  cells.rows.forEach((row, i) => {
    if (i % every(cellHeight) === 0) context.fillText(clip(cells.name(row)), box.x - 5, box.y + (i + 0.5) * cellHeight);
  });
  context.font = label(cellWidth - 1);
  cells.columns.forEach((column, i) => {
    if (i % every(cellWidth) !== 0) return;
    context.save();
    context.translate(box.x + (i + 0.5) * cellWidth, box.y + box.height + 6);
    context.rotate(-Math.PI / 3);
    context.fillText(clip(`${view.sample.tokens[column].shown} ${column}`), 0, 0);
    context.restore();
  });
  return { cells, box, cellWidth, cellHeight, top };
}

/** Frames the column or row of the chosen node where this layer touches it. */
function outlineNode(context, view, state, cells, box, cellWidth, cellHeight, palette) {
  if (!state.node) return;
  const rows = rowsOf(view);
  context.strokeStyle = palette.accent;
  context.lineWidth = 2;
  const row = cells.rows.indexOf(state.node.pos);
  const column = cells.columns.indexOf(state.node.pos);
  if (state.map !== "mlp" && rows.high[state.layer] === state.node.row && row >= 0) {
    context.strokeRect(box.x, box.y + row * cellHeight, box.width, cellHeight);
  }
  if (rows.low[state.layer] === state.node.row && column >= 0) {
    context.strokeRect(box.x + column * cellWidth, box.y, cellWidth, box.height);
  }
  context.lineWidth = 1;
}

function clip(text) {
  return text.length > 16 ? `${text.slice(0, 9)}… ${text.split(" ").pop()}` : text;
}

function sized(canvas, width, height) {
  const sharp = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * sharp);
  canvas.height = Math.round(height * sharp);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(sharp, sharp);
  return context;
}

/** One small heatmap for each head, in the buttons of `list`. */
function drawSmall(list, view, state, scene, palette, choose) {
  const heads = view.byHead(state.map) && state.map !== "mlp" ? view.nHeads : 0;
  const size = heads > 16 ? 58 : 84;
  while (list.children.length > heads) list.lastChild.remove();
  while (list.children.length < heads) {
    const button = document.createElement("button");
    button.append(document.createElement("canvas"), document.createElement("span"));
    const head = list.children.length;
    button.addEventListener("click", () => choose(head));
    list.append(button);
  }
  for (let head = 0; head < heads; head++) list.children[head].setAttribute("aria-pressed", String(state.head === head));
  // Drawn again only where something has changed that they show.
  const drawn = [state.sample, state.view, state.map, state.layer, state.scale, state.shared, state.special, state.punct, palette.surface].join();
  if (list.dataset.drawn === drawn) return;
  list.dataset.drawn = drawn;
  const top = colourTop(view, state, view.heads(state.map));
  const scale = colourScale(palette);
  for (let head = 0; head < heads; head++) {
    const button = list.children[head];
    button.setAttribute("aria-label", `Block ${view.spec.layers[state.layer]}, head ${head}`);
    button.lastChild.textContent = `head ${head}`;
    const context = sized(button.firstChild, size, size);
    paintCells(context, heatCells(view, state, scene, head), top, scale, { x: 0, y: 0, width: size, height: size });
  }
}
