// The table of edges: of the chosen node, or of the current layer; sortable, and to be copied as CSV.

// Kept, and written as CSV: of a node all but those of the largest Flows, of a block the strongest.
const MOST_ROWS = { node: 4000, block: 300 };
const SHOWN_ROWS = 60;
const HEAD_NAMES = { past: "skip and bias", all: "all heads" };
const COLUMNS = [
  ["layer", "block", (r) => r.layer],
  ["head", "head", (r) => r.head],
  ["src", "source", (r) => r.src],
  ["dst", "destination", (r) => r.dst],
  ["value", "value", (r) => r.value],
  ["size", "size", (r) => Math.abs(r.value)],
  ["share", "share", (r) => (r.share === r.share ? r.share : 0)],
  ["gap", "gap", (r) => r.gap ?? -1],
];

/** Edges that the table lists, strongest first, and how many there are in all. */
function tableRows(view, state, scene) {
  const rows = rowsOf(view);
  const kept = new Strongest(state.node ? MOST_ROWS.node : MOST_ROWS.block);
  let all = 0;
  view.spec.layers.forEach((number, layer) => {
    const into = state.node && rows.high[layer] === state.node.row ? state.node.pos : null;
    const outOf = state.node && rows.low[layer] === state.node.row ? state.node.pos : null;
    if (state.node ? into === null && outOf === null : layer !== state.layer) return;
    const consider = (head, src, c, value, divisor) => {
      const dst = view.destinations[c];
      if (value === 0 || !scene.visible[src] || !scene.visible[dst]) return;
      if (state.node && dst !== into && src !== outOf) return;
      all++;
      const size = Math.abs(value);
      if (size <= kept.floor) return;
      kept.add(size, { at: layer, layer: number, head, src, dst, c, value, share: divisor === 0 ? NaN : value / divisor });
    };
    const alone = headIn(view, state, layer);
    if (state.head !== null && alone === null) return; // a head alone is one of the block that is shown
    for (const head of alone === null ? view.heads(state.map) : [alone]) {
      const matrix = view.headsMatrix(state.map, layer, head);
      const divisors = view.divisors(state.map, layer, head);
      const n = view.nColumns;
      for (let c = 0; c < n; c++) {
        const dst = view.destinations[c];
        if (state.node && dst !== into && outOf === null) continue;
        if (state.node && dst !== into) {
          consider(head ?? "all", outOf, c, matrix[outOf * n + c], divisors[c]);
        } else {
          for (let src = 0; src < view.nTokens; src++) consider(head ?? "all", src, c, matrix[src * n + c], divisors[c]);
        }
      }
    }
    const past = alone === null ? view.past(state.map, layer) : null;
    if (past) {
      const divisors = view.divisors(state.map, layer);
      past.forEach((value, c) => consider("past", view.destinations[c], c, value, divisors[c]));
    }
  });
  const found = kept.sorted().map(({ at, c, ...row }) => {
    const certain = view.certainty(state.map, at, row.head === "all" ? null : row.head, c);
    return { ...row, gap: certain?.gap, converged: certain?.converged };
  });
  return { rows: found, all };
}

function sortRows(rows, key, down) {
  const [, , value] = COLUMNS.find(([name]) => name === key);
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (typeof x === typeof y) return x < y ? -1 : x > y ? 1 : 0;
    return typeof x === "number" ? -1 : 1; // heads before what goes past them
  };
  return rows.slice().sort((a, b) => (down ? -order(a, b) : order(a, b)));
}

function fillTable(table, view, rows, state, sortBy) {
  const head = table.tHead.rows[0];
  const focused = head.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  head.replaceChildren(
    ...COLUMNS.filter(([key]) => key !== "size").map(([key, label]) => {
      const cell = document.createElement("th");
      const button = document.createElement("button");
      const on = state.sort === key || (key === "value" && state.sort === "size");
      cell.scope = "col";
      cell.ariaSort = on ? (state.down ? "descending" : "ascending") : "none";
      button.textContent = label + (on ? (state.down ? " ↓" : " ↑") : "") + (key === "value" && state.sort === "size" ? " (by size)" : "");
      button.dataset.key = key;
      button.addEventListener("click", () => sortBy(key));
      cell.append(button);
      return cell;
    })
  );
  if (focused) head.querySelector(`[data-key="${focused}"]`)?.focus();
  const name = (i) => `${view.sample.tokens[i].shown} ${i}`;
  const body = document.createDocumentFragment();
  for (const row of sortRows(rows, state.sort, state.down).slice(0, SHOWN_ROWS)) {
    const line = document.createElement("tr");
    const cells = [row.layer, HEAD_NAMES[row.head] ?? row.head, name(row.src), name(row.dst), exact(view, row.value), percent(row.share), gapText(row)];
    const shown = state.scale === "share" ? row.share : row.value; // as the picture has it
    cells.forEach((text, i) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      if (i === (state.scale === "share" ? 5 : 4) && shown === shown) cell.className = shown < 0 ? "negative" : "positive";
      if (i === 6 && row.converged === false) cell.className = "open";
      line.append(cell);
    });
    line.dataset.value = row.value;
    body.append(line);
  }
  table.tBodies[0].replaceChildren(body);
}

/** A number with as many digits as are known: three of half-precision numbers, five of others. */
function exact(view, value) {
  if (value === 0) return "0";
  const digits = view.spec.half ? 3 : 5;
  const text = Math.abs(value) >= 1e5 || Math.abs(value) < 1e-4 ? value.toExponential(digits - 1) : value.toPrecision(digits);
  return (value > 0 ? "+" : "") + text.replace("-", "−");
}

function percent(share) {
  if (share !== share) return "–"; // of nothing
  const size = Math.abs(share) * 100;
  const text = size >= 10 ? size.toFixed(0) : size >= 0.1 || size === 0 ? size.toFixed(1) : size >= 1e-4 ? size.toPrecision(1) : size.toExponential(0);
  return `${share < 0 ? "−" : ""}${text}%`;
}

function gapText(row) {
  if (row.gap === undefined) return "–";
  return row.gap.toExponential(0) + (row.converged ? "" : " !");
}

/** Comma-separated values; text cells are quoted, and cannot begin a formula in a spreadsheet. */
function csvOf(view, rows, state) {
  const quote = (text) => `"${(/^[=+\-@\t\r]/.test(text) ? `'${text}` : text).replace(/"/g, '""')}"`;
  const token = (i) => quote(view.sample.tokens[i].text);
  const lines = sortRows(rows, state.sort, state.down).map((row) =>
    [row.layer, row.head, row.src, token(row.src), row.dst, token(row.dst), row.value, row.share === row.share ? row.share : "", row.gap ?? "", row.converged ?? ""].join(",")
  );
  return ["layer,head,src,src_token,dst,dst_token,value,share,gap,converged", ...lines].join("\n") + "\n";
}
