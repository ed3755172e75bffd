"""Style and script of the page of `udon app`."""

STYLE = """
.gradio-container { --quiet: #5f5f6b; --mark: #b45309; --good: #2563eb; }
.dark .gradio-container, .dark.gradio-container { --quiet: #a1a1aa; --mark: #fbbf24; --good: #60a5fa; }
.gradio-container > main { max-width: 80rem; margin: 0 auto; }
.gradio-container .html-container { padding: 0; }
.udon-hidden { display: none !important; }
.udon-head h1 { font-size: 1.35rem; font-weight: 650; margin: 0 0 .2rem; }
.udon-head p, .udon-results .muted, .udon-results .about { color: var(--quiet); margin: 0; overflow-wrap: anywhere; }
.udon-hint { color: var(--quiet); border: 1px dashed var(--border-color-primary); border-radius: 8px; margin: 0;
  padding: 3rem 1rem; text-align: center; }
.udon-results { display: grid; gap: 1.5rem; grid-template-columns: minmax(0, 1fr); }
.udon-results.two { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.udon-results h2 { font-size: 1rem; font-weight: 650; margin: 0; overflow-wrap: anywhere; }
.udon-results h2, .udon-results .about { margin-bottom: .1rem; }
.udon-results .about { font-size: .8rem; }
.udon-results ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1.1rem .8rem;
  list-style: none; margin: 0; padding: 0; }
.udon-results .about + ol, .udon-note + ol { margin-top: .75rem; }
.udon-results li, .udon-results figure { margin: 0; min-width: 0; }
.udon-results figcaption { font-size: .8rem; line-height: 1.4; margin-top: .3rem; min-width: 0; }
.udon-results figcaption > div { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.udon-results .picture { aspect-ratio: 1; border-radius: 8px; overflow: hidden; display: grid; place-items: center;
  background: var(--background-fill-secondary); color: var(--quiet); font-size: .8rem; width: 100%; padding: 0;
  border: 1px solid var(--border-color-primary); }
.udon-results button.picture { cursor: zoom-in; }
.udon-results .picture img { width: 100%; height: 100%; object-fit: contain; margin: 0; }
.udon-results .score { font-weight: 650; font-variant-numeric: tabular-nums; }
.udon-results .bar { display: block; height: 4px; border-radius: 2px; background: var(--border-color-primary);
  margin: .3rem 0 .2rem; overflow: hidden; }
.udon-results .bar i { display: block; height: 100%; background: var(--good); }
.udon-results .divider ~ li .bar i { background: var(--quiet); }
.udon-results .actions { display: flex; flex-wrap: wrap; gap: .3rem; margin-top: .25rem; }
.udon-results .actions button, .udon-like button, .udon-large button { border: 1px solid var(--border-color-primary);
  border-radius: 6px; background: var(--background-fill-primary); color: var(--body-text-color); cursor: pointer;
  font-size: .75rem; font-weight: 500; line-height: 1.2; margin: 0; min-height: 0; padding: .3rem .5rem;
  white-space: nowrap; }
.udon-results .actions button:hover, .udon-like button:hover { border-color: var(--good); }
.udon-results summary { color: var(--quiet); cursor: pointer; }
.udon-results details span { display: block; color: var(--quiet); overflow-wrap: anywhere; }
.udon-results .divider { grid-column: 1 / -1; border-top: 2px solid var(--mark); color: var(--mark); font-size: .8rem;
  padding-top: .3rem; }
.udon-like { display: flex; gap: .6rem; align-items: center; margin: 0 0 .9rem; min-width: 0; }
.udon-like img { width: 3rem; height: 3rem; object-fit: contain; border-radius: 6px; margin: 0; }
.udon-like span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; min-width: 0; flex: 1; }
.udon-note { border-left: 3px solid #d97706; background: var(--background-fill-secondary); border-radius: 4px;
  padding: .6rem .8rem; margin: 0; overflow-wrap: anywhere; }
.udon-note b { display: block; }
.udon-controls .min_value, .udon-controls .max_value { display: none; }
.udon-large { position: fixed; inset: 0; z-index: 1000; background: #000d; display: grid; gap: .6rem; padding: 1rem;
  grid-template-rows: minmax(0, 1fr) auto; justify-items: center; align-items: center; cursor: zoom-out; }
.udon-large img { width: 100%; height: 100%; object-fit: contain; margin: 0; }
.udon-large p { color: #eee; margin: 0; overflow-wrap: anywhere; text-align: center; font-size: .85rem; }
.udon-box { position: fixed; border: 2px solid var(--good); background: #2563eb22; pointer-events: none; z-index: 5; }
body.udon-cropping #udon-picture img { cursor: crosshair; touch-action: none; }
body.udon-cropping #udon-crop-button { border-color: var(--good); color: var(--good); }
@media (max-width: 40rem) {
  .gradio-container { padding: 0 .75rem !important; }
  .gradio-container > main { padding-top: .5rem !important; gap: .6rem; }
  .udon-head h1 { font-size: 1.1rem; margin: 0; }
  .udon-head p { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 1; overflow: hidden;
    font-size: .8rem; }
  #udon-picture { height: 8.5rem !important; min-height: 8.5rem !important; }
  .udon-hint { padding: 1.25rem 1rem; }
  .udon-results.two { gap: .75rem; }
  .udon-results ol { grid-template-columns: repeat(auto-fill, minmax(6.2rem, 1fr)); gap: .9rem .6rem; }
  .udon-results .actions { gap: .2rem; } .udon-results .actions button { padding: .3rem .35rem; }
  #udon-examples .gallery { flex-wrap: nowrap; overflow-x: auto; }
  #udon-examples .gallery-item { flex: none; }
}
"""

# Buttons of the results press hidden ones, since Gradio gives HTML no events; `udon` holds what is asked for.
SCRIPT = """
() => {
  const udon = window.udon = {crop: "", like: "", place: ""};
  const tell = (values, button = "udon-again") => {
    Object.assign(udon, values);
    document.getElementById(button).click();
  };
  const close = () => document.querySelectorAll(".udon-large").forEach((large) => large.remove());
  const copy = async (button) => {
    const text = button.dataset.path;
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // Only pages of this machine or with HTTPS may use the clipboard so.
      const field = document.createElement("textarea");
      field.value = text;
      document.body.append(field);
      field.select();
      document.execCommand("copy");
      field.remove();
    }
    const before = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = before; }, 1200);
  };
  let box = null, start = null;
  const dropBox = () => { box?.remove(); box = null; start = null; };
  udon.forget = () => { dropBox(); udon.crop = udon.like = ""; };
  const stopCropping = () => { document.body.classList.remove("udon-cropping"); };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-do]");
    if (event.target.closest(".udon-large")) { close(); return; }
    if (event.target.closest("#udon-crop-button")) {
      if (udon.crop) { dropBox(); tell({crop: ""}); }
      document.body.classList.toggle("udon-cropping");
      return;
    }
    if (!button) return;
    if (button.dataset.do === "enlarge") tell({place: button.dataset.place}, "udon-enlarge");
    if (button.dataset.do === "like") tell({like: button.dataset.place})
    if (button.dataset.do === "back") tell({like: ""});
    if (button.dataset.do === "copy") copy(button);
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") { close(); stopCropping(); } });
  // Where the picture itself lies in its frame, whose sides it does not fill.
  const shown = (image) => {
    const frame = image.getBoundingClientRect();
    const scale = Math.min(frame.width / image.naturalWidth, frame.height / image.naturalHeight);
    const width = image.naturalWidth * scale, height = image.naturalHeight * scale;
    return {left: frame.left + (frame.width - width) / 2, top: frame.top + (frame.height - height) / 2, width, height};
  };
  const within = (value, length) => Math.min(Math.max(value / length, 0), 1);
  const place = (event, at) => [within(event.clientX - at.left, at.width), within(event.clientY - at.top, at.height)];
  const draw = (at, one, other) => {
    Object.assign(box.style, {
      left: `${at.left + at.width * Math.min(one[0], other[0])}px`,
      top: `${at.top + at.height * Math.min(one[1], other[1])}px`,
      width: `${at.width * Math.abs(one[0] - other[0])}px`,
      height: `${at.height * Math.abs(one[1] - other[1])}px`,
    });
  };
  document.addEventListener("pointerdown", (event) => {
    const image = event.target.closest("#udon-picture img");
    if (!image || !document.body.classList.contains("udon-cropping")) return;
    event.preventDefault();
    dropBox();
    start = {image, from: place(event, shown(image))};
    box = document.createElement("div");
    box.className = "udon-box";
    document.querySelector(".gradio-container").append(box);
  });
  document.addEventListener("pointermove", (event) => {
    if (start) draw(shown(start.image), start.from, place(event, shown(start.image)));
  });
  document.addEventListener("pointerup", (event) => {
    if (!start) return;
    const to = place(event, shown(start.image)), from = start.from, image = start.image;
    start = null;
    const size = [0, 1].map((axis) => Math.abs(to[axis] - from[axis]));
    if (Math.min(...size) < 0.02) { dropBox(); tell({crop: ""}); return; }
    stopCropping();
    const sides = [Math.min, Math.max].flatMap((pick) => [pick(from[0], to[0]), pick(from[1], to[1])]);
    const follow = () => {
      if (!box) return;
      if (!document.body.contains(image)) { dropBox(); return; }
      draw(shown(image), [sides[0], sides[1]], [sides[2], sides[3]]);
      requestAnimationFrame(follow);
    };
    follow();
    tell({crop: sides.map((side) => side.toFixed(4)).join(","), like: ""});
  });
}
"""

# What an event sends in place of its fields. A visitor may be quicker than the script.
ASK = '(picture, domain, k) => [picture, domain, k, window.udon?.crop ?? "", window.udon?.like ?? ""]'
ASK_NEW = '(picture, domain, k) => { window.udon?.forget(); return [picture, domain, k, "", ""]; }'
ASK_LARGE = "() => [window.udon.place]"
# Events of a picture that was there before the page was ready are lost.
ASK_WAITING = """
() => { if (document.querySelector("#udon-picture img")) document.getElementById("udon-again").click(); }
"""
