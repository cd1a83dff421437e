// @ts-check
/**
 * The two read-only widgets: each is an element that shows the result of the node's last run.
 * Text of users and of servers goes in as text, never as markup.
 */

import { countLines, parseCounts } from "./prompt_counts.js";
import { layoutSequence, parseReport } from "./sequence.js";

/**
 * A view of one ui key: `show` draws the key's value and returns the height it needs, in px.
 *
 * @typedef {{element: HTMLElement, show: (values: unknown) => number}} View
 */

/** @returns {View} */
export function sequenceView() {
  const element = tag("section", { class: "glassbox-view", "aria-label": "Token sequence" });
  const show = (/** @type {unknown} */ values) => {
    const report = Array.isArray(values) ? parseReport(values[0]) : null;
    if (!report) {
      element.replaceChildren(
        tag("p", { class: "glassbox-hint" }, "Run the graph to see the sequence."),
      );
      return 40;
    }
    const layout = layoutSequence(report);
    const notes = layout.notes.map((note) => tag("p", { class: "glassbox-hint" }, note));
    element.replaceChildren(bar(layout), table(layout), ...notes);
    return 76 + 22 * Math.min(layout.rows.length, 8) + 44 * notes.length;
  };
  show(undefined);
  return { element, show };
}

/** @returns {View} */
export function countsView() {
  const element = tag("section", { class: "glassbox-view", "aria-label": "Tokens of the prompt" });
  const show = (/** @type {unknown} */ values) => {
    const lines = countLines(parseCounts(values));
    element.hidden = lines.length === 0;
    element.replaceChildren(
      ...lines.map(({ head, cut }) =>
        cut
          ? tag("p", { class: "glassbox-cut", tabindex: "0" }, `${head} `, tag("del", {}, cut))
          : tag("p", {}, head),
      ),
    );
    return lines.reduce((height, line) => height + (line.cut ? 60 : 20), lines.length ? 12 : 0);
  };
  show(undefined);
  return { element, show };
}

/** @param {import("./sequence.js").Layout} layout */
function bar({ boxes, summary }) {
  const parts = boxes.map(({ kind, left, width, label, title }) => {
    const part = tag("span", { class: `glassbox-box glassbox-${kind}`, title }, label);
    part.style.left = `${left * 100}%`;
    part.style.width = `${width * 100}%`;
    return part;
  });
  return tag("div", { class: "glassbox-bar", role: "img", "aria-label": summary }, ...parts);
}

/** @param {import("./sequence.js").Layout} layout */
function table({ rows, total }) {
  const cells = (/** @type {string} */ name, /** @type {string[]} */ texts) =>
    texts.map((text) => tag(name, name === "th" ? { scope: "col" } : {}, text));
  const body = rows.map(({ kind, name, count, share, grid, ids }) =>
    tag(
      "tr",
      {},
      tag("th", { scope: "row", class: `glassbox-key glassbox-key-${kind}` }, name),
      ...cells("td", [count, share, grid, ids]),
    ),
  );
  return tag(
    "div",
    { class: "glassbox-rows", tabindex: "0", role: "group", "aria-label": "Segments" },
    tag(
      "table",
      {},
      tag("thead", {}, tag("tr", {}, ...cells("th", ["segment", `tokens (${total})`, "share", "grid", "ids"]))),
      tag("tbody", {}, ...body),
    ),
  );
}

/**
 * @param {string} name
 * @param {Record<string, string>} attributes
 * @param {(Node | string)[]} children
 */
function tag(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}
