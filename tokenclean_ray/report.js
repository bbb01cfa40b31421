"use strict";
// The report's page: reads the JSON in #data and draws it. Text reaches the page as textContent only.
const data = JSON.parse(document.getElementById("data").textContent);
const KEPT = "#2a9d80", DROPPED = "#d9534a", PAGE = 10;
const count = (n) => n.toLocaleString("en");
const percent = (part, whole) => (whole ? ((100 * part) / whole).toFixed(1) + " %" : "–");
const figure = (x) => (x === null || x === undefined ? "–" : String(Number(x.toPrecision(4))));
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null)); // strings become text nodes
  return element;
}

function card(title, caption, ...content) {
  const id = title.toLowerCase().replace(/[^a-z]+/g, "-");
  const section = make("section", { class: "card", id, "aria-label": title }, make("h2", {}, title), make("p", { class: "soft" }, caption), ...content);
  byId("cards").append(section);
  return section;
}

function table(columns, rows) {
  const head = make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)));
  const body = rows.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, cell instanceof Node ? cell : make("bdi", {}, String(cell))))));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": columns.join(", ") }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

function chart(description, spec) {
  const place = make("div", { class: "chart" });
  const full = {
    width: "container", autosize: { type: "fit-x", contains: "padding" }, background: null, description,
    config: { view: { stroke: null }, axis: { labelLimit: 150, titleFontWeight: "normal" }, legend: { orient: "top", title: null } },
    ...spec,
  };
  // ast: expressions are interpreted, since the page's policy allows no eval
  requestAnimationFrame(() => vegaEmbed(place, full, { renderer: "svg", actions: false, ast: true, defaultStyle: false, tooltip: { disableDefaultStyle: true } }));
  return make("figure", {}, place);
}

const { sample } = data;
const sampled = sample.parts === sample.of_parts ? `Of all ${count(sample.response_tokens)} answer tokens.`
  : `From a sample of ${count(sample.response_tokens)} answer tokens (${count(sample.parts)} of ${count(sample.of_parts)} parts).`;
const scale = { domain: ["kept", "dropped"], range: [KEPT, DROPPED] };

function header() {
  const { select, models, counts } = data;
  byId("run").textContent = data.run;
  document.title = `Token cleaning: ${data.run}`;
  const names = Object.entries(models).map(([role, path]) => `${role} ${path}`).join(", ");
  byId("what").append(make("bdi", {}, `${select.scorer}, ${select.scope}, keep ratio ${select.keep_ratio}; ${names}. Masked dataset: ${data.result}`));
  const tiles = [
    [count(counts.rows), "rows in"], [count(counts.masked), "rows out"], [count(counts.nothing_kept), "rows with nothing kept"],
    [count(counts.rejected), "rows rejected"], ...(counts.warmup ? [[count(counts.warmup), "rows not selected from"]] : []),
    [count(counts.tokens), "tokens in"], [count(counts.selected), "answer tokens judged"],
    [count(counts.kept), `kept, ${percent(counts.kept, counts.selected)}`, "kept"], [count(counts.dropped), `dropped, ${percent(counts.dropped, counts.selected)}`, "dropped"],
  ];
  byId("tiles").append(...tiles.map(([value, label, kind]) => make("div", { class: `tile ${kind || ""}` }, make("b", {}, value), make("span", {}, label))));
}

function rejected() {
  const { counts } = data;
  if (counts.rejected) card("Rejected rows", `${percent(counts.rejected, counts.rows)} of the rows could not be used; they are in rejected/, with file and line.`, table(["reason", "rows"], counts.reasons.map((r) => [r.reason, count(r.rows)])));
}

function scores() {
  const { bins, ruled_out } = data.scores;
  if (!bins.length) return;
  const values = bins.flatMap((bin) => ["kept", "dropped"].map((fate) => ({ ...bin, fate, tokens: bin[fate] })));
  const cuts = data.cuts.map((cut) => ({ ...cut, label: cut.round ? `cut of round ${cut.round}` : "cut" }));
  const caption = `${sampled} ${cuts.length ? `The cut: ${cuts.map((c) => (c.round ? `round ${c.round}: ` : "") + c.score.toPrecision(6)).join(", ")}; ${count(data.counts.near)} tokens lie within ${data.near} of it.` : "Each row has its own cut."} The end bins hold what lies beyond.${ruled_out ? ` ${count(ruled_out)} tokens are ruled out and not shown.` : ""}`;
  card("Scores and the cut", caption, chart("Histogram of the scores, kept and dropped tokens", {
    height: 240,
    layer: [
      { data: { values }, mark: "bar", encoding: {
        x: { field: "low", type: "quantitative", bin: { binned: true }, title: `score (${data.select.scorer})` }, x2: { field: "high" },
        y: { field: "tokens", type: "quantitative", title: "tokens" }, color: { field: "fate", type: "nominal", scale },
        tooltip: ["fate", "tokens", "low", "high"].map((field) => ({ field, type: field === "fate" ? "nominal" : "quantitative" })) } },
      { data: { values: cuts }, mark: { type: "rule", color: "#7a6ad8", size: 2, strokeDash: [5, 3] }, encoding: { x: { field: "score", type: "quantitative" }, tooltip: [{ field: "label", type: "nominal" }, { field: "score", type: "quantitative" }] } },
    ],
  }));
}

function losses() {
  if (!data.losses.length) return;
  const step = data.losses[0].step;
  const values = data.losses.map((cell) => ({ ...cell, base2: cell.base + step, reference2: cell.reference + step }));
  const top = Math.max(...values.map((cell) => Math.max(cell.base2, cell.reference2)));
  const cut = data.select.scorer === "excess_loss" && data.cuts.length ? data.cuts[data.cuts.length - 1].score : null;
  const ends = cut === null ? [] : [Math.max(0, cut), Math.min(top, top + cut)].map((base) => ({ base, reference: base - cut }));
  card("Base against reference loss", `${sampled} Each cell: green where its tokens were kept, red where dropped, the denser the more tokens.${ends.length ? " Below the line: kept." : ""}`, chart("Tokens by the loss under base and reference, and the share kept", {
    height: 300,
    layer: [
      { data: { values }, mark: "rect", encoding: {
        x: { field: "base", type: "quantitative", title: "loss under the base (nats)" }, x2: { field: "base2" },
        y: { field: "reference", type: "quantitative", title: "loss under the reference (nats)" }, y2: { field: "reference2" },
        color: { field: "share", type: "quantitative", scale: { domain: [0, 1], range: [DROPPED, "#c9b458", KEPT] }, legend: { title: "kept share", format: ".0%", values: [0, 0.5, 1] } },
        opacity: { field: "tokens", type: "quantitative", scale: { type: "log", range: [0.25, 1] }, legend: null },
        tooltip: [{ field: "tokens", type: "quantitative" }, { field: "share", type: "quantitative", format: ".1%" }, { field: "base", type: "quantitative" }, { field: "reference", type: "quantitative" }] } },
      { data: { values: ends }, mark: { type: "line", color: "#7a6ad8", strokeDash: [5, 3] }, encoding: { x: { field: "base", type: "quantitative" }, y: { field: "reference", type: "quantitative" } } },
    ],
  }));
}

function shares(title, caption, groups, name, horizontal) {
  if (!groups.length) return;
  const values = groups.map((group) => ({ ...group, share: group.kept / group.tokens }));
  const all = data.counts.kept / data.counts.selected;
  const category = { field: "name", type: "nominal", sort: null, title: horizontal ? null : name, axis: { labelAngle: 0, labelLimit: 130, labelOverlap: !horizontal } };
  const share = { field: "share", type: "quantitative", title: "kept share", scale: { domain: [0, 1] }, axis: { format: "%" } };
  const tooltip = [{ field: "name", type: "nominal" }, { field: "share", type: "quantitative", format: ".1%" }, { field: "tokens", type: "quantitative", format: "," }];
  card(title, caption, chart(`${title}, bars`, {
    height: horizontal ? 22 * values.length : 200,
    layer: [
      { data: { values }, mark: { type: "bar", color: KEPT }, encoding: { [horizontal ? "y" : "x"]: category, [horizontal ? "x" : "y"]: share, tooltip } },
      { data: { values: [{ all }] }, mark: { type: "rule", color: "#7a6ad8", strokeDash: [5, 3], size: 2 }, encoding: { [horizontal ? "x" : "y"]: { field: "all", type: "quantitative" }, tooltip: [{ field: "all", type: "quantitative", format: ".1%", title: "all" }] } },
    ],
  }), make("details", {}, make("summary", {}, "Table"), table([name, "tokens", "kept", "share"], groups.map((g) => [g.name, count(g.tokens), count(g.kept), percent(g.kept, g.tokens)]))));
}

function tokens() {
  for (const [kind, title] of [["kept", "Tokens most often kept"], ["dropped", "Tokens most often dropped"]]) {
    const rows = data.tokens[kind];
    if (rows.length) card(title, `${sampled} Beyond what chance explains, given how often a token is seen.`, table(["token", "seen", "kept", "mean score"], rows.map((t) => [make("code", {}, make("bdi", {}, JSON.stringify(t.token))), count(t.seen), percent(t.kept, t.seen), figure(t.score)])));
  }
}

function rounds() {
  if (!data.rounds.length) return;
  const held = (outcome) => (outcome.held_out ? `${outcome.held_out.loss.toFixed(4)} ± ${outcome.held_out.standard_error.toFixed(4)}` : "–");
  const rows = data.rounds.map((r) => [`${r.plan} ${r.round}`, held(r), percent(r.kept_share, 1), figure(r.threshold), r.agreement == null ? "–" : percent(r.agreement, 1), count(r.tokens_trained), r.accepted ? "yes" : "no"]);
  const content = [table(["round", "held-out loss", "kept", "cut", "agreement", "tokens trained", "accepted"], rows)];
  const values = data.rounds.filter((r) => r.held_out).map((r) => ({ plan: r.plan, round: r.round, loss: r.held_out.loss, low: r.held_out.loss - r.held_out.standard_error, high: r.held_out.loss + r.held_out.standard_error }));
  if (values.length) {
    const x = { field: "round", type: "ordinal", title: "round", axis: { labelAngle: 0 } }, color = { field: "plan", type: "nominal" };
    content.push(chart("Held-out loss by round, with standard errors", { height: 220, data: { values }, layer: [
      { mark: { type: "line", point: true }, encoding: { x, color, y: { field: "loss", type: "quantitative", title: "held-out loss (nats)", scale: { zero: false } }, tooltip: ["plan", "round", "loss"].map((field) => ({ field, type: field === "loss" ? "quantitative" : "nominal" })) } },
      { mark: { type: "rule" }, encoding: { x, color, y: { field: "low", type: "quantitative" }, y2: { field: "high" } } },
    ] }));
  }
  const points = data.curves.flatMap((curve) => curve.points.map((point) => ({ ...point, round: curve.round })));
  if (points.length) content.push(chart("Training loss by step", { height: 220, data: { values: points }, mark: { type: "line", interpolate: "monotone" }, encoding: { x: { field: "step", type: "quantitative", title: "update" }, y: { field: "loss", type: "quantitative", title: "training loss (nats)", scale: { zero: false } }, color: { field: "round", type: "nominal" } } }));
  if (data.comparison.length) content.push(make("h3", {}, "Plans"), table(["plan", "rounds accepted", "held-out loss", "kept", "tokens trained", "seconds"], data.comparison.map((p) => [p.plan, `${p.accepted}/${p.rounds}`, p.held_out_loss == null ? "–" : `${p.held_out_loss.toFixed(4)} ± ${p.standard_error.toFixed(4)}`, percent(p.kept_share, 1), count(p.tokens_trained), p.seconds.toFixed(0)])));
  card("Rounds side by side", "Held-out loss: nats per answer token on clean rows, with its standard error. Agreement: share of held-out tokens on whose mask the round's model and its reference agree.", ...content).classList.add("wide");
}

// whatever a calibration holds: lists of objects as tables, estimates with their intervals, the rest by name and value
const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const isEstimate = (value) => isObject(value) && ["value", "low", "high"].every((key) => key in value);

function show(value) {
  if (isEstimate(value)) return `${figure(value.value)} (${figure(value.low)} to ${figure(value.high)})`;
  if (Array.isArray(value)) return value.map(show).join(" to ");
  if (isObject(value)) return Object.entries(value).map(([key, inner]) => `${key} ${show(inner)}`).join(", ");
  return typeof value === "number" ? figure(value) : String(value ?? "–");
}

function dropped(by, rows) {
  const values = ["planted", "genuine"].flatMap((what) => rows.filter((row) => isEstimate(row[`${what}_dropped`])).map((row) => ({ what, by: row[by], ...row[`${what}_dropped`] })));
  if (!values.length) return null;
  const x = { field: "by", type: "quantitative", title: by, scale: { zero: false } };
  const color = { field: "what", type: "nominal", scale: { domain: ["genuine", "planted"], range: [KEPT, DROPPED] } };
  const tooltip = ["what", "by", "value", "low", "high"].map((field) => ({ field, type: field === "what" ? "nominal" : "quantitative", format: field === "what" ? undefined : ".3", title: field === "by" ? by : field }));
  return chart(`Dropped share of planted and genuine tokens by ${by}`, { height: 200, data: { values }, layer: [
    { mark: { type: "line", point: true }, encoding: { x, color, tooltip, y: { field: "value", type: "quantitative", title: "dropped share", axis: { format: "%" }, scale: { domain: [0, 1] } } } },
    { mark: "rule", encoding: { x, color, y: { field: "low", type: "quantitative" }, y2: { field: "high" } } },
  ] });
}

function calibration() {
  if (!data.calibration) return;
  const content = [], single = [];
  for (const [key, value] of Object.entries(data.calibration)) {
    const name = key.replaceAll("_", " ");
    if (Array.isArray(value) && value.length && value.every(isObject)) {
      const columns = [...new Set(value.flatMap(Object.keys))];
      content.push(make("h3", {}, name), ...[dropped(columns[0], value)].filter(Boolean), table(columns.map((c) => c.replaceAll("_", " ")), value.map((row) => columns.map((c) => show(row[c])))));
    } else single.push([name, show(value)]);
  }
  if (single.length) content.unshift(table(["figure", "value"], single));
  card("Planted calibration", "What became of tokens that were replaced on purpose, so that it is known which ones should go; with 95 % intervals where there are some.", ...content).classList.add("wide");
}

// -- rows --------------------------------------------------------------------------------------------------------

const far = (() => {
  const all = data.examples.flatMap((row) => row.pieces.filter(Array.isArray).map((piece) => Math.abs(piece[2] - cutOf(row)))).filter(Number.isFinite).sort((a, b) => a - b);
  return all[Math.floor(all.length * 0.9)] || 1;
})();

function cutOf(row) {
  const cut = data.cuts.find((c) => c.round === row.round);
  return cut ? cut.score : Math.min(...row.pieces.filter((p) => Array.isArray(p) && p[1] && p[2] !== null).map((p) => p[2]));
}

function tokenElement(piece, cut) {
  const [text, keep, score] = piece;
  const distance = score === null ? 1 : Math.min(1, Math.abs(score - cut) / far);
  const element = make("span", { class: `tok ${keep ? "kept" : "dropped"}`, tabindex: "-1", "aria-describedby": "tip" }, text);
  element.style.setProperty("--strength", (0.12 + 0.5 * (Number.isFinite(distance) ? distance : 0.5)).toFixed(2));
  element.piece = piece;
  return element;
}

function rowElement(row) {
  const cut = cutOf(row);
  const pieces = row.pieces.map((piece) => (Array.isArray(piece) ? tokenElement(piece, cut) : make("span", { class: "prompt" }, piece)));
  const text = make("div", { class: "text", dir: "auto", tabindex: "0", role: "group", "aria-label": `row ${row.row} of ${row.part}, ${row.kept} of ${row.tokens} tokens kept; arrow keys move from token to token` }, ...pieces, row.cut_short ? make("span", { class: "prompt" }, " … cut short here") : null);
  const meta = [make("bdi", {}, row.source), `${row.part}:${row.row}`, ...(row.round ? [`round ${row.round}`] : []), `${count(row.kept)} of ${count(row.tokens)} kept, ${percent(row.kept, row.tokens)}`];
  return make("article", { class: "row" }, make("div", { class: "meta" }, ...meta.map((item) => make("span", {}, item))), text);
}

function describe([text, keep, score, base, reference]) {
  const lines = [JSON.stringify(text), `${keep ? "kept" : "dropped"}, score ${score === null ? "ruled out" : figure(score)}`];
  if (base !== null) lines.push(`base ${figure(base)} nats`);
  if (reference !== null) lines.push(`reference ${figure(reference)} nats`);
  return lines.join("\n");
}

function tip(element) {
  const box = byId("tip");
  box.hidden = !element;
  if (!element) return;
  box.textContent = describe(element.piece);
  const at = element.getClientRects()[0], size = box.getBoundingClientRect();
  box.style.left = `${Math.max(4, Math.min(at.left, innerWidth - size.width - 4))}px`;
  box.style.top = `${at.bottom + size.height + 6 < innerHeight ? at.bottom + 4 : at.top - size.height - 4}px`;
}

const tokenOf = (event) => (event.target instanceof Element ? event.target.closest(".tok") : null);

function move(event) {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const text = event.target.closest(".text");
  if (!step || !text) return;
  const all = [...text.querySelectorAll(".tok")], now = all.indexOf(event.target);
  const next = all[now < 0 ? (step > 0 ? 0 : all.length - 1) : now + step];
  if (next) { event.preventDefault(); next.focus(); }
}

let shown = PAGE;

function list() {
  const words = byId("search").value.toLowerCase(), source = byId("source").value, order = byId("order").value;
  let rows = data.examples.filter((row) => (!source || row.source === source) && (!words || row.text.includes(words)));
  const changed = (row) => (row.tokens ? 1 - row.kept / row.tokens : 0);
  if (order) rows = [...rows].sort((a, b) => (order === "most" ? 1 : -1) * (changed(b) - changed(a)));
  byId("found").textContent = `${count(rows.length)} of the ${count(data.examples.length)} sampled rows match`;
  byId("rows").replaceChildren(...rows.slice(0, shown).map(rowElement));
  byId("more").hidden = rows.length <= shown;
}

function examples() {
  for (const row of data.examples) row.text = [row.source, `${row.part}:${row.row}`, row.pieces.map((p) => (Array.isArray(p) ? p[0] : p)).join("")].join("\n").toLowerCase();
  const names = [...new Set(data.examples.map((row) => row.source))].sort();
  byId("source").append(make("option", { value: "" }, "all"), ...names.map((name) => make("option", { value: name }, name.length > 60 ? name.slice(0, 60) + "…" : name)));
  for (const id of ["search", "source", "order"]) byId(id).addEventListener("input", () => { shown = PAGE; list(); });
  byId("more").addEventListener("click", () => { shown += PAGE; list(); });
  const box = byId("rows");
  for (const name of ["mouseover", "focusin"]) box.addEventListener(name, (event) => tip(tokenOf(event)));
  for (const name of ["mouseleave", "focusout"]) box.addEventListener(name, () => tip(null));
  addEventListener("scroll", () => tip(null), { passive: true });
  box.addEventListener("keydown", (event) => { if (event.key === "Escape") tip(null); else move(event); });
  list();
}

header();
rejected();
scores();
losses();
shares("Kept share by source", `Exact, over all ${count(data.counts.selected)} answer tokens. The line: all sources.`, data.sources, "source", true);
shares("Kept share by place in the answer", `${sampled} The line: all tokens.`, data.places, "token of the answer", false);
if (data.turns.length > 1) shares("Kept share by turn", `${sampled} The line: all tokens.`, data.turns, "answer of the row", false);
tokens();
rounds();
calibration();
examples();
document.querySelector("nav").append(...[...document.querySelectorAll("section")].map((section) => make("a", { href: `#${section.id}` }, section.querySelector("h2").textContent)));
byId("foot").textContent = `Counts are exact; distributions, token tables and rows: ${sampled.toLowerCase()} Seed ${sample.seed}. Made by tokenclean_ray ${data.tokenclean}; this file asks nothing of the network.`;
