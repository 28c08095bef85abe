// The page's mathematics: that of flow/compose.py, and of `Flow.shares`, for one layer at a time. Functions of numbers
// and arrays alone; each names what it stands for there. What decides a number (which rule conserves, when a sum is
// rounding or nearly cancels) comes with the page from Python; tests/test_browser_compose.py holds the numbers against
// Python's.
//
// A matrix is [source, column] in one array. Edges are float32, as the Flow is; sums and shares of steps are float64.

// Columns.

/** `.sum(-2)`, or `.abs().sum(-2)`. */
function columnSums(matrix, nColumns, absolute = false) {
  const sums = new Float64Array(nColumns);
  for (let i = 0, c = 0; i < matrix.length; i++) {
    sums[c] += absolute ? Math.abs(matrix[i]) : matrix[i];
    if (++c === nColumns) c = 0;
  }
  return sums;
}

/** Sums of the columns of several matrices together: `total` and `size` of `compose.shares`. */
function addedColumns(terms, nColumns, absolute = false) {
  const sums = new Float64Array(nColumns);
  for (const term of terms) columnSums(term, nColumns, absolute).forEach((sum, c) => (sums[c] += sum));
  return sums;
}

function largestSize(values) {
  let largest = 0;
  for (let i = 0; i < values.length; i++) {
    const size = Math.abs(values[i]);
    if (size > largest) largest = size;
  }
  return largest;
}

/**
 * What columns are divided by: their sums, 0 where these are `rounding` at most. Those are `vanishing` in `Flow.shares`
 * and `rests` in `compose.shares`.
 */
function divisorsOf(sums, rounding) {
  return sums.map((sum) => (Math.abs(sum) <= rounding ? 0 : sum));
}

/** `Flow.shares`: columns divided by their sums, zeros where nothing is to be shared. */
function divided(matrix, divisors, result = new Float32Array(matrix.length)) {
  for (let i = 0, c = 0; i < matrix.length; i++) {
    if (divisors[c] !== 0) result[i] = matrix[i] / divisors[c];
    if (++c === divisors.length) c = 0;
  }
  return result;
}

/** `_warn_of_cancelling`: how many sums have terms more than `cancels` times as large. What rests is no sum. */
function nearlyCancelling(sizes, divisors, cancels) {
  return sizes.filter((size, c) => divisors[c] !== 0 && size / Math.abs(divisors[c]) > cancels).length;
}

// Within a block.

/** `compose.edges` of one head by a rule that multiplies. */
function productEdges(attn, mlp) {
  const edges = new Float32Array(attn.length);
  for (let i = 0, c = 0; i < attn.length; i++) {
    edges[i] = attn[i] * mlp[c];
    if (++c === mlp.length) c = 0;
  }
  return edges;
}

/**
 * `compose.edges` of one head by a rule that conserves: shares of each column of the attn map, times what the mlp map
 * says of the head. A head that rests on its path leaves that with the destination itself.
 */
function conservingEdges(attn, divisors, mlp, destinations) {
  const edges = new Float32Array(attn.length);
  for (let i = 0, c = 0; i < attn.length; i++) {
    if (divisors[c] !== 0) edges[i] = (attn[i] / divisors[c]) * mlp[c];
    if (++c === mlp.length) c = 0;
  }
  divisors.forEach((divisor, c) => {
    if (divisor === 0) edges[destinations[c] * mlp.length + c] += mlp[c];
  });
  return edges;
}

/** `.sum(1)`: heads added up. */
function addedUp(matrices) {
  const sum = new Float64Array(matrices[0].length);
  for (const matrix of matrices) for (let i = 0; i < sum.length; i++) sum[i] += matrix[i];
  return new Float32Array(sum);
}

/** `_composed`: what goes past the heads stays with each destination. */
function withPast(heads, past, destinations) {
  const result = heads.slice();
  destinations.forEach((position, c) => (result[position * destinations.length + c] += past[c]));
  return result;
}

// Across blocks: every position is a destination, so that columns are positions.

/** `compose.shares` of heads, or of `all` edges of a step; a destination that nothing moves keeps what it has. */
function stepShares(matrix, divisors, all) {
  const result = divided(matrix, divisors, new Float64Array(matrix.length));
  if (all) divisors.forEach((divisor, c) => divisor === 0 && (result[c * divisors.length + c] = 1));
  return result;
}

/** `compose.shares` of what goes past the heads; `past` is null by a rule that has no such thing. */
function pastShares(past, divisors) {
  return divisors.map((divisor, c) => (divisor === 0 ? 1 : past ? past[c] / divisor : 0));
}

/**
 * `compose.rollout` of one node: how much of the node (row, position) is whose, in every row below, and how much of
 * every node above is its own. Row r is what enters layer r; the last row is what leaves the last layer. Below, row r
 * is a column of the rollout from layer r; above, a row of that up to it.
 */
function rollout(steps, row, position, n) {
  const rows = Array.from({ length: steps.length + 1 }, () => new Float64Array(n));
  rows[row][position] = 1;
  for (let layer = row - 1; layer >= 0; layer--) {
    const shares = steps[layer];
    for (let i = 0; i < n; i++) {
      let sum = 0;
      for (let j = 0; j < n; j++) sum += shares[i * n + j] * rows[layer + 1][j];
      rows[layer][i] = sum;
    }
  }
  for (let layer = row; layer < steps.length; layer++) {
    const shares = steps[layer];
    for (let i = 0; i < n; i++) {
      const here = rows[layer][i];
      if (here !== 0) for (let j = 0; j < n; j++) rows[layer + 1][j] += here * shares[i * n + j];
    }
  }
  return rows;
}

/**
 * One layer of `compose.paths`: for each destination its k strongest ways, strongest first, with their last edge and
 * the number of the way (among those of the edge's source, whose weights are `best`) that it prolongs. Python looks at
 * all options; the k best ways into a node pass through at most k of its edges: those whose best way is strongest.
 */
function bestWays(best, heads, past, divisors, k) {
  return strongestEdges(best, heads, past, divisors, k).map((into) => {
    const ways = new Strongest(k);
    for (const edge of into.sorted()) {
      best[edge.src].forEach((weight, way) => {
        const product = edge.share * weight;
        const size = Math.abs(product);
        if (size > ways.floor) ways.add(size, { ...edge, way, product });
      });
    }
    return ways.sorted();
  });
}

/** For each destination the k edges of a layer whose share times the best way to their source is largest. */
function strongestEdges(best, heads, past, divisors, k) {
  const n = best.length;
  const inverse = divisors.map((divisor) => (divisor === 0 ? 0 : 1 / divisor));
  const found = Array.from({ length: n }, () => new Strongest(k));
  const floors = new Float64Array(n); // beside the heaps, where the innermost loop finds them at once
  for (const { head, matrix } of heads) {
    for (let src = 0; src < n; src++) {
      if (!best[src].length) continue;
      const way = Math.abs(best[src][0]);
      for (let j = 0, at = src * n; j < n; j++, at++) {
        const share = matrix[at] * inverse[j];
        const size = Math.abs(share) * way;
        if (size > floors[j]) {
          found[j].add(size, { head, src, share });
          floors[j] = found[j].floor;
        }
      }
    }
  }
  past.forEach((share, j) => {
    const size = best[j].length ? Math.abs(share * best[j][0]) : 0;
    if (size > found[j].floor) found[j].add(size, { head: -1, src: j, share });
  });
  return found;
}

/** `_walk_back` from a position: its best ways as paths; `ways` are the best ways into each row from the second on. */
function walkBack(ways, position) {
  const top = ways.length - 1;
  if (top < 0) return [];
  return ways[top][position].map((last) => {
    const steps = [];
    let here = position;
    for (let layer = top, way = last; layer >= 0; layer--) {
      steps.push({ layer, head: way.head, src: way.src, dst: here, share: way.share });
      here = way.src;
      if (layer > 0) way = ways[layer - 1][here][way.way];
    }
    return { weight: last.product, steps: steps.reverse() };
  });
}

/** Steps of all paths, each once: with the numbers of the paths that take it, and their weights added up. */
function stepsOf(paths) {
  const steps = new Map();
  paths.forEach((path, number) => {
    for (const step of path.steps) {
      const key = `${step.layer} ${step.head} ${step.src} ${step.dst}`;
      if (!steps.has(key)) steps.set(key, { ...step, weight: 0, paths: [] });
      const one = steps.get(key);
      one.weight += path.weight;
      one.paths.push(number);
    }
  });
  return Array.from(steps.values());
}

/** Keeps the `limit` items of largest size that were added; what is not above `floor` would not be kept. */
class Strongest {
  constructor(limit) {
    this.limit = limit;
    this.floor = 0;
    this.items = []; // a heap, smallest first
  }

  add(size, item) {
    const items = this.items;
    if (items.length < this.limit) {
      items.push({ size, item });
      for (let at = items.length - 1; at > 0; ) {
        const above = (at - 1) >> 1;
        if (items[above].size <= items[at].size) break;
        [items[above], items[at]] = [items[at], items[above]];
        at = above;
      }
    } else if (size > this.floor) {
      items[0] = { size, item };
      for (let at = 0; ; ) {
        let least = at;
        for (const child of [2 * at + 1, 2 * at + 2]) {
          if (child < items.length && items[child].size < items[least].size) least = child;
        }
        if (least === at) break;
        [items[least], items[at]] = [items[at], items[least]];
        at = least;
      }
    }
    if (items.length === this.limit) this.floor = items[0].size;
  }

  sorted() {
    return this.items
      .slice()
      .sort((a, b) => b.size - a.size)
      .map((entry) => entry.item);
  }
}
