// The engine's last steps on a canvas: above a row for each resident sequence, below one for each layer.

// Steps that are kept, in milliseconds: a little more than the widest window.
const KEPT_MS = 20000;
const GUTTER = 34;
const GAP = 10;
const AXIS = 18;

export class Timeline {
  /** offer: of /v1/depths. reading: where the step under the pointer, or the last one, is said in words. */
  constructor(canvas, reading, offer, windowMs) {
    this.canvas = canvas;
    this.reading = reading;
    this.numLayers = offer.num_layers;
    this.fewest = Math.min(...offer.paths.map(({ layers }) => layers.length));
    this.windowMs = windowMs;
    this.nowMs = 0;
    this.steps = [];
    this.pointedMs = null;
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerleave", () => this.#point(null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#point(null));
    addEventListener("resize", () => this.draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.draw();
  }

  /** Take in what /v1/engine says. */
  add(live) {
    this.nowMs = live.time_ms;
    const paths = live.paths.map((layers) => ({ layers }));
    const row = ([place, path, numTokens, numGuesses, draft]) => {
      return { place, path: paths[path], numTokens, numGuesses, draft: draft === null ? null : paths[draft] };
    };
    for (const step of live.steps) {
      this.steps.push({ ...step, prompts: step.prompts.map(row), rows: step.rows.map(row) });
    }
    const first = this.steps.findIndex((step) => endOf(step) > this.nowMs - KEPT_MS);
    this.steps.splice(0, first < 0 ? this.steps.length : first);
  }

  clear() {
    this.steps = [];
  }

  draw() {
    const numPlaces = this.#numPlaces();
    const rowHeight = Math.min(12, Math.max(3, Math.floor(168 / numPlaces)));
    const layerHeight = Math.min(7, Math.max(2, Math.floor(168 / this.numLayers)));
    const top = numPlaces * rowHeight + GAP;
    const height = top + this.numLayers * layerHeight + AXIS;
    const context = this.#sized(height);
    if (!context) return;
    const width = this.canvas.clientWidth;
    const colours = coloursOf(this.canvas);
    const beginMs = this.nowMs - this.windowMs;
    const x = (ms) => GUTTER + ((ms - beginMs) / this.windowMs) * (width - GUTTER);
    const shown = this.steps.filter((step) => endOf(step) > beginMs);
    const layout = { x, width, top, rowHeight, layerHeight, numPlaces, colours };
    this.#drawFrame(context, layout);
    context.save();
    context.beginPath();
    context.rect(GUTTER, 0, width - GUTTER, height - AXIS);
    context.clip();
    this.#drawWaits(context, layout);
    for (const step of shown) {
      this.#drawSequences(context, layout, step);
      this.#drawLayers(context, layout, step);
    }
    context.restore();
    const pointed = this.#pointed();
    if (pointed) {
      context.fillStyle = colours.ink;
      context.fillRect(Math.round(x(pointed.begin_ms)), 0, 1, height - AXIS);
    }
    this.#read();
  }

  /** So many rows that no sequence of the steps that are kept is left out; a few at least, so that the page is calm. */
  #numPlaces() {
    let most = 7;
    for (const step of this.steps) for (const row of [...step.prompts, ...step.rows]) most = Math.max(most, row.place);
    return most + 1;
  }

  /** The context of the canvas in CSS pixels, cleared; null while the page has no room for it. */
  #sized(height) {
    const ratio = devicePixelRatio || 1;
    const width = this.canvas.clientWidth;
    if (width <= GUTTER) return null;
    if (this.canvas.style.height !== `${height}px`) this.canvas.style.height = `${height}px`;
    const [deviceWidth, deviceHeight] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (this.canvas.width !== deviceWidth) this.canvas.width = deviceWidth;
    if (this.canvas.height !== deviceHeight) this.canvas.height = deviceHeight;
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    return context;
  }

  #drawFrame(context, { x, width, top, layerHeight, colours }) {
    const bottom = top + this.numLayers * layerHeight;
    context.font = `11px ${colours.font}`;
    context.fillStyle = colours.soft;
    context.textBaseline = "top";
    context.save();
    context.translate(2, top - GAP);
    context.rotate(-Math.PI / 2);
    context.fillText("sequences", 0, 0);
    context.restore();
    context.save();
    context.translate(2, bottom);
    context.rotate(-Math.PI / 2);
    context.fillText("layers", 0, 0);
    context.restore();
    context.textAlign = "right";
    context.fillText("0", GUTTER - 5, top - 2);
    context.fillText(`${this.numLayers - 1}`, GUTTER - 5, bottom - 11);
    context.strokeStyle = colours.line;
    context.lineWidth = 1;
    context.strokeRect(GUTTER + 0.5, 0.5, width - GUTTER - 1, top - GAP - 1);
    context.strokeRect(GUTTER + 0.5, top + 0.5, width - GUTTER - 1, bottom - top - 1);
    const tickMs = this.windowMs / 4;
    for (let tick = 0; tick <= 4; tick += 1) {
      const at = x(this.nowMs - tick * tickMs);
      context.textAlign = tick === 0 ? "right" : tick === 4 ? "left" : "center";
      const text = this.windowMs < 1000 ? `${tick * tickMs} ms` : `${(tick * tickMs) / 1000} s`;
      context.fillText(tick === 0 ? "now" : `−${text}`, at, bottom + 5);
    }
    context.textAlign = "left";
  }

  /** A line from one step of a sequence to its next: it is resident, and waits. */
  #drawWaits(context, { x, rowHeight, colours }) {
    const lastMs = new Map();
    context.fillStyle = colours.wait;
    for (const step of this.steps) {
      const promptEndMs = step.begin_ms + step.prefill_ms;
      for (const { place } of step.prompts) lastMs.set(place, promptEndMs);
      for (const { place } of step.rows) {
        const fromMs = lastMs.get(place);
        lastMs.set(place, endOf(step));
        if (fromMs === undefined || promptEndMs <= fromMs) continue;
        context.fillRect(x(fromMs), (place + 0.5) * rowHeight - 0.5, x(promptEndMs) - x(fromMs), 1);
      }
    }
  }

  #drawSequences(context, { x, rowHeight, colours }, step) {
    const [begin, middle, end] = edgesOf(step, x);
    const inset = rowHeight > 4 ? 1 : 0.5;
    context.strokeStyle = colours.prompt;
    for (const { place } of step.prompts) {
      const height = rowHeight - 2 * inset - 1;
      context.strokeRect(begin + 0.5, place * rowHeight + inset + 0.5, Math.max(middle - begin - 1, 1), Math.max(height, 1));
    }
    const width = barWidth(middle, end);
    for (const row of step.rows) {
      context.fillStyle = this.#shade(row.path.layers.length, colours);
      context.fillRect(middle, row.place * rowHeight + inset, width, rowHeight - 2 * inset);
      if (row.numTokens < 2) continue;
      const height = Math.max(2, rowHeight / 3);
      context.fillStyle = colours.draft;
      context.fillRect(middle, (row.place + 1) * rowHeight - inset - height, width, height);
    }
  }

  #drawLayers(context, { x, top, layerHeight, colours }, step) {
    const [begin, middle, end] = edgesOf(step, x);
    const height = layerHeight - (layerHeight > 3 ? 1 : 0.5);
    const bars = (counts, left, width, colour) => {
      context.fillStyle = colour;
      counts.forEach((count, layer) => {
        if (!count) return;
        context.globalAlpha = Math.min(1, 0.3 + 0.1 * (count - 1));
        context.fillRect(left, top + layer * layerHeight + 0.5, width, height);
      });
      context.globalAlpha = 1;
    };
    bars(this.#counts(step.prompts, "path"), begin, barWidth(begin, middle), colours.prompt);
    bars(this.#counts(step.rows, "path"), middle, barWidth(middle, end), colours.ink);
    const drafts = this.#counts(step.rows, "draft").map((count) => (count ? 8 : 0));
    bars(drafts, middle, Math.max(1, barWidth(middle, end) / 4), colours.draft);
  }

  /** How many of `rows` run each layer along `which` of their paths. */
  #counts(rows, which) {
    const counts = new Array(this.numLayers).fill(0);
    for (const row of rows) for (const layer of row[which]?.layers ?? []) counts[layer] += 1;
    return counts;
  }

  #shade(numLayers, { ramp }) {
    const span = this.numLayers - this.fewest;
    const share = span > 0 ? Math.min(1, Math.max(0, (numLayers - this.fewest) / span)) : 1;
    const mixed = ramp[0].map((from, index) => Math.round(from + share * (ramp[1][index] - from)));
    return `rgb(${mixed.join(" ")})`;
  }

  #point(event) {
    this.pointedMs = null;
    this.reading.ariaLive = "off";
    if (event) {
      const share = (event.offsetX - GUTTER) / (this.canvas.clientWidth - GUTTER);
      this.pointedMs = this.nowMs - (1 - share) * this.windowMs;
    }
    this.draw();
  }

  /** The arrows go from step to step, Home and End to the first and the last that are seen. */
  #key(event) {
    const shown = this.steps.filter((step) => step.begin_ms > this.nowMs - this.windowMs);
    const last = shown.length - 1;
    const at = shown.indexOf(this.#pointed() ?? shown[last]);
    const next = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last }[event.key];
    if (next === undefined || last < 0) return;
    event.preventDefault();
    this.pointedMs = shown[Math.min(Math.max(next, 0), last)].begin_ms;
    this.reading.ariaLive = "polite"; // a step that was asked for is said aloud; those that pass by are not
    this.draw();
  }

  /** The step under the pointer, or at which the arrows are; null for none. */
  #pointed() {
    const at = this.pointedMs;
    return at === null ? null : (this.steps.find((step) => step.begin_ms <= at && at < endOf(step)) ?? null);
  }

  #read() {
    const pointed = this.#pointed();
    const step = pointed ?? this.steps.at(-1);
    const text = step ? this.#inWords(step, pointed ? "This step" : "The last step") : "No step of late.";
    if (this.reading.textContent !== text) this.reading.textContent = text;
  }

  #inWords(step, name) {
    const layers = this.#counts([...step.prompts, ...step.rows], "path").filter(Boolean).length;
    const paths = new Set(step.rows.map(({ path }) => path)).size;
    const parts = [];
    if (step.prompts.length) parts.push(counted(step.prompts.length, "prompt"));
    if (step.rows.length) parts.push(`a token for ${counted(step.rows.length, "sequence")} along ${counted(paths, "path")}`);
    const accepted = step.rows.reduce((sum, row) => sum + Math.max(0, row.numTokens - 1), 0);
    if (accepted) parts.push(`${counted(accepted, "guess", "guesses")} accepted`);
    const took = (step.prefill_ms + step.decode_ms).toFixed(1);
    return `${name}: ${parts.join(", ") || "nothing"}; ${layers} of ${this.numLayers} layers ran, ${took} ms.`;
  }
}

function counted(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}

function endOf(step) {
  return step.begin_ms + step.prefill_ms + step.decode_ms;
}

/** Where a step begins, where its decode rows do, and where it ends, in pixels. */
function edgesOf(step, x) {
  return [x(step.begin_ms), x(step.begin_ms + step.prefill_ms), x(endOf(step))];
}

/** Wide enough to be seen, and narrow enough that its neighbour is another bar. */
function barWidth(from, to) {
  return Math.max(0.75, to - from - (to - from > 3 ? 1 : 0));
}

function coloursOf(element) {
  const style = getComputedStyle(element);
  const value = (name) => style.getPropertyValue(name).trim();
  const found = { font: style.fontFamily };
  for (const name of ["ink", "soft", "line", "wait", "prompt", "draft"]) found[name] = value(`--${name}`);
  found.ramp = ["--ramp-0", "--ramp-1"].map((name) => {
    return [1, 3, 5].map((at) => parseInt(value(name).slice(at, at + 2), 16));
  });
  return found;
}
