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
      "tokens on whose mask the round's model and its reference agree.",
    ...content,
  ).classList.add("wide");
}

// whatever a calibration holds: lists of objects as tables, estimates with their intervals, the rest by name and value
const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const isEstimate = (value) => isObject(value) && ["value", "low", "high"].every((key) => key in value);

function show(value) {
  if (isEstimate(value)) return `${figure(value.value)} (${figure(value.low)} to ${figure(value.high)})`;
  if (Array.isArray(value)) return value.map(show).join(" to ");
  if (isObject(value))
    return Object.entries(value)
      .map(([key, inner]) => `${key} ${show(inner)}`)
      .join(", ");
  return typeof value === "number" ? figure(value) : String(value ?? "–");
}

function dropped(by, rows) {
  const values = ["planted", "genuine"].flatMap((what) =>
    rows
      .filter((row) => isEstimate(row[`${what}_dropped`]))
      .map((row) => ({ what, by: row[by], ...row[`${what}_dropped`] })),
  );
  if (!values.length) return null;
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
  const content = [],
    single = [];
  for (const [key, value] of Object.entries(data.calibration)) {
    const name = key.replaceAll("_", " ");
    if (Array.isArray(value) && value.length && value.every(isObject)) {
      const columns = [...new Set(value.flatMap(Object.keys))];
      content.push(
        make("h3", {}, name),
        ...[dropped(columns[0], value)].filter(Boolean),
        table(
          columns.map((c) => c.replaceAll("_", " ")),
          value.map((row) => columns.map((c) => show(row[c]))),
        ),
      );
    } else single.push([name, show(value)]);
  }
  if (single.length) content.unshift(table(["figure", "value"], single));
  card(
    "Planted calibration",
    "What became of tokens that were replaced on purpose, so that it is known which ones should go; " +
      "with 95 % intervals where there are some.",
    ...content,
  ).classList.add("wide");
}
