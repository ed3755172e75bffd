// Reads pictures, embeds them with onnxruntime-web and searches, beside the page's own thread.
import { Codes, readShard, shardPath, thresholdOf, unit } from "./search.js";

const INPUT = "pixel_values";
const OUTPUT = "image_embeds";
const MOST_BYTES = 20 * 2 ** 20;
const MOST_PIXELS = 89_478_485; // as udon search
const LEAST_COSINE = 0.99;
const MOST_SHARDS = 64;

let page = null;
let codes = null;
let model = null; // { ort, session }
let newest = 0;
let embedded = { key: null, vector: null };
const shards = new Map();

// One after the other, so that a search waits for the model; of searches that wait, only the newest is done.
let queue = Promise.resolve();
self.onmessage = ({ data }) => {
  if (data.kind === "search") newest = data.id;
  queue = queue.then(async () => {
    try {
      const answer = data.kind === "open" ? await open(data) : await search(data);
      self.postMessage({ id: data.id, answer });
    } catch (error) {
      self.postMessage({ id: data.id, error: error.message || String(error) });
    }
  });
};

async function open({ backend }) {
  const started = performance.now();
  page = await (await get("page.json")).json();
  const gpu = backend !== "wasm" && page.runtime.webgpu !== null && (await hasGpu(backend === "webgpu"));
  const runtime = gpu ? page.runtime.webgpu : page.runtime.wasm;
  const files = [page.model, page.codes, ...(page.rowDomains ? [page.rowDomains] : []), runtime.binary];
  const counter = { loaded: 0, total: files.reduce((sum, file) => sum + file.bytes, 0) };
  const [weights, code, ...others] = await Promise.all(files.map((file) => load(file, counter)));
  const binary = others.pop();
  codes = new Codes(code, page.numImages, page.scales, others.length ? new Uint16Array(others[0]) : null);
  const loaded = performance.now();
  self.postMessage({ progress: counter, starting: true });
  let name = gpu ? "webgpu" : "wasm";
  try {
    model = await start(name, runtime, binary, weights);
  } catch (error) {
    if (!gpu) throw error;
    // A driver that cannot run the model, or runs it wrong, is no reason to end.
    name = "wasm";
    model = await start(name, page.runtime.wasm, await load(page.runtime.wasm.binary, counter), weights);
  }
  return { backend: name, threads: model.ort.env.wasm.numThreads, loadMs: loaded - started, startMs: performance.now() - loaded };
}

async function hasGpu(forced) {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return Boolean(adapter) && (forced || !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter));
}

async function start(name, runtime, binary, weights) {
  const ort = await import(new URL(runtime.script, self.location));
  ort.env.wasm.wasmPaths = { mjs: new URL(runtime.factory, self.location).href };
  ort.env.wasm.wasmBinary = binary;
  // Threads share memory, which browsers allow to isolated pages only; see sw.js.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  const session = await ort.InferenceSession.create(new Uint8Array(weights), { executionProviders: [name] });
  const { width, height, pixels, embedding } = page.probe;
  const probe = Uint8Array.from(atob(pixels), (letter) => letter.charCodeAt(0));
  const found = await run({ ort, session }, probe, width, height);
  const cosine = unit(found, found.length).reduce((sum, value, place) => sum + value * embedding[place], 0);
  if (!(cosine >= LEAST_COSINE)) throw new Error(`This browser computes other embeddings than the model (cosine ${cosine}).`);
  return { ort, session };
}

async function run({ ort, session }, pixels, width, height) {
  const outputs = await session.run({ [INPUT]: new ort.Tensor("uint8", pixels, [1, height, width, 3]) }, [OUTPUT]);
  return outputs[OUTPUT].data;
}

async function search({ id, key, blob, row, crop, domain, k }) {
  if (id !== newest) return null;
  const times = { read: 0, embed: 0 };
  let vector = embedded.vector;
  if (row !== null) {
    vector = codes.vector(row);
  } else if (key !== embedded.key) {
    let before = performance.now();
    const { pixels, width, height } = await pixelsOf(blob, crop);
    times.read = performance.now() - before;
    before = performance.now();
    vector = unit(await run(model, pixels, width, height), page.dim);
    times.embed = performance.now() - before;
    embedded = { key, vector };
  }
  const before = performance.now();
  const found = codes.search(vector, k, domain, row ?? -1);
  times.search = performance.now() - before;
  const hits = await Promise.all(found.map(describe));
  return { hits, times };
}

async function describe({ row, score }) {
  const number = Math.floor(row / page.shardRows);
  try {
    if (!shards.has(number)) {
      while (shards.size >= MOST_SHARDS) shards.delete(shards.keys().next().value);
      shards.set(number, get(shardPath(number)).then((response) => response.arrayBuffer()).then(readShard));
    }
    const { name, domain, columns, thumbnail } = (await shards.get(number))[row % page.shardRows];
    const threshold = thresholdOf(page.calibration, domain);
    const picture = thumbnail && new Blob([thumbnail], { type: "image/jpeg" });
    return { row, score, name, domain, columns, picture, threshold, match: threshold === null ? null : score >= threshold };
  } catch {
    // Without a network, of what was not kept.
    shards.delete(number);
    return { row, score, name: null, domain: null, columns: [], picture: null, threshold: null, match: null };
  }
}

// Upright RGB of a picture, or of the part that `crop` names as fractions; transparency on white.
async function pixelsOf(blob, crop) {
  if (blob.size > MOST_BYTES) throw new Error(`The picture must be a file of at most ${MOST_BYTES / 2 ** 20} MB.`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new Error("This file is no picture that the browser can read. JPEG, PNG, WebP, GIF, BMP and AVIF work.");
  }
  try {
    if (bitmap.width * bitmap.height > MOST_PIXELS) {
      throw new Error(`The picture must have at most ${MOST_PIXELS.toLocaleString("en")} pixels.`);
    }
    const left = Math.floor(crop.x * bitmap.width);
    const top = Math.floor(crop.y * bitmap.height);
    const width = Math.max(1, Math.min(Math.round(crop.width * bitmap.width), bitmap.width - left));
    const height = Math.max(1, Math.min(Math.round(crop.height * bitmap.height), bitmap.height - top));
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    context.drawImage(bitmap, left, top, width, height, 0, 0, width, height);
    const rgba = context.getImageData(0, 0, width, height).data;
    const pixels = new Uint8Array(3 * width * height);
    for (let from = 0, to = 0; from < rgba.length; from += 4) {
      pixels[to++] = rgba[from];
      pixels[to++] = rgba[from + 1];
      pixels[to++] = rgba[from + 2];
    }
    return { pixels, width, height };
  } finally {
    bitmap.close();
  }
}

async function get(path) {
  const response = await fetch(new URL(path, self.location));
  if (!response.ok) throw new Error(`${path} could not be loaded (${response.status}).`);
  return response;
}

// Loads a file whose size is known, and tells how far all of them are.
async function load({ path, bytes }, counter) {
  const reader = (await get(path)).body.getReader();
  const whole = new Uint8Array(bytes);
  let place = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (place + value.length <= bytes) whole.set(value, place);
    place += value.length;
    counter.loaded += value.length;
    self.postMessage({ progress: counter });
  }
  if (place !== bytes) throw new Error(`${path} must have ${bytes} bytes and has ${place}: upload the page's folder again.`);
  return whole.buffer;
}
