// What the page holds: arrays of every view, decoded when they are first needed, and the matrices that are drawn.

const EPS32 = 2 ** -23;
let halfValues = null;

/** Value of every half-precision number, by its bits. */
function halfTable() {
  if (halfValues) return halfValues;
  halfValues = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    let value = (1 + fraction / 1024) * 2 ** (exponent - 15);
    if (exponent === 0) value = fraction * 2 ** -24;
    if (exponent === 31) value = fraction ? NaN : Infinity;
    halfValues[bits] = bits & 32768 ? -value : value;
  }
  return halfValues;
}

/** Numbers of one array: base64 of float32 or float16, each layer divided by its scale. */
function decode(spec) {
  const text = atob(document.getElementById(spec.id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const half = spec.dtype === "f2";
  const raw = half ? new Uint16Array(bytes.buffer) : new Float32Array(bytes.buffer);
  const result = half ? new Float32Array(raw.length) : raw;
  const table = half ? halfTable() : null;
  const step = raw.length / Math.max(1, spec.scales.length);
  spec.scales.forEach((scale, layer) => {
    for (let i = layer * step; i < (layer + 1) * step; i++) result[i] = (half ? table[raw[i]] : raw[i]) * scale;
  });
  return result;
}

/**
 * One Flow. A matrix is [source, column]; column c belongs to destination `destinations[c]`.
 * The maps drawn are those of the Flow, what they compose to, and `metric`, the attn map of a Flow with one.
 */
class View {
  constructor(spec, sample) {
    Object.assign(this, { spec, sample });
    this.nTokens = sample.tokens.length;
    this.destinations = spec.destinations;
    this.nColumns = spec.destinations.length;
    this.nLayers = spec.layers.length;
    this.nHeads = spec.n_heads;
    this.columnOf = new Int32Array(this.nTokens).fill(-1);
    spec.destinations.forEach((position, column) => (this.columnOf[position] = column));
    this.arrays = new Map();
    this.cache = new Map();
    const has = (name) => name in spec.arrays;
    const composes = has("mlp") && (spec.by_head || has("conserving"));
    this.maps = has("skip") && !has("mlp") ? ["metric"] : ["attn", "mlp", "block"].filter(has);
    if (composes) this.maps.push("product", "conserving");
    /** Whether paths can go from any token through all layers. */
    this.chained =
      spec.layers.every((layer, i) => layer === spec.layers[0] + i) &&
      this.nColumns === this.nTokens &&
      spec.destinations.every((position, i) => position === i);
  }

  array(name) {
    if (!this.arrays.has(name)) this.arrays.set(name, decode(this.spec.arrays[name]));
    return this.arrays.get(name);
  }

  /** A layer's part of an array. */
  slice(name, layer, index = 0, length = null) {
    const array = this.array(name);
    const perLayer = array.length / this.nLayers;
    const size = length ?? perLayer;
    return array.subarray(layer * perLayer + index * size, layer * perLayer + (index + 1) * size);
  }

  remember(key, make) {
    if (!this.cache.has(key)) this.cache.set(key, make());
    return this.cache.get(key);
  }

  /** Whether a map says what each head carries. */
  byHead(map) {
    return map === "mlp" || (map !== "block" && this.spec.by_head);
  }

  /** The heads that a map tells apart; null stands for all together. */
  heads(map) {
    return this.byHead(map) ? Array.from({ length: this.nHeads }, (_, h) => h) : [null];
  }

  /** Weights [source, column] of one head, or of all that a layer does: heads, skip and bias. */
  matrix(map, layer, head = null) {
    if (head === null && !this.byHead(map)) return this.slice(map, layer);
    const past = head === null ? this.past(map, layer) : null;
    if (!past) return this.headsMatrix(map, layer, head);
    return this.remember(`m ${map} ${layer}`, () => {
      const sum = this.headsMatrix(map, layer).slice();
      past.forEach((value, c) => (sum[this.destinations[c] * this.nColumns + c] += value));
      return sum;
    });
  }

  /** The same without what goes past the heads. */
  headsMatrix(map, layer, head = null) {
    if (head !== null) return this.headMatrix(map, layer, head);
    return this.remember(`o ${map} ${layer}`, () => {
      if (map === "block") return this.slice("block", layer);
      if (!this.byHead(map)) {
        const result = this.slice(map, layer).slice();
        this.past(map, layer)?.forEach((value, c) => (result[this.destinations[c] * this.nColumns + c] -= value));
        return result;
      }
      const sum = new Float32Array(this.nTokens * this.nColumns);
      for (let h = 0; h < this.nHeads; h++) {
        const one = this.headMatrix(map, layer, h);
        for (let i = 0; i < sum.length; i++) sum[i] += one[i];
      }
      return sum;
    });
  }

  headMatrix(map, layer, head) {
    const size = this.nTokens * this.nColumns;
    if (map === "attn" || map === "metric") return this.slice("attn", layer, head, size);
    return this.remember(`h ${map} ${layer} ${head}`, () => {
      const result = new Float32Array(size);
      const through = this.slice("mlp", layer, head, this.nColumns);
      if (map === "mlp") {
        through.forEach((value, c) => (result[this.destinations[c] * this.nColumns + c] = value));
        return result;
      }
      const into = this.slice("attn", layer, head, size);
      const n = this.nColumns;
      if (map === "product") {
        for (let i = 0; i < size; i++) result[i] = into[i] * through[i % n];
        return result;
      }
      const rounding = EPS32 * this.nTokens * this.strongestColumn(layer);
      const sums = this.sums("attn", layer, head);
      for (let i = 0; i < size; i++) {
        const c = i % n;
        if (Math.abs(sums[c]) > rounding) result[i] = (into[i] / sums[c]) * through[c];
      }
      // A head that does not move on its path leaves what the mlp map says of it with the destination.
      for (let c = 0; c < n; c++) {
        if (Math.abs(sums[c]) <= rounding) result[this.destinations[c] * n + c] += through[c];
      }
      return result;
    });
  }

  /** Largest sum of absolute contributions in a column of a layer's attn map. */
  strongestColumn(layer) {
    return this.remember(`s ${layer}`, () => {
      const n = this.nColumns;
      let largest = 0;
      for (let h = 0; h < this.nHeads; h++) {
        const sums = columnSums(this.slice("attn", layer, h, this.nTokens * n), n, true);
        for (const sum of sums) largest = Math.max(largest, sum);
      }
      return largest;
    });
  }

  /** Sums of the columns of an array, as they were before halves were made of it. */
  sums(name, layer, head = null) {
    const n = this.nColumns;
    if (`${name}-sums` in this.spec.arrays) {
      return Float64Array.from(head === null ? this.slice(`${name}-sums`, layer) : this.slice(`${name}-sums`, layer, head, n));
    }
    return columnSums(head === null ? this.slice(name, layer) : this.slice(name, layer, head, this.nTokens * n), n);
  }

  /** What goes past the heads at each column, or null where the map has no such thing. */
  past(map, layer) {
    if (map === "metric") return this.slice("skip", layer);
    if (map !== "mlp" && map !== "conserving") return null;
    return this.remember(`p ${layer}`, () => {
      const bias = this.slice("bias", layer);
      return this.slice("skip", layer).map((value, c) => value + bias[c]);
    });
  }

  /**
   * Whether what tokens keep is left out: the mlp map's path holds it (att_itb_a0), so skip and bias give nothing. Flow
   * through several blocks then follows only what moves between tokens.
   */
  get forgets() {
    return this.remember("forgets", () => this.maps.includes("product") && ["skip", "bias"].every((name) => this.array(name).every((value) => value === 0)));
  }

  /**
   * What a weight is divided by to be a share, for each column: the sum of the column; for one head of the attn map
   * that of the head's own; for a metric the layer's total. 0 where there is nothing to share.
   */
  divisors(map, layer, head = null) {
    const own = map === "attn" ? head : null;
    return this.remember(`d ${map} ${layer} ${own}`, () => {
      const shown = this.matrix(map, layer, own);
      const single = map !== "attn" || own !== null || !this.spec.by_head;
      const exact = map in this.spec.arrays && single && map !== "mlp";
      const sums = exact ? this.sums(map, layer, own) : columnSums(shown, this.nColumns);
      if (map === "metric") return sums.fill(this.spec.totals[layer] ?? 0);
      const sizes = columnSums(shown, this.nColumns, true);
      const rounding = EPS32 * this.nTokens * sizes.reduce((a, b) => Math.max(a, b), 0);
      return sums.map((sum) => (Math.abs(sum) <= rounding ? 0 : sum));
    });
  }

  /** How many columns of what is divided by `divisors` nearly cancel. */
  cancelling(map, layer, head) {
    const matrix = this.matrix(map, layer, head);
    const sums = this.divisors(map, layer, head);
    return columnSums(matrix, this.nColumns, true).filter((size, c) => sums[c] !== 0 && size > CANCELS * Math.abs(sums[c])).length;
  }

  /**
   * Gap of the column that a number belongs to, and whether it has converged; of a composition the larger of its two
   * parts', of what goes past the heads (`head` is "past") that of the mlp map. Null for sums over heads, of which each
   * has its own.
   */
  certainty(map, layer, head, column) {
    if (head === "past" && map === "conserving") return this.certainty("mlp", layer, null, column);
    if (map === "product" || map === "conserving") {
      if (head === null) return null;
      const parts = ["attn", "mlp"].map((part) => this.certainty(part, layer, head, column));
      return { gap: Math.max(...parts.map((part) => part.gap)), converged: parts.every((part) => part.converged) };
    }
    if (map === "attn" && head === null) return null;
    const name = map === "metric" ? "attn" : map;
    const index = map === "metric" ? 0 : map === "attn" ? head * this.nColumns + column : column;
    const cell = (what) => this.slice(`${name}-${what}`, layer)[index];
    return { gap: cell("gap"), converged: cell("converged") > 0 };
  }
}

function columnSums(matrix, nColumns, absolute = false) {
  const sums = new Float64Array(nColumns);
  for (let i = 0, c = 0; i < matrix.length; i++) {
    sums[c] += absolute ? Math.abs(matrix[i]) : matrix[i];
    if (++c === nColumns) c = 0;
  }
  return sums;
}
