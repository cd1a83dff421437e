// @ts-check
/**
 * What the text encoders read of a prompt, as lines to show. Pure: no page, no ComfyUI.
 *
 * @typedef {{encoder: string, used: number, limit: number, cut: string}} TokenCount
 * @typedef {{head: string, cut: string}} CountLine
 */

/**
 * Read the ui key `glassbox_text`.
 *
 * @param {unknown} value a list with one count per encoder, or the JSON text of it
 * @returns {TokenCount[]} what of it can be read
 */
export function parseCounts(value) {
  if (!Array.isArray(value)) return [];
  return value.flatMap((item) => (typeof item === "string" ? parseJson(item) : item)).filter(isCount);
}

/**
 * One line per encoder; `cut` is the end of the prompt which it did not read.
 *
 * @param {TokenCount[]} counts
 * @returns {CountLine[]}
 */
export function countLines(counts) {
  return counts.map(({ encoder, used, limit, cut }) => ({
    head: cut
      ? `${encoder} is full at ${limit} tokens and did not read:`
      : `${encoder} read ${used} of ${limit} tokens`,
    cut,
  }));
}

/** @param {unknown} count */
function isCount(count) {
  if (typeof count !== "object" || count === null) return false;
  const { encoder, used, limit, cut } = /** @type {Record<string, unknown>} */ (count);
  return (
    typeof encoder === "string" &&
    typeof used === "number" &&
    typeof limit === "number" &&
    typeof cut === "string"
  );
}

/** @param {string} text */
function parseJson(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
