// Which charts the view of a run has, and the colours of its stages.

/**
 * The charts, from the most to the least looked at. `lines` are the metrics in one chart; `points` marks those that are
 * measured now and then. Instead of `lines` a chart may have `match` and `label`: it draws the metrics whose names match,
 * under what `label` makes of the match. `zero` begins the axis at 0. Without `stages` all of them are drawn.
 */
export const CHARTS = [
  {
    title: "Training loss",
    unit: "nats a token",
    lines: [{ name: "loss" }],
    trend: true,
    settle: true,
    stages: ["pretrain", "midtrain", "sft"],
  },
  {
    title: "Validation",
    unit: "bits a byte",
    lines: [{ name: "bpb", points: true }],
    settle: true,
    stages: ["pretrain", "midtrain", "sft"],
  },
  {
    title: "CORE on a sample",
    unit: "share above guessing",
    match: /^(?:core|centered_mean)_(v\d)(?:_of_(\d+))?$/,
    label: ([, version, count]) => (count ? `${count} tasks, baselines ${version}` : `baselines ${version}`),
    stages: ["pretrain"],
  },
  {
    title: "Tasks on a sample",
    unit: "answered right",
    match: /^sample_score\/(.+)$/,
    label: ([, task]) => task.replaceAll("_", " "),
    zero: true,
    share: true,
    stages: ["midtrain", "sft"],
  },
  {
    title: "Reward",
    unit: "mean of answers",
    lines: [
      { name: "reward", label: "training questions" },
      { name: "reward_eval", label: "validation questions", points: true },
    ],
    trend: true,
    stages: ["rl"],
  },
  {
    title: "Validation questions",
    unit: "answered right",
    match: /^(greedy|pass_\d+)$/,
    label: ([, measure]) => measure.replace("_", "@"),
    zero: true,
    share: true,
    stages: ["rl"],
  },
  {
    title: "Learning rate",
    unit: "by group",
    lines: [
      { name: "lr_matrix", label: "matrices" },
      { name: "lr_embedding", label: "embedding" },
      { name: "lr_head", label: "head" },
      { name: "lr_value_embedding", label: "value embeddings" },
      { name: "lr_gate", label: "gates" },
      { name: "lr_residual_scale", label: "residual scales" },
      { name: "lr_input_scale", label: "input scales" },
      { name: "lr_scalar", label: "scalars" },
    ],
    zero: true,
  },
  { title: "Gradient norm", unit: "before clipping", lines: [{ name: "grad_norm" }], trend: true },
  { title: "Speed", unit: "tokens a second", lines: [{ name: "tokens_per_second" }], trend: true, zero: true },
  { title: "MFU", unit: "share of the device’s peak", lines: [{ name: "mfu" }], trend: true, zero: true, share: true },
  { title: "Objective", unit: "nats a token, weighted", lines: [{ name: "loss" }], trend: true, stages: ["rl"] },
  {
    title: "Answer length",
    unit: "tokens",
    lines: [{ name: "completion_tokens" }],
    trend: true,
    zero: true,
    stages: ["rl"],
  },
  {
    title: "Answers that teach nothing",
    unit: "share",
    lines: [
      { name: "groups_without_signal", label: "all worth the same" },
      { name: "cut", label: "no room to end" },
    ],
    trend: true,
    zero: true,
    share: true,
    stages: ["rl"],
  },
];

/** The colour of each stage, in all charts and in the list of stages. */
export const STAGE_COLORS = { pretrain: "--series-1", midtrain: "--series-2", sft: "--series-3", rl: "--series-4" };
