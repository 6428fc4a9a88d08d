// The page of `sfmodel serve`: docs/serve.md has the messages.

import { Player } from "./player.js";

const $ = (id) => document.getElementById(id);
const SAMPLES = 60; // of a chart, one a second
const LARGEST = 8 * 2 ** 20; // bytes of a picture
const FIRST_WAIT = 500, LAST_WAIT = 8000; // ms between two tries to connect

let socket = null;
let about = { fps: 16 };
let state = "connecting"; // ready, starting, running, paused, failed
let away = false; // paused because nobody looks
let wait = FIRST_WAIT;
let image = null; // in base64
let sent = []; // prompts whose number is not known yet: text and time
let prompts = new Map(); // by number: text, time, frame, shown
let earlier = [], at = 0; // prompts, and which of them is in the box
let seen = 0; // frames shown in the last second
let latency = 0;

const player = new Player($("picture"), (number, prompt, now) => {
  seen += 1;
  $("picture").dataset.shown = Number($("picture").dataset.shown) + 1;
  $("picture").dataset.prompt = prompt;
  for (const [key, each] of prompts) {
    if (key <= prompt && each.asked !== undefined) {
      latency = (now - each.asked) / 1000;
      delete each.asked;
    }
  }
  const present = prompts.get(prompt);
  if (present) {
    if (present.frame === undefined) { present.frame = number; drawTimeline(); }
    present.frames += 1;
  }
});

// --- The connection

function connect() {
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  socket = new WebSocket(`${scheme}://${location.host}/stream`);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => {
    if (typeof data === "string") take[JSON.parse(data).type]?.(JSON.parse(data));
    else player.push(data);
  };
  socket.onclose = ({ code, reason }) => {
    const why = reason || (code === 1006 ? "the server does not answer" : `closed (${code})`);
    become("failed", `${why}; trying again`);
    setTimeout(connect, wait);
    wait = Math.min(2 * wait, LAST_WAIT);
  };
}

function send(message) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

const take = {
  hello(message) {
    about = message;
    wait = FIRST_WAIT;
    player.setup(message);
    $("about").textContent = `${message.preset}, ${message.width} × ${message.height}`;
    $("prompt").placeholder = message.examples[0] ?? "";
    $("examples").replaceChildren(...message.examples.map((text) => button(text, () => submit(text))));
    become("ready", `${message.places - message.sessions} of ${message.places} places free`);
  },
  started(message) {
    become("running");
    drawTimeline();
    $("seed").value = message.seed;
  },
  coming({ number, text }) {
    const { asked } = sent.shift() ?? {};
    prompts.set(number, { text, asked, frames: 0 });
    drawTimeline();
  },
  seed({ seed }) { $("seed").value = seed; },
  paused() { player.paused = true; become("paused", away ? "paused: nobody looks" : ""); },
  resumed() { player.paused = false; become("running"); },
  stats(message) {
    charts.cache.add(message.cache, message.window);
    charts.latency.add(latency);
    document.body.dataset.dropped = message.dropped;
    if (state === "running") {
      const lost = message.dropped + player.left;
      const others = message.sessions - 1;
      say(`running, ${clock(message.made)}` + (others ? `, with ${others} more` : "")
        + (lost ? `, ${lost} frames left out` : ""));
    }
  },
  saved(clip) {
    $("save").disabled = false;
    const item = document.createElement("li");
    const sheet = Object.assign(new Image(), { src: clip.sheet, alt: "Contact sheet" });
    const link = Object.assign(document.createElement("a"), { href: clip.url, download: "" });
    link.textContent = `${clip.seconds.toFixed(1)} s, ${Math.ceil(clip.bytes / 1000)} kB`;
    item.append(sheet, link);
    $("clips").prepend(item);
    link.click();
  },
  stopped({ reason }) {
    become("ready");
    say("stopped");
    if (reason !== "asked") note(reason);
  },
  error({ about: what, message }) {
    if (what === "save") $("save").disabled = false;
    if (what === "prompt") sent.shift();
    if (what === "start") become("ready");
    note(message);
  },
};

// --- What is shown

function become(next, said = "") {
  state = next;
  document.body.dataset.state = next;
  const live = next === "running" || next === "paused";
  for (const id of ["pause", "reseed", "save"]) $(id).disabled = !live;
  $("toggle").disabled = $("send").disabled = !live && next !== "ready";
  $("toggle").textContent = live ? "Stop" : "Start";
  $("send").textContent = live ? "Change prompt" : "Start";
  $("pause").textContent = next === "paused" ? "Resume" : "Pause";
  say(said || next);
}

function say(text) { $("status").textContent = text; }

function note(text) {
  $("note").textContent = text;
  $("note").hidden = false;
}

function button(text, pressed) {
  const made = Object.assign(document.createElement("button"), { type: "button", onclick: pressed });
  made.textContent = text;
  return made;
}

function clock(frames) {
  const seconds = Math.floor(frames / about.fps);
  return `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
}

function drawTimeline() {
  const lines = [...prompts.values()].reverse().map(({ text, frame }) => {
    const line = document.createElement("li");
    const when = document.createElement("time");
    when.textContent = frame === undefined ? "soon" : clock(frame);
    line.append(when, button(text, () => submit(text)));
    return line;
  });
  $("timeline").replaceChildren(...lines);
  drawStrip();
}

function drawStrip() {
  const parts = [...prompts.values()].filter((each) => each.frames).map((each) => {
    const part = document.createElement("span");
    part.style.flexGrow = each.frames;
    part.title = `${each.text}, from ${clock(each.frame)}`;
    return part;
  });
  $("strip").replaceChildren(...parts);
}

class Chart {
  constructor(name, unit, digits) {
    Object.assign(this, { unit, digits, values: [] });
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = name;
    this.output = document.createElement("output");
    this.output.textContent = "–";
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", `0 0 ${SAMPLES - 1} 20`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    this.line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    svg.append(this.line);
    figure.append(caption, this.output, svg);
    $("charts").append(figure);
  }

  add(value, most = 0) {
    this.values = [...this.values, value].slice(-SAMPLES);
    const top = Math.max(most, ...this.values) * 1.1 || 1;
    const first = SAMPLES - this.values.length;
    const points = this.values.map((y, i) => `${first + i},${20 - (20 * y) / top}`);
    this.line.setAttribute("points", points.join(" "));
    this.output.textContent = value.toFixed(this.digits) + (most ? ` of ${most}` : "") + this.unit;
  }
}

const charts = {
  fps: new Chart("Frames a second", "", 0),
  latency: new Chart("Prompt to picture", " s", 2),
  cache: new Chart("Cache, latent frames", "", 0),
};

setInterval(() => {
  if (state === "running") {
    charts.fps.add(seen, about.fps);
    drawStrip();
  }
  seen = 0;
}, 1000);

// --- What is asked for

function submit(text) {
  text = text.trim() || $("prompt").placeholder;
  if (!text || $("send").disabled) return;
  earlier = [...earlier.filter((each) => each !== text), text];
  at = earlier.length;
  $("prompt").value = "";
  $("note").hidden = true;
  if (state === "ready") start(text);
  else {
    const over = Number($("over").value);
    sent.push({ asked: performance.now() });
    send({ type: "prompt", text, over, keep_cache: $("keep").checked });
  }
}

function start(text) {
  player.clear();
  player.paused = false;
  latency = 0;
  sent = [];
  prompts = new Map([[0, { text, asked: performance.now(), frames: 0 }]]);
  become("starting");
  send({ type: "start", prompt: text, seed: Math.trunc(Number($("seed").value)) || 0, image });
}

function toggle() {
  if (state === "ready") submit($("prompt").value);
  else send({ type: "stop" });
}

function pause() { send({ type: state === "paused" ? "resume" : "pause" }); }

function reseed() { send({ type: "seed", seed: Math.floor(Math.random() * 2 ** 31) }); }

function save() {
  $("save").disabled = true;
  send({ type: "save" });
}

$("form").onsubmit = (event) => { event.preventDefault(); submit($("prompt").value); };
$("toggle").onclick = toggle;
$("pause").onclick = pause;
$("reseed").onclick = reseed;
$("save").onclick = save;
$("seed").onchange = () => {
  const seed = Math.trunc(Number($("seed").value)) || 0;
  if (state === "running" || state === "paused") send({ type: "seed", seed });
};

$("image").onchange = () => {
  const [file] = $("image").files;
  image = null;
  $("noimage").hidden = !file;
  if (!file) return;
  if (file.size > LARGEST) {
    note(`the picture has ${(file.size / 2 ** 20).toFixed(1)} MiB: at most 8 are taken`);
    forgetImage();
    return;
  }
  const reader = new FileReader();
  reader.onload = () => { image = reader.result.slice(reader.result.indexOf(",") + 1); };
  reader.readAsDataURL(file);
};

function forgetImage() {
  $("image").value = "";
  $("noimage").hidden = true;
  image = null;
}

$("noimage").onclick = forgetImage;

$("prompt").onkeydown = (event) => {
  const box = $("prompt");
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit(box.value);
  } else if (event.key === "Escape") {
    box.blur();
  } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
    const next = at + (event.key === "ArrowUp" ? -1 : 1);
    if (next < 0 || next > earlier.length) return;
    event.preventDefault();
    at = next;
    box.value = earlier[at] ?? "";
  }
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, textarea, select")) return;
  const onButton = event.target.closest("button, summary, a");
  const live = state === "running" || state === "paused";
  const pressed = {
    "/": () => $("prompt").focus(),
    " ": onButton || !live ? null : pause,
    n: live ? reseed : null,
    s: live && !$("save").disabled ? save : null,
  }[event.key];
  if (!pressed) return;
  event.preventDefault();
  pressed();
});

// Nobody looks at a page that is hidden: its stream waits.
document.addEventListener("visibilitychange", () => {
  if (document.hidden && state === "running") {
    away = true;
    send({ type: "pause" });
  } else if (!document.hidden && away) {
    away = false;
    send({ type: "resume" });
  }
});

connect();
