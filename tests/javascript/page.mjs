// Searches an exported page's index with its own scripts, and its model in onnxruntime-node; prints JSON.
// node page.mjs PAGE PIXELS.json, where the second holds [{ file, width, height }] of raw RGB.
import { readFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";
import { InferenceSession, Tensor } from "onnxruntime-node";

const [folder, list] = process.argv.slice(2);
const { Codes, readShard, shardPath, unit } = await import(pathToFileURL(`${folder}/search.js`));
const bytes = async (path) => {
  const data = await readFile(path);
  return data.buffer.slice(data.byteOffset, data.byteOffset + data.byteLength);
};
const page = JSON.parse(await readFile(`${folder}/page.json`, "utf8"));
const domains = page.rowDomains ? new Uint16Array(await bytes(`${folder}/${page.rowDomains.path}`)) : null;
const codes = new Codes(await bytes(`${folder}/${page.codes.path}`), page.numImages, page.scales, domains);
const session = await InferenceSession.create(`${folder}/${page.model.path}`);

const embed = async (pixels, width, height) => {
  const outputs = await session.run({ pixel_values: new Tensor("uint8", pixels, [1, height, width, 3]) });
  return unit(outputs.image_embeds.data, page.dim);
};
const named = async ({ row, score }) => {
  const shard = readShard(await bytes(`${folder}/${shardPath(Math.floor(row / page.shardRows))}`));
  return { score, name: shard[row % page.shardRows].name };
};

const { pixels, width, height, embedding } = page.probe;
const probe = await embed(Uint8Array.from(Buffer.from(pixels, "base64")), width, height);
const found = [];
for (const picture of JSON.parse(await readFile(list, "utf8"))) {
  const vector = await embed(new Uint8Array(await bytes(picture.file)), picture.width, picture.height);
  const first = codes.search(vector, 1)[0].row;
  found.push({
    embedding: Array.from(vector),
    all: await Promise.all(codes.search(vector, 5).map(named)),
    inDomain: domains ? await Promise.all(codes.search(vector, 5, 0).map(named)) : [],
    likeFirst: await Promise.all(codes.search(codes.vector(first), 3, null, first).map(named)),
  });
}
const cosine = probe.reduce((sum, value, place) => sum + value * embedding[place], 0);
console.log(JSON.stringify({ probe: cosine, found }));
