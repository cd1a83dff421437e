// @ts-check
/** The pack's one extension: shows what a node reported, on the node, after each run. */

import { app } from "../../scripts/app.js";
import { keepResult, keptResult } from "./results.js";
import { countsView, sequenceView } from "./widgets.js";

/** Node id → the key of its ui output, the view that shows it, and the widgets it is about. */
const SHOWN = {
  GlassboxInspectTokens: {
    key: "glassbox_tokens",
    view: sequenceView,
    of: [],
    fillsNode: true,
    width: 440,
  },
  GlassboxEncodeText: {
    key: "glassbox_text",
    view: countsView,
    of: ["prompt", "prompt_2", "t5_tokens"],
    fillsNode: false,
    width: 0,
  },
};

/** What the classic canvas leaves free above and below an element, in px together. */
const MARGIN = 20;

/** @type {WeakMap<object, (values: unknown) => void>} what draws on which node */
const draws = new WeakMap();

/** @param {any} node */
function shownOn(node) {
  return SHOWN[/** @type {keyof SHOWN} */ (node.constructor?.comfyClass ?? node.type)];
}

/**
 * Height of the widget on the classic canvas; a view with nothing to show takes none.
 *
 * @param {number} content height of the view, in px
 */
function room(content) {
  return content ? content + MARGIN : 0;
}

/**
 * Give a node its widget and let each of its runs draw on it.
 *
 * @param {any} node
 */
function addView(node) {
  const shown = shownOn(node);
  if (!shown) return;
  const { element, show } = shown.view();
  let height = room(show(undefined));
  const widget = node.addDOMWidget(shown.key, shown.key, element, {
    getMinHeight: () => height,
    ...(shown.fillsNode ? {} : { getMaxHeight: () => height }),
    hideOnZoom: false,
    hideInPanel: true, // the element exists once: the side panel would take it off the node
    serialize: false, // not for the prompt
  });
  widget.serialize = false; // nor for the workflow, whose widget values are positional
  node.setSize([Math.max(node.size[0], shown.width), node.size[1]]);

  draws.set(node, (values) => {
    const content = show(values);
    height = room(content);
    element.style.minHeight = `${content}px`; // Nodes 2.0 goes by the element itself
    const [width, needed] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], needed)]);
    node.setDirtyCanvas(true, true);
  });
  // What was read of the old text says nothing about the new one.
  for (const input of node.widgets.filter((/** @type {any} */ { name }) => shown.of.includes(name))) {
    const callback = input.callback;
    input.callback = function () {
      draws.get(node)?.(undefined);
      return callback?.apply(this, arguments);
    };
  }

  const onExecuted = node.onExecuted;
  node.onExecuted = function (/** @type {any} */ output) {
    onExecuted?.apply(this, arguments);
    if (output && shown.key in output) {
      keepResult(sessionStorage, this, output[shown.key]);
      draws.get(this)?.(output[shown.key]);
    }
  };
}

/**
 * Show again what a node of a loaded graph showed before.
 *
 * @param {any} node
 */
function restoreView(node) {
  if (!shownOn(node)) return;
  const values = keptResult(sessionStorage, node);
  if (values !== undefined) draws.get(node)?.(values);
}

app.registerExtension({
  name: "glassbox.results",
  setup() {
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = new URL("./glassbox.css", import.meta.url).href;
    document.head.append(link);
  },
  nodeCreated: addView,
  loadedGraphNode: restoreView,
});
