// The records of metrics.jsonl as curves, and what is drawn of them.

/** What a line may have besides numbers that are drawn. */
const FACTS = new Set([
  "stage",
  "step",
  "time",
  "start",
  "id",
  "total_steps",
  "of",
  "model",
  "prompt",
  "sample",
  "seed",
  "questions",
  "tokens",
]);

/**
 * The curves of a run, by stage and metric: `{steps, values}`, steps rising; a value is NaN where it was not finite.
 *
 * The rules are those of `jaxchat.runs.metrics.in_force`: where a stage is resumed, what it had logged from there on does
 * not count, and where it is made again, nothing that it had logged.
 */
export class Records {
  constructor() {
    this.stages = new Map();
    this.scores = new Map(); // the line of each stage and task that came last
    this.samples = 0; // how many samples there were so far
    this.lastTime = null; // seconds since 1970, of the last line
  }

  add(records) {
    for (const record of records) this.#add(record);
  }

  /** The stages that have curves, in the order of the run. */
  names() {
    return [...this.stages.keys()].filter((name) => this.stages.get(name).curves.size > 0);
  }

  /** The metrics that any stage has. */
  metrics() {
    return [...new Set([...this.stages.values()].flatMap(({ curves }) => [...curves.keys()]))].sort();
  }

  curve(stage, metric) {
    return this.stages.get(stage)?.curves.get(metric) ?? null;
  }

  #add(record) {
    if (record.time !== undefined) this.lastTime = record.time;
    if (record.of !== undefined) return this.#addScores(record);
    if (record.stage === "evaluate") return;
    let stage = this.stages.get(record.stage);
    if (!stage)
      this.stages.set(
        record.stage,
        (stage = { id: null, curves: new Map(), begun: null, last: null, totalSteps: null }),
      );
    if (record.start) this.#restart(stage, record);
    if (record.sample !== undefined) this.samples += 1;
    if (record.loss !== undefined) {
      // The first step of a process compiles: the speed is measured from its end on.
      stage.begun ??= { step: record.step, time: record.time };
      stage.last = { step: record.step, time: record.time, tokens: record.tokens };
    }
    for (const [name, value] of Object.entries(record)) {
      if (!FACTS.has(name) && (typeof value === "number" || value === null))
        put(stage.curves, name, record.step, value ?? NaN);
    }
  }

  #restart(stage, record) {
    if (record.id && stage.id && record.id !== stage.id) stage.curves.clear();
    stage.id = record.id ?? stage.id;
    stage.totalSteps = record.total_steps ?? stage.totalSteps;
    stage.begun = null;
    for (const [name, curve] of stage.curves) {
      let keep = place(curve.steps, record.step);
      // An evaluation at the step of the resume still counts, unless it is logged again.
      if (curve.steps[keep] === record.step && record[name] === undefined) keep += 1;
      curve.steps.length = curve.values.length = keep;
      if (keep === 0) stage.curves.delete(name);
    }
  }

  #addScores(record) {
    for (const [name, score] of Object.entries(record)) {
      if (!name.startsWith("score/") || score === null) continue;
      const task = name.slice("score/".length);
      if (!this.scores.has(task)) this.scores.set(task, new Map());
      const { count, cut } = { count: record[`count/${task}`], cut: record[`cut/${task}`] };
      this.scores.get(task).set(record.of, { score, count, cut, longest: record.max_new_tokens });
    }
  }
}

/** The index of the first of rising `steps` that is not below `step`. */
export function place(steps, step) {
  let low = 0;
  let high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low;
}

function put(curves, name, step, value) {
  let curve = curves.get(name);
  if (!curve) curves.set(name, (curve = { steps: [], values: [] }));
  const { steps, values } = curve;
  if (steps.length === 0 || steps[steps.length - 1] < step) {
    steps.push(step);
    values.push(value);
    return;
  }
  const at = place(steps, step);
  const same = steps[at] === step ? 1 : 0; // of several, the last one counts
  steps.splice(at, same, step);
  values.splice(at, same, value);
}

/**
 * The trend of values: a moving average over `reach` values on each side, taken twice, as the report's plots have it.
 *
 * NaN stays NaN, and counts for nothing. At the start, where a model falls steeply, it reaches less far.
 */
export function smoothed(values, reach) {
  let current = Float64Array.from(values);
  if (reach < 1) return current;
  const length = current.length;
  const sums = new Float64Array(length + 1);
  const counts = new Uint32Array(length + 1);
  for (let round = 0; round < 2; round += 1) {
    for (let i = 0; i < length; i += 1) {
      const there = !Number.isNaN(current[i]);
      sums[i + 1] = sums[i] + (there ? current[i] : 0);
      counts[i + 1] = counts[i] + (there ? 1 : 0);
    }
    const next = new Float64Array(length);
    for (let i = 0; i < length; i += 1) {
      const far = Math.min(reach, i >> 2);
      const end = Math.min(i + far + 1, length);
      next[i] = Number.isNaN(current[i]) ? NaN : (sums[end] - sums[i - far]) / (counts[end] - counts[i - far]);
    }
    current = next;
  }
  return current;
}

/**
 * Fewer points with the same look: of each of `buckets` parts of the values from `start` to `end` the indices of the first,
 * the lowest, the highest and the last one, and of a gap where it has one.
 */
export function thinned(values, start, end, buckets) {
  const chosen = [];
  const put = (i) => i >= 0 && i !== chosen[chosen.length - 1] && chosen.push(i);
  const parts = Math.min(buckets, Math.ceil((end - start) / 4));
  for (let part = 0; part < parts; part += 1) {
    const from = start + Math.floor((part * (end - start)) / parts);
    const to = start + Math.floor(((part + 1) * (end - start)) / parts);
    if (to - from <= 4) {
      for (let i = from; i < to; i += 1) put(i);
      continue;
    }
    let [low, high, gap] = [-1, -1, -1];
    for (let i = from; i < to; i += 1) {
      if (Number.isNaN(values[i])) gap = i;
      else if (low < 0) low = high = i;
      else if (values[i] < values[low]) low = i;
      else if (values[i] > values[high]) high = i;
    }
    [from, low, high, gap, to - 1].sort((a, b) => a - b).forEach(put);
  }
  return chosen;
}

/**
 * Limits that leave out what is rare and far off, such as a few spikes: [lowest, highest], or null without values. Of many
 * values only some are looked at.
 */
export function limits(values) {
  const stride = Math.ceil(values.length / 4000);
  const finite = Float64Array.from(values.filter((value, i) => i % stride === 0 && !Number.isNaN(value))).sort();
  if (finite.length === 0) return null;
  const at = (share) => finite[Math.round(share * (finite.length - 1))];
  return [at(0.002), at(0.998)];
}

// --- how numbers are written ---

const UNITS = [
  [1e12, "T"],
  [1e9, "B"],
  [1e6, "M"],
  [1e3, "k"],
];

/** Three digits and a unit: 950, 1.23k, 412k, 1.31M. */
export function count(number) {
  for (const [size, unit] of UNITS) {
    if (Math.abs(number) >= 0.9995 * size) return `${digits(number / size)}${unit}`;
  }
  return Number.isInteger(number) ? String(number) : digits(number);
}

/** About three significant digits, without a unit. */
export function digits(number) {
  const size = Math.abs(number);
  if (number === 0) return "0";
  if (size < 0.0005) return number.toExponential(1).replace("e-", "e−");
  return size >= 99.95
    ? number.toFixed(0)
    : size >= 9.995
      ? number.toFixed(1)
      : size >= 0.9995
        ? number.toFixed(2)
        : number.toPrecision(3);
}

/** The two largest units that matter: 8 s, 9 min 41 s, 1 h 05 min, 2 d 03 h. */
export function duration(seconds) {
  const two = (number) => String(number).padStart(2, "0");
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 24 * 60) return `${Math.floor(minutes / 60)} h ${two(minutes % 60)} min`;
  const hours = Math.round(minutes / 60);
  return `${Math.floor(hours / 24)} d ${two(hours % 24)} h`;
}

/** Four significant digits, and all of whole numbers. */
export function precise(value) {
  if (value === 0 || Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return minus(Math.abs(value) < 0.001 ? value.toExponential(2) : String(Number(value.toPrecision(4))));
}

/** A round number, as those of an axis are. */
export function short(value) {
  const [size, unit] = Math.abs(value) >= 1e6 ? [1e6, "M"] : Math.abs(value) >= 1000 ? [1000, "k"] : [1, ""];
  return minus(
    value !== 0 && Math.abs(value) < 0.001 ? value.toExponential() : `${Number((value / size).toPrecision(6))}${unit}`,
  );
}

const minus = (text) => text.replaceAll("-", "−");
