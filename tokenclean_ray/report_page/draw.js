// The page, from top to bottom.

header();
rejected();
scores();
losses();
shares(
  "Kept share by source",
  `Exact, over all ${count(data.counts.selected)} answer tokens. The line: all sources.`,
  data.sources,
  "source",
  true,
);
shares(
  "Kept share by place in the answer",
  `${sampled} The line: all tokens.`,
  data.places,
  "token of the answer",
  false,
);
if (data.turns.length > 1)
  shares("Kept share by turn", `${sampled} The line: all tokens.`, data.turns, "answer of the row", false);
tokens();
rounds();
calibration();
examples();
document
  .querySelector("nav")
  .append(
    ...[...document.querySelectorAll("section")].map((section) =>
      make("a", { href: `#${section.id}` }, section.querySelector("h2").textContent),
    ),
  );
byId("foot").textContent =
  `Counts are exact; distributions, token tables and rows: ${sampled.toLowerCase()} Seed ${sample.seed}. ` +
  `Made by tokenclean_ray ${data.tokenclean}; this file asks nothing of the network.`;
