// @grpc/grpc-js against the gateways of conftest.py: a client in another language, with a gRPC stack of its own.
// Run by test_clients.py with the addresses as JSON; whatever is wrong is an exception.
"use strict";

const assert = require("node:assert/strict");
const fs = require("node:fs");
const { createRequire } = require("node:module");

const where = JSON.parse(process.argv[2]);
const installed = createRequire(where.modules);
const grpc = installed("@grpc/grpc-js");
const protoLoader = installed("@grpc/proto-loader");

const OPTIONS = { keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true };
const ANSWER = "Noun: a person who is harbor of a woman.";
const MESSAGES = [{ role: "user", content: 'What does "harbor" mean?' }];
const GREEDY = { model: "demo", messages: MESSAGES, sampling: { temperature: 0 } };
const ENDLESS = { model: "demo", messages: MESSAGES, sampling: { ignore_eos: true, max_tokens: 6000 } };
const DEADLINE_MS = 60000;

const ours = grpc.loadPackageDefinition(protoLoader.loadSync(where.proto, OPTIONS));
// What comes with gRPC itself: health, reflection, and the messages of error details.
const common = protoLoader.loadFileDescriptorSetFromBuffer(fs.readFileSync(where.descriptors), OPTIONS);
const theirs = grpc.loadPackageDefinition(common);

const CREDENTIALS = where.authority
  ? grpc.credentials.createSsl(fs.readFileSync(where.authority))
  : grpc.credentials.createInsecure();

function client(Service, target, credentials = CREDENTIALS) {
  return new Service(target, credentials);
}

function metadata(key) {
  const sent = new grpc.Metadata();
  sent.set("authorization", `Bearer ${key}`);
  return sent;
}

const at = {};
for (const [name, target] of Object.entries(where.targets)) {
  at[name] = client(ours.eightfold.v1.InferenceService, target);
}
const KEY = metadata(where.key);

function later(milliseconds = DEADLINE_MS) {
  return { deadline: Date.now() + milliseconds };
}

function unary(stub, method, request, sent = KEY, options = later()) {
  return new Promise((resolve, reject) => {
    stub[method](request, sent, options, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

async function streamed(stub, method, request, sent = KEY, options = later()) {
  const call = stub[method](request, sent, options);
  let initial = null;
  call.on("metadata", (received) => (initial = received));
  const ended = new Promise((resolve) => call.on("status", resolve));
  const events = [];
  for await (const event of call) events.push(event);
  return { events, initial, status: await ended };
}

async function refusal(code, work) {
  let error = null;
  try {
    await work();
  } catch (caught) {
    error = caught;
  }
  assert.equal(error && error.code, code, error ? error.message : "was not refused");
  return error;
}

/** The messages of a status' details, by their short names. */
function details(error) {
  const read = (type, bytes) => common[type].deserialize(bytes);
  const status = read("google.rpc.Status", error.metadata.get("grpc-status-details-bin")[0]);
  assert.equal(status.message, error.details);
  return Object.fromEntries(
    status.details.map((detail) => {
      const type = detail.type_url.split("/").pop();
      return [type.split(".").pop(), read(type, detail.value)];
    }),
  );
}

const checks = {
  async models() {
    const { models } = await unary(at.open, "Models", {});
    assert.deepEqual([models.length, models[0].id, models[0].context_length], [1, "demo", 8192]);
  },

  async tokenize() {
    const text = "def read(path):";
    const { token_ids } = await unary(at.open, "Tokenize", { model: "demo", text });
    assert.ok(token_ids.length > 1);
    const again = await unary(at.open, "Tokenize", { model: "demo", token_ids: { ids: token_ids } });
    assert.equal(again.text, text);
  },

  async chat() {
    const { events, initial, status } = await streamed(at.open, "Chat", GREEDY);
    assert.equal(events.map((event) => (event.delta ? event.delta.content : "")).join(""), ANSWER);
    assert.deepEqual(events.slice(-2).map((event) => event.event), ["finish", "usage"]);
    assert.equal(events.at(-2).finish.reason, "FINISH_REASON_STOP");
    assert.equal(events.at(-1).usage.prompt_tokens, 13);
    assert.equal(events.at(-1).usage.completion_tokens, 15);
    assert.match(initial.get("x-request-id")[0], /^req_/);
    assert.equal(status.code, grpc.status.OK);
  },

  async generate() {
    const sampling = { temperature: 1.5, max_tokens: 8, n: 2, seed: 11, logprobs: 2 };
    const request = { model: "demo", text: "def read(path):", sampling };
    const ids = async () => {
      const { events } = await streamed(at.open, "Generate", request);
      assert.equal(events.at(-1).usage.completion_tokens, 16);
      const tokens = (choice) =>
        events.filter((e) => e.delta && e.delta.choice === choice).flatMap((e) => e.delta.tokens);
      assert.ok(tokens(0).every((token) => token.logprob <= 0 && token.top_logprobs.length === 2));
      return [0, 1].map((choice) => tokens(choice).map((token) => token.id));
    };
    const first = await ids();
    assert.deepEqual(await ids(), first);
    assert.notDeepEqual(first[0], first[1]);
  },

  async stop() {
    const request = { ...GREEDY, sampling: { temperature: 0, stop: ["person"] } };
    const { events } = await streamed(at.open, "Chat", request);
    assert.equal(events.map((event) => (event.delta ? event.delta.content : "")).join(""), "Noun: a ");
  },

  async tools() {
    const tool = { name: "weather", parameters_json: '{"type": "object", "properties": {}}' };
    const { events } = await streamed(at.tools, "Chat", { ...GREEDY, tools: [tool] });
    const pieces = events.flatMap((event) => (event.delta ? event.delta.tool_calls : []));
    const args = pieces.map((piece) => piece.arguments).join("");
    assert.deepEqual([pieces[0].name, JSON.parse(args)], ["weather", { city: "Cork" }]);
    assert.equal(events.at(-2).finish.reason, "FINISH_REASON_TOOL_CALLS");
    const call = { id: pieces[0].id, name: "weather", arguments: args };
    const messages = [
      ...MESSAGES,
      { role: "assistant", tool_calls: [call] },
      { role: "tool", content: "rain", tool_call_id: call.id },
    ];
    const told = await streamed(at.tools, "Chat", {
      ...GREEDY, messages, tools: [tool], sampling: { temperature: 0, max_tokens: 4 },
    });
    assert.ok(told.events.at(-1).usage.prompt_tokens > events.at(-1).usage.prompt_tokens);
  },

  async health() {
    const stub = client(theirs.grpc.health.v1.Health, where.targets.open);
    for (const service of ["", "eightfold.v1.InferenceService"]) {
      const { status } = await unary(stub, "Check", { service }, new grpc.Metadata());
      assert.equal(status, "SERVING");
    }
    await refusal(grpc.status.NOT_FOUND, () => unary(stub, "Check", { service: "nobody" }));
    stub.close();
  },

  /** A client that has nothing but the address: it learns the service by reflection and then calls it. */
  async reflection() {
    for (const version of ["v1", "v1alpha"]) {
      const Definition = theirs.grpc.reflection.v1alpha.ServerReflection.service.ServerReflectionInfo;
      const path = Definition.path.replace("v1alpha", version);
      const Service = grpc.makeGenericClientConstructor({ Info: { ...Definition, path } }, "Reflection");
      const stub = client(Service, where.targets.open);
      const call = stub.Info(KEY, later());
      call.write({ file_containing_symbol: "eightfold.v1.InferenceService" });
      call.end();
      const files = [];
      for await (const answer of call) files.push(...answer.file_descriptor_response.file_descriptor_proto);
      stub.close();
      const set = Buffer.concat(files.map((file) => Buffer.concat([Buffer.from([10]), varint(file.length), file])));
      const learnt = grpc.loadPackageDefinition(protoLoader.loadFileDescriptorSetFromBuffer(set, OPTIONS));
      const found = client(learnt.eightfold.v1.InferenceService, where.targets.open);
      assert.equal((await unary(found, "Models", {})).models[0].id, "demo");
      found.close();
    }
  },

  async "a deadline"() {
    const error = await refusal(grpc.status.DEADLINE_EXCEEDED, () =>
      streamed(at.open, "Chat", ENDLESS, KEY, later(500)),
    );
    assert.ok(error);
  },

  async "a cancelled call"() {
    const call = at.open.Chat(ENDLESS, KEY, later());
    await refusal(grpc.status.CANCELLED, async () => {
      for await (const event of call) if (event.delta) call.cancel();
    });
  },

  /** Where the gateway speaks TLS, who does not is cut off, and so is who does not trust it. */
  async "a stranger's channel"() {
    if (!where.authority) return;
    for (const credentials of [grpc.credentials.createInsecure(), grpc.credentials.createSsl()]) {
      const stub = client(ours.eightfold.v1.InferenceService, where.targets.open, credentials);
      await refusal(grpc.status.UNAVAILABLE, () => unary(stub, "Models", {}));
      stub.close();
    }
  },

  async "error details"() {
    const bad = { ...GREEDY, sampling: { temperature: 3 } };
    const wrong = details(await refusal(grpc.status.INVALID_ARGUMENT, () => streamed(at.open, "Chat", bad)));
    assert.equal(wrong.BadRequest.field_violations[0].field, "sampling.temperature");
    assert.deepEqual([wrong.ErrorInfo.reason, wrong.ErrorInfo.domain], ["INVALID_VALUE", "eightfold"]);
    assert.match(wrong.RequestInfo.request_id, /^req_/);
    const unknown = await refusal(grpc.status.NOT_FOUND, () =>
      streamed(at.open, "Chat", { ...GREEDY, model: "gpt" }),
    );
    assert.equal(details(unknown).ErrorInfo.reason, "MODEL_NOT_FOUND");
    const full = await refusal(grpc.status.UNAVAILABLE, () => streamed(at.draining, "Chat", GREEDY));
    assert.ok(details(full).RetryInfo.retry_delay.seconds >= 1);
    assert.ok(Number(full.metadata.get("grpc-retry-pushback-ms")[0]) >= 1000);
    const late = await refusal(grpc.status.DEADLINE_EXCEEDED, () => streamed(at.hasty, "Chat", ENDLESS));
    assert.equal(details(late).ErrorInfo.reason, "TIMEOUT");
    await refusal(grpc.status.UNAUTHENTICATED, () => unary(at.open, "Models", {}, metadata("nobody")));
  },
};

/** A length as protobuf writes it. */
function varint(number) {
  const bytes = [];
  for (; number > 127; number >>>= 7) bytes.push((number & 127) | 128);
  return Buffer.from([...bytes, number]);
}

async function main() {
  for (const [name, check] of Object.entries(checks)) {
    await check();
    console.log(name, "ok");
  }
  for (const stub of Object.values(at)) stub.close();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
