// Against the gateway that tests/contract/test_typescript.py runs; it knows what each name does.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { readFileSync, rmSync, writeFileSync } from "node:fs";
import { test } from "node:test";

import { Code, DetflowError, createClient } from "@detflow/client";

const baseUrl = process.env.DETFLOW_URL;
const name = (what) => `projects/p/versions/v/trainings/${what}`;

async function cursors(watch) {
  const seen = [];
  for await (const message of watch) seen.push(message.cursor);
  return seen;
}

const failure = async (promise) => {
  const error = await promise.then(() => undefined, (thrown) => thrown);
  assert.ok(error instanceof DetflowError, `not a DetflowError: ${error}`);
  return error;
};

for (const json of [false, true]) {
  const client = createClient({ baseUrl, json });

  test(`calls are answered (json: ${json})`, async () => {
    const { models } = await client.trainer.listModels({});
    assert.equal(models[0].numParameters, 3_000_000n);
  });

  test(`a stored failure keeps its details (json: ${json})`, async () => {
    const training = await client.trainer.getTraining({ name: name("failed") });
    assert.equal(training.failure.status.details.length, 1);
  });

  test(`errors have their reason, facts and violations (json: ${json})`, async () => {
    const error = await failure(client.trainer.getTraining({ name: name("wrong") }));
    assert.equal(error.code, Code.InvalidArgument);
    assert.equal(error.reason, "WRONG");
    assert.equal(error.facts.training, "t");
    assert.deepEqual(error.violations, [{ field: "name", reason: "BAD", description: "say another" }]);
  });

  test(`a watch goes on behind where it was cut (json: ${json})`, async () => {
    assert.deepEqual(await cursors(client.watch.training(name(`cut-${json}`))), ["1", "2", "3", "4"]);
  });

  test(`a watch whose place has expired begins again (json: ${json})`, async () => {
    const watch = client.watch.training(name("expired"), { cursor: "old" });
    assert.deepEqual(await cursors(watch), ["1"]);
  });

  test(`a watch fails with what the service says (json: ${json})`, async () => {
    const error = await failure(cursors(client.watch.training(name("gone"))));
    assert.deepEqual([error.code, error.reason], [Code.NotFound, "GONE"]);
  });
}

test("a watch ends when its signal is aborted", async () => {
  const client = createClient({ baseUrl });
  const stop = new AbortController();
  const watch = client.watch.training(name("endless"), { signal: stop.signal });
  assert.equal((await watch.next()).value.cursor, "1");
  stop.abort();
  assert.equal((await failure(watch.next())).code, Code.Canceled);
});

test("a process that leaves a watch is not kept alive by its connection", () => {
  const file = "test/leaving.tmp.mjs";
  const code = `import { createClient } from "@detflow/client";
    const client = createClient({ baseUrl: process.env.DETFLOW_URL });
    for await (const message of client.watch.training("${name("endless")}")) break;`;
  writeFileSync(file, code);
  try {
    execFileSync(process.execPath, [file], { timeout: 15_000 });
  } finally {
    rmSync(file);
  }
});

test("a token is shown with every call and every watch", async () => {
  const shown = async (client) => (await client.trainer.getTraining({ name: name("shown") })).model;
  assert.equal(await shown(createClient({ baseUrl })), "nobody");
  const client = createClient({ baseUrl, token: "dfk_key" });
  assert.equal(await shown(client), "Bearer dfk_key");
  assert.deepEqual(await cursors(client.watch.training(name("shown"))), ["Bearer dfk_key"]);
  let number = 0;
  const renewing = createClient({ baseUrl, token: async () => `renewed-${++number}` });
  assert.equal(await shown(renewing), "Bearer renewed-1");
  assert.equal(await shown(renewing), "Bearer renewed-2");
});

test("a token does not go over a network unencrypted", () => {
  const there = { baseUrl: "http://gpu-server:7100", token: "dfk_key" };
  assert.throws(() => createClient(there), /https:\/\/, or set insecure/);
  assert.ok(createClient({ ...there, insecure: true }));
  assert.ok(createClient({ ...there, baseUrl: "https://gpu-server:7100" }));
  assert.ok(createClient({ baseUrl: there.baseUrl }));
});

test("where nobody listens is said at once", async () => {
  const client = createClient({ baseUrl: "http://127.0.0.1:9" });
  const error = await failure(cursors(client.watch.training(name("t"))));
  assert.equal(error.reason, "");
});

test("the examples of the README run", () => {
  const examples = readFileSync("README.md", "utf8").matchAll(/```js\n(.*?)```/gs);
  const outputs = [];
  for (const [number, [, code]] of [...examples].entries()) {
    const file = `test/example-${number}.tmp.mjs`;
    writeFileSync(file, code);
    try {
      outputs.push(execFileSync(process.execPath, [file], { encoding: "utf8" }));
    } finally {
      rmSync(file);
    }
  }
  assert.equal(outputs[0], "YOLOv8n\n");
  assert.match(outputs[1], /^epoch 3: 50 %\nstate \d+\n$/);
  assert.match(outputs[2], /^InvalidArgument [A-Z_]+ .+\nname /s);
});
