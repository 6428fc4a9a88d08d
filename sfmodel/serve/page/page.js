// The page of `sfmodel serve`: docs/serve.md has the messages.

import { Player } from "./player.js";

const $ = (id) => document.getElementById(id);
const SAMPLES = 60; // of a chart, one a second
const LARGEST = 8 * 2 ** 20; // bytes of a picture
const FIRST_WAIT = 500, LAST_WAIT = 8000; // ms between two tries to connect

let socket = null;
let about = { fps: 16 };
// connecting, ready, starting, running, paused; failed: tries again; idle: waits to be asked.
let state = "connecting";
let away = false; // paused because nobody looks
let wait = FIRST_WAIT;
let first = null; // a prompt to start with as soon as there is a connection
let image = null; // that is being read, to base64
let asked = []; // prompts that the server has not answered: text and time
let events = []; // prompts and seeds, in their order: text, number, frame, frames, at
let earlier = [], place = 0; // prompts, and which of them is in the box
let draft = ""; // what was in it before
let seen = 0; // frames shown in the last second
let latency = 0;

const player = new Player($("picture"), (number, prompt, now) => {
  seen += 1;
  $("picture").dataset.shown = Number($("picture").dataset.shown) + 1;
  $("picture").dataset.prompt = prompt;
  const present = events.find((each) => each.number === prompt);
  if (!present) return;
  if (!present.frames) {
    latency = (now - present.at) / 1000;
    present.frame = number;
    drawTimeline();
  }
  present.frames += 1;
});

// --- The connection

function connect() {
  become("connecting");
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  socket = new WebSocket(`${scheme}://${location.host}/stream`);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => {
    if (typeof data !== "string") player.push(data);
    else {
      const message = JSON.parse(data);
      take[message.type]?.(message);
    }
  };
  socket.onclose = async ({ code, reason }) => {
    away = false;
    if (reason) note(`the connection was closed: ${reason}`);
    if (code === 1000) { // the server has had no use for it
      become("idle", reason);
      return;
    }
    const refused = await fetch("sessions").then((answer) => answer.status === 401, () => false);
    become("failed", refused ? "the server has another token: open the address that it shows"
      : `${reason || "the server does not answer"}; trying again`);
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
    if (first !== null) start(first);
    first = null;
  },
  started(message) {
    asked = [];
    $("seed").value = message.seed;
    become("running");
    drawTimeline();
    hidden();
  },
  coming({ number, text }) {
    events.push({ number, text, at: asked.shift()?.at ?? performance.now(), frames: 0 });
    drawTimeline();
  },
  prompt({ number, frame }) {
    // One that another took the place of, before it was seen.
    for (const each of events) if (each.number < number && !each.frames) each.lost = true;
    events.find((each) => each.number === number).frame = frame;
    drawTimeline();
  },
  seed({ seed, frame }) {
    $("seed").value = seed;
    events.push({ text: `seed ${seed}`, frame, anew: true });
    drawTimeline();
  },
  paused() { player.paused = true; become("paused", away ? "paused: nobody looks" : ""); },
  resumed() { player.paused = false; become("running"); },
  stats(message) {
    charts.cache.add(message.cache, message.window);
    charts.latency.add(latency);
    if (state === "running") {
      const lost = message.dropped + player.left, others = message.sessions - 1;
      say(`running, ${clock(message.made)}` + (others ? `, with ${others} more` : "")
        + (lost ? `, ${lost} frames left out` : ""));
    }
  },
  saved(clip) {
    $("save").disabled = false;
    const item = document.createElement("li");
    const sheet = Object.assign(document.createElement("a"), { href: clip.sheet, target: "_blank" });
    sheet.append(Object.assign(new Image(), { src: clip.sheet, alt: "Contact sheet" }));
    const link = Object.assign(document.createElement("a"), { href: clip.url, download: "" });
    link.textContent = `${clip.seconds.toFixed(1)} s, ${Math.ceil(clip.bytes / 1000)} kB`;
    item.append(sheet, link);
    $("clips").prepend(item);
    link.click();
  },
  stopped({ reason }) {
    away = false;
    become("ready", "stopped");
    if (reason !== "asked") note(reason);
  },
  error({ about: what, message }) {
    note(message);
    if (what === "save") $("save").disabled = false;
    if (what === "prompt" || what === "start") {
      const refused = asked.shift()?.text ?? "";
      $("prompt").value ||= refused; // to be mended
    }
    if (what === "start") become("ready");
  },
};

// --- What is shown

function become(next, said = "") {
  state = next;
  document.body.dataset.state = next;
  const live = next === "running" || next === "paused";
  for (const id of ["stop", "pause", "reseed"]) $(id).disabled = !live;
  $("save").disabled = !live && !(next === "ready" && events.length);
  $("send").disabled = !live && next !== "ready" && next !== "idle";
  $("send").textContent = live ? "Change prompt" : "Start";
  $("pause").textContent = next === "paused" ? "Resume" : "Pause";
  if (!live) for (const each of Object.values(charts)) each.rest();
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
  const lines = events.toReversed().map(({ text, frame, lost, anew }) => {
    const line = document.createElement("li");
    line.className = lost ? "lost" : "";
    const when = document.createElement("time");
    when.textContent = lost ? "–" : frame === undefined ? "soon" : clock(frame);
    line.append(when, anew ? text : button(text, () => submit(text)));
    return line;
  });
  $("timeline").replaceChildren(...lines);
  drawStrip();
}

function drawStrip() {
  const parts = events.filter((each) => each.frames).map((each) => {
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
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", `0 0 ${SAMPLES - 1} 20`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    this.line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    svg.append(this.line);
    figure.append(caption, this.output, svg);
    $("charts").append(figure);
    this.rest();
  }

  rest() { this.output.textContent = "–"; }

  clear() {
    this.values = [];
    this.line.setAttribute("points", "");
  }

  add(value, most = 0) {
    this.values = [...this.values, value].slice(-SAMPLES);
    const top = Math.max(most, ...this.values) * 1.1 || 1;
    const points = this.values.map((y, i) => `${i},${20 - (20 * y) / top}`);
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
  text = text.trim();
  const live = state === "running" || state === "paused";
  if ($("send").disabled || (live && !text)) return;
  text ||= $("prompt").placeholder;
  earlier = [...earlier.filter((each) => each !== text), text];
  place = earlier.length;
  $("prompt").value = draft = "";
  $("note").hidden = true;
  if (live) {
    asked.push({ text, at: performance.now() });
    send({ type: "prompt", text, over: Number($("over").value), keep_cache: $("keep").checked });
  } else if (state === "ready") start(text);
  else {
    first = text;
    connect();
  }
}

function seed() {
  const said = Number($("seed").value);
  $("seed").value = Number.isSafeInteger(said) ? said : 0;
  return Number($("seed").value);
}

async function start(text) {
  player.clear();
  player.paused = false;
  latency = 0;
  asked = [{ text, at: performance.now() }];
  events = [{ number: 0, text, at: performance.now(), frames: 0 }];
  for (const each of Object.values(charts)) each.clear();
  become("starting");
  const file = await image;
  send({ type: "start", prompt: text, seed: seed(), ...(file ? { image: file } : {}) });
}

function stop() {
  $("stop").disabled = true;
  send({ type: "stop" });
}

function pause() { send({ type: state === "paused" ? "resume" : "pause" }); }

function reseed() { send({ type: "seed", seed: Math.floor(Math.random() * 2 ** 31) }); }

function save() {
  $("save").disabled = true;
  send({ type: "save" });
}

$("form").onsubmit = (event) => { event.preventDefault(); submit($("prompt").value); };
$("stop").onclick = stop;
$("pause").onclick = pause;
$("reseed").onclick = reseed;
$("save").onclick = save;
$("seed").onchange = () => {
  const chosen = seed();
  if (state === "running" || state === "paused") send({ type: "seed", seed: chosen });
};

// A button that the mouse pressed gives Space back to the page.
document.addEventListener("click", (event) => {
  if (event.detail) event.target.closest("button")?.blur();
});

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
  image = new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => { note("the picture cannot be read"); done(null); };
    reader.readAsDataURL(file);
  });
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
    const up = event.key === "ArrowUp", next = place + (up ? -1 : 1);
    const within = up ? box.value.slice(0, box.selectionStart) : box.value.slice(box.selectionEnd);
    if (next < 0 || next > earlier.length || within.includes("\n")) return; // moves between lines
    event.preventDefault();
    if (place === earlier.length) draft = box.value;
    place = next;
    box.value = earlier[place] ?? draft;
  }
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target.closest("input, textarea, select")) return;
  const onButton = event.target.closest("button, summary, a");
  const live = state === "running" || state === "paused";
  const pressed = {
    "/": () => $("prompt").focus(),
    " ": onButton || !live ? null : pause,
    n: live ? reseed : null,
    s: $("save").disabled ? null : save,
  }[event.key.toLowerCase()];
  if (!pressed) return;
  event.preventDefault();
  pressed();
});

// Nobody looks at a page that is hidden: its stream waits.
function hidden() {
  if (document.hidden && state === "running") {
    away = true;
    send({ type: "pause" });
  } else if (!document.hidden && away) {
    away = false;
    send({ type: "resume" });
  }
}

document.addEventListener("visibilitychange", hidden);

connect();
