// @ts-check
/**
 * The sequence the transformer reads, laid out: what `GlassboxInspectTokens` reports becomes boxes
 * to scale, table rows and one sentence. Pure: no page, no ComfyUI.
 *
 * @typedef {"text" | "target" | "reference"} Kind
 * @typedef {{kind: Kind, name: string, count: number, grid: [number, number] | null,
 *   ids: [string, number, number][]}} Segment
 * @typedef {{segments: Segment[], total: number, notes?: string[]}} Report
 * @typedef {{kind: Kind, left: number, width: number, label: string, title: string}} Box
 * @typedef {{kind: Kind, name: string, count: string, share: string, grid: string, ids: string}} Row
 * @typedef {{boxes: Box[], rows: Row[], total: string, summary: string, notes: string[]}} Layout
 */

const KINDS = ["text", "target", "reference"];

/**
 * Read one value of the ui key `glassbox_tokens`.
 *
 * @param {unknown} value a JSON text or what it parses to
 * @returns {Report | null} null when it is no report: a newer or older pack wrote it
 */
export function parseReport(value) {
  const report = typeof value === "string" ? parseJson(value) : value;
  if (!isRecord(report) || !Array.isArray(report.segments)) return null;
  if (!report.segments.every(isSegment)) return null;
  const segments = /** @type {Segment[]} */ (report.segments);
  const notes = Array.isArray(report.notes) ? report.notes.filter((note) => typeof note === "string") : [];
  return { segments, total: sum(segments.map((segment) => segment.count)), notes };
}

/**
 * Lay the sequence out to scale; lefts and widths are fractions of the whole.
 *
 * @param {Report} report
 * @returns {Layout}
 */
export function layoutSequence(report) {
  const total = Math.max(report.total, 1);
  let start = 0;
  const boxes = report.segments.map((segment) => {
    const box = {
      kind: segment.kind,
      left: start / total,
      width: segment.count / total,
      label: `${segment.name} ${segment.count}`,
      title: describeSegment(segment),
    };
    start += segment.count;
    return box;
  });
  const rows = report.segments.map((segment) => ({
    kind: segment.kind,
    name: segment.name,
    count: String(segment.count),
    share: formatShare(segment.count / total),
    grid: segment.grid ? `${segment.grid[0]} × ${segment.grid[1]}` : "–",
    ids: segment.ids.map(formatRange).join(", ") || "–",
  }));
  const notes = report.notes ?? [];
  return { boxes, rows, total: String(report.total), summary: summarise(report), notes };
}

/**
 * The whole drawing as one sentence, for who does not see it.
 *
 * @param {Report} report
 */
export function summarise(report) {
  if (!report.segments.length) return "An empty sequence.";
  const parts = report.segments.map((segment) => describeSegment(segment));
  return `A sequence of ${report.total} tokens: ${parts.join("; ")}.`;
}

/** @param {Segment} segment */
function describeSegment(segment) {
  const grid = segment.grid ? `, ${segment.grid[0]} rows by ${segment.grid[1]} columns` : "";
  const ids = segment.ids.length ? `, ${segment.ids.map(formatRange).join(", ")}` : "";
  return `${segment.name}, ${segment.count} tokens${grid}${ids}`;
}

/** @param {[string, number, number]} range */
export function formatRange([axis, low, high]) {
  return low === high
    ? `${axis} ${formatNumber(low)}`
    : `${axis} ${formatNumber(low)} to ${formatNumber(high)}`;
}

/** @param {number} value */
function formatNumber(value) {
  return Number.isInteger(value) ? String(value) : String(Number(value.toFixed(2)));
}

/** @param {number} fraction */
function formatShare(fraction) {
  const percent = fraction * 100;
  return percent > 0 && percent < 1 ? "< 1 %" : `${Math.round(percent)} %`;
}

/** @param {unknown} segment */
function isSegment(segment) {
  return (
    isRecord(segment) &&
    KINDS.includes(String(segment.kind)) &&
    typeof segment.name === "string" &&
    typeof segment.count === "number" &&
    segment.count >= 0 &&
    (segment.grid === null || isPair(segment.grid)) &&
    Array.isArray(segment.ids) &&
    segment.ids.every((range) => Array.isArray(range) && range.length === 3)
  );
}

/** @param {unknown} value */
function isPair(value) {
  return Array.isArray(value) && value.length === 2;
}

/**
 * @param {unknown} value
 * @returns {value is Record<string, unknown>}
 */
function isRecord(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** @param {string} text */
function parseJson(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** @param {number[]} values */
function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}
