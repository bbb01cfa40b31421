// Counts and distributions: what came in, the scores, the losses, shares by group, tokens.

function header() {
  const { select, models, counts } = data;
  byId("run").textContent = data.run;
  document.title = `Token cleaning: ${data.run}`;
  const names = Object.entries(models)
    .map(([role, path]) => `${role} ${path}`)
    .join(", ");
  byId("what").append(
    make(
      "bdi",
      {},
      `${select.scorer}, ${select.scope}, keep ratio ${select.keep_ratio}; ${names}. Masked dataset: ${data.result}`,
    ),
  );
  const tiles = [
    [count(counts.rows), "rows in"],
    [count(counts.masked), "rows out"],
    [count(counts.nothing_kept), "rows with nothing kept"],
    [count(counts.rejected), "rows rejected"],
    ...(counts.warmup ? [[count(counts.warmup), "rows not selected from"]] : []),
    [count(counts.tokens), "tokens in"],
    [count(counts.selected), "answer tokens judged"],
    [count(counts.kept), `kept, ${percent(counts.kept, counts.selected)}`, "kept"],
    [count(counts.dropped), `dropped, ${percent(counts.dropped, counts.selected)}`, "dropped"],
  ];
  byId("tiles").append(
    ...tiles.map(([value, label, kind]) =>
      make("div", { class: `tile ${kind || ""}` }, make("b", {}, value), make("span", {}, label)),
    ),
  );
}

function rejected() {
  const { counts } = data;
  if (counts.rejected)
    card(
      "Rejected rows",
      `${percent(counts.rejected, counts.rows)} of the rows cannot be used; they are in rejected/, with file and line.`,
      table(
        ["reason", "rows"],
        counts.reasons.map((r) => [r.reason, count(r.rows)]),
      ),
    );
}

function scores() {
  const { bins, ruled_out } = data.scores;
  if (!bins.length) return;
  const values = bins.flatMap((bin) => ["kept", "dropped"].map((fate) => ({ ...bin, fate, tokens: bin[fate] })));
  const named = (cut) => [cut.round && `round ${cut.round}`, cut.source].filter(Boolean).join(", ");
  const cuts = data.cuts
    .slice(0, 12)
    .map((cut) => ({ ...cut, label: named(cut) ? `cut of ${named(cut)}` : "cut" }));
  const each = cuts.map((cut) => (named(cut) ? `${named(cut)}: ` : "") + cut.score.toPrecision(6)).join("; ");
  const more = data.cuts.length > cuts.length ? "; …" : "";
  const where = cuts.length
    ? `The cut: ${each}${more}. Tokens within ${data.near} of it: ${count(data.counts.near)}.`
    : "Each row has its own cut.";
  const without = ruled_out ? ` ${count(ruled_out)} tokens are ruled out and not shown.` : "";
  const caption = `${sampled} ${where} The end bins hold what lies beyond.${without}`;
  card(
    "Scores and the cut",
    caption,
    chart("Histogram of the scores, kept and dropped tokens", {
      height: 240,
      layer: [
        {
          data: { values },
          mark: "bar",
          encoding: {
            x: number("low", { bin: { binned: true }, title: `score (${data.select.scorer})` }),
            x2: { field: "high" },
            y: number("tokens", { title: "tokens" }),
            color: word("fate", { scale }),
            tooltip: [word("fate"), number("tokens"), number("low"), number("high")],
          },
        },
        {
          data: { values: cuts },
          mark: { type: "rule", size: 2, ...LINE },
          encoding: { x: number("score"), tooltip: [word("label"), number("score")] },
        },
      ],
    }),
  );
}

function losses() {
  if (!data.losses.length) return;
  const step = data.losses[0].step;
  const values = data.losses.map((cell) => ({ ...cell, base2: cell.base + step, reference2: cell.reference + step }));
  const top = Math.max(...values.map((cell) => Math.max(cell.base2, cell.reference2)));
  const one = data.select.scorer === "excess_loss" && data.select.scope === "global" && data.cuts.length;
  const cut = one ? data.cuts[data.cuts.length - 1].score : null;
  const ends =
    cut === null ? [] : [Math.max(0, cut), Math.min(top, top + cut)].map((base) => ({ base, reference: base - cut }));
  card(
    "Base against reference loss",
    `${sampled} Each cell: green where its tokens were kept, red where dropped, the denser the more tokens.` +
      (ends.length ? " Below the line: kept." : ""),
    chart("Tokens by the loss under base and reference, and the share kept", {
      height: 300,
      layer: [
        {
          data: { values },
          mark: "rect",
          encoding: {
            x: number("base", { title: "loss under the base (nats)" }),
            x2: { field: "base2" },
            y: number("reference", { title: "loss under the reference (nats)" }),
            y2: { field: "reference2" },
            color: number("share", {
              scale: { domain: [0, 1], range: [DROPPED, "#c9b458", KEPT] },
              legend: { title: "kept share", format: ".0%", values: [0, 0.5, 1] },
            }),
            opacity: number("tokens", { scale: { type: "log", range: [0.25, 1] }, legend: null }),
            tooltip: [number("tokens"), number("share", { format: ".1%" }), number("base"), number("reference")],
          },
        },
        {
          data: { values: ends },
          mark: { type: "line", ...LINE },
          encoding: { x: number("base"), y: number("reference") },
        },
      ],
    }),
  );
}

function shares(title, caption, groups, name, horizontal) {
  if (!groups.length) return;
  const values = groups.map((group) => ({ ...group, share: group.kept / group.tokens }));
  const all = data.counts.kept / data.counts.selected;
  const category = word("name", {
    sort: null,
    title: horizontal ? null : name,
    axis: { labelAngle: 0, labelLimit: 130, labelOverlap: !horizontal },
  });
  const share = number("share", { title: "kept share", scale: { domain: [0, 1] }, axis: { format: "%" } });
  const tooltip = [word("name"), number("share", { format: ".1%" }), number("tokens", { format: "," })];
  card(
    title,
    caption,
    chart(`${title}, bars`, {
      height: horizontal ? 22 * values.length : 200,
      layer: [
        {
          data: { values },
          mark: { type: "bar", color: KEPT },
          encoding: { [horizontal ? "y" : "x"]: category, [horizontal ? "x" : "y"]: share, tooltip },
        },
        {
          data: { values: [{ all }] },
          mark: { type: "rule", size: 2, ...LINE },
          encoding: {
            [horizontal ? "x" : "y"]: number("all"),
            tooltip: [number("all", { format: ".1%", title: "all" })],
          },
        },
      ],
    }),
    make(
      "details",
      {},
      make("summary", {}, "Table"),
      table(
        [name, "tokens", "kept", "share"],
        groups.map((g) => [g.name, count(g.tokens), count(g.kept), percent(g.kept, g.tokens)]),
      ),
    ),
  );
}

function tokens() {
  for (const [kind, title] of [
    ["kept", "Tokens most often kept"],
    ["dropped", "Tokens most often dropped"],
  ]) {
    const rows = data.tokens[kind];
    if (rows.length)
      card(
        title,
        `${sampled} Beyond what chance explains, given how often a token is seen.`,
        table(
          ["token", "seen", "kept", "mean score"],
          rows.map((t) => [
            make("code", {}, make("bdi", {}, JSON.stringify(t.token))),
            count(t.seen),
            percent(t.kept, t.seen),
            figure(t.score),
          ]),
        ),
      );
  }
}
