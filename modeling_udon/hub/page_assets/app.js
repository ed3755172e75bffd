// The page: pictures in, neighbours out. The work is done in worker.js.
import { offersCamera, takePicture } from "./camera.js";
import { CropBox, WHOLE } from "./crop.js";
import { element, showHits } from "./results.js";
import { shardPath } from "./search.js";

const FIRST_HITS = 12;
const MOST_HITS = 48;
// All pictures are kept for use without a network if they are no more than this, else those that were shown.
const KEPT_BYTES = 25 * 2 ** 20;
const at = (id) => document.getElementById(id);

const worker = new WorkerCalls();
const history = [];
let page = null;
let query = null; // { key, name, address, blob, row, area }
let asked = 0;
let numHits = FIRST_HITS;
let numQueries = 0;

const crop = new CropBox(at("frame"), at("crop"), at("crop-toggle"), (area) => {
  search({ ...query, area, key: `${++numQueries}` });
});

class PageError extends Error {}

function WorkerCalls() {
  let started = null;
  let number = 0;
  const waiting = new Map();
  const start = () => {
    started = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    started.onmessage = ({ data }) => {
      if (data.progress) return showProgress(data);
      const { resolve, reject } = waiting.get(data.id);
      waiting.delete(data.id);
      if (data.error === undefined) resolve(data.answer);
      else reject(new PageError(data.error));
    };
    started.onerror = () => {
      for (const { reject } of waiting.values()) reject(new PageError("This browser cannot run the page: it needs WebAssembly and module workers."));
    };
  };
  this.ask = (kind, values) =>
    new Promise((resolve, reject) => {
      if (started === null) start();
      waiting.set(++number, { resolve, reject });
      started.postMessage({ id: number, kind, ...values });
    });
}

async function begin() {
  at("unstarted").remove();
  if (await serveFromHere()) return;
  page = await (await fetch("page.json")).json();
  describePage();
  const opened = await worker.ask("open", { backend: new URLSearchParams(location.search).get("backend") });
  at("loading").hidden = true;
  const engine = opened.backend === "webgpu" ? "WebGPU" : `WebAssembly, ${opened.threads} thread${opened.threads > 1 ? "s" : ""}`;
  at("engine").textContent = `Runs in this browser (${engine}). Pictures never leave your device.`;
  // For benchmarks and tests: when the page could answer.
  performance.mark("udon-ready", { detail: opened });
  document.documentElement.dataset.ready = opened.backend;
  await keepPictures();
}

// Has the service worker serve the page; true where the page is about to be loaded again, isolated.
async function serveFromHere() {
  if (!navigator.serviceWorker) return false;
  try {
    await navigator.serviceWorker.register(new URL("sw.js", import.meta.url));
    if (!navigator.serviceWorker.controller) {
      await new Promise((resolve) => {
        navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true });
        setTimeout(resolve, 3000);
      });
    }
    if (navigator.serviceWorker.controller && !crossOriginIsolated && !sessionStorage.getItem("udon-isolated")) {
      sessionStorage.setItem("udon-isolated", "1");
      location.reload();
      return true;
    }
  } catch {
    // Private windows and some embedded pages have neither; the page works without.
  }
  return false;
}

function describePage() {
  document.title = page.title;
  at("title").textContent = page.title;
  const domains = page.domains.length ? ` in ${page.domains.length} domains` : "";
  at("about").textContent = `${page.numImages.toLocaleString("en")} images${domains}, searched in your browser`;
  at("threshold").textContent = page.calibration ? `Match: ${page.calibration.text}.` : "";
  at("domain-field").hidden = page.domains.length < 2;
  at("domain").replaceChildren(
    element("option", { value: "", textContent: "all domains" }),
    ...page.domains.map((name, number) => element("option", { value: `${number}`, textContent: name })),
  );
  at("examples-field").hidden = page.examples.length === 0;
  at("examples").replaceChildren(
    ...page.examples.map(({ path, name }) => {
      const button = element("button", { type: "button", title: name }, element("img", { src: path, alt: "", loading: "lazy" }));
      button.setAttribute("aria-label", `Example ${name}`);
      button.addEventListener("click", async () => {
        const response = await fetch(path).catch(() => null);
        if (response?.ok) bring(await response.blob(), name);
        else complain("This example is not kept for use without a network.");
      });
      return element("li", {}, button);
    }),
  );
}

function showProgress({ progress, starting }) {
  const megabytes = (bytes) => (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0);
  at("progress").value = progress.loaded / progress.total;
  at("loading-text").textContent = starting
    ? "Starting the model…"
    : `Loading the model and the index: ${megabytes(progress.loaded)} of ${megabytes(progress.total)} MB`;
}

async function keepPictures() {
  if (!navigator.serviceWorker?.controller) {
    at("offline").textContent = "This browser does not keep the page for use without a network.";
    return;
  }
  const isAll = page.pictureBytes <= KEPT_BYTES && !navigator.connection?.saveData;
  if (isAll) {
    const paths = page.examples.map(({ path }) => path);
    for (let number = 0; number * page.shardRows < page.numImages; number++) paths.push(shardPath(number));
    for (const path of paths) await (await fetch(path)).arrayBuffer();
  }
  at("offline").textContent = isAll
    ? "Kept in this browser: works without a network."
    : "Kept in this browser: works without a network, with the neighbours that were shown before.";
  document.documentElement.dataset.kept = "true";
}

function bring(blob, name) {
  if (query !== null) history.push(query);
  search({ key: `${++numQueries}`, name, address: URL.createObjectURL(blob), blob, row: null, area: WHOLE });
}

function like(hit) {
  if (query !== null) history.push(query);
  const address = hit.picture === null ? null : URL.createObjectURL(hit.picture);
  const name = hit.name ?? "an image of the index";
  search({ key: `${++numQueries}`, name, address, blob: null, row: hit.row, area: WHOLE });
  at("results-title").focus({ preventScroll: true });
  at("results").scrollIntoView({ block: "nearest" });
}

async function search(wanted, count = FIRST_HITS) {
  [query, numHits] = [wanted, count];
  showQuery();
  const own = ++asked;
  at("results").setAttribute("aria-busy", "true");
  const domain = at("domain").value === "" ? null : Number(at("domain").value);
  try {
    const { key, blob, row, area } = query;
    const found = await worker.ask("search", { key, blob, row, crop: area, domain, k: numHits });
    if (own === asked && found !== null) showFound(found);
  } catch (error) {
    if (own === asked) {
      at("hits").replaceChildren();
      [at("more").hidden, at("unknown").hidden, at("hint").hidden] = [true, true, false];
      at("status").textContent = "";
      complain(error.message);
    }
  }
  if (own === asked) at("results").setAttribute("aria-busy", "false");
}

function showQuery() {
  complain(null);
  at("drop").classList.add("full");
  at("invitation").hidden = true;
  at("frame").hidden = query.address === null;
  if (query.address !== null && at("picture").src !== query.address) at("picture").src = query.address;
  at("picture").alt = `Picture that is searched for: ${query.name}`;
  at("query-name").hidden = false;
  at("query-name").textContent = query.row === null ? query.name : `Like ${query.name}`;
  at("query-name").title = query.name;
  at("choose").textContent = "Another picture";
  at("crop-toggle").hidden = query.blob === null;
  at("back").hidden = history.length === 0;
  crop.show(query.area);
}

function showFound({ hits, times }) {
  at("hint").hidden = true;
  showHits(at("hits"), hits, like);
  const total = Object.values(times).reduce((sum, time) => sum + time, 0);
  const part = query.area === WHOLE ? "" : "the chosen part of ";
  const best = hits.length ? `, best score ${hits[0].score.toFixed(3)}` : "";
  at("status").textContent = `${hits.length} neighbours of ${part}${query.name}${best}, in ${Math.max(Math.round(total), 1)} ms`;
  const isUnknown = hits.length > 0 && hits.every((hit) => hit.match === false);
  at("unknown").hidden = !isUnknown;
  if (isUnknown) {
    const needed = Math.min(...hits.map((hit) => hit.threshold)).toFixed(3);
    at("unknown").replaceChildren(
      element("b", { textContent: "Not in the index." }), `No image reaches the score that counts as a match (${needed}).`,
    );
  }
  at("more").hidden = numHits >= MOST_HITS || hits.length < numHits;
  performance.mark("udon-found", { detail: times });
  document.documentElement.dataset.found = performance.getEntriesByName("udon-found").length;
}

function complain(text) {
  at("error").hidden = text === null;
  at("error").textContent = text ?? "";
}

function bringFile(file) {
  if (file) bring(file, file.name || "pasted picture");
}

at("choose").addEventListener("click", () => at("file").click());
at("file").addEventListener("change", () => {
  bringFile(at("file").files[0]);
  at("file").value = "";
});
at("back").addEventListener("click", () => search(history.pop()));
at("domain").addEventListener("change", () => query && search(query));
at("more").addEventListener("click", () => search(query, 2 * numHits));
document.addEventListener("paste", (event) => bringFile(event.clipboardData.files[0]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dragging"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  bringFile(event.dataTransfer.files[0]);
});
at("camera").hidden = !offersCamera();
at("camera").addEventListener("click", async () => {
  try {
    const picture = await takePicture(at("camera-dialog"), at("video"), at("shoot"), at("camera-close"));
    if (picture !== null) bring(picture, "camera");
  } catch {
    complain("The camera cannot be used: there is none, or it was not allowed.");
  }
});

begin().catch((error) => {
  at("loading").hidden = true;
  complain(`The page could not be loaded: ${error.message}`);
});
