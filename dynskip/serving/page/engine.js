// What the engine does now: asked for a few times a second while the page is seen.

import { getJson } from "./api.js";

const BUSY_MS = 250;
const IDLE_MS = 1000;
const FAILED_MS = 3000;
// Tokens a second are those of so long a while.
const RATE_MS = 2000;

export class Engine {
  /** parts: the elements by name. onRefusal: called with why it says nothing, or null once it does. */
  constructor(parts, timeline, onRefusal) {
    this.parts = parts;
    this.timeline = timeline;
    this.onRefusal = onRefusal;
    this.isHeld = false;
    this.isExpecting = false;
    this.since = 0;
    this.samples = [];
    this.drawnMs = 0;
    this.timer = null;
    this.isAsking = false;
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    document.addEventListener("visibilitychange", () => this.wake());
  }

  /** Ask often from now on, or no longer than the engine is busy: the page itself sends something, or has its answer. */
  expect(isExpecting) {
    this.isExpecting = isExpecting;
    this.wake();
  }

  /** Ask now, and go on asking. */
  wake() {
    clearTimeout(this.timer);
    if (!this.isAsking && !document.hidden) this.#ask();
  }

  hold(isHeld) {
    this.isHeld = isHeld;
    if (!isHeld) this.timeline.clear(); // what has gone by meanwhile is not there
  }

  async #ask() {
    this.isAsking = true;
    let pauseMs = IDLE_MS;
    try {
      const live = await getJson(`v1/engine?since=${this.since}`);
      this.#take(live);
      this.onRefusal(null);
      if (this.isExpecting || live.num_running + live.num_prefilling + live.num_waiting > 0) pauseMs = BUSY_MS;
    } catch (error) {
      this.onRefusal(error);
      pauseMs = error.status === 401 ? Infinity : FAILED_MS; // a key that is refused is not tried again
    }
    this.isAsking = false;
    if (!document.hidden && pauseMs < Infinity) this.timer = setTimeout(() => this.#ask(), pauseMs);
  }

  #take(live) {
    if (live.num_steps < this.since) {
      this.samples = []; // another server by now
      this.timeline.clear();
    }
    this.since = live.num_steps;
    this.#showTiles(live);
    if (this.isHeld) return;
    this.timeline.add(live);
    const now = performance.now();
    if (this.calm.matches && now - this.drawnMs < 1000) return;
    this.drawnMs = now;
    this.timeline.draw();
  }

  #showTiles(live) {
    const { rate, resident, waiting, memory, bar } = this.parts;
    this.samples.push({ ms: live.time_ms, num: live.num_tokens });
    while (this.samples.length > 2 && this.samples[1].ms < live.time_ms - RATE_MS) this.samples.shift();
    const first = this.samples[0];
    const passedMs = live.time_ms - first.ms;
    rate.textContent = passedMs > 0 ? `${Math.round((1000 * (live.num_tokens - first.num)) / passedMs)}` : "–";
    resident.textContent = `${live.num_running + live.num_prefilling}`;
    waiting.textContent = `${live.num_waiting}`;
    memory.textContent = `${mebibytes(live.kv_bytes)} of ${mebibytes(live.kv_capacity_bytes)} MiB`;
    bar.style.width = `${(100 * live.kv_bytes) / live.kv_capacity_bytes}%`;
  }
}

function mebibytes(bytes) {
  const value = bytes / 2 ** 20;
  return value && value < 10 ? value.toFixed(1) : value.toFixed(0);
}
