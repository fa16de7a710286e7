// Chat: a conversation with a model, whose answers come token by token.

import { call, element, events, told } from "./calls.js";

const id = (name) => document.getElementById(name);
const messages = [];
let running = null;

export function startChat() {
  id("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  id("chat-text").addEventListener("keydown", (event) => {
    // While an input method composes a word, Enter belongs to it.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  id("chat").addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  id("chat-stop").addEventListener("click", () => running?.abort());
  id("chat-new").addEventListener("click", begin);
}

function begin() {
  running?.abort();
  running = null;
  busy(false);
  messages.length = 0;
  id("chat-log").replaceChildren();
  id("chat-status").textContent = "";
  id("chat-text").focus();
}

function numbered(name) {
  const field = id(name);
  return field.value === "" || !field.validity.valid ? undefined : field.valueAsNumber;
}

function request() {
  const system = id("chat-system").value.trim();
  return {
    model: id("chat-model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    temperature: numbered("chat-temperature"),
    max_tokens: numbered("chat-tokens"),
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** A turn in the log: returns the element of its text, and that of the line below it. */
function turn(role, name) {
  const text = element("p", { class: "text" });
  const line = element("p", { class: "hint" });
  id("chat-log").append(element("article", { class: role }, element("h3", {}, name), text, line));
  return { text, line };
}

async function send() {
  const text = id("chat-text").value.trim();
  if (!text || running || !id("chat-model").value) return;
  const log = id("chat-log");
  const asked = { role: "user", content: text };
  messages.push(asked);
  id("chat-text").value = "";
  turn("user", "You").text.textContent = text;
  const answer = turn("assistant", id("chat-model").value);
  const own = (running = new AbortController());
  busy(true);
  log.scrollTop = log.scrollHeight;
  const timer = new Timer();
  let made = "";
  let failure = null;
  try {
    for await (const event of events(await call("/v1/chat/completions", { body: request(), signal: own.signal }))) {
      const choice = event.choices[0];
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      if (choice?.delta.content) {
        made += choice.delta.content;
        answer.text.textContent = made;
      }
      timer.note(event, choice);
      answer.line.textContent = timer.text();
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    if (!own.signal.aborted) failure = told(error);
  }
  if (own !== running) return; // a new chat has begun
  running = null;
  busy(false);
  finish(asked, made, answer, failure, own.signal.aborted, timer);
  log.scrollTop = log.scrollHeight;
}

function finish(asked, made, answer, failure, stopped, timer) {
  // A model that was asked and has said nothing would be asked twice in a row.
  if (made) messages.push({ role: "assistant", content: made });
  else messages.splice(messages.indexOf(asked), 1);
  if (failure !== null) {
    answer.line.className = "error";
    answer.line.textContent = failure;
    if (!made) id("chat-text").value ||= asked.content;
  } else {
    answer.line.textContent = (stopped ? "Stopped. " : "") + timer.text();
  }
  id("chat-status").textContent = failure !== null ? "The call failed." : stopped ? "Stopped." : "The answer is complete.";
}

function busy(is) {
  id("chat-log").setAttribute("aria-busy", is);
  id("chat-send").disabled = is || !id("chat-model").value;
  id("chat-stop").disabled = !is;
  if (is) id("chat-status").textContent = "The model answers.";
  else if (document.activeElement === document.body) id("chat-text").focus(); // Stop had it, and takes none now
}

/** Counts tokens and seconds of an answer. */
class Timer {
  #begin = performance.now();
  #first = null;
  #last = null;
  #pieces = 0;
  #usage = null;
  #reason = null;

  note(event, choice) {
    if (event.usage) this.#usage = event.usage;
    if (choice?.finish_reason) this.#reason = choice.finish_reason;
    if (!choice?.delta.content) return;
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#pieces += 1;
  }

  text() {
    if (this.#first === null) return "";
    const tokens = this.#usage?.completion_tokens ?? this.#pieces;
    const seconds = (this.#last - this.#first) / 1000;
    const parts = [`${tokens} tokens`];
    if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    parts.push(`first after ${((this.#first - this.#begin) / 1000).toFixed(2)} s`);
    if (this.#usage) parts.push(`prompt of ${this.#usage.prompt_tokens}`);
    if (this.#reason === "length") parts.push("cut off at the most tokens");
    return parts.join(" · ");
  }
}
