// Requests to the server: the API key, errors that say what to do, and streams.

const KEY = "jaxchat.key";
let askForKey = async () => null;
let asking = null;

/** Sets the function that asks a person for the API key: `(refused) => Promise<string | null>`. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** An error of the server, or of the way there (`status` 0). `code` is OpenAI's, `retryAfter` in seconds. */
export class ApiError extends Error {
  constructor(status, code, message, retryAfter = null) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

async function errorOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Not of this server: a proxy, for example. The status has to do.
    if (response.status === 503) error.code = "loading";
  }
  const seconds = Number.parseInt(response.headers.get("retry-after"), 10);
  const message = typeof error.message === "string" ? error.message : `the server answered ${response.status}`;
  return new ApiError(response.status, error.code ?? null, message, Number.isNaN(seconds) ? null : seconds);
}

/**
 * Sends a request to `path` (relative to the page) and returns the response. `body` is sent as JSON, by POST.
 *
 * Where the server wants an API key, the person is asked once; the key is kept until the tab is closed.
 * Throws an ApiError, or an AbortError where `signal` says so.
 */
export async function request(path, { body, signal, headers = {} } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const options = { method: body === undefined ? "GET" : "POST", signal, headers: { ...headers }, cache: "no-store" };
    if (key) options.headers.Authorization = `Bearer ${key}`;
    if (body !== undefined) {
      options.headers["Content-Type"] = "application/json";
      options.body = JSON.stringify(body);
    }
    let response;
    try {
      response = await fetch(new URL(path.replace(/^\/+/, ""), document.baseURI.split("#")[0]), options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "gone", "the server does not answer");
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await errorOf(response);
    if (sessionStorage.getItem(KEY) === key) {
      asking ??= askForKey(key !== null).finally(() => (asking = null));
      const typed = await asking;
      if (typed === null) throw await errorOf(response);
      sessionStorage.setItem(KEY, typed);
    }
  }
}

/** The JSON that the server answers. */
export async function json(path, options) {
  return (await request(path, options)).json();
}

/**
 * Yields the JSON of each frame of a stream of server-sent events, up to [DONE].
 *
 * Throws an ApiError for a frame that is an error, and where the stream ends without [DONE].
 */
export async function* stream(path, options) {
  const response = await request(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  let complete = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const frames = (pending + value).split(/\r?\n\r?\n/);
      pending = frames.pop();
      for (const data of frames.map(dataOf).filter(Boolean)) {
        if (data === "[DONE]") complete = true;
        else yield checkedFrame(JSON.parse(data));
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    complete = false;
  }
  if (!complete) throw new ApiError(0, "broken", "the connection broke off");
}

function dataOf(frame) {
  const lines = frame.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).trim()).join("\n");
}

function checkedFrame(frame) {
  if (frame.error) throw new ApiError(500, frame.error.code ?? null, frame.error.message ?? String(frame.error));
  return frame;
}

/**
 * What a person can do about an error: `{title, text, retry}`; `retry` says whether the same request may work later.
 * `error` is an ApiError, what was kept of one, or a fault of the page.
 */
export function advice(error, info = null) {
  if (!Number.isInteger(error.status))
    return { title: "Something went wrong in the page.", text: `${error.message}. Reload the page.`, retry: true };
  if (error.code === "gone") {
    return {
      title: "The server does not answer.",
      text: "It may have stopped. Start jaxchat serve again, then try again here.",
      retry: true,
    };
  }
  if (error.code === "broken") {
    return {
      title: "The connection broke off.",
      text: "What had arrived is kept. If this happens again, see whether the server is still running.",
      retry: true,
    };
  }
  if (error.code === "context_length_exceeded") {
    const limit = info?.context ? ` of ${info.context.toLocaleString("en")} tokens` : "";
    return {
      title: `This does not fit into the model’s context${limit}.`,
      text: "Shorten the message or the system prompt, or start a new chat.",
      retry: false,
    };
  }
  if (error.status === 429) {
    const when = error.retryAfter
      ? `in ${error.retryAfter} ${error.retryAfter === 1 ? "second" : "seconds"}`
      : "in a moment";
    return { title: "The server is busy.", text: `Its queue is full. Try again ${when}.`, retry: true };
  }
  if (error.code === "engine_failed") {
    return {
      title: "The server can no longer answer.",
      text: "Its terminal says what went wrong. Start it again.",
      retry: true,
    };
  }
  if (error.code === "stopping") {
    return { title: "The server is stopping.", text: "Try again when it has been started again.", retry: true };
  }
  if (error.code === "loading") {
    return {
      title: "The model is still loading.",
      text: "It answers as soon as it is ready. Try again in a moment.",
      retry: true,
    };
  }
  if (error.status === 401) {
    return {
      title: "The server wants its API key.",
      text: "Try again and type the key that jaxchat serve was started with.",
      retry: true,
    };
  }
  return { title: "The server could not answer.", text: `It says: ${error.message}`, retry: true };
}
