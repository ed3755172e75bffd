// Keeps the page for use without a network. Above this line stand VERSION, a digest of all files, and SHELL, those that
// the page begins with.
const PREFIX = `udon-page ${self.registration.scope} `;
const CACHE = PREFIX + VERSION;
// A static server sends no headers of its own. The first two isolate the page, so that threads may share memory; the
// policy is the one of index.html, which does not hold for workers, and allows WebAssembly.
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Content-Security-Policy":
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob:; " +
    "connect-src 'self'; worker-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'",
};

self.addEventListener("install", (event) => {
  const requests = SHELL.map((path) => new Request(path, { cache: "reload" }));
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(requests)));
});

self.addEventListener("activate", (event) => {
  event.waitUntil(
    (async () => {
      for (const name of await caches.keys()) {
        if (name.startsWith(PREFIX) && name !== CACHE) await caches.delete(name);
      }
      await self.clients.claim();
    })(),
  );
});

self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method !== "GET" || !request.url.startsWith(self.registration.scope)) return;
  event.respondWith(answer(request, event));
});

async function answer(request, event) {
  const cache = await caches.open(CACHE);
  const path = request.mode === "navigate" ? "./" : request;
  const kept = await cache.match(path, { ignoreSearch: true });
  if (kept) return isolated(kept);
  const response = await fetch(request);
  if (response.status === 200) event.waitUntil(keep(cache, request, response.clone()));
  return isolated(response);
}

async function keep(cache, request, response) {
  try {
    await cache.put(request, response);
  } catch {
    // The browser has no room for it; the page goes on without.
  }
}

function isolated(response) {
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
