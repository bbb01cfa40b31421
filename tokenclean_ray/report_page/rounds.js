// Rounds and plans of evolve, and the planted calibration.

function rounds() {
  if (!data.rounds.length) return;
  const rows = data.rounds.map((r) => [
    `${r.plan} ${r.round}`,
    withError(r.held_out?.loss, r.held_out?.standard_error),
    percent(r.kept_share, 1),
    figure(r.threshold),
    r.agreement == null ? "–" : percent(r.agreement, 1),
    count(r.tokens_trained),
    r.accepted ? "yes" : "no",
  ]);
  const content = [table(["round", "held-out loss", "kept", "cut", "agreement", "tokens trained", "accepted"], rows)];
  const values = data.rounds
    .filter((r) => Number.isFinite(r.held_out?.loss))
    .map((r) => ({
      plan: r.plan,
      round: r.round,
      loss: r.held_out.loss,
      low: r.held_out.loss - r.held_out.standard_error,
      high: r.held_out.loss + r.held_out.standard_error,
    }));
  if (values.length) {
    const x = { field: "round", type: "ordinal", title: "round", axis: { labelAngle: 0 } },
      color = word("plan");
    content.push(
      chart("Held-out loss by round, with standard errors", {
        height: 220,
        data: { values },
        layer: [
          {
            mark: { type: "line", point: true },
            encoding: {
              x,
              color,
              y: number("loss", { title: "held-out loss (nats)", scale: { zero: false } }),
              tooltip: [word("plan"), word("round"), number("loss")],
            },
          },
          { mark: "rule", encoding: { x, color, y: number("low"), y2: { field: "high" } } },
        ],
      }),
    );
  }
  const points = data.curves.flatMap((curve) => curve.points.map((point) => ({ ...point, round: curve.round })));
  if (points.length)
    content.push(
      chart("Training loss by step", {
        height: 220,
        data: { values: points },
        mark: { type: "line", interpolate: "monotone" },
        encoding: {
          x: number("step", { title: "update" }),
          y: number("loss", { title: "training loss (nats)", scale: { zero: false } }),
          color: word("round"),
        },
      }),
    );
  if (data.comparison.length)
    content.push(
      make("h3", {}, "Plans"),
      table(
        ["plan", "rounds accepted", "held-out loss", "kept", "tokens trained", "seconds"],
        data.comparison.map((p) => [
          p.plan,
          `${p.accepted}/${p.rounds}`,
          withError(p.held_out_loss, p.standard_error),
          percent(p.kept_share, 1),
          count(p.tokens_trained),
          fixed(p.seconds, 0),
        ]),
      ),
    );
  card(
    "Rounds side by side",
    "Held-out loss: nats per answer token on clean rows, with its standard error. Agreement: share of held-out " +
      "tokens on whose mask the round's model and its reference agree; at a kept share p masks without a relation " +
      "agree on p² + (1 − p)² of them.",
    ...content,
  ).classList.add("wide");
}

// an estimate with its 95 % interval; older runs may lack some
const estimate = (found, show) =>
  found ? `${show(found.value)} (${show(found.low)} to ${show(found.high)})` : "–";
const asShare = (x) => (typeof x === "number" ? percent(x, 1) : "–");
const asChance = (x) => fixed(x, 3);

function dropped(by, key, rows) {
  const values = ["planted", "genuine"].flatMap((what) =>
    rows.map((row) => ({ what, by: row[key], ...row[`${what}_dropped`] })),
  );
  const x = number("by", { title: by, scale: { zero: false } });
  const color = word("what", { scale: { domain: ["genuine", "planted"], range: [KEPT, DROPPED] } });
  const figures = ["by", "value", "low", "high"];
  const tooltip = [
    word("what", { title: "what" }),
    ...figures.map((field) => number(field, { format: ".3", title: field === "by" ? by : field })),
  ];
  return chart(`Dropped share of planted and genuine tokens by ${by}`, {
    height: 200,
    data: { values },
    layer: [
      {
        mark: { type: "line", point: true },
        encoding: {
          x,
          color,
          tooltip,
          y: number("value", { title: "dropped share", axis: { format: "%" }, scale: { domain: [0, 1] } }),
        },
      },
      { mark: "rule", encoding: { x, color, y: number("low"), y2: { field: "high" } } },
    ],
  });
}

function calibration() {
  if (!data.calibration) return;
  const { planted, rows, noise_share, largest_ratio, ratios = [], gates = [], gate_on, ...found } = data.calibration;
  const figures = [
    ["planted tokens", figure(planted)],
    ["rows that were copied", figure(rows)],
    ["AUROC: chance that a genuine token scores above a planted one", estimate(found.auroc, asChance)],
    ["AUROC, tokens replaced at random", estimate(found.auroc_random, asChance)],
    ["AUROC, tokens of other rows", estimate(found.auroc_other_rows, asChance)],
    ["noise like it in the pool, at most", asShare(noise_share)],
    ["largest ratio that keeps no more noise than max_noise", figure(largest_ratio)],
  ];
  const content = [table(["figure", "value"], figures)];
  const both = (row) => [estimate(row.planted_dropped, asShare), estimate(row.genuine_dropped, asShare)];
  if (ratios.length)
    content.push(
      make("h3", {}, "By keep ratio"),
      dropped("keep ratio", "ratio", ratios),
      table(
        ["keep ratio", "planted tokens dropped", "genuine tokens dropped", "noise among the kept, at most"],
        ratios.map((row) => [figure(row.ratio), ...both(row), asShare(row.noise_kept)]),
      ),
    );
  if (gates.length)
    content.push(
      make("h3", {}, `By gate on ${gate_on}`),
      dropped(`gate on ${gate_on}`, "gate", gates),
      table(
        ["gate", "planted tokens outside", "genuine tokens outside"],
        gates.map((row) => [figure(row.gate), ...both(row)]),
      ),
    );
  card(
    "Planted calibration",
    "What became of tokens that were replaced on purpose, so that it is known which ones should go; " +
      "with 95 % intervals where there are some.",
    ...content,
  ).classList.add("wide");
}
