// A client in Node.js that knows teacher.proto and FORMAT.md and nothing of the Python packages.
//
// node client.mjs ADDRESS FOLDER-OF-PROTOS < questions.json > answers.json
//
// A question: {name, sequences: [[id, ...], ...], targets: {...}, and any other field of ScoreRequest}.
// "id_table": true in its targets stands for the teacher's own table.

import { readFileSync } from "node:fs";
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import { createXXHash128 } from "hash-wasm";
import { decode, readTable } from "./container.mjs";

const [address, protos] = process.argv.slice(2);
const hasher = await createXXHash128();
const xxh3 = (bytes) => Buffer.from(hasher.init().update(bytes).digest("binary"));

function fail(what) {
  throw new Error(what);
}

// Integers of fixed size, little-endian.
function u8(value) {
  return Buffer.from([value]);
}
function u32(value) {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
}
function i32(value) {
  const bytes = Buffer.alloc(4);
  bytes.writeInt32LE(value);
  return bytes;
}
function u64(value) {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt(value));
  return bytes;
}
function counted(value) {
  const bytes = Buffer.from(value ?? "");
  return Buffer.concat([u32(bytes.length), bytes]);
}

// The canonical bytes of a message: see teacher.proto. fields: [number, kind, value], ascending.
function canonical(fields) {
  const varint = (value) => {
    const bytes = [];
    for (let rest = BigInt(value); ; rest >>= 7n) {
      if (rest < 128n) return Buffer.from([...bytes, Number(rest)]);
      bytes.push(Number(rest & 127n) | 128);
    }
  };
  const tagged = (number, type, bytes) => Buffer.concat([varint(8 * number + type), bytes]);
  const sized = (number, bytes) => tagged(number, 2, Buffer.concat([varint(bytes.length), bytes]));
  const parts = fields.map(([number, kind, value]) => {
    if (kind === "message") return value === undefined ? Buffer.alloc(0) : sized(number, value);
    if (kind === "bytes") return value?.length ? sized(number, Buffer.from(value)) : Buffer.alloc(0);
    if (kind === "packed") {
      return value?.length ? sized(number, Buffer.concat(value.map(varint))) : Buffer.alloc(0);
    }
    if (!Number(value ?? 0)) return Buffer.alloc(0);
    if (kind === "varint") return tagged(number, 0, varint(value));
    const bytes = Buffer.alloc(8);
    bytes.writeDoubleLE(value);
    return tagged(number, 1, bytes);
  });
  return Buffer.concat(parts);
}

function canonicalRequest(r) {
  const t = r.targets;
  const targets = canonical([
    [
      ...[1, "message"],
      t.top_k &&
        canonical([
          [1, "varint", t.top_k.k],
          [2, "double", t.top_k.min_p],
          [3, "varint", t.top_k.bits],
          [4, "double", t.top_k.top_p],
        ]),
    ],
    [2, "message", t.dense && canonical([[1, "varint", t.dense.bits]])],
    [3, "message", t.sampled && canonical([[1, "varint", t.sampled.n]])],
    [6, "varint", t.omit_realized_logprob ? 1 : 0],
    [7, "varint", t.entropy ? 1 : 0],
    [8, "varint", t.omit_log_z ? 1 : 0],
    [9, "bytes", t.id_table],
  ]);
  return canonical([
    [1, "bytes", r.session_id],
    [2, "varint", r.request_id],
    [3, "bytes", r.token_ids],
    [4, "packed", r.lengths],
    [5, "packed", r.first_rows],
    [6, "bytes", r.row_mask],
    [7, "message", targets],
    [8, "double", r.temperature],
    [9, "varint", r.seed],
    [10, "varint", r.epoch],
    [11, "varint", r.level],
    [12, "bytes", r.teacher_fingerprint],
    [13, "varint", r.item_id],
  ]);
}

function verify(request, response) {
  const { part, error } = response;
  const asked = xxh3(canonicalRequest(request));
  let check, full;
  if (error) {
    const place = (value) => Buffer.concat([u8(value === undefined ? 0 : 1), u32(value ?? 0)]);
    const numbers = [i32(error.code ?? 0), u64(error.retry_after_ms ?? 0)];
    check = [...numbers, Buffer.from(error.reason ?? ""), Buffer.from(error.message ?? "")];
    full = [u8(3), ...numbers, place(error.sequence), place(error.row)];
    full.push(counted(error.reason), counted(error.message), counted(error.field));
  } else {
    const timing = part.timing ?? {};
    const where = [part.sequence, part.first_row, part.num_rows].map((n) => u32(n ?? 0));
    check = [...where, u8(part.last ? 1 : 0), part.payload.subarray(-16)];
    full = [u8(2), ...check];
    for (const name of ["queue_us", "forward_us", "head_us", "encode_us"]) full.push(u64(timing[name] ?? 0));
    full.push(u32(timing.batch_sequences ?? 0), u32(timing.batch_tokens ?? 0));
    full.push(counted(part.ids_digest), counted(part.teacher_fingerprint));
  }
  if (!xxh3(Buffer.concat([asked, ...check])).equals(response.check)) fail("check differs");
  if (!xxh3(Buffer.concat([asked, ...full])).equals(response.full_check)) fail("full_check differs");
}

const base64 = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength).toString("base64");

function shown(decoded) {
  const flat = (rows) => base64(Int32Array.from(rows.flat()));
  return {
    kind: decoded.header.kind,
    id_coding: decoded.header.idCoding,
    temperature: decoded.header.temperature,
    row_lengths: decoded.ids?.map((row) => row.length),
    ids: decoded.ids && flat(decoded.ids),
    counts: decoded.counts && flat(decoded.counts),
    ...Object.fromEntries(
      ["logprobs", "tail", "realized", "entropy", "logZ"]
        .filter((name) => decoded[name])
        .map((name) => [name, base64(decoded[name])]),
    ),
  };
}

const definition = loader.loadSync("protos/teacher.proto", {
  includeDirs: [protos],
  keepCase: true,
  longs: String,
  oneofs: true,
});
const { Teacher } = grpc.loadPackageDefinition(definition).logitstream.v1;
const client = new Teacher(address, grpc.credentials.createInsecure());
const ask = (method, message) =>
  new Promise((resolve, reject) =>
    client[method](message, (error, answer) => (error ? reject(error) : resolve(answer))),
  );

const info = await ask("Describe", {});
const tables = {};
for (const digest of info.id_tables ?? []) {
  const { data } = await ask("FetchIdTable", { digest });
  const table = readTable(data, xxh3);
  if (table.digest !== digest.toString("hex")) fail("another table came");
  tables[table.digest] = table;
}

const requests = {};
const answers = {};
JSON.parse(readFileSync(0, "utf8")).forEach(({ name, sequences, ...rest }, index) => {
  const targets = { ...rest.targets };
  if (targets.id_table) targets.id_table = info.id_tables[0];
  if (rest.row_mask) rest.row_mask = Buffer.from(rest.row_mask);
  const request = {
    ...rest,
    request_id: String(index + 1),
    token_ids: Buffer.from(Int32Array.from(sequences.flat()).buffer),
    lengths: sequences.map((ids) => ids.length),
    teacher_fingerprint: info.teacher_fingerprint,
    targets,
  };
  requests[request.request_id] = { name, sequences, request };
  answers[name] = { parts: [], error: null, done: false };
});

const call = client.Score();
const ended = new Promise((resolve, reject) => {
  call.on("data", (response) => {
    try {
      const { name, sequences, request } = requests[response.request_id];
      verify(request, response);
      const answer = answers[name];
      if (answer.done) fail(`${name} has ended before`);
      const { part, error } = response;
      answer.done = Boolean(error ?? part.last);
      if (error) {
        answer.error = { code: error.code, reason: error.reason, field: error.field };
        return;
      }
      const sequence = part.sequence ?? 0;
      const ids = Buffer.from(Int32Array.from(sequences[sequence]).buffer);
      if (!xxh3(ids).equals(part.ids_digest)) fail("ids_digest differs");
      if (part.teacher_fingerprint !== info.teacher_fingerprint) fail("another teacher");
      const decoded = decode(part.payload, tables, xxh3);
      if (decoded.header.rows !== part.num_rows) fail("num_rows differs");
      answer.parts.push({
        sequence,
        first_row: part.first_row ?? 0,
        payload: part.payload.toString("base64"),
        ...shown(decoded),
      });
    } catch (error) {
      reject(error);
      call.cancel();
    }
  });
  call.on("error", reject);
  call.on("end", resolve);
});
for (const { request } of Object.values(requests)) call.write(request);
call.end(); // half-closed: the service answers what is outstanding and ends the stream
await ended;
client.close();
process.stdout.write(
  JSON.stringify({
    info: {
      teacher_fingerprint: info.teacher_fingerprint,
      vocab_size: info.vocab_size,
      format_versions: info.format_versions,
      max_part_bytes: info.limits.max_part_bytes,
    },
    tables: Object.keys(tables),
    answers,
  }),
);
