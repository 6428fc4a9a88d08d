// Shows frames as they come, at the video's rate: what is early waits, what is late is shown at once.

const HEADER = 8; // bytes: the frame's number, its prompt's number
const FULL = 3; // chunks that may wait; of more the oldest are left out

export class Player {
  // shown: called with the number and the prompt of each frame when it is on the screen.
  constructor(canvas, shown) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.shown = shown;
    this.paused = false;
    this.period = 1000 / 16; // ms from a frame to the next
    this.most = 36;
    this.clear();
    const tick = (now) => {
      this.show(now);
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  setup({ width, height, fps, chunk }) {
    Object.assign(this.canvas, { width, height });
    this.canvas.classList.toggle("small", Math.min(width, height) <= 256);
    this.period = 1000 / fps;
    this.most = FULL * chunk;
  }

  clear() {
    this.waiting = []; // frames in their order, each with its picture once that is decoded
    this.due = 0; // when the next one is
    this.left = 0; // frames that were left out
  }

  push(message) {
    const header = new DataView(message);
    const frame = { number: header.getUint32(0, true), prompt: header.getUint32(4, true) };
    this.waiting.push(frame);
    const file = new Blob([new Uint8Array(message, HEADER)], { type: "image/jpeg" });
    createImageBitmap(file).then(
      (picture) => { frame.picture = picture; },
      () => { frame.broken = true; },
    );
    while (this.waiting.length > this.most) {
      this.waiting.shift().picture?.close();
      this.left += 1;
    }
  }

  show(now) {
    while (this.waiting[0]?.broken) this.waiting.shift();
    const frame = this.waiting[0];
    if (this.paused || now < this.due || !frame?.picture) return;
    this.waiting.shift();
    this.context.drawImage(frame.picture, 0, 0, this.canvas.width, this.canvas.height);
    frame.picture.close();
    // On time, to the frame's time after the last one; late, from now on.
    this.due = now - this.due < this.period ? this.due + this.period : now + this.period;
    this.shown(frame.number, frame.prompt, now);
  }
}
