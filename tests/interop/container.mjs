// The targets container and the id table's file, read as logit_codec/FORMAT.md describes them.
//
// decode(bytes, tables, xxh3) -> an object of typed arrays; xxh3(bytes) is XXH3-128 as a Buffer.

const HEADER_BYTES = 56;
const DIGEST_BYTES = 16;

function need(fine, what) {
  if (!fine) throw new Error(`refused: ${what}`);
}

function bitsOf(x) {
  return x === 0 ? 0 : 32 - Math.clz32(x); // x is below 2^32
}

// A string of bits, the least significant bit of each byte first.
class Bits {
  constructor(bytes, name) {
    this.bytes = bytes;
    this.name = name;
    this.at = 0;
  }

  next(width) {
    need(this.at + width <= 8 * this.bytes.length, `${this.name} ends`);
    let value = 0;
    for (let bit = 0; bit < width; bit++, this.at++) {
      if ((this.bytes[this.at >> 3] >> (this.at & 7)) & 1) value += 2 ** bit;
    }
    return value;
  }

  numbers(count, width) {
    return Array.from({ length: count }, () => this.next(width));
  }

  end() {
    while (this.at < 8 * this.bytes.length) need(this.next(1) === 0, `padding of ${this.name}`);
  }
}

function bytesOfBits(count) {
  return 4 * Math.ceil(count / 32);
}

export function readTable(file, xxh3) {
  need(file.toString("latin1", 0, 4) === "LSTI" && file.readUInt32LE(4) === 1, "table header");
  need(xxh3(file.subarray(0, -DIGEST_BYTES)).equals(file.subarray(-DIGEST_BYTES)), "table digest");
  const vocabSize = file.readUInt32LE(8);
  const buckets = file.readUInt32LE(12);
  const idsAt = 16 + 4 * Math.ceil(buckets / 4);
  const ids = new Bits(file.subarray(idsAt, -DIGEST_BYTES), "ids of the table");
  const table = {
    digest: file.subarray(-DIGEST_BYTES).toString("hex"),
    vocabSize,
    shifts: [...file.subarray(16, 16 + buckets)],
    ids: ids.numbers(vocabSize, Math.max(1, bitsOf(vocabSize - 1))),
  };
  ids.end();
  return table;
}

function identity(vocabSize, rows, entries) {
  // V * R may be beyond what a double counts exactly.
  const each = rows === 0 ? 1n : (BigInt(vocabSize) * BigInt(rows)) / BigInt(entries);
  const shift = rows === 0 ? 0 : each.toString(2).length - 1;
  const size = 2 ** shift;
  const buckets = Math.floor((vocabSize - 1) / size) + 1;
  return { vocabSize, shifts: Array(buckets).fill(shift), ids: null };
}

function readHeader(data) {
  need(data.length >= HEADER_BYTES + DIGEST_BYTES && data.length % 4 === 0, "length");
  need(data.toString("latin1", 0, 4) === "LSTG" && data[4] === 1, "magic or version");
  return {
    kind: { 1: "dense", 2: "top_k", 3: "sampled" }[data[5]],
    idCoding: data[6],
    valueBits: data[7],
    flags: data.readUInt32LE(8),
    rows: data.readUInt32LE(12),
    vocabSize: data.readUInt32LE(16),
    maxEntries: data.readUInt32LE(20),
    entries: Number(data.readBigUInt64LE(24)),
    temperature: data.readDoubleLE(32),
    table: data.toString("hex", 40, 56),
  };
}

export function decode(data, tables, xxh3) {
  const header = readHeader(data);
  need(header.kind !== undefined && header.flags < 8, "kind or flags");
  need(xxh3(data.subarray(0, -DIGEST_BYTES)).equals(data.subarray(-DIGEST_BYTES)), "digest");
  const { rows, vocabSize, valueBits } = header;
  const sizesOfRows = []; // of the planes at the end, whose sizes the header says
  if (header.kind === "top_k") sizesOfRows.push(["tail", 32]);
  if (header.flags & 1) sizesOfRows.push(["realized", 16]);
  if (header.flags & 2) sizesOfRows.push(["entropy", 16]);
  if (header.flags & 4) sizesOfRows.push(["logZ", 32]);
  let rowsAt = data.length - DIGEST_BYTES;
  for (const [, bits] of sizesOfRows) rowsAt -= bytesOfBits(rows * bits);
  let at = HEADER_BYTES;
  const take = (size, name) => {
    need(at + size <= rowsAt, `${name} ends`);
    at += size;
    return data.subarray(at - size, at);
  };
  const plane = (bits, name) => new Bits(take(bytesOfBits(bits), name), name);

  const result = { header };
  if (header.kind === "dense") {
    result.logprobs = readDense(plane(rows * vocabSize * valueBits, "values"), header);
  } else {
    const ids = header.idCoding === 1 ? fixedIds(header, plane) : eliasFano(header, plane, tables);
    const idBytes = at - HEADER_BYTES;
    result.ids = ids;
    if (header.kind === "top_k") {
      const ranges = plane(rows * 8, "ranges");
      result.ranges = ranges.numbers(rows, 8);
      ranges.end();
    }
    // The last plane before those of the rows takes what is left.
    const last = new Bits(take(rowsAt - at, "codes or draws"), "codes or draws");
    if (header.kind === "top_k") result.codes = readCodes(last, ids, valueBits);
    else result.counts = readDraws(last, ids, header.maxEntries);
    const least = 4 * Math.ceil(header.entries / 4) - idBytes;
    need(last.bytes.length === Math.max(bytesOfBits(last.at), least), "length of codes or draws");
    last.end();
  }
  need(at === rowsAt, "length");

  for (const [name, bits] of sizesOfRows) {
    const bytes = data.subarray(rowsAt, (rowsAt += bytesOfBits(rows * bits)));
    if (bits === 32) {
      result[name] = Float32Array.from({ length: rows }, (_, row) => bytes.readFloatLE(4 * row));
    } else {
      const string = new Bits(bytes, name);
      const sign = name === "realized" ? -1 : 1;
      result[name] = Float32Array.from(string.numbers(rows, 16), (n) => sign * (n / 2048));
      string.end();
    }
  }
  if (header.kind === "top_k") result.logprobs = logprobs(result, valueBits);
  return result;
}

function readDense(plane, { rows, vocabSize, valueBits }) {
  const words = new Uint32Array(rows * vocabSize);
  for (let i = 0; i < words.length; i++) {
    // bfloat16 is the upper half of an f32.
    words[i] = valueBits === 32 ? plane.bytes.readUInt32LE(4 * i) : plane.bytes.readUInt16LE(2 * i) * 65536;
  }
  plane.at = words.length * valueBits;
  plane.end();
  const values = new Float32Array(words.buffer);
  for (let row = 0; row < rows; row++) {
    let sum = 0;
    for (const value of values.subarray(row * vocabSize, (row + 1) * vocabSize)) sum += Math.exp(value);
    need(Math.abs(sum - 1) <= (valueBits === 32 ? 0.001 : 0.25), "sum of a row");
  }
  return values;
}

function fixedIds({ rows, vocabSize, maxEntries, entries }, plane) {
  const width = bitsOf(Math.min(maxEntries, vocabSize));
  const counts = plane(rows * width, "counts");
  const perRow = counts.numbers(rows, width);
  counts.end();
  need(perRow.reduce((a, b) => a + b, 0) === entries, "counts");
  const idWidth = Math.max(1, bitsOf(vocabSize - 1));
  const string = plane(entries * idWidth, "ids");
  const ids = perRow.map((count) => string.numbers(count, idWidth));
  string.end();
  return ids;
}

function eliasFano({ rows, vocabSize, entries, table: digest }, plane, tables) {
  const table = /^0+$/.test(digest) ? identity(vocabSize, rows, entries) : tables[digest];
  need(table !== undefined, `table ${digest}`);
  const buckets = table.shifts.length;
  const starts = [];
  table.shifts.reduce((start, shift, bucket) => ((starts[bucket] = start), start + 2 ** shift), 0);
  const numBits = rows * buckets + entries;
  const occupancy = plane(numBits, "occupancy");
  const cells = [];
  for (let bit = 0, cell = 0; bit < numBits; bit++) {
    if (occupancy.next(1)) {
      need(cell < rows * buckets, "beyond the last cell");
      cells.push(cell);
    } else {
      cell += 1;
    }
  }
  occupancy.end();
  need(cells.length === entries, "entries");
  const widths = cells.map((cell) => table.shifts[cell % buckets]);
  const offsets = plane(widths.reduce((a, b) => a + b, 0), "offsets");
  const ids = Array.from({ length: rows }, () => []);
  cells.forEach((cell, entry) => {
    const rank = starts[cell % buckets] + offsets.next(widths[entry]);
    need(rank < vocabSize, "rank");
    ids[Math.floor(cell / buckets)].push(table.ids === null ? rank : table.ids[rank]);
  });
  offsets.end();
  for (const row of ids) row.sort((a, b) => a - b);
  return ids;
}

function readCodes(string, ids, valueBits) {
  const best = ids.map((row) => string.next(bitsOf(row.length - 1)));
  const codes = ids.map((row) => Array(row.length).fill(0));
  const others = [];
  ids.forEach((row, r) => row.forEach((_, place) => place !== best[r] && others.push([r, place])));
  const low = valueBits - 3;
  let alive = others;
  for (let level = 1; level <= 7; level++) {
    alive = alive.filter(() => string.next(1));
    for (const [row, place] of alive) codes[row][place] += 2 ** low;
  }
  for (const [row, place] of others) codes[row][place] += string.next(low);
  best.forEach((place, row) => {
    need(place < ids[row].length, "best entry");
    codes[row][place] = 2 ** valueBits - 1;
  });
  return codes;
}

function readDraws(string, ids, draws) {
  const counts = ids.map((row) => row.map(() => 1 + string.next(1)));
  const stated = [];
  counts.forEach((row, r) => {
    const several = row.map((_, place) => place).filter((place) => row[place] === 2);
    for (const place of several.slice(1)) stated.push({ r, place, log2: 1 });
  });
  let alive = stated;
  for (let level = 2; 2 ** level <= draws; level++) {
    alive = alive.filter(() => string.next(1));
    for (const entry of alive) entry.log2 = level;
  }
  for (const { r, place, log2 } of stated) counts[r][place] = 2 ** log2 + string.next(log2);
  for (const row of counts) {
    const first = row.findIndex((count) => count > 1);
    const sum = row.reduce((a, b) => a + b, 0);
    if (first >= 0) row[first] = draws - (sum - 2); // the first one still counts as 2 in the sum
    need(row.reduce((a, b) => a + b, 0) === draws && (first < 0 || row[first] >= 2), "draws");
  }
  return counts;
}

function logprobs({ codes, ranges, tail }, valueBits) {
  const most = 2 ** valueBits - 1;
  const values = [];
  codes.forEach((row, r) => {
    need(tail[r] < 0, "tail");
    const nats = ranges[r] === 0 ? 0 : 2 ** ((ranges[r] - 127) / 16);
    const below = row.map((code) => nats * (1 - Math.log1p(((Math.E - 1) * code) / most)));
    const mass = below.reduce((sum, x) => sum + Math.exp(-x), 0);
    const high = Math.log(-Math.expm1(tail[r])) - Math.log(mass);
    for (const x of below) values.push(high - x);
  });
  return Float32Array.from(values);
}
