// Line charts: drawn by uPlot, which is loaded when the first of them comes into view.
import { html, useEffect, useRef, useState } from "../vendor/preact.js";
import { path } from "../router.js";
import { isDark, language, theme } from "../state/preferences.js";
import { t } from "../i18n/texts.js";
import { Later } from "../ui/later.js";

const HEIGHT = 240;
const EPOCH_STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000];

/** @type {Promise<any> | undefined} */
let library;

function load() {
  if (!library) {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = "/console/vendor/uplot.css";
    document.head.append(style);
    library = import("../vendor/uplot.js").then((module) => module.default);
  }
  return library;
}

/** @param {string} name */
const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Resolves light-dark(), which a canvas does not know. @param {string} name */
function color(name) {
  const text = token(name);
  const pair = text.match(/^light-dark\(([^,]+),\s*([^)]+)\)$/);
  return pair ? pair[isDark() ? 2 : 1].trim() : text;
}

/** Exponential smoothing as TensorBoard does it, without its bias at the start. */
function smoothed(/** @type {(number | null)[]} */ values, /** @type {number} */ weight) {
  if (!weight) return values;
  let last = 0;
  let seen = 0;
  return values.map((value) => {
    if (value === null || !Number.isFinite(value)) return null;
    last = last * weight + (1 - weight) * value;
    seen += 1;
    return last / (1 - weight ** seen);
  });
}

/**
 * @typedef {{label: string, x: number[], y: number[], dashed?: boolean, tone?: number}} Line
 * @param {{title: string, name?: string, lines: Line[], xLabel: string, xRange?: [number, number], yRange?: [number, number],
 *   smoothing?: number}} props `name` is what its zoom is kept under, in any language
 */
export function Chart({ title, name = title, lines, xLabel, xRange, yRange, smoothing = 0 }) {
  const place = useRef(/** @type {any} */ (null));
  const plot = useRef(/** @type {any} */ (null));
  const [seen, setSeen] = useState(false);
  const [table, setTable] = useState(false);
  const [hidden, setHidden] = useState(/** @type {string[]} */ ([]));
  const [at, setAt] = useState(/** @type {number | null} */ (null));
  const [zoom, setZoom] = useZoom(`${path.value} ${name}`);
  // A page is drawn with every step of a training, its charts with every epoch.
  const inputs = [smoothing, ...lines.flatMap((line) => [line.x, line.y])];
  const aligned = useRef({ inputs: /** @type {any[]} */ ([]), data: /** @type {any} */ (null) });
  if (inputs.length !== aligned.current.inputs.length || inputs.some((one, index) => one !== aligned.current.inputs[index])) {
    aligned.current = { inputs, data: align(lines, smoothing) };
  }
  const { data } = aligned.current;
  const names = lines.map((line) => line.label).join("\n");

  useEffect(() => {
    const observer = new IntersectionObserver(([entry]) => entry.isIntersecting && setSeen(true));
    observer.observe(place.current);
    return () => observer.disconnect();
  }, []);

  // A plot is made again when its lines or its colours change, and only filled when their values do.
  useEffect(() => {
    if (!seen || table) return undefined;
    let gone = false;
    /** @type {HTMLElement} */
    const element = place.current;
    /** @type {ResizeObserver} */
    let observer;
    load().then((UPlot) => {
      if (gone) return;
      plot.current = new UPlot(options({ lines, xRange, yRange, hidden, zoom, onZoom: setZoom, onMove: setAt, width: element.clientWidth }), data, element);
      observer = new ResizeObserver(() => plot.current?.setSize({ width: element.clientWidth, height: HEIGHT }));
      observer.observe(element);
    });
    return () => {
      gone = true;
      observer?.disconnect();
      plot.current?.destroy();
      plot.current = null;
    };
  }, [seen, table, names, hidden.join("\n"), theme.value, language.value]);

  useEffect(() => {
    plot.current?.setData(data, !zoom);
    if (zoom) plot.current?.setScale("x", { min: zoom[0], max: zoom[1] }); // draws what setData does not
  }, [data]);
  const whole = () => {
    setZoom(null);
    plot.current?.setData(data);
  };

  const index = at ?? data[0].length - 1;
  return html`<figure class="chart">
    <figcaption class="row spread">
      <h3>${title}</h3>
      <span>
        ${zoom && !table && html`<button type="button" class="link small" onClick=${whole}>${t("chart.whole")}</button>`}
        <button type="button" class="link small" aria-pressed=${table} onClick=${() => setTable(!table)}>
          ${t(table ? "chart.asChart" : "chart.asTable")}
        </button>
      </span>
    </figcaption>
    ${table
      ? html`<${Later} load=${() => import("./chart_table.js")} name="Values" lines=${lines} data=${data} xLabel=${xLabel} />`
      : html`<div class="plot" ref=${place} role="img" aria-label=${t("chart.of", { title })}></div>`}
    <div class="legend row small">
      <span class="muted number">${xLabel} ${data[0].length ? data[0][index] : "–"}</span>
      ${lines.map(
        (line, position) => html`<button
          type="button"
          class="link"
          aria-pressed=${!hidden.includes(line.label)}
          onClick=${() =>
            setHidden(hidden.includes(line.label) ? hidden.filter((one) => one !== line.label) : [...hidden, line.label])}
        >
          <svg width="14" height="10" aria-hidden="true">
            <line class=${`series-${line.tone ?? position + 1} ${line.dashed ? "dashed" : ""}`} x1="0" y1="5" x2="14" y2="5" />
          </svg>
          ${line.label} <span class="number muted">${short(data[position + 1][index])}</span>
        </button>`,
      )}
    </div>
  </figure>`;
}

/**
 * What a chart shows of its x axis, if not all: kept while new values come, and when the page is loaded again.
 *
 * @param {string} name
 * @returns {[[number, number] | null, (range: [number, number] | null) => void]}
 */
function useZoom(name) {
  const key = `detflow.zoom ${name}`;
  const [zoom, setZoom] = useState(() => JSON.parse(sessionStorage.getItem(key) ?? "null"));
  return [
    zoom,
    (range) => {
      if (range) sessionStorage.setItem(key, JSON.stringify(range));
      else sessionStorage.removeItem(key);
      setZoom(range);
    },
  ];
}

/** Puts lines on one axis. @param {Line[]} lines @param {number} smoothing @returns {any} */
function align(lines, smoothing) {
  const xs = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const columns = lines.map((line) => {
    const values = new Map(line.x.map((x, index) => [x, line.y[index]]));
    return smoothed(
      xs.map((x) => values.get(x) ?? null),
      smoothing,
    );
  });
  return [xs, ...columns];
}

/** @param {any} wanted */
function options({ lines, xRange, yRange, hidden, zoom, onZoom, onMove, width }) {
  const axis = {
    stroke: color("--ink-2"),
    grid: { stroke: color("--line"), width: 1 },
    ticks: { show: false },
    font: `11px ${token("--font")}`,
  };
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    padding: [8, 8, 0, 0],
    scales: { x: { time: false, range: xRange ? () => xRange : undefined }, y: yRange ? { range: () => yRange } : {} },
    // Without a range of its own the x axis counts epochs, which are whole.
    axes: [{ ...axis, size: 28, incrs: xRange ? undefined : EPOCH_STEPS }, { ...axis, size: 48 }],
    cursor: { y: false, points: { size: 6 }, drag: { x: !xRange, y: false } },
    series: [
      {},
      ...lines.map((/** @type {Line} */ line, /** @type {number} */ index) => ({
        label: line.label,
        show: !hidden.includes(line.label),
        stroke: color(`--series-${((line.tone ?? index + 1) - 1) % 6 + 1}`),
        dash: line.dashed ? [5, 4] : undefined,
        width: 1.5,
        points: { show: line.x.length < 3, size: 5 },
        spanGaps: true,
      })),
    ],
    hooks: {
      setCursor: [(/** @type {any} */ plot) => onMove(plot.cursor.idx ?? null)],
      // A stretch was marked with the pointer; a double click shows all of it again.
      setSelect: [(/** @type {any} */ plot) => plot.select.width && onZoom([plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")])],
      ready: [
        (/** @type {any} */ plot) => {
          if (zoom) plot.setScale("x", { min: zoom[0], max: zoom[1] });
          plot.over.addEventListener("dblclick", () => onZoom(null));
        },
      ],
    },
  };
}

/** @param {number | null | undefined} value */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 10_000) ? value.toExponential(1) : String(Number(value.toPrecision(4)));
}
