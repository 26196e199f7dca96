"use strict";
// The page asks this server alone, and shows what it says as text, never as markup.

const LONGEST_RECORDING = 60; // seconds
const at = (id) => document.getElementById(id);
let tasks = null;
let recording = null; // a Blob
let recorder = null;
let busy = false;

const make = (name, text = "", kind = "") => {
  const element = document.createElement(name);
  element.textContent = text;
  if (kind) element.className = kind;
  return element;
};

const headers = () => (at("token").value ? { Authorization: `Bearer ${at("token").value.trim()}` } : {});

const number = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));

function tell(text) {
  at("state").textContent = text;
  at("state").hidden = !text;
}

async function begin() {
  let answer;
  try {
    answer = await fetch("v1/tasks", { headers: headers() });
  } catch {
    tell("The server does not answer. Trying again …");
    setTimeout(begin, 2000);
    return;
  }
  if (answer.status === 503) {
    tell("The model is being loaded …");
    setTimeout(begin, 1000);
    return;
  }
  at("form").hidden = false;
  if (answer.status === 401) {
    at("token-row").hidden = false;
    tell(at("token").value ? "The token is another one." : "Give the token of this server to begin.");
    at("token").focus();
    return;
  }
  if (!answer.ok) {
    tell(`The server answers with status ${answer.status}.`);
    return;
  }
  tasks = await answer.json();
  tell("");
  at("task").replaceChildren();
  for (const name of [...Object.keys(tasks.tasks), ...Object.keys(tasks.questions)]) at("task").append(new Option(name));
  if (tasks.default) at("task").value = tasks.default;
  at("clip-row").hidden = !tasks.clips.taken;
  at("text").maxLength = tasks.limits.max_text;
  describe();
}

function describe() {
  const names = tasks.questions[at("task").value] || [at("task").value];
  const found = names.map((name) => tasks.tasks[name]).filter(Boolean);
  at("task-note").textContent = found
    .map((task) => (task.labels ? task.labels.join(", ") : `${task.grid.low} to ${task.grid.high}`))
    .join("; ");
  const inputs = found.length ? found[0].inputs : {};
  const widths = Object.entries(inputs).filter(([, one]) => one).map(([name, one]) => {
    const rate = one.rate ? `, ${one.rate} frames a second` : "";
    return `${name} has ${one.width} features a frame${rate}`;
  });
  at("features-note").textContent = widths.length ? `The model's ${widths.join("; ")}.` : "The model reads texts alone.";
}

// ── recording ──────────────────────────────────────────────────────────────────────────────────────────────────────

async function record() {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true, video: true });
  } catch {
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    } catch (error) {
      at("record-note").textContent = `Nothing can be recorded: ${error.message || error}`;
      return;
    }
  }
  drop();
  const parts = [];
  const preview = at("preview");
  preview.hidden = false;
  preview.controls = false;
  preview.muted = true;
  preview.srcObject = stream;
  preview.play().catch(() => {});
  recorder = new MediaRecorder(stream);
  recorder.ondataavailable = (event) => parts.push(event.data);
  recorder.onstop = () => {
    clearInterval(clock);
    for (const track of stream.getTracks()) track.stop();
    recording = new Blob(parts, { type: recorder.mimeType });
    recorder = null;
    preview.srcObject = null;
    preview.src = URL.createObjectURL(recording);
    preview.controls = true;
    preview.muted = false;
    at("clip").value = "";
    at("stop").hidden = true;
    at("record").hidden = false;
    at("drop").hidden = false;
    at("record-note").textContent = `${seconds} s recorded`;
    at("record").focus();
  };
  let seconds = 0;
  const clock = setInterval(() => {
    seconds += 1;
    at("record-note").textContent = `${seconds} s`;
    if (seconds >= LONGEST_RECORDING && recorder) recorder.stop();
  }, 1000);
  recorder.start();
  at("record-note").textContent = "Recording …";
  at("record").hidden = true;
  at("stop").hidden = false;
  at("stop").focus();
}

function drop() {
  const preview = at("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.removeAttribute("src");
  preview.hidden = true;
  recording = null;
  at("drop").hidden = true;
  at("record-note").textContent = "";
}

// ── asking ─────────────────────────────────────────────────────────────────────────────────────────────────────────

async function ask(event) {
  event.preventDefault();
  if (busy) return;
  if (!tasks) {
    await begin();
    return;
  }
  const form = new FormData();
  form.set("task", at("task").value);
  if (at("text").value.trim()) form.set("text", at("text").value);
  const clip = recording || at("clip").files[0];
  if (tasks.clips.taken && clip) form.set("clip", clip, "clip");
  if (at("features").files[0]) form.set("features", at("features").files[0], "features.npz");
  form.set("probabilities", String(tasks.probabilities));
  form.set("gates", String(tasks.gates));
  busy = true;
  at("ask").setAttribute("aria-disabled", "true");
  at("ask").textContent = "The model works …";
  try {
    const answer = await fetch("v1/predict", { method: "POST", body: form, headers: headers() });
    const content = await answer.json();
    show(answer.ok ? content.predictions.map(one) : [refusal(content.error)], answer.ok ? content.notes : []);
  } catch (error) {
    show([refusal({ message: `The server does not answer: ${error.message}`, faults: [] })], []);
  } finally {
    busy = false;
    at("ask").removeAttribute("aria-disabled");
    at("ask").textContent = "Ask the model";
  }
}

function show(blocks, notes) {
  const list = notes.flatMap((note) => note.notes).map((text) => make("p", text, "note"));
  at("answers").replaceChildren(...blocks, ...list);
  at("result").hidden = false;
  if (matchMedia("(max-width: 899px)").matches) at("result").scrollIntoView({ block: "start" });
}

function refusal(error) {
  const box = make("div", "", "fault");
  box.append(make("p", error.message));
  if (error.faults.length) {
    const list = make("ul");
    for (const fault of error.faults) list.append(make("li", `${fault.where}: ${fault.reason}`));
    box.append(list);
  }
  return box;
}

function one(prediction) {
  const box = make("div", "", "answer");
  const task = tasks.tasks[prediction.task];
  const value = prediction.prediction;
  box.append(make("p", prediction.task, "note"));
  box.append(make("p", value === null ? "no valid answer" : typeof value === "number" ? number(value) : value, "value"));
  if (!prediction.valid) box.append(make("p", `The model wrote: ${prediction.answer}`, "note"));
  if (prediction.probabilities) {
    box.append(make("h3", "Probabilities"));
    box.append(task && task.grid ? columns(prediction.probabilities) : bars(prediction.probabilities));
  }
  if (prediction.gate_expert) {
    box.append(make("h3", "Weights of the experts"), bars(prediction.gate_expert));
    box.append(make("h3", "Weights of the modalities in each expert"), gates(prediction.gate_modality));
  }
  return box;
}

function track(share) {
  const outer = make("span", "", "track");
  outer.setAttribute("aria-hidden", "true");
  const inner = make("i");
  inner.style.width = `${100 * (share || 0)}%`;
  outer.append(inner);
  return outer;
}

function bars(shares) {
  const list = make("ul", "", "bars");
  const best = Math.max(...Object.values(shares).map((share) => share || 0));
  for (const [name, share] of Object.entries(shares)) {
    const row = make("li", "", share === best ? "best" : "");
    const label = make("span", name);
    label.dir = "auto";
    row.append(label, track(share), make("span", number(share), "number"));
    list.append(row);
  }
  return list;
}

function columns(shares) {
  const box = make("div");
  const entries = Object.entries(shares);
  const best = entries.reduce((a, b) => ((b[1] || 0) > (a[1] || 0) ? b : a));
  const chart = make("div", "", "columns");
  chart.setAttribute("role", "img");
  chart.setAttribute("aria-label", `Probabilities of the numbers ${entries[0][0]} to ${entries[entries.length - 1][0]}`);
  for (const [name, share] of entries) {
    const column = make("i");
    column.style.height = `${(100 * (share || 0)) / (best[1] || 1)}%`;
    column.title = `${name}: ${number(share)}`;
    chart.append(column);
  }
  const ends = make("div", "", "ends");
  ends.append(make("span", entries[0][0]), make("span", entries[entries.length - 1][0]));
  box.append(chart, ends, make("p", `Most probable is ${best[0]}, with ${number(best[1])}.`, "note"));
  return box;
}

function gates(weights) {
  const scroll = make("div", "", "scroll");
  const table = make("table");
  const modalities = Object.keys(Object.values(weights)[0] || {});
  const head = make("tr");
  for (const name of ["expert", ...modalities]) {
    const cell = make("th", name);
    cell.scope = "col";
    head.append(cell);
  }
  const top = make("thead");
  top.append(head);
  const body = make("tbody");
  for (const [expert, shares] of Object.entries(weights)) {
    const row = make("tr");
    const name = make("th", expert);
    name.scope = "row";
    row.append(name);
    for (const modality of modalities) {
      const cell = make("td", number(shares[modality], 2));
      cell.append(track(shares[modality]));
      row.append(cell);
    }
    body.append(row);
  }
  table.append(top, body);
  scroll.append(table);
  return scroll;
}

at("form").addEventListener("submit", ask);
at("task").addEventListener("change", describe);
at("token").addEventListener("change", begin);
at("record").addEventListener("click", record);
at("stop").addEventListener("click", () => recorder && recorder.stop());
at("drop").addEventListener("click", drop);
at("clip").addEventListener("change", drop);
begin();
