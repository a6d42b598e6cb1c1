// The page: a prompt, one or two depths that answer it, and the engine below.

import { getJson, key } from "./api.js";
import { Column } from "./column.js";
import { Engine } from "./engine.js";
import { Timeline } from "./timeline.js";

const $ = (id) => document.getElementById(id);
const columns = [];
let offer = null;
let engine = null;
let running = null; // the AbortController of what is being answered

// The key

let asking = null;

/** Ask for the key, saying why; resolves to whether one was given. */
function askKey(why) {
  asking ??= new Promise((resolve) => {
    $("key-why").textContent = why;
    $("key").value = "";
    $("key-button").hidden = false;
    const dialog = $("key-dialog");
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "given"), { once: true });
    dialog.returnValue = "";
    dialog.showModal();
    $("key").focus();
  }).finally(() => {
    asking = null;
  });
  return asking;
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  $("key").value = "";
  $("key-dialog").close("given");
});
$("key-cancel").addEventListener("click", () => $("key-dialog").close(""));
$("key-button").addEventListener("click", async () => {
  if (await askKey("Another key replaces the one that this tab has.")) await start();
});

// What is said

/** What holds as long as the server does. */
function standing() {
  return offer.has_tokenizer ? "" : "The model has no tokenizer: it takes token ids only, which this page cannot send.";
}

function notice(text) {
  const isNew = $("notice").textContent !== text;
  $("notice").hidden = !text;
  if (isNew) $("notice").textContent = text; // said aloud once, where it is shown
}

// The beginning

async function start() {
  try {
    offer = await getJson("v1/depths");
  } catch (error) {
    notice(error.message);
    if (error.status === 401 && (await askKey(error.message))) await start();
    return;
  }
  notice(standing());
  $("key-button").hidden = !key.get();
  if (!columns.length) build();
  engine.wake();
}

function build() {
  $("model").textContent = `${offer.model}, ${offer.num_layers} layers`;
  document.title = `${offer.model} · dynskip`;
  $("max-tokens").max = offer.max_model_len - 1;
  $("max-tokens").value = Math.min($("max-tokens").value, offer.max_model_len - 1);
  $("mode").value = offer.has_chat_template ? "chat" : "completion";
  $("mode-label").hidden = !offer.has_chat_template;
  const budget = offer.default_path.layers.length;
  const found = offer.paths.findIndex(({ layers }) => layers.length >= budget);
  columns.push(new Column(offer, found < 0 ? offer.paths.length - 1 : found, "First answer"));
  columns.push(new Column(offer, Math.floor((offer.paths.length - 1) / 2), "Second answer"));
  $("columns").append(...columns.map(({ root }) => root));
  showColumns();
  const timeline = new Timeline($("timeline"), $("reading"), offer, Number($("window").value));
  $("window").addEventListener("change", () => {
    timeline.windowMs = Number($("window").value);
    timeline.draw();
  });
  const parts = { rate: $("rate"), resident: $("resident"), waiting: $("waiting"), memory: $("memory"), bar: $("memory-bar") };
  engine = new Engine(parts, timeline, onEngine);
}

let engineFailed = false;

function onEngine(error) {
  if (error?.status === 401) {
    askKey(error.message).then((isGiven) => isGiven && start());
  } else if (error) {
    notice(error.message);
  } else if (engineFailed) {
    notice(standing());
    checkOffer();
  }
  engineFailed = Boolean(error);
}

/** Behind a failure another server may answer, whose depths are not those of the sliders. */
async function checkOffer() {
  const now = await getJson("v1/depths").catch(() => offer);
  if (JSON.stringify(now) !== JSON.stringify(offer)) notice("The server offers other depths by now. Reload the page.");
}

function showColumns() {
  const isCompared = $("compare").checked;
  columns[1].root.hidden = !isCompared;
  $("in-turn-label").hidden = !isCompared;
  columns[0].parts.title.textContent = isCompared ? "First answer" : "Answer";
  $("columns").classList.toggle("two", isCompared);
}

// Asking

async function send() {
  if (running || !offer?.has_tokenizer) return;
  running = new AbortController();
  showRunning();
  const shown = columns.filter(({ root }) => !root.hidden);
  const [route, request] = requestOf();
  $("announce").textContent = shown.length > 1 ? "Two depths are answering." : "Answering.";
  engine.expect(true);
  const ask = (column) => column.run(route, request, running.signal);
  const ends = await ($("in-turn").checked ? inTurn(shown, ask) : Promise.all(shown.map(ask)));
  running = null;
  showRunning();
  engine.expect(false);
  $("announce").textContent = ends.map(({ told }) => told).join(" ");
  const refused = ends.find(({ error }) => error?.status === 401);
  if (refused && (await askKey(refused.error.message))) await send();
}

/** One after the other, so that each has its own time: at once they share the engine's steps. */
async function inTurn(shown, ask) {
  shown.slice(1).forEach((column) => column.wait());
  const ends = [];
  for (const column of shown) ends.push(await ask(column));
  return ends;
}

function requestOf() {
  const prompt = $("prompt").value;
  const request = { max_tokens: Number($("max-tokens").value), temperature: Number($("temperature").value) };
  if (request.temperature > 0) request.seed = Math.floor(Math.random() * 2 ** 31); // one, so that depths compare
  if ($("mode").value === "chat") {
    return ["v1/chat/completions", { ...request, messages: [{ role: "user", content: prompt }] }];
  }
  return ["v1/completions", { ...request, prompt }];
}

function showRunning() {
  // Not disabled: a button that loses the focus strands the keyboard.
  $("send").setAttribute("aria-disabled", `${Boolean(running)}`);
  $("stop").setAttribute("aria-disabled", `${!running}`);
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) $("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("key-dialog").open) running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("compare").addEventListener("change", showColumns);
$("hold").addEventListener("click", () => {
  if (!engine) return;
  const isHeld = $("hold").getAttribute("aria-pressed") !== "true";
  $("hold").setAttribute("aria-pressed", `${isHeld}`);
  engine.hold(isHeld);
});

start();
