// Embeddings: texts -> vectors -> a table of their cosines.

import { call, element, told } from "./calls.js";

const MOST_TEXTS = 40;
const id = (name) => document.getElementById(name);

export function startEmbeddings() {
  id("embeddings-form").addEventListener("submit", (event) => {
    event.preventDefault();
    compare();
  });
  id("embeddings-texts").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) compare();
  });
}

async function compare() {
  const texts = id("embeddings-texts").value.split("\n").map((line) => line.trim()).filter(Boolean);
  const status = id("embeddings-status");
  if (texts.length < 2 || texts.length > MOST_TEXTS) {
    fail(`There are ${texts.length} texts. Write 2 to ${MOST_TEXTS}, one a line.`);
    return;
  }
  status.className = "hint";
  status.textContent = "The model embeds.";
  const begin = performance.now();
  try {
    const answer = await call("/v1/embeddings", { body: { model: id("embeddings-model").value, input: texts } });
    const { data, usage } = await answer.json();
    const seconds = (performance.now() - begin) / 1000;
    const vectors = data.map((one) => normalised(one.embedding));
    id("embeddings-result").replaceChildren(table(texts, vectors));
    id("embeddings-result").hidden = false;
    status.textContent =
      `${texts.length} vectors of ${vectors[0].length} numbers · ${usage.prompt_tokens} tokens · ${seconds.toFixed(2)} s`;
  } catch (error) {
    fail(told(error));
  }
}

function fail(message) {
  id("embeddings-status").className = "error";
  id("embeddings-status").textContent = message;
}

function normalised(vector) {
  const length = Math.hypot(...vector) || 1;
  return vector.map((value) => value / length);
}

const dot = (one, other) => one.reduce((sum, value, at) => sum + value * other[at], 0);

function table(texts, vectors) {
  const numbers = texts.map((text, at) => element("th", { scope: "col", title: text }, `${at + 1}`));
  const rows = texts.map((text, row) => {
    const head = element("th", { scope: "row" }, `${row + 1}. ${text}`);
    return element("tr", {}, head, ...vectors.map((vector) => cell(dot(vectors[row], vector))));
  });
  return element(
    "table",
    { class: "cosines" },
    element("caption", {}, "Cosine of each two texts: 1 is the same direction, 0 has nothing in common"),
    element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Text"), ...numbers)),
    element("tbody", {}, ...rows),
  );
}

function cell(cosine) {
  const made = element("td", {}, cosine.toFixed(2));
  made.style.setProperty("--share", `${Math.round(100 * Math.max(0, cosine))}%`);
  return made;
}
