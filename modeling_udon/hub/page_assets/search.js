// The index of the page: int8 codes with a scale for each dimension, and shards of names and thumbnails.

export class Codes {
  // buffer: `numImages` rows of `dim` int8; domains: a Uint16Array with 1 + the number of each row's domain, or null.
  constructor(buffer, numImages, scales, domains = null) {
    this.codes = new Int8Array(buffer);
    this.numImages = numImages;
    this.scales = Float32Array.from(scales);
    this.domains = domains;
    this.inverseNorms = new Float32Array(numImages);
    for (let row = 0; row < numImages; row++) {
      let sum = 0;
      for (let place = 0; place < scales.length; place++) {
        sum += (this.scales[place] * this.codes[row * scales.length + place]) ** 2;
      }
      this.inverseNorms[row] = sum > 0 ? 1 / Math.sqrt(sum) : 0;
    }
  }

  // The embedding of a row, of unit norm.
  vector(row) {
    return this.#values(row).map((value) => value * this.inverseNorms[row]);
  }

  // The `k` rows of the largest cosine with a query, best first: [{ row, score }].
  // domain: number of the only domain that is searched, null for all; without: a row that is left out, -1 for none.
  search(query, k, domain = null, without = -1) {
    const { codes, scales, domains, inverseNorms } = this;
    const dim = scales.length;
    const weights = scales.map((scale, place) => scale * query[place]);
    const best = [];
    for (let row = 0, start = 0; row < this.numImages; row++, start += dim) {
      if (row === without || (domain !== null && domains[row] !== domain + 1)) continue;
      let sum = 0;
      for (let place = 0; place < dim; place++) sum += weights[place] * codes[start + place];
      const score = sum * inverseNorms[row];
      if (best.length === k && score <= best[k - 1].score) continue;
      let rank = best.length;
      while (rank > 0 && best[rank - 1].score < score) rank--;
      best.splice(rank, 0, { row, score });
      if (best.length > k) best.pop();
    }
    return best;
  }

  #values(row) {
    const dim = this.scales.length;
    return this.scales.map((scale, place) => scale * this.codes[row * dim + place]);
  }
}

// Scales a vector to unit norm, of its first `dim` numbers.
export function unit(vector, dim) {
  const cut = Float32Array.from(vector.subarray(0, dim));
  const norm = Math.hypot(...cut);
  return cut.map((value) => value / norm);
}

export function shardPath(number) {
  const name = String(number).padStart(6, "0");
  return `index/${name.slice(0, 3)}/${name.slice(3)}.bin`;
}

// What a shard says of its rows: length of a JSON text (uint32), the text, then the thumbnails one after the other.
export function readShard(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const rows = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let place = 4 + length;
  return rows.map(({ name, domain, columns, bytes }) => {
    const thumbnail = bytes ? buffer.slice(place, place + bytes) : null;
    place += bytes;
    return { name, domain, columns, thumbnail };
  });
}

// The least score with which an image of a domain counts as a match; null for a model without calibration.
export function thresholdOf(calibration, domain) {
  if (calibration === null) return null;
  return Object.hasOwn(calibration.domains, domain ?? "") ? calibration.domains[domain] : calibration.threshold;
}
