// An Atoll node in JavaScript, written from docs/protocol.md (version 2) and docs/plan.md: logistic regression on a CSV file.
//     node client.mjs URL --data FILE [--name NAME] [--dir DIR] [--plan DIGEST] [--token TOKEN]

import { createHash, createPrivateKey, createPublicKey, generateKeyPairSync, sign } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as pause } from "node:timers/promises";
import { parseArgs } from "node:util";
import { io } from "socket.io-client";

const PROTOCOL = 2;
const AGAIN = [408, 416, 429]; // refusals of this moment; any other status from 400 to 499 is meant for good
class Refused extends Error {}
const refuse = (why) => { throw new Refused(why); };
const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");
const canonical = (value) => JSON.stringify(value, Object.keys(value).sort());
const hexFloat = (value) => (value < 0 ? "-0x" : "0x") + Math.abs(value).toString(16); // exact: the base is a power of two

// ---- Who this node is
function identity(directory) {
  const path = join(directory, "node.pem");
  mkdirSync(directory, { recursive: true });
  const made = () => generateKeyPairSync("ed25519").privateKey.export({ type: "pkcs8", format: "pem" });
  if (!existsSync(path)) writeFileSync(path, made(), { mode: 0o600 });
  const secret = createPrivateKey(readFileSync(path));
  const key = Buffer.from(createPublicKey(secret).export({ format: "jwk" }).x, "base64url");
  return { key, node: sha256(key).slice(0, 32), sign: (text) => sign(null, Buffer.from(text), secret) };
}

// What a one-time token signs: it is the seed of a key, and never leaves this machine. The bytes before it are PKCS #8's (RFC 8410).
function proof(token, text) {
  const seed = createHash("sha256").update(`atoll token ${token}`).digest();
  const der = Buffer.concat([Buffer.from("302e020100300506032b657004220420", "hex"), seed]);
  return sign(null, Buffer.from(text), createPrivateKey({ key: der, format: "der", type: "pkcs8" })).toString("hex");
}

// ---- HTTP
async function patiently(act, seconds, until = Date.now() + 1000 * seconds) {
  for (let wait = 250; ; wait = Math.min(2 * wait, 30000)) {
    try { return await act(); } catch (error) {
      if (error instanceof Refused || Date.now() + wait > until) throw error;
      console.error(`${error.cause?.message ?? error.message}; trying again`);
      await pause(wait);
    }
  }
}

async function get(url, digest) {
  const answer = await fetch(url);
  if (!answer.ok) throw new (answer.status < 500 ? Refused : Error)(`${url}: HTTP ${answer.status}`);
  const bytes = Buffer.from(await answer.arrayBuffer());
  if (digest && sha256(bytes) !== digest) refuse(`${url}: what came has another digest: it was altered on the way`);
  return bytes;
}

async function append(server, header, body) {
  const envelope = JSON.parse(header);
  const url = `${server}/v1/runs/${envelope.run}/rounds/${envelope.round}/${envelope.attempt}/updates/${envelope.node}`;
  const there = await fetch(url, { method: "HEAD", headers: { "Atoll-Envelope": header } });
  const start = Number(there.headers.get("Upload-Offset") ?? 0);
  if (start >= body.length) return envelope;
  const range = start ? { "Content-Range": `bytes ${start}-${body.length - 1}/${body.length}` } : {};
  const headers = { "Atoll-Envelope": header, "Content-Type": "application/octet-stream", ...range };
  const answer = await fetch(url, { method: "PUT", headers, body: body.subarray(start) });
  if (answer.ok) return envelope;
  const said = (await answer.json().catch(() => ({}))).error ?? `HTTP ${answer.status}`;
  throw new (answer.status >= 500 || AGAIN.includes(answer.status) ? Error : Refused)(said);
}

// ---- Models and updates: safetensors files
function unpack(bytes, inputs) {
  const start = 8 + Number(bytes.readBigUInt64LE(0));
  const { __metadata__, ...tensors } = JSON.parse(bytes.subarray(8, start));
  const right = (name, size) => tensors[name]?.dtype === "F64" && String(tensors[name].shape) === String(size);
  if (!right("parameters/kernel", inputs) || !right("parameters/bias", 1) || bytes.length !== start + 8 * (inputs + 1))
    refuse(`this is no logistic model of ${inputs} inputs: ${JSON.stringify(tensors)}`);
  return { tensors, theta: Float64Array.from({ length: inputs + 1 }, (_, k) => bytes.readDoubleLE(start + 8 * k)) };
}

function pack(tensors, metadata, values) {
  const text = JSON.stringify({ __metadata__: metadata, ...tensors });
  const header = Buffer.from(text.padEnd(Math.ceil(text.length / 8) * 8)); // the text is ASCII: names and numbers only
  const body = Buffer.alloc(8 + header.length + 8 * values.length);
  body.writeBigUInt64LE(BigInt(header.length), 0);
  header.copy(body, 8);
  values.forEach((value, k) => body.writeDoubleLE(value, 8 + header.length + 8 * k));
  return body;
}

// ---- Rows, as the plan's [data] says
function readRows(path, data) {
  const lines = readFileSync(path, "utf8").replace(/^\ufeff/, "").split(/\r?\n/).filter(Boolean);
  const table = lines.map((line) => line.split(",").map((word) => word.trim())); // plain commas, no quotes
  const names = data.columns ?? table.shift();
  const place = (name) =>
    names.includes(name) ? names.indexOf(name) : refuse(`${path}: has no column '${name}'; there are: ${names.join(", ")}`);
  const same = (word, kind) => (typeof kind === "string" ? word === kind : word !== "" && Number(word) === kind);
  const number = (word, name) =>
    word !== "" && Number.isFinite(Number(word)) ? Number(word) : refuse(`${path}: column '${name}': '${word}' is no number`);
  const code = (word, name, kinds) => {
    if (!kinds) return [number(word, name)];
    if (!kinds.some((kind) => same(word, kind))) refuse(`${path}: column '${name}': '${word}' is no category`);
    return kinds.slice(1).map((kind) => Number(same(word, kind)));
  };
  const used = [...data.features, data.target].map(place);
  const rows = { train: [], test: [] };
  for (const words of table) {
    const picked = used.map((at) => words[at]);
    if (picked.some((word) => data.missing.includes(word))) continue;
    const last = picked.pop();
    const y = data.positive ? Number(data.positive.some((kind) => same(last, kind))) : number(last, data.target);
    if (y !== 0 && y !== 1) refuse(`${path}: column '${data.target}': '${y}' is neither 0 nor 1`);
    const x = picked.flatMap((word, k) => code(word, data.features[k], data.categories[data.features[k]]));
    rows[data.split ? words[place(data.split)] : "train"].push({ x, y });
  }
  const { train, test } = rows;
  for (const k of data.standardise === "node" ? train[0].x.keys() : []) {
    const mean = train.reduce((sum, { x }) => sum + x[k], 0) / train.length;
    const deviation = Math.sqrt(train.reduce((sum, { x }) => sum + (x[k] - mean) ** 2, 0) / (train.length - 1)) + 1e-9;
    for (const { x } of [...train, ...test]) x[k] = (x[k] - mean) / deviation;
  }
  return { train, judge: test.length ? test : train };
}

// ---- Logistic regression by mini-batch SGD
const logit = (theta, x) => x.reduce((sum, value, k) => sum + value * theta[k], theta[x.length]);
const crossEntropy = (z, y) => Math.max(z, 0) + Math.log1p(Math.exp(-Math.abs(z))) - y * z;

function evaluate(theta, rows) {
  const z = rows.map(({ x }) => logit(theta, x));
  const count = (wanted) => rows.filter(({ y }, k) => wanted(y === 1, z[k] >= 0)).length;
  return {
    samples: rows.length,
    loss: rows.reduce((sum, { y }, k) => sum + crossEntropy(z[k], y), 0),
    correct: count((y, said) => y === said),
    true_positive: count((y, said) => y && said),
    false_positive: count((y, said) => !y && said),
    false_negative: count((y, said) => y && !said),
  };
}

function fit(start, rows, { steps, epochs, batch_size: size, learning_rate: rate }) {
  const theta = Float64Array.from(start);
  let left = steps ?? (epochs ?? 1) * Math.ceil(rows.length / size);
  while (left > 0) {
    const drawn = rows.map((row) => ({ row, lot: Math.random() })).sort((a, b) => a.lot - b.lot).map(({ row }) => row);
    for (let from = 0; from < drawn.length && left > 0; from += size, left--) {
      const batch = drawn.slice(from, from + size);
      const pulls = batch.map(({ x, y }) => (rate * (1 / (1 + Math.exp(-logit(theta, x))) - y)) / batch.length);
      batch.forEach(({ x }, row) => [...x, 1].forEach((value, k) => (theta[k] -= pulls[row] * value)));
    }
  }
  return theta;
}

// ---- The node
// What a plan may ask of this client, with its defaults; [plan], [cohort], [checks] and [stopping] are the server's business.
const KNOWN = {
  model: { logistic: false, inputs: null, classes: [0, 1] },
  data: { features: null, target: null, columns: null, positive: null, split: null, standardise: "no",
          categories: {}, missing: [""] },
  training: { epochs: null, steps: null, batch_size: 32, optimizer: "sgd", learning_rate: 0.01 },
  aggregation: { rule: "fedavg" }, log: { prefix: null },
};
function asked({ cohort, checks, stopping, ...sections }) {
  const keys = Object.entries(sections).flatMap(([section, keys]) => Object.keys(keys).map((key) => [section, key]));
  const unknown = keys.find(([section, key]) => !(key in (KNOWN[section] ?? {})));
  if (unknown) refuse(`this client doesn't know what the plan asks: ${unknown.join(".")}`);
  const [model, data, training, aggregation] = Object.keys(KNOWN).map((name) => ({ ...KNOWN[name], ...sections[name] }));
  const can = model.logistic && data.features && training.optimizer === "sgd" && aggregation.rule === "fedavg";
  if (!can) refuse("this client can only take part in plans with logistic = true, data.features, sgd and fedavg");
  if (!["no", "node"].includes(data.standardise)) refuse(`this client doesn't know standardise = "${data.standardise}"`);
  return { columns: data, training, patience: cohort?.deadline ?? 600 };
}

function update(me, task, digest, training, rows, bytes) {
  const { tensors, theta } = unpack(bytes, rows.train[0].x.length);
  const fitted = fit(theta, rows.train, training);
  const metrics = JSON.stringify(evaluate(theta, rows.judge), (key, value) => (key ? hexFloat(value) : value));
  const said = { atoll: "1", model: task.model, weight: hexFloat(rows.train.length), metrics };
  const body = pack(tensors, said, fitted.map((value, k) => value - theta[k]));
  const address = { run: task.run, round: task.round, attempt: task.attempt, node: me.node };
  const envelope = { v: 1, ...address, plan: digest, digest: sha256(body), size: body.length };
  const seal = { key: me.key.toString("base64"), signature: me.sign(canonical(envelope)).toString("base64") };
  return { header: canonical({ ...envelope, ...seal }), body };
}

async function main({ values: { data, name: called, dir, plan: agreed, token }, positionals: [server] }) {
  const me = identity(dir);
  const { protocol, run, digest } = JSON.parse(await patiently(() => get(`${server}/v1/plan`), 300));
  if (protocol !== PROTOCOL) refuse(`${server} speaks protocol ${protocol}, this client ${PROTOCOL}`);
  if (agreed && agreed !== digest) refuse(`${server} runs plan ${digest}, not ${agreed}`);
  const { plan: about, ...plan } = JSON.parse(await get(`${server}/v1/plans/${digest}`, digest));
  const { columns, training, patience } = asked(plan);
  const rows = readRows(data, columns);
  console.log(`plan ${about.name}: ${about.rounds} rounds; ${rows.train.length} training rows here`);
  const name = called ?? `node-${me.node.slice(0, 8)}`;
  const key = me.key.toString("hex");
  const auth = async (give) => { // before each connection anew: a challenge is good for one
    const { challenge } = JSON.parse(await patiently(() => get(`${server}/v1/plan`), patience).catch(() => "{}"));
    const text = `atoll connect ${PROTOCOL} ${run} ${digest} ${name} ${key} ${challenge}`;
    const signature = me.sign(text).toString("hex");
    give({ v: PROTOCOL, name, key, plan: digest, challenge, signature, proof: token ? proof(token, text) : "" });
  };
  const socket = io(`${server}/fl`, { transports: ["websocket"], auth });
  const say = (event, fields) => socket.timeout(10000).emitWithAck(event, { v: PROTOCOL, run, ...fields }).catch(() => null);
  const kept = ({ run, round, attempt }) => join(dir, `update-${run}-${round}-${attempt}`);
  let current = null;
  socket.on("connection_received", (said) => console.log(`connected: run ${said.run}, round ${said.round}`));
  socket.on("start_training", async (task) => {
    const { round, attempt } = (current = task);
    const send = async () => {
      const [note, file] = [`${kept(task)}.json`, `${kept(task)}.safetensors`];
      const bytes = existsSync(note) || (await get(`${server}/v1/models/${task.model}`, task.model));
      if (current !== task) return; // another task has taken its place
      if (!existsSync(note)) { // made once: another body under the same address would be refused
        const made = update(me, task, digest, training, rows, bytes);
        writeFileSync(file, made.body);
        writeFileSync(note, made.header);
      }
      const sent = await append(server, readFileSync(note, "utf8"), readFileSync(file));
      console.log(`round ${round}: sent ${sent.size} bytes`);
      say("fl_update", { round, attempt, digest: sent.digest });
    };
    await patiently(send, task.deadline).catch(({ message }) => {
      console.error(`round ${round}: ${message}`);
      say("decline", { round, attempt, reason: message });
    });
  });
  socket.on("slowed", ({ reason }) => console.error(`the server slows this node: ${reason}`));
  socket.on("verdict", (verdict) => {
    ["json", "safetensors"].forEach((ending) => rmSync(`${kept(verdict)}.${ending}`, { force: true }));
    if (!verdict.accepted) console.log(`round ${verdict.round}: the update doesn't count: ${verdict.reason}`);
  });
  const end = await new Promise((resolve, reject) => {
    let away;
    const lost = (error) => (away ??= setTimeout(() => reject(error), 1000 * patience));
    socket.on("connect", () => (away = clearTimeout(away)));
    const again = () => socket.active || setTimeout(() => socket.connect(), 1000); // not active: it hung up
    socket.on("connect_error", (error) => { // active: the library tries again
      if (!socket.active && !error.data?.again) return reject(error);
      lost(error);
      again();
    });
    socket.on("disconnect", (why) => lost(new Error(`the server stayed away (${why})`)));
    socket.on("disconnect", again);
    socket.once("end_session", resolve);
  });
  const bytes = end.model && (await patiently(() => get(`${server}/v1/models/${end.model}`, end.model), 60));
  const metrics = bytes ? evaluate(unpack(bytes, rows.train[0].x.length).theta, rows.judge) : {};
  if (bytes) writeFileSync(join(dir, "final.safetensors"), bytes);
  await say("session_ended", { metrics });
  console.log(`${end.outcome}: ${end.reason}${bytes ? `; ${metrics.correct} of ${metrics.samples} rows here are right` : ""}`);
  return end.outcome === "gave_up" ? 3 : 0;
}

try {
  const text = { type: "string" };
  const options = { data: text, name: text, plan: text, dir: { ...text, default: "atoll-node" } };
  options.token = { ...text, default: process.env.ATOLL_JOIN_TOKEN };
  const words = parseArgs({ options, allowPositionals: true });
  if (!words.values.data || words.positionals.length !== 1)
    refuse("usage: node client.mjs URL --data FILE [--name NAME] [--dir DIR] [--plan DIGEST] [--token TOKEN]");
  process.exit(await main(words));
} catch (error) {
  console.error(`error: ${error.message}${error.cause ? ` (${error.cause.message})` : ""}`);
  process.exit(2);
}
