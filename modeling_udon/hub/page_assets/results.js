// The neighbours as a list. What comes from data is only ever text: never HTML, never an address.

let addresses = [];

// Shows hits in a list; like(hit) is called for the one whose picture is clicked.
export function showHits(list, hits, like) {
  addresses.forEach((address) => URL.revokeObjectURL(address));
  addresses = [];
  const others = hits.findIndex((hit) => hit.match === false);
  // Those of a domain with a low threshold may match below others that do not.
  const ordered = [...hits.filter((hit) => hit.match !== false), ...hits.filter((hit) => hit.match === false)];
  const items = ordered.map((hit) => element("li", {}, card(hit, hits.indexOf(hit) + 1, like)));
  if (others >= 0) {
    const divider = element("li", { className: "divider", textContent: "No match from here on" });
    items.splice(hits.filter((hit) => hit.match !== false).length, 0, divider);
  }
  list.replaceChildren(...items);
}

function card(hit, rank, like) {
  const name = hit.name ?? "not kept for use without a network";
  const score = hit.score.toFixed(3);
  const button = element("button", { type: "button" }, picture(hit), element("span", { className: "like", textContent: "More like this" }));
  const told = [`More like ${name}`, hit.domain, `score ${score}`, hit.match === false ? "no match" : null];
  button.setAttribute("aria-label", told.filter(Boolean).join(", "));
  button.addEventListener("click", () => like(hit));
  const bar = element("div", { className: "bar", ariaHidden: "true" }, element("i"));
  bar.firstChild.style.setProperty("--share", `${100 * Math.min(Math.max(hit.score, 0), 1)}%`);
  const numbers = element(
    "div", { className: "numbers" },
    element("span", { className: "score", textContent: score }), element("span", { textContent: `${rank}` }),
  );
  const details = [hit.domain, ...hit.columns.map(([column, value]) => `${column}: ${value}`)].filter(Boolean);
  return element(
    "div", { className: hit.match === false ? "hit other" : "hit" },
    button, bar, numbers, element("div", { className: "name", textContent: name, title: name, dir: "auto" }),
    ...details.map((text) => element("div", { className: "detail", textContent: text, title: text, dir: "auto" })),
  );
}

function picture(hit) {
  if (hit.picture === null) return element("span", { className: "none", textContent: "no picture" });
  const address = URL.createObjectURL(hit.picture);
  addresses.push(address);
  return element("img", { src: address, alt: "", width: 160, height: 160 });
}

export function element(kind, values = {}, ...children) {
  const made = Object.assign(document.createElement(kind), values);
  made.append(...children);
  return made;
}
