import assert from "node:assert/strict";
import test from "node:test";

import { formatRange, layoutSequence, parseReport } from "../../web/sequence.js";

const TEXT = { kind: "text", name: "text", count: 512, grid: null, ids: [["index", 0, 0]] };
const TARGET = {
  kind: "target",
  name: "target",
  count: 4096,
  grid: [64, 64],
  ids: [["index", 0, 0], ["row", 0, 63], ["column", 0, 63]],
};
const REFERENCE = {
  kind: "reference",
  name: "reference 1",
  count: 4608,
  grid: [72, 64],
  ids: [["index", 1, 1], ["row", 0, 71], ["column", 64.5, 127.5]],
};
const REPORT = { segments: [TEXT, TARGET, REFERENCE], total: 9216 };

test("boxes lie end to end and fill the bar to scale", () => {
  const { boxes } = layoutSequence(REPORT);
  assert.deepEqual(boxes.map((box) => box.left), [0, 512 / 9216, 4608 / 9216]);
  assert.deepEqual(boxes.map((box) => box.width), [512 / 9216, 4096 / 9216, 0.5]);
  assert.equal(boxes.reduce((width, box) => width + box.width, 0), 1);
});

test("rows tell count, share, grid and id ranges", () => {
  const { rows, total } = layoutSequence(REPORT);
  assert.equal(total, "9216");
  assert.deepEqual(rows[0], {
    kind: "text", name: "text", count: "512", share: "6 %", grid: "–", ids: "index 0",
  });
  assert.deepEqual(rows[2], {
    kind: "reference", name: "reference 1", count: "4608", share: "50 %", grid: "72 × 64",
    ids: "index 1, row 0 to 71, column 64.5 to 127.5",
  });
});

test("notes are what the server wrote, and only text", () => {
  const { notes } = parseReport({ ...REPORT, notes: ["references see themselves alone", 7, null] });
  assert.deepEqual(notes, ["references see themselves alone"]);
  assert.deepEqual(layoutSequence({ ...REPORT, notes }).notes, notes);
  assert.deepEqual(layoutSequence(REPORT).notes, []);
  assert.deepEqual(parseReport(REPORT).notes, []);
});

test("the summary says in words what the boxes show", () => {
  assert.equal(
    layoutSequence({ segments: [TEXT, TARGET], total: 4608 }).summary,
    "A sequence of 4608 tokens: text, 512 tokens, index 0; target, 4096 tokens, 64 rows by " +
      "64 columns, index 0, row 0 to 63, column 0 to 63.",
  );
});

test("a segment too small to see has a share below one percent, not zero", () => {
  const tiny = { ...TEXT, count: 1 };
  assert.equal(layoutSequence({ segments: [tiny, TARGET], total: 4097 }).rows[0].share, "< 1 %");
});

test("a hundred references are laid out, each after the one before", () => {
  const references = Array.from({ length: 100 }, (_, i) => ({ ...REFERENCE, name: `reference ${i + 1}` }));
  const { boxes, rows } = layoutSequence(parseReport({ segments: references, total: 460800 }));
  assert.equal(rows.length, 100);
  assert.ok(boxes.every((box, i) => i === 0 || box.left > boxes[i - 1].left));
});

test("an empty sequence has no boxes and no division by zero", () => {
  const layout = layoutSequence(parseReport({ segments: [], total: 0 }));
  assert.deepEqual(layout.boxes, []);
  assert.equal(layout.summary, "An empty sequence.");
});

test("a report is read from JSON text, and its total is counted, not believed", () => {
  const report = parseReport(JSON.stringify({ segments: [TEXT, TARGET], total: 1 }));
  assert.equal(report?.total, 4608);
});

test("what is no report is refused, not drawn wrong", () => {
  for (const value of [
    undefined, null, "", "{", "[]", 7, {}, { segments: {} },
    { segments: [{ ...TEXT, kind: "sound" }] },
    { segments: [{ ...TEXT, count: -1 }] },
    { segments: [{ ...TEXT, name: 3 }] },
    { segments: [{ ...TEXT, ids: [["row", 0]] }] },
    { segments: [{ ...TARGET, grid: [1, 2, 3] }] },
  ]) {
    assert.equal(parseReport(value), null);
  }
});

test("a range of one value is written as that value", () => {
  assert.equal(formatRange(["row", 0, 0]), "row 0");
  assert.equal(formatRange(["row", -1.239, 2]), "row -1.24 to 2");
});
