// What the page asks of the server: JSON, streams, and the key where one is set.

const KEY = "dynskip-key";
let heldKey = "";

/** The server's key in this tab. Where storage is forbidden, it lasts until the page is left. */
export const key = {
  get() {
    try {
      return sessionStorage.getItem(KEY) ?? heldKey;
    } catch {
      return heldKey;
    }
  },
  set(value) {
    heldKey = value;
    try {
      sessionStorage.setItem(KEY, value);
    } catch {
      // heldKey has it
    }
  },
};

/** Why the server does not answer, in words. status: of HTTP; 0 where there was no answer, or no end of it. */
export class Refusal extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export async function getJson(path) {
  return (await ask(path, {})).json();
}

/** The chunks of the stream that answers `body`; a Refusal where it breaks off, an AbortError once `signal` says so. */
export async function* stream(path, body, signal) {
  const json = { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal };
  const response = await ask(path, json, { "content-type": "application/json" });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw lost();
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue;
        const data = event.slice("data: ".length);
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refusal(`The answer broke off: ${chunk.error.message}`);
        yield chunk;
      }
    }
  } catch (error) {
    throw error instanceof Refusal || error.name === "AbortError" ? error : lost();
  } finally {
    reader.cancel().catch(() => {}); // it may have been broken off already
  }
}

function lost() {
  return new Refusal("The connection was lost in the middle of the answer.");
}

async function ask(path, options, headers = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...authorization() }, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached. Does it still run?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** The key as the bytes of its UTF-8: a header is made of bytes. */
function authorization() {
  if (!key.get()) return {};
  return { authorization: `Bearer ${String.fromCharCode(...new TextEncoder().encode(key.get()))}` };
}

async function refusal(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // what stands between may answer with a page of its own: its status says enough
  }
  const { status } = response;
  if (status === 401) {
    const why = key.get() ? "The server refuses this key." : "This server answers only those who have its key.";
    return new Refusal(why, status);
  }
  if (status === 429) {
    const seconds = Number(response.headers.get("retry-after")) || 1;
    return new Refusal(`The server is full. Try again in ${seconds} ${seconds === 1 ? "second" : "seconds"}.`, status);
  }
  if (error.code === "stopped") return new Refusal("The engine has stopped. The server must be started anew.", status);
  if (error.code === "stopping") return new Refusal("The server is stopping. It takes no more requests.", status);
  return new Refusal(error.message ?? `The server answers with status ${status}.`, status);
}
