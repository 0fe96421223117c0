// A chart of the run's view: the curves of a metric, one stage beside the other, drawn with uPlot.

import { STAGE_COLORS } from "./charts.js";
import { element } from "./dom.js";
import { digits, limits, place, precise, short, smoothed, thinned } from "./records.js";

const POINTS = 1000; // parts of a curve that each keep their lowest and highest value
const GAP = 0.012; // between stages, of the width
const LABELS = 20; // pixels above a chart for the names of stages
const COLORS = 6; // of lines, which then begin again
const LEAST = 0.14; // of the width, that a stage has at least

/** Where stages lie on a common axis from 0 to 1: `{stage, from, width, last}`; the last step of each has its own scale. */
export function layout(records, stages) {
  const lasts = stages.map((stage) => {
    const curves = [...records.stages.get(stage).curves.values()];
    return Math.max(1, ...curves.map(({ steps }) => steps[steps.length - 1]));
  });
  const total = lasts.reduce((sum, last) => sum + last, 0);
  const shares = lasts.map((last) => Math.max(LEAST, last / total));
  const scale = (1 - GAP * (stages.length - 1)) / shares.reduce((sum, share) => sum + share, 0);
  let from = 0;
  return stages.map((stage, i) => {
    const band = { stage, from, width: shares[i] * scale, last: lasts[i] };
    from += band.width + GAP;
    return band;
  });
}

/** Whole steps of about the wanted number on [low, high]: multiples of 1, 2 or 5 times a power of ten. */
export function ticks(low, high, wanted) {
  const rough = Math.max(1, (high - low) / Math.max(1, wanted));
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) found.push(tick);
  return found;
}

/**
 * A chart in an element of its own. `view` is shared by all charts: `{records, stages, smoothing, log, color}`, and
 * `zoom`, `{from, to}` or null; `onzoom(zoom)` and `onpoint(point)` are called for what a reader does. Points of the axis
 * are `{stage, step}`, since charts differ in the stages that they have.
 */
export class Chart {
  constructor(spec, view) {
    this.spec = { lines: [], ...spec };
    this.view = view;
    this.plot = null;
    this.readout = element("p", { class: "readout" });
    this.place = element("div", {
      class: "plot",
      tabindex: "0",
      role: "img",
      onkeydown: (event) => this.#onKey(event),
    });
    this.remark = element("p", { class: "remark", hidden: true });
    this.element = element(
      "article",
      { class: "chart" },
      element("header", {}, element("h3", {}, spec.title, " ", element("small", {}, spec.unit)), this.readout),
      this.place,
      this.remark,
    );
    // Only what is in sight is drawn.
    this.seen = new IntersectionObserver((entries) => this.#onSight(entries[entries.length - 1].isIntersecting), {
      rootMargin: "200px",
    });
    this.sized = new ResizeObserver(() => this.#resize());
    this.seen.observe(this.element);
    this.sized.observe(this.place);
  }

  /** Draws what there is now; `anew` after a change of colours or of the kind of axis. */
  update(anew = false) {
    const { match, label } = this.spec;
    if (match) {
      const found = this.view.records.metrics().filter((name) => match.test(name));
      this.spec.lines = found.map((name) => ({ name, label: label(match.exec(name)), points: true }));
    }
    const drawn = (stage) => !this.spec.stages || this.spec.stages.includes(stage);
    const stages = this.view.stages.filter(
      (stage) => drawn(stage) && this.spec.lines.some(({ name }) => this.#has(stage, name)),
    );
    this.bands = layout(this.view.records, stages);
    this.element.hidden = stages.length === 0;
    this.late = this.element.hidden ? null : { anew: anew || (this.late?.anew ?? false) };
    if (!this.late) return;
    if (this.inSight) this.#draw(this.late.anew);
    else this.#read(null);
  }

  #onSight(inSight) {
    this.inSight = inSight;
    if (inSight && this.late) this.#draw(this.late.anew);
  }

  #draw(anew) {
    this.late = null;
    const tables = this.#tables();
    const data = aligned(tables);
    const kind = tables.map(({ band, line }) => `${band.stage} ${line}`).join();
    if (anew || kind !== this.kind) this.destroy();
    this.kind = kind;
    if (this.plot) this.plot.setData(data, false);
    else this.plot = new uPlot(this.#options(tables), data, this.place);
    this.#setScales();
    this.#describe();
  }

  destroy() {
    this.plot?.destroy();
    this.plot = null;
  }

  /** Ends it for good. */
  close() {
    this.seen.disconnect();
    this.sized.disconnect();
    this.destroy();
  }

  /** Shows the values at a point, or without one the last values. */
  point(point) {
    if (!this.plot || this.element.hidden) return;
    const band = point && this.bands.find(({ stage }) => stage === point.stage);
    const left = band ? this.plot.valToPos(band.from + (point.step / band.last) * band.width, "x") : -10;
    this.plot.setCursor({ left, top: band ? 10 : -10 }, false);
    this.#read(band ? point : null);
  }

  #has(stage, name) {
    return (this.view.records.curve(stage, name)?.steps.length ?? 0) > 0;
  }

  /**
   * What is drawn, in tables `{band, line, points, x, columns}`: of each line and stage what was measured and, if the line
   * has one, its trend; of the steps that are shown as many as one can see.
   */
  #tables() {
    const { smoothing, log } = this.view;
    const [low, high] = this.#range();
    const tables = [];
    this.notFinite = 0;
    this.settled = [];
    this.spec.lines.forEach(({ name, points = false }, line) => {
      for (const band of this.bands) {
        const { steps, values: all } = this.view.records.curve(band.stage, name) ?? { steps: [], values: [] };
        for (const value of all) this.notFinite += Number.isNaN(value) ? 1 : 0;
        const values = log ? all.map((value) => (value > 0 ? value : NaN)) : all;
        const stepAt = (x) => ((x - band.from) / band.width) * band.last;
        // One more on each side, so that lines go on to the border.
        const start = Math.max(0, place(steps, stepAt(low)) - 1);
        const end = Math.max(start, Math.min(steps.length, place(steps, stepAt(high)) + 1));
        const chosen = thinned(values, start, end, POINTS);
        const pick = (of) => chosen.map((i) => (Number.isNaN(of[i]) ? null : of[i]));
        const columns = [pick(values)];
        if (this.spec.trend && !points)
          columns.push(pick(smoothed(values, Math.round(values.length * (smoothing / 100) ** 2 * 0.25))));
        tables.push({
          band,
          line,
          points,
          columns,
          x: chosen.map((i) => band.from + (steps[i] / band.last) * band.width),
        });
        // The axis is made for what follows the fall from an untrained model, and of that not for single spikes.
        const whole = low === 0 && high === 1;
        const from = whole && this.spec.settle && values.length > 2 ? Math.ceil(values.length / 20) : start;
        this.settled.push(...(limits(values.slice(from, end)) ?? []));
      }
    });
    return tables;
  }

  #options(tables) {
    const { color, log } = this.view;
    const muted = color("--muted");
    const font = `12px ${getComputedStyle(this.place).fontFamily}`;
    const axis = { stroke: muted, font, grid: { stroke: color("--line"), width: 1 }, ticks: { show: false } };
    const format = (value) => (this.spec.share ? `${short(value * 100)} %` : short(value));
    return {
      ...this.#size(),
      padding: [LABELS, 8, 0, 0],
      legend: { show: false },
      cursor: {
        y: false,
        points: { show: false },
        drag: { x: true, y: false, setScale: false },
        bind: { dblclick: () => () => this.view.onzoom(null) },
      },
      scales: {
        x: { time: false, auto: false, range: (_, low, high) => [low, high] },
        y: { auto: false, distr: log ? 3 : 1, range: (_, low, high) => [low, high] },
      },
      axes: [
        {
          ...axis,
          size: 28,
          gap: 4,
          splits: () => this.#ticks().map(({ x }) => x),
          values: () => this.#ticks().map(({ step }) => short(step)),
        },
        {
          ...axis,
          size: 52,
          gap: 4,
          values: (_, splits) => splits.map((value) => (value === null ? "" : format(value))),
        },
      ],
      series: [{}, ...tables.flatMap((table) => this.#series(table))],
      hooks: {
        setCursor: [(plot) => this.#onCursor(plot)],
        setSelect: [(plot) => this.#onSelect(plot)],
        drawAxes: [(plot) => this.#drawStages(plot)],
      },
    };
  }

  #series({ band, line, points, columns }) {
    const name = this.spec.lines.length > 1 ? `--series-${(line % COLORS) + 1}` : (STAGE_COLORS[band.stage] ?? "--series-5");
    const stroke = this.view.color(name);
    const plain = { stroke, spanGaps: false, points: { show: false } };
    if (points) return [{ ...plain, width: 1.5, points: { size: 7, stroke, fill: stroke } }];
    return columns.length === 1
      ? [{ ...plain, width: 2 }]
      : [
          { ...plain, width: 1, alpha: 0.35 },
          { ...plain, width: 2 },
        ];
  }

  #ticks() {
    const [low, high] = this.#range();
    const width = this.#size().width - 60;
    return this.bands.flatMap(({ from, width: share, last }, i) => {
      const start = Math.max(0, ((low - from) / share) * last);
      const end = Math.min(last, ((high - from) / share) * last);
      if (end < start) return [];
      const pixels = (((end - start) / last) * share * width) / (high - low);
      const steps = ticks(start, end, pixels / 64);
      return steps.filter((step) => i === 0 || step > 0).map((step) => ({ x: from + (step / last) * share, step }));
    });
  }

  /** A line where a stage begins, and its name. */
  #drawStages(plot) {
    if (this.bands.length < 2) return;
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, 0, bbox.width, bbox.top + bbox.height);
    ctx.clip();
    ctx.font = `${11 * devicePixelRatio}px ${getComputedStyle(this.place).fontFamily}`;
    ctx.strokeStyle = this.view.color("--muted");
    ctx.lineWidth = devicePixelRatio;
    ctx.textAlign = "left";
    ctx.setLineDash([2 * devicePixelRatio, 3 * devicePixelRatio]);
    this.bands.forEach(({ stage, from, width }, i) => {
      const x = Math.round(plot.valToPos(from - GAP / 2, "x", true));
      if (i > 0) {
        ctx.beginPath();
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
      }
      const room = plot.valToPos(from + width, "x", true) - x;
      if (ctx.measureText(stage).width + 8 * devicePixelRatio < room) {
        ctx.fillStyle = this.view.color(STAGE_COLORS[stage] ?? "--muted");
        ctx.textBaseline = "top";
        ctx.fillText(stage, Math.max(x, bbox.left) + 6 * devicePixelRatio, bbox.top - (LABELS - 3) * devicePixelRatio);
      }
    });
    ctx.restore();
  }

  #setScales() {
    const [low, high] = this.#range();
    this.plot.setScale("x", { min: low, max: high });
    let [least, most] = this.settled.length ? [Math.min(...this.settled), Math.max(...this.settled)] : [0, 1];
    if (this.view.log) {
      const range = most / least;
      [least, most] =
        least > 0 ? [least / Math.max(1.05, range ** 0.06), most * Math.max(1.05, range ** 0.06)] : [0.001, 1];
    } else {
      const margin = 0.08 * (most - least) || Math.abs(most) * 0.1 || 0.1;
      [least, most] = [this.spec.zero && least >= 0 ? 0 : least - margin, most + margin];
    }
    this.plot.setScale("y", { min: least, max: most });
  }

  /** The part of the axis that is shown, from 0 to 1. */
  #range() {
    const { zoom, stages } = this.view;
    if (!zoom) return [0, 1];
    const order = ({ stage }) => stages.indexOf(stage);
    const x = (point, otherwise) => {
      const band = this.bands.find(({ stage }) => stage === point.stage);
      return band ? band.from + Math.min(1, point.step / band.last) * band.width : otherwise;
    };
    const later = this.bands.find((band) => order(band) > order(zoom.from));
    const earlier = this.bands.findLast((band) => order(band) < order(zoom.to));
    const [low, high] = [x(zoom.from, later?.from ?? 1), x(zoom.to, earlier ? earlier.from + earlier.width : 0)];
    return high - low > 1e-6 ? [low, high] : [0, 1];
  }

  /** The point of the axis at x. */
  #pointAt(x) {
    const band = this.bands.find(({ from, width }) => x <= from + width + GAP / 2) ?? this.bands[this.bands.length - 1];
    return { stage: band.stage, step: Math.min(1, Math.max(0, (x - band.from) / band.width)) * band.last };
  }

  #size() {
    return { width: Math.max(120, this.place.clientWidth), height: this.place.clientHeight || 220 };
  }

  #resize() {
    const size = this.#size();
    if (!this.plot || (this.plot.width === size.width && this.plot.height === size.height)) return;
    this.plot.setSize(size);
  }

  #onCursor(plot) {
    const { left } = plot.cursor;
    this.view.onpoint(left >= 0 ? this.#pointAt(plot.posToVal(left, "x")) : null);
  }

  #onSelect(plot) {
    const { left, width } = plot.select;
    if (width < 6) return;
    const [from, to] = [left, left + width].map((position) => this.#pointAt(plot.posToVal(position, "x")));
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.view.onzoom({ from, to });
  }

  #onKey(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") this.view.onpoint(null);
    if (!move || !this.plot) return;
    event.preventDefault();
    const width = this.plot.bbox.width / devicePixelRatio;
    const now = Math.max(0, this.plot.cursor.left ?? 0) + move * (event.shiftKey ? 40 : 6);
    this.view.onpoint(this.#pointAt(this.plot.posToVal(Math.min(width, Math.max(0, now)), "x")));
  }

  /** Writes the values nearest to a point, or the last ones. */
  #read(point) {
    const stage = point?.stage ?? this.bands[this.bands.length - 1].stage;
    const wanted = point?.step ?? Infinity;
    const pieces = [];
    let shown = null;
    this.spec.lines.forEach(({ name, label }, i) => {
      const curve = this.view.records.curve(stage, name);
      if (!curve?.steps.length) return;
      const after = Math.min(place(curve.steps, wanted), curve.steps.length - 1);
      const at = after > 0 && wanted - curve.steps[after - 1] < curve.steps[after] - wanted ? after - 1 : after;
      shown = Math.max(shown ?? 0, curve.steps[at]);
      const value = curve.values[at];
      const text = Number.isNaN(value) ? "not finite" : this.spec.share ? `${digits(value * 100)} %` : precise(value);
      const several = this.spec.lines.length > 1;
      const key = several
        ? element("i", { class: `key series-${(i % COLORS) + 1}` })
        : element("i", { class: `key stage-${stage}` });
      pieces.push(element("span", {}, key, several ? `${label} ` : "", element("b", {}, text)));
    });
    const where = `${stage} ${shown === null ? "" : shown.toLocaleString("en")}`;
    this.readout.replaceChildren(element("span", { class: "where" }, where), ...pieces);
  }

  #describe() {
    this.#read(null);
    this.remark.hidden = this.notFinite === 0;
    this.remark.textContent = `${this.notFinite.toLocaleString("en")} ${this.notFinite === 1 ? "value is" : "values are"} not finite: gaps in the line.`;
    this.place.setAttribute(
      "aria-label",
      `${this.spec.title}, ${this.spec.unit}. Last: ${this.readout.textContent}. Arrow keys read other steps.`,
    );
  }
}

/** The columns of tables over one x. Where a table has no value it is undefined, which is no gap. */
function aligned(tables) {
  const overlap = tables.some(({ line }) => line > 0);
  if (overlap) return uPlot.join(tables.map(({ x, columns }) => [x, ...columns]));
  const all = [[]];
  for (const { x, columns } of tables) {
    const before = all[0].length;
    all[0].push(...x);
    all.push(...columns.map((column) => [...new Array(before), ...column]));
  }
  return all.map((column) => Object.assign(column, { length: all[0].length }));
}
