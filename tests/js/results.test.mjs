import assert from "node:assert/strict";
import test from "node:test";

import { keepResult, keptResult } from "../../web/results.js";

function storage(limit = Infinity) {
  const items = new Map();
  return {
    getItem: (key) => items.get(key) ?? null,
    setItem: (key, value) => {
      if (value.length > limit) throw new DOMException("full", "QuotaExceededError");
      items.set(key, value);
    },
  };
}

test("a node gets back its own result and no other node's", () => {
  const kept = storage();
  keepResult(kept, { id: 3, graph: { id: "a" } }, ["x"]);
  assert.deepEqual(keptResult(kept, { id: 3, graph: { id: "a" } }), ["x"]);
  assert.equal(keptResult(kept, { id: 4, graph: { id: "a" } }), undefined);
  assert.equal(keptResult(kept, { id: 3, graph: { id: "b" } }), undefined);
});

test("a node outside any graph keeps nothing", () => {
  const kept = storage();
  keepResult(kept, { id: -1, graph: null }, ["x"]);
  assert.equal(keptResult(kept, { id: -1, graph: null }), undefined);
});

test("a full storage costs the memory, not the run", () => {
  const kept = storage(2);
  keepResult(kept, { id: 3, graph: { id: "a" } }, ["long"]);
  assert.equal(keptResult(kept, { id: 3, graph: { id: "a" } }), undefined);
});
