// The crop box over the picture: with a pointer by its corners and its middle, with the keyboard by the arrows.

export const WHOLE = Object.freeze({ x: 0, y: 0, width: 1, height: 1 });
const FIRST = Object.freeze({ x: 0.15, y: 0.15, width: 0.7, height: 0.7 });
const LEAST = 0.08;
const STEP = 0.04;
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class CropBox {
  // changed(area): called with the part of the picture, as fractions, when it has been chosen.
  constructor(frame, box, toggle, changed) {
    Object.assign(this, { frame, box, toggle, changed, area: WHOLE, timer: 0 });
    toggle.addEventListener("click", () => this.#toggle());
    box.addEventListener("keydown", (event) => this.#press(event));
    box.addEventListener("pointerdown", (event) => this.#drag(event));
  }

  // Shows a part of the picture without telling of it.
  show(area) {
    this.area = area;
    const isOn = area !== WHOLE;
    this.box.hidden = !isOn;
    this.toggle.setAttribute("aria-pressed", String(isOn));
    const percent = (share) => `${100 * share}%`;
    Object.assign(this.box.style, {
      left: percent(area.x), top: percent(area.y), width: percent(area.width), height: percent(area.height),
    });
  }

  #toggle() {
    const isOn = this.area === WHOLE;
    this.show(isOn ? { ...FIRST } : WHOLE);
    if (isOn) this.box.focus();
    this.changed(this.area);
  }

  #press(event) {
    const move = MOVES[event.key];
    if (!move) return;
    event.preventDefault();
    const [right, down] = move.map((way) => way * STEP);
    const { x, y, width, height } = this.area;
    this.show(
      event.shiftKey
        ? { x, y, width: within(width + right, LEAST, 1 - x), height: within(height + down, LEAST, 1 - y) }
        : { x: within(x + right, 0, 1 - width), y: within(y + down, 0, 1 - height), width, height },
    );
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.changed(this.area), 250);
  }

  #drag(event) {
    event.preventDefault();
    this.box.focus();
    const corner = event.target.dataset.corner ?? "";
    const size = this.frame.getBoundingClientRect();
    const first = this.area;
    const move = (now) => {
      const right = (now.clientX - event.clientX) / size.width;
      const down = (now.clientY - event.clientY) / size.height;
      this.show(corner ? stretched(first, corner, right, down) : moved(first, right, down));
    };
    const end = (now) => {
      this.box.removeEventListener("pointermove", move);
      this.box.removeEventListener("pointerup", end);
      this.box.removeEventListener("pointercancel", end);
      if (now.type === "pointerup" && this.area !== first) this.changed(this.area);
    };
    this.box.setPointerCapture(event.pointerId);
    this.box.addEventListener("pointermove", move);
    this.box.addEventListener("pointerup", end);
    this.box.addEventListener("pointercancel", end);
  }
}

function within(value, least, most) {
  return Math.min(Math.max(value, least), most);
}

function moved({ x, y, width, height }, right, down) {
  return { x: within(x + right, 0, 1 - width), y: within(y + down, 0, 1 - height), width, height };
}

function stretched({ x, y, width, height }, corner, right, down) {
  let [left, top, end, bottom] = [x, y, x + width, y + height];
  if (corner.includes("w")) left = within(left + right, 0, end - LEAST);
  if (corner.includes("e")) end = within(end + right, left + LEAST, 1);
  if (corner.includes("n")) top = within(top + down, 0, bottom - LEAST);
  if (corner.includes("s")) bottom = within(bottom + down, top + LEAST, 1);
  return { x: left, y: top, width: end - left, height: bottom - top };
}
