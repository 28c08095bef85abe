// What the page holds: arrays of every view, decoded when they are first needed, and what compose.js makes of them,
// remembered. How numbers are composed is said there.

/**
 * One Flow. A matrix is [source, column]; column c belongs to destination `destinations[c]`.
 * The maps drawn are those of the Flow, what they compose to, and `metric`, the attn map of a Flow with one.
 */
class View {
  constructor(spec, sample, header) {
    Object.assign(this, { spec, sample });
    this.rules = new Map(header.rules.map((rule) => [rule.name, rule]));
    this.cancels = header.cancels;
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
    const rules = [...this.rules.keys()];
    this.maps = has("skip") && !has("mlp") ? ["metric"] : ["attn", "mlp", "block"].filter(has);
    if (has("mlp") && (spec.by_head || rules.some(has))) this.maps.push(...rules);
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

  /** Whether a map is put together by a rule: only such maps can be followed through blocks. */
  composes(map) {
    return this.rules.has(map);
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
    return this.remember(`m ${map} ${layer}`, () => withPast(this.headsMatrix(map, layer), past, this.destinations));
  }

  /** The same without what goes past the heads. */
  headsMatrix(map, layer, head = null) {
    if (head !== null) return this.headMatrix(map, layer, head);
    return this.remember(`o ${map} ${layer}`, () => {
      if (this.byHead(map)) return addedUp(this.heads(map).map((one) => this.headMatrix(map, layer, one)));
      const past = this.past(map, layer);
      const all = this.slice(map, layer);
      return past ? withPast(all, past.map((value) => -value), this.destinations) : all;
    });
  }

  headMatrix(map, layer, head) {
    const into = () => this.slice("attn", layer, head, this.nTokens * this.nColumns);
    if (map === "attn" || map === "metric") return into();
    return this.remember(`h ${map} ${layer} ${head}`, () => {
      const through = this.slice("mlp", layer, head, this.nColumns);
      if (map === "mlp") return withPast(new Float32Array(this.nTokens * this.nColumns), through, this.destinations);
      return this.rules.get(map).conserves
        ? conservingEdges(into(), this.divisors("attn", layer, head), through, this.destinations)
        : productEdges(into(), through);
    });
  }

  /** What goes past the heads at each column, or null where the map has no such thing. */
  past(map, layer) {
    if (map === "metric") return this.slice("skip", layer);
    if (map !== "mlp" && !this.rules.get(map)?.conserves) return null;
    return this.remember(`p ${layer}`, () => addedUp([this.slice("skip", layer), this.slice("bias", layer)]));
  }

  /**
   * Whether what tokens keep is left out: the mlp map's path holds it (att_itb_a0), so skip and bias give nothing. Flow
   * through several blocks then follows only what moves between tokens.
   */
  get forgets() {
    return this.remember("forgets", () => {
      const nothing = (name) => this.array(name).every((value) => value === 0);
      return this.maps.some((map) => this.composes(map)) && nothing("skip") && nothing("bias");
    });
  }

  /** What is added up in each column, [any, column] each; as `Flow.columns` and `compose.edges` have it. */
  terms(map, layer, head = null) {
    if (map === "mlp") return ["mlp", "skip", "bias"].map((name) => this.slice(name, layer));
    if (!this.composes(map)) return [this.matrix(map, layer, head)];
    const past = this.past(map, layer);
    return [...this.heads(map).map((one) => this.headsMatrix(map, layer, one)), ...(past ? [past] : [])];
  }

  /** Sums and sizes of columns; as Python added them up where halves or heads that are left out would not tell. */
  columns(map, layer, head = null) {
    return this.remember(`c ${map} ${layer} ${head}`, () => {
      const n = this.nColumns;
      const known = (what) => {
        const name = `${map}-${what}`;
        if (!(name in this.spec.arrays)) return null;
        return columnSums(head === null ? this.slice(name, layer) : this.slice(name, layer, head, n), n);
      };
      const [sums, sizes] = [known("sums"), known("sizes")];
      if (sums && sizes) return { sums, sizes };
      const terms = this.terms(map, layer, head);
      return { sums: sums ?? addedColumns(terms, n), sizes: sizes ?? addedColumns(terms, n, true) };
    });
  }

  /**
   * What a weight is divided by to be a share, for each column: the sum of the column; for one head of the attn map
   * that of the head's own; for a metric the layer's total. 0 where there is nothing to share.
   */
  divisors(map, layer, head = null) {
    const own = map === "attn" ? head : null;
    return this.remember(`d ${map} ${layer} ${own}`, () => {
      if (map === "metric") return new Float64Array(this.nColumns).fill(this.spec.totals[layer] ?? 0);
      const { sums, sizes } = this.columns(map, layer, own);
      const strongest = own === null ? largestSize(sizes) : this.strongestColumn(layer);
      return divisorsOf(sums, this.spec.rounding[map] * strongest);
    });
  }

  /** The largest size of a column of a layer's attn map, of all heads. */
  strongestColumn(layer) {
    return this.remember(`s ${layer}`, () => {
      return largestSize(this.heads("attn").map((head) => largestSize(this.columns("attn", layer, head).sizes)));
    });
  }

  /** How many columns of what is divided by `divisors` nearly cancel. */
  cancelling(map, layer, head = null) {
    return nearlyCancelling(this.columns(map, layer, head).sizes, this.divisors(map, layer, head), this.cancels);
  }

  /** Shares [source, destination] of one step, of one head or all; needs a chained View, as all below. */
  stepShares(map, layer, head = null) {
    return this.remember(`shares ${map} ${layer} ${head}`, () => {
      return stepShares(this.matrix(map, layer, head), this.divisors(map, layer), head === null);
    });
  }

  /** What goes past the heads, as a share of the step: [destination]. */
  pastShares(map, layer) {
    return this.remember(`past ${map} ${layer}`, () => pastShares(this.past(map, layer), this.divisors(map, layer)));
  }

  /** How much of the node (row, position) is from every node below, and of every node above from it. */
  rollout(map, row, position) {
    return this.remember(`x ${map} ${row} ${position}`, () => {
      const steps = this.spec.layers.map((_, layer) => this.stepShares(map, layer));
      return rollout(steps, row, position, this.nTokens);
    });
  }

  /** The k strongest ways to each node of a row; whichever node is chosen, these are the same. */
  bestWays(map, row, k) {
    return this.remember(`ways ${map} ${row} ${k}`, () => {
      const layer = row - 1;
      const below = layer > 0 ? this.bestWays(map, layer, k).map((ways) => ways.map((way) => way.product)) : null;
      const best = below ?? Array(this.nTokens).fill([1]);
      const heads = this.heads(map).map((head) => ({ head, matrix: this.headsMatrix(map, layer, head) }));
      return bestWays(best, heads, this.pastShares(map, layer), this.divisors(map, layer), k);
    });
  }

  /** The k strongest paths from any token that enters the first layer to the node (row, position). */
  paths(map, row, position, k) {
    return walkBack(Array.from({ length: row }, (_, layer) => this.bestWays(map, layer + 1, k)), position);
  }

  /**
   * Gap of the column that a number belongs to, and whether it has converged; of a composition the larger of its two
   * parts', of what goes past the heads (`head` is "past") that of the mlp map. Null for sums over heads, of which each
   * has its own.
   */
  certainty(map, layer, head, column) {
    if (this.composes(map)) {
      if (head === "past") return this.certainty("mlp", layer, null, column);
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
