// Example rows: tokens with their figures, filters, search.

const far = (() => {
  const all = data.examples
    .flatMap((row) => row.pieces.filter(Array.isArray).map((piece) => Math.abs(piece[2] - cutOf(row))))
    .filter(Number.isFinite)
    .sort((a, b) => a - b);
  return all[Math.floor(all.length * 0.9)] || 1;
})();

function cutOf(row) {
  const cut = data.cuts.find((c) => c.round === row.round && ["", row.source].includes(c.source));
  return cut
    ? cut.score
    : Math.min(...row.pieces.filter((p) => Array.isArray(p) && p[1] && p[2] !== null).map((p) => p[2]));
}

function tokenElement(piece, cut) {
  const [text, keep, score] = piece;
  const distance = score === null ? 1 : Math.min(1, Math.abs(score - cut) / far);
  const element = make(
    "span",
    { class: `tok ${keep ? "kept" : "dropped"}`, tabindex: "-1", "aria-describedby": "tip" },
    text,
  );
  element.style.setProperty("--strength", (0.12 + 0.5 * (Number.isFinite(distance) ? distance : 0.5)).toFixed(2));
  element.piece = piece;
  return element;
}

function rowElement(row) {
  const cut = cutOf(row);
  const pieces = row.pieces.map((piece) =>
    Array.isArray(piece) ? tokenElement(piece, cut) : make("span", { class: "prompt" }, piece),
  );
  const text = make(
    "div",
    {
      class: "text",
      dir: "auto",
      tabindex: "0",
      role: "group",
      "aria-label":
        `row ${row.row} of ${row.part}, ${row.kept} of ${row.tokens} tokens kept; ` +
        "arrow keys move from token to token",
    },
    ...pieces,
    row.cut_short ? make("span", { class: "prompt" }, " … cut short here") : null,
  );
  const meta = [
    make("bdi", {}, row.source),
    `${row.part}:${row.row}`,
    ...(row.round ? [`round ${row.round}`] : []),
    `${count(row.kept)} of ${count(row.tokens)} kept, ${percent(row.kept, row.tokens)}`,
  ];
  return make(
    "article",
    { class: "row" },
    make("div", { class: "meta" }, ...meta.map((item) => make("span", {}, item))),
    text,
  );
}

function describe([text, keep, score, base, reference]) {
  const lines = [
    JSON.stringify(text),
    `${keep ? "kept" : "dropped"}, score ${score === null ? "ruled out" : figure(score)}`,
  ];
  if (base !== null) lines.push(`base ${figure(base)} nats`);
  if (reference !== null) lines.push(`reference ${figure(reference)} nats`);
  return lines.join("\n");
}

function tip(element) {
  const box = byId("tip");
  box.hidden = !element;
  if (!element) return;
  box.textContent = describe(element.piece);
  const at = element.getClientRects()[0],
    size = box.getBoundingClientRect();
  box.style.left = `${Math.max(4, Math.min(at.left, innerWidth - size.width - 4))}px`;
  box.style.top = `${at.bottom + size.height + 6 < innerHeight ? at.bottom + 4 : at.top - size.height - 4}px`;
}

const tokenOf = (event) => (event.target instanceof Element ? event.target.closest(".tok") : null);

function move(event) {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  const text = event.target.closest(".text");
  if (!step || !text) return;
  const all = [...text.querySelectorAll(".tok")],
    now = all.indexOf(event.target);
  const next = all[now < 0 ? (step > 0 ? 0 : all.length - 1) : now + step];
  if (next) {
    event.preventDefault();
    next.focus();
  }
}

let shown = PAGE;

function list() {
  const words = byId("search").value.toLowerCase(),
    source = byId("source").value,
    order = byId("order").value;
  let rows = data.examples.filter((row) => (!source || row.source === source) && (!words || row.text.includes(words)));
  const changed = (row) => (row.tokens ? 1 - row.kept / row.tokens : 0);
  if (order) rows = [...rows].sort((a, b) => (order === "most" ? 1 : -1) * (changed(b) - changed(a)));
  byId("found").textContent = `${count(rows.length)} of the ${count(data.examples.length)} sampled rows match`;
  byId("rows").replaceChildren(...rows.slice(0, shown).map(rowElement));
  byId("more").hidden = rows.length <= shown;
}

function examples() {
  for (const row of data.examples)
    row.text = [row.source, `${row.part}:${row.row}`, row.pieces.map((p) => (Array.isArray(p) ? p[0] : p)).join("")]
      .join("\n")
      .toLowerCase();
  const names = [...new Set(data.examples.map((row) => row.source))].sort();
  byId("source").append(
    make("option", { value: "" }, "all"),
    ...names.map((name) => make("option", { value: name }, name.length > 60 ? name.slice(0, 60) + "…" : name)),
  );
  for (const id of ["search", "source", "order"])
    byId(id).addEventListener("input", () => {
      shown = PAGE;
      list();
    });
  byId("more").addEventListener("click", () => {
    shown += PAGE;
    list();
  });
  const box = byId("rows");
  for (const name of ["mouseover", "focusin"]) box.addEventListener(name, (event) => tip(tokenOf(event)));
  for (const name of ["mouseleave", "focusout"]) box.addEventListener(name, () => tip(null));
  const follow = () => byId("tip").hidden || tip(document.activeElement.closest(".tok")); // a focus scrolls, too
  addEventListener("scroll", follow, { passive: true });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") tip(null);
    else move(event);
  });
  list();
}
