// Flow across layers: shares of each step multiplied along the way, and the strongest paths. Needs a chained View.

// As in compose.py: a sum nearly cancels where its terms are this many times larger.
const CANCELS = 10;

/**
 * What reaches each token in one step, and whether that is nothing beyond rounding: `total` and `rests` [destination];
 * and in how many columns it nearly cancels.
 */
function stepTotals(view, map, layer) {
  return view.remember(`totals ${map} ${layer}`, () => {
    const n = view.nTokens;
    const total = map in view.spec.arrays ? view.sums(map, layer) : columnSums(view.matrix(map, layer), n);
    const size = new Float64Array(n);
    const past = view.past(map, layer);
    if (past) past.forEach((value, c) => (size[c] += Math.abs(value)));
    const heads = view.heads(map);
    for (const head of heads) {
      columnSums(view.headsMatrix(map, layer, head), n, true).forEach((value, c) => (size[c] += value));
    }
    const rounding = EPS32 * heads.length * n * size.reduce((a, b) => Math.max(a, b), 0);
    const rests = Array.from(total, (value) => Math.abs(value) <= rounding);
    const cancels = rests.filter((rest, c) => !rest && size[c] > CANCELS * Math.abs(total[c])).length;
    return { total, rests, cancels };
  });
}

/** Shares [source, destination] of one step, of one head or all; a token that nothing moves keeps what it has. */
function stepShares(view, map, layer, head = null) {
  return view.remember(`shares ${map} ${layer} ${head}`, () => {
    const n = view.nTokens;
    const { total, rests } = stepTotals(view, map, layer);
    const shown = view.matrix(map, layer, head);
    const result = new Float64Array(n * n);
    for (let i = 0; i < result.length; i++) {
      const c = i % n;
      if (!rests[c]) result[i] = shown[i] / total[c];
    }
    if (head === null) rests.forEach((rest, c) => rest && (result[c * n + c] = 1));
    return result;
  });
}

/** What goes past the heads, as a share of the step: [destination]. */
function pastShares(view, map, layer) {
  return view.remember(`past ${map} ${layer}`, () => {
    const { total, rests } = stepTotals(view, map, layer);
    const past = view.past(map, layer);
    return Float64Array.from(total, (sum, c) => (rests[c] ? 1 : past ? past[c] / sum : 0));
  });
}

/**
 * How much of the node (row, position) is whose, in every row below, and how much of every node above is its own.
 * Row r is what enters layer r; the last row is what leaves the last layer.
 */
function rolloutOf(view, map, row, position) {
  const n = view.nTokens;
  const rows = Array.from({ length: view.nLayers + 1 }, () => new Float64Array(n));
  rows[row][position] = 1;
  for (let layer = row - 1; layer >= 0; layer--) {
    const shares = stepShares(view, map, layer);
    for (let i = 0; i < n; i++) {
      let sum = 0;
      for (let j = 0; j < n; j++) sum += shares[i * n + j] * rows[layer + 1][j];
      rows[layer][i] = sum;
    }
  }
  for (let layer = row; layer < view.nLayers; layer++) {
    const shares = stepShares(view, map, layer);
    for (let i = 0; i < n; i++) {
      const here = rows[layer][i];
      if (here !== 0) for (let j = 0; j < n; j++) rows[layer + 1][j] += here * shares[i * n + j];
    }
  }
  return rows;
}

/** The k strongest paths from any token that enters the first layer to the node (row, position), by exact search. */
function strongestPaths(view, map, row, position, k) {
  if (row === 0) return [];
  return bestWays(view, map, row, k)[position].map((last) => {
    const steps = [];
    let here = position;
    for (let layer = row - 1, way = last; layer >= 0; layer--) {
      steps.push({ layer, head: way.head, src: way.src, dst: here, share: way.share });
      here = way.src;
      if (layer > 0) way = bestWays(view, map, layer, k)[here][way.way];
    }
    return { weight: last.product, steps: steps.reverse() };
  });
}

/**
 * For each node of a row its k strongest ways from below, strongest first, with their last edge and the number of the
 * way (among those of the edge's source) that it prolongs. Whichever node is chosen, these are the same.
 * The k best ways into a node pass through at most k of its edges: those whose best way is strongest.
 */
function bestWays(view, map, row, k) {
  return view.remember(`ways ${map} ${row} ${k}`, () => {
    const n = view.nTokens;
    const below = row > 1 ? bestWays(view, map, row - 1, k).map((ways) => ways.map((way) => way.product)) : null;
    const best = Array.from({ length: n }, (_, i) => (below ? below[i] : [1]));
    return strongestEdges(view, map, row - 1, best, k).map((into) => {
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

/** For each destination the k edges of a layer whose share times the best way to their source is largest. */
function strongestEdges(view, map, layer, best, k) {
  const n = view.nTokens;
  const { total, rests } = stepTotals(view, map, layer);
  const inverse = Float64Array.from(total, (sum, c) => (rests[c] ? 0 : 1 / sum));
  const found = Array.from({ length: n }, () => new Strongest(k));
  const floors = new Float64Array(n); // beside the heaps, where the innermost loop finds them at once
  for (const head of view.heads(map)) {
    const matrix = view.headsMatrix(map, layer, head);
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
  pastShares(view, map, layer).forEach((share, j) => {
    const size = best[j].length ? Math.abs(share * best[j][0]) : 0;
    if (size > found[j].floor) found[j].add(size, { head: -1, src: j, share });
  });
  return found;
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
