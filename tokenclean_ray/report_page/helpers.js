"use strict";
// What the report's other scripts share. They are joined into one in the order helpers, distributions, rounds, rows,
// draw. The data is the JSON in #data; text reaches the page as textContent only.
const data = JSON.parse(document.getElementById("data").textContent);
const KEPT = "#2a9d80";
const DROPPED = "#d9534a";
const LINE = { color: "#7a6ad8", strokeDash: [5, 3] }; // what bars and cells are read against
const PAGE = 10; // rows shown at a time
const count = (n) => n.toLocaleString("en");
const percent = (part, whole) => (whole ? ((100 * part) / whole).toFixed(1) + " %" : "–");
const figure = (x) => (x === null || x === undefined ? "–" : String(Number(x.toPrecision(4))));
const fixed = (x, digits) => (x === null || x === undefined ? "–" : x.toFixed(digits)); // NaN arrives as null
const withError = (x, error) => (x === null || x === undefined ? "–" : `${fixed(x, 4)} ± ${fixed(error, 4)}`);
const number = (field, more) => ({ field, type: "quantitative", ...more }); // of a chart
const word = (field, more) => ({ field, type: "nominal", ...more });
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null)); // strings become text nodes
  return element;
}

function card(title, caption, ...content) {
  const id = title.toLowerCase().replace(/[^a-z]+/g, "-");
  const section = make(
    "section",
    { class: "card", id, "aria-label": title },
    make("h2", {}, title),
    make("p", { class: "soft" }, caption),
    ...content,
  );
  byId("cards").append(section);
  return section;
}

function table(columns, rows) {
  const head = make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)));
  const body = rows.map((cells) =>
    make("tr", {}, ...cells.map((cell) => make("td", {}, cell instanceof Node ? cell : make("bdi", {}, String(cell))))),
  );
  return make(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": columns.join(", ") },
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)),
  );
}

function chart(description, spec) {
  const place = make("div", { class: "chart" });
  const full = {
    width: "container",
    autosize: { type: "fit-x", contains: "padding" },
    background: null,
    description,
    config: {
      view: { stroke: null },
      axis: { labelLimit: 150, titleFontWeight: "normal" },
      legend: { orient: "top", title: null },
    },
    ...spec,
  };
  // ast: expressions are interpreted, since the page's policy allows no eval
  requestAnimationFrame(() =>
    vegaEmbed(place, full, {
      renderer: "svg",
      actions: false,
      ast: true,
      defaultStyle: false,
      tooltip: { disableDefaultStyle: true },
    }),
  );
  return make("figure", {}, place);
}

const { sample } = data;
const sampled =
  sample.parts === sample.of_parts
    ? `Of all ${count(sample.response_tokens)} answer tokens.`
    : `From a sample of ${count(sample.response_tokens)} answer tokens ` +
      `(${count(sample.parts)} of ${count(sample.of_parts)} parts).`;
const scale = { domain: ["kept", "dropped"], range: [KEPT, DROPPED] };
