// @ts-check
/**
 * The last result of each node, kept for this browser tab, so that a reload shows it again.
 * It is a result and no part of the graph: saved workflows hold nothing of it.
 */

/**
 * Remember what a node showed.
 *
 * @param {Storage} storage
 * @param {{id: number | string, graph?: {id?: string} | null}} node
 * @param {unknown} values
 */
export function keepResult(storage, node, values) {
  const key = resultKey(node);
  if (!key) return;
  try {
    storage.setItem(key, JSON.stringify(values));
  } catch (error) {
    // A full or forbidden storage costs the drawing after a reload, nothing else.
    if (!(error instanceof DOMException)) throw error;
  }
}

/**
 * What the node showed last, or undefined.
 *
 * @param {Storage} storage
 * @param {{id: number | string, graph?: {id?: string} | null}} node
 * @returns {unknown}
 */
export function keptResult(storage, node) {
  const key = resultKey(node);
  const text = key ? storage.getItem(key) : null;
  return text === null ? undefined : JSON.parse(text);
}

/** @param {{id: number | string, graph?: {id?: string} | null}} node */
function resultKey(node) {
  const graph = node.graph?.id;
  return graph ? `glassbox:${graph}:${node.id}` : null;
}
