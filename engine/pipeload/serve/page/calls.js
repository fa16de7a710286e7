// Calls of the server. The API key stays in this tab: it goes when the tab is closed.

const KEY = "pipeload-key";

export const apiKey = () => sessionStorage.getItem(KEY) ?? "";
export const setApiKey = (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY));

/** A request that the server has refused, with the server's own message. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The answer to a request. `body` makes it a POST. Throws Refused. */
export async function call(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal, cache: "no-store" };
  const answer = await fetch(path, body ? { ...options, body: JSON.stringify(body) } : options);
  if (!answer.ok) throw await refused(answer);
  return answer;
}

async function refused(answer) {
  let message = `The server answered ${answer.status}.`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // Something between this page and the server has answered.
  }
  if (answer.status === 401) dispatchEvent(new CustomEvent("pipeload-key-needed"));
  return new Refused(answer.status, message);
}

/** The objects of a stream of server-sent events, as they come. Throws Refused where one of them is an error. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
        if (data === "[DONE]") continue;
        const told = JSON.parse(data);
        if (told.error) throw new Refused(answer.status, told.error.message);
        yield told;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** What people are told of a failure. */
export const told = (error) =>
  error instanceof Refused ? error.message : `The server cannot be reached (${error.message}).`;

/** An element with attributes and children; texts become text, never markup. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
