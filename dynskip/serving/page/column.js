// One depth: its slider, its draft, and the answer through its layers.

import { stream } from "./api.js";

/** `20 of 30`, as the slider says it. */
function depthText(layers, numLayers) {
  return `${layers.length} of ${numLayers}`;
}

/** `0-2, 6-13`: layer numbers with runs drawn together. */
function rangesOf(layers) {
  const runs = [];
  for (const layer of layers) {
    const last = runs.at(-1);
    if (last && last[1] === layer - 1) last[1] = layer;
    else runs.push([layer, layer]);
  }
  return runs.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join(", ");
}

function rounded(value) {
  return value.toFixed(value < 10 ? 1 : 0);
}

export class Column {
  /** offer: of /v1/depths. index: of the path that the slider begins at. name: what tells it from another. */
  constructor(offer, index, name) {
    this.offer = offer;
    this.root = document.getElementById("column").content.firstElementChild.cloneNode(true);
    this.parts = {};
    for (const part of this.root.querySelectorAll("[data-part]")) this.parts[part.dataset.part] = part;
    const { slider, draft, strip, title, answer } = this.parts;
    title.textContent = name;
    answer.setAttribute("aria-label", name);
    slider.max = offer.paths.length - 1;
    slider.value = index;
    slider.disabled = offer.paths.length < 2;
    slider.addEventListener("input", () => this.#showDepth());
    for (let layer = 0; layer < offer.num_layers; layer += 1) strip.append(document.createElement("span"));
    for (const name of offer.drafts) draft.append(this.#option(name));
    this.wantedDraft = offer.default_draft;
    draft.addEventListener("change", () => {
      this.wantedDraft = draft.value;
    });
    this.#showDepth();
  }

  get path() {
    return this.offer.paths[this.parts.slider.value];
  }

  /** Show that this one's turn is to come. */
  wait() {
    this.ranPath = this.path;
    this.#begin();
    this.parts.state.textContent = "Behind the first answer …";
  }

  /** Stream the answer to `request` into the column; resolves to how it ended: text, and the error if one ended it. */
  async run(route, request, signal) {
    this.ranPath = this.path;
    this.#begin();
    const body = { ...request, path: this.ranPath.path, draft: this.parts.draft.value, return_token_ids: true };
    let error = null;
    try {
      for await (const chunk of stream(route, body, signal)) this.#take(chunk);
    } catch (caught) {
      error = caught;
    }
    return this.#end(error);
  }

  #option(name) {
    const option = document.createElement("option");
    const known = this.offer.paths.find(({ path }) => path === name);
    option.value = name;
    option.textContent = { none: "none", auto: "the one a search has found" }[name] ?? name;
    if (known) option.textContent = `${known.layers.length} layers (${name})`;
    option.needsFull = name === "auto";
    option.numLayers = known ? known.layers.length : 0;
    return option;
  }

  /** Show the path under the slider; drafts that are no shallower than it have nothing to save. */
  #showDepth() {
    const { slider, said, strip, draft } = this.parts;
    const { layers, path } = this.path;
    const text = depthText(layers, this.offer.num_layers);
    said.textContent = text;
    slider.setAttribute("aria-valuetext", `${text} layers: ${rangesOf(layers)}`);
    slider.title = path;
    const active = new Set(layers);
    [...strip.children].forEach((cell, layer) => cell.classList.toggle("on", active.has(layer)));
    for (const option of draft.options) {
      const isFull = layers.length === this.offer.num_layers;
      option.disabled = (option.needsFull && !isFull) || option.numLayers >= layers.length;
    }
    const wanted = [...draft.options].find((option) => option.value === this.wantedDraft);
    draft.value = wanted && !wanted.disabled ? wanted.value : "none";
  }

  #begin() {
    const { answer, state, ran } = this.parts;
    Object.assign(this, { sentMs: performance.now(), firstMs: 0, lastMs: 0, numTokens: 0, numAccepted: 0 });
    this.reason = null;
    this.facts = null;
    answer.replaceChildren();
    answer.setAttribute("aria-busy", "true");
    state.classList.remove("failed");
    state.textContent = "Waiting for the first token …";
    for (const name of ["ms", "first", "tokens", "drafted", "accepted"]) this.parts[name].textContent = "–";
    ran.textContent = depthText(this.ranPath.layers, this.offer.num_layers);
  }

  #take(chunk) {
    this.facts = chunk.dynskip ?? this.facts;
    const choice = chunk.choices[0];
    if (!choice) return;
    this.reason = choice.finish_reason ?? this.reason;
    this.#append(choice.delta?.content ?? choice.text ?? "", Boolean(choice.was_guessed?.[0]));
    this.numAccepted += (choice.was_guessed ?? []).filter(Boolean).length;
    const count = choice.token_ids?.length ?? 0;
    if (!count) return;
    this.lastMs = performance.now();
    if (!this.numTokens) {
      this.firstMs = this.lastMs;
      this.numFirst = count;
      this.parts.state.textContent = "Answering …";
    }
    this.numTokens += count;
    this.#showFacts();
  }

  /** Text is set as text, never as markup: a model may write anything. */
  #append(text, isGuessed) {
    if (!text) return;
    const { answer } = this.parts;
    const isAtEnd = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 40;
    let run = answer.lastElementChild;
    if (!run || run.classList.contains("guessed") !== isGuessed) {
      run = document.createElement("span");
      run.classList.toggle("guessed", isGuessed);
      run.append(document.createTextNode(""));
      answer.append(run);
    }
    run.firstChild.appendData(text);
    if (isAtEnd) answer.scrollTop = answer.scrollHeight;
  }

  #showFacts() {
    const { ms, first, tokens, ran, drafted, accepted } = this.parts;
    const numLater = this.numTokens - this.numFirst;
    if (numLater > 0) ms.textContent = rounded((this.lastMs - this.firstMs) / numLater);
    if (this.firstMs) first.textContent = rounded(this.firstMs - this.sentMs);
    tokens.textContent = `${this.numTokens}`;
    accepted.textContent = `${this.numAccepted}`;
    if (!this.facts) return;
    ran.textContent = depthText(this.facts.layers, this.offer.num_layers);
    drafted.textContent = `${this.facts.num_drafted}`;
    accepted.textContent = `${this.facts.num_accepted}`;
  }

  #end(error) {
    const { answer, state, ms } = this.parts;
    answer.setAttribute("aria-busy", "false");
    const ends = { stop: "Ended by the model.", length: "Ended at the most tokens." };
    state.textContent = ends[this.reason] ?? "Ended.";
    if (error?.name === "AbortError") state.textContent = `Stopped after ${this.numTokens} tokens.`;
    else if (error) {
      state.textContent = error.message;
      state.classList.add("failed");
    }
    if (!error) this.#showFacts();
    const depth = depthText(this.ranPath.layers, this.offer.num_layers);
    const speed = this.numTokens > 1 ? `, ${ms.textContent} milliseconds a token` : "";
    return { error, told: `${depth} layers, ${this.numTokens} tokens${speed}. ${state.textContent} ${answer.textContent}` };
  }
}
