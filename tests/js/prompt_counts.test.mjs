import assert from "node:assert/strict";
import test from "node:test";

import { countLines, parseCounts } from "../../web/prompt_counts.js";

const WHOLE = { encoder: "T5", used: 120, limit: 512, cut: "" };
const CUT = { encoder: "CLIP-L", used: 77, limit: 77, cut: "at <b>dusk</b>" };

test("an encoder that read everything says how much of its room that took", () => {
  assert.deepEqual(countLines([WHOLE]), [{ head: "T5 read 120 of 512 tokens", cut: "" }]);
});

test("an encoder that ran out of room hands over the text it did not read, unchanged", () => {
  assert.deepEqual(countLines([CUT]), [
    { head: "CLIP-L is full at 77 tokens and did not read:", cut: "at <b>dusk</b>" },
  ]);
});

test("counts come as objects, as JSON texts, or as one JSON text of the list", () => {
  assert.deepEqual(parseCounts([WHOLE, CUT]), [WHOLE, CUT]);
  assert.deepEqual(parseCounts([JSON.stringify(WHOLE), JSON.stringify(CUT)]), [WHOLE, CUT]);
  assert.deepEqual(parseCounts([JSON.stringify([WHOLE, CUT])]), [WHOLE, CUT]);
});

test("what is no count is left out", () => {
  assert.deepEqual(parseCounts(undefined), []);
  assert.deepEqual(parseCounts([null, 3, "{", { encoder: "T5" }, WHOLE]), [WHOLE]);
});
