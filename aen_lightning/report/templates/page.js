"use strict";
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const figures = read("figure-data"), sets = read("feature-data");
const hash = new URLSearchParams(location.hash.slice(1));

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// one legend for all figures
for (const button of document.querySelectorAll("#legend button")) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", on);
    for (const figure of figures.filter((f) => !f.own_legend)) {
      const div = document.getElementById("plot-" + figure.id);
      const traces = div.data.flatMap((t, i) => (t.legendgroup === button.dataset.label ? [i] : []));
      if (traces.length) Plotly.restyle(div, { visible: on }, traces);
    }
  });
}

function sortTable(table, column, rows) {
  const headings = [...table.tHead.rows[0].cells];
  const down = headings[column].dataset.dir === "▲";
  headings.forEach((h) => delete h.dataset.dir);
  headings[column].dataset.dir = down ? "▼" : "▲";
  const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");  // what is not known stays at the end
    const order = isNaN(x) || isNaN(y) ? String(x).localeCompare(y) : x - y;
    return down ? -order : order;
  };
  rows.sort(compare).forEach((row) => row.parentNode.appendChild(row));
}
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((th, i) => th.addEventListener("click", () => sortTable(table, i, [...table.tBodies[0].rows])));
}

// features
const MOST_ROWS = +(hash.get("rows") ?? 200);
let current = null, order = { key: "density", down: true };
const format = (x) => (x === 0 ? "0" : Math.abs(x) >= 0.01 ? x.toPrecision(3) : x.toExponential(1));

const percent = (share) => (share >= 0.1 ? (100 * share).toFixed(0) : (100 * share).toPrecision(2));

function contextNode(context, max) {
  const node = make("span", "text");
  context.tokens.forEach((token, i) => {
    const act = context.acts[i];
    const span = make("span", act === null ? "out" : i === context.peak ? "peak" : "", token);
    if (act) span.style.background = `rgba(var(--mark), ${(0.75 * Math.min(1, Math.abs(act) / max)).toFixed(3)})`;
    span.title = act === null ? "left out: special token or outlier" : act ? `activation ${format(act)}` : "not active";
    node.appendChild(span);
  });
  return node;
}

function tokenList(title, pairs) {
  const div = make("div");
  div.appendChild(make("strong", "", title + " "));
  for (const [text, value] of pairs) {
    const token = make("span", "token text", text);
    token.appendChild(make("small", "", (value > 0 ? "+" : "") + value.toFixed(2)));
    div.appendChild(token);
  }
  return div;
}

function link(id, remark) {
  const span = make("span", "near"), a = make("a", "", String(id));
  a.href = permalink(id);
  span.append(a, make("small", "", remark));
  return span;
}

function permalink(id) {
  return `#feature-${id}` + (sets.indexOf(current) > 0 ? `&of=${encodeURIComponent(current.label)}` : "");
}

function histogram(title, { from, to, counts }) {
  const div = make("div"), ns = "http://www.w3.org/2000/svg", highest = Math.max(...counts);
  div.appendChild(make("strong", "", title));
  const svg = div.appendChild(document.createElementNS(ns, "svg"));
  svg.setAttribute("viewBox", `0 0 ${10 * counts.length} 60`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", "histogram");
  counts.forEach((count, i) => {
    if (!count) return;
    // by the logarithm: the tail is what one looks for, and it is thin
    const height = Math.max(1.5, 58 * Math.log1p(count) / Math.log1p(highest)), bar = svg.appendChild(document.createElementNS(ns, "rect"));
    const values = { x: 10 * i + 0.5, y: 60 - height, width: 9, height };
    for (const [key, value] of Object.entries(values)) bar.setAttribute(key, value);
    bar.appendChild(document.createElementNS(ns, "title")).textContent = `${count} from ${format(from + (to - from) * i / counts.length)}`;
  });
  const ends = div.appendChild(make("div", "ends small"));
  ends.append(make("span", "", format(from)), make("span", "", "number, logarithmic"), make("span", "", format(to)));
  return div;
}

function detail(feature) {
  const div = make("div", "detail");
  const pairs = div.appendChild(make("div", "pairs"));
  if (feature.promoted.length) {
    pairs.appendChild(tokenList("Promotes", feature.promoted));
    pairs.appendChild(tokenList("Suppresses", feature.suppressed));
  }
  const near = pairs.appendChild(make("div"));
  near.appendChild(make("strong", "", "Nearest features "));
  for (const [id, cosine] of feature.neighbours) near.append(link(id, `cosine ${cosine.toFixed(2)}`));
  if (feature.together.length) {
    const together = pairs.appendChild(make("div"));
    together.appendChild(make("strong", "", "Fires together with "));
    for (const [id, share] of feature.together) together.append(link(id, `on ${percent(share)} % of their tokens`));
  }
  const histograms = div.appendChild(make("div", "pairs"));
  histograms.append(...[["Activations where it fires", feature.acts], ["Effect on each output token", feature.logits]]
    .filter(([, counts]) => counts).map(([title, counts]) => histogram(title, counts)));
  for (const quantile of [null, ...new Set(feature.contexts.map((c) => c.quantile).filter((q) => q !== null))]) {
    const contexts = feature.contexts.filter((c) => c.quantile === quantile);
    if (!contexts.length) continue;
    const usual = quantile === 0.5 ? " (median)" : "";
    div.appendChild(make("strong", "", quantile === null ? "Where it is strongest"
      : `Where it is stronger than on ${Math.round(100 * quantile)} % of the tokens on which it fires${usual}`));
    for (const context of contexts) {
      const block = div.appendChild(make("div", "context"));
      block.appendChild(make("small", "", `activation ${format(context.acts[context.peak])}`));
      block.appendChild(contextNode(context, feature.max));
    }
  }
  return div;
}

function toggle(row, feature, name = true) {
  if (row.nextSibling && row.nextSibling.classList.contains("open")) return row.nextSibling.remove();
  const open = make("tr", "open"), cell = open.appendChild(make("td"));
  cell.colSpan = [...document.querySelectorAll("#feature-table th")].filter((th) => th.offsetParent).length;
  cell.appendChild(detail(feature));
  row.after(open);
  if (name) history.replaceState(null, "", permalink(feature.id));
}

function haystack(feature) {
  feature.text ??= [...feature.promoted, ...feature.suppressed].map((p) => p[0]).concat(feature.contexts.map((c) => c.tokens.join(""))).join("\n").toLowerCase();
  return feature.text;
}

function draw() {
  const query = document.getElementById("query").value, id = query.match(/^\s*#?(\d+)\s*$/);
  let found = current.features.filter((f) => haystack(f).includes(query.toLowerCase()));
  if (id) {
    const exact = current.features.filter((f) => f.id === +id[1]);
    if (exact.length || query.includes("#")) found = exact;
  }
  found.sort((a, b) => (order.down ? -1 : 1) * (a[order.key] - b[order.key]));
  document.getElementById("found").textContent = `${found.length} of ${current.features.length} features`
    + (found.length > MOST_ROWS ? `; the first ${MOST_ROWS} are listed` : "")
    + (id && !found.length ? `: feature ${id[1]} is not on this page; aen report ... --feature_ids ${id[1]} makes one with it` : "");
  const rows = found.slice(0, MOST_ROWS).map((feature) => {
    const row = make("tr", "row"), first = feature.contexts[0];
    row.tabIndex = 0;
    row.id = `feature-${feature.id}`;
    const cells = [feature.id, `${percent(feature.density)} %`, format(feature.mean), format(feature.max)];
    cells.forEach((text) => row.appendChild(make("td", "", text)));
    const text = row.appendChild(make("td"));
    if (first) {
      const begin = Math.max(0, first.peak - 6);
      text.appendChild(contextNode({ tokens: first.tokens.slice(begin), acts: first.acts.slice(begin), peak: first.peak - begin }, feature.max));
    }
    row.appendChild(make("td", "text", feature.promoted.slice(0, 4).map((p) => p[0]).join(" ·")));
    row.addEventListener("click", () => toggle(row, feature));
    row.addEventListener("keydown", (e) => { if (e.key === "Enter") toggle(row, feature); });
    return row;
  });
  document.querySelector("#feature-table tbody").replaceChildren(...rows);
  if (found.length === 1) toggle(rows[0], found[0], Boolean(query)); // unasked, the page stays at its top
}

// #feature-123 shows one feature, #feature-123&of=LABEL of another dictionary than the first
function follow() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  const wanted = [...parameters.keys()].map((key) => key.match(/^feature-(\d+)$/)).find((m) => m);
  if (!wanted) return;
  const index = Math.max(0, sets.findIndex((s) => s.label === parameters.get("of")));
  document.getElementById("which").value = index;
  document.getElementById("query").value = `#${wanted[1]}`;
  choose(index);
  document.getElementById("features").scrollIntoView();
}

function choose(index) {
  current = sets[index];
  document.getElementById("feature-note").textContent = current.note;
  draw();
}

if (sets.length) {
  const select = document.getElementById("which");
  sets.forEach((s, i) => select.add(new Option(s.label, i)));
  select.hidden = sets.length < 2;
  select.addEventListener("change", () => choose(+select.value));
  document.getElementById("query").addEventListener("input", draw);
  for (const th of document.querySelectorAll("#feature-table th[data-key]")) {
    th.addEventListener("click", () => {
      order = { key: th.dataset.key, down: order.key === th.dataset.key ? !order.down : true };
      document.querySelectorAll("#feature-table th").forEach((h) => delete h.dataset.dir);
      th.dataset.dir = order.down ? "▼" : "▲";
      draw();
    });
  }
  document.getElementById("query").value = hash.get("q") ?? "";
  choose(0);
  follow();
  addEventListener("hashchange", follow);
  for (let i = 0; i < +(hash.get("open") ?? 0); i++) {
    const row = document.querySelectorAll("#feature-table tr.row")[i];
    if (row) row.click();
  }
}

// #only=ID shows one card, for pictures
if (hash.get("only")) {
  document.body.classList.add("only");
  document.getElementById(hash.get("only")).classList.add("chosen");
}

const config = {
  responsive: true, displaylogo: false, toImageButtonOptions: { scale: 2 }, displayModeBar: hash.get("only") ? false : "hover",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};
// on a narrow screen letters are smaller, and a figure of several columns scrolls in its card
function fit(figure) {
  if (document.documentElement.clientWidth > 600) return;
  const axes = Object.entries(figure.figure.layout).filter(([key]) => /^[xy]axis\d*$/.test(key)).map(([, axis]) => axis);
  for (const axis of axes) if (axis.title) axis.title.font = { ...axis.title.font, size: 10 };
  const columns = new Set(axes.filter((axis) => axis.domain && axis.anchor?.startsWith("y")).map((axis) => axis.domain[0])).size;
  if (columns > 1) document.getElementById("plot-" + figure.id).style.minWidth = `${290 * columns}px`;
}
const shown = figures.filter((f) => !hash.get("only") || hash.get("only") === f.id);
shown.forEach(fit);
Promise.all(shown.map((f) => Plotly.newPlot("plot-" + f.id, f.figure.data, f.figure.layout, config))).then(() => {
  // for pictures: how high the page is, and each card
  const height = (node) => Math.ceil(node.getBoundingClientRect().height);
  const cards = [...document.querySelectorAll(".card[id]")].map((card) => [card.id, height(card)]);
  document.documentElement.dataset.heights = JSON.stringify({ page: height(document.body), legend: height(document.getElementById("legend")), ...Object.fromEntries(cards) });
});
