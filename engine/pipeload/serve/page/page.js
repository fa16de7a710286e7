// The page: tabs, the API key, and the models to choose from.

import { apiKey, call, element, setApiKey, told } from "./calls.js";
import { startChat } from "./chat.js";
import { startEmbeddings } from "./embeddings.js";
import { startMachine } from "./machine.js";

const id = (name) => document.getElementById(name);
const PARTS = ["chat", "embeddings", "machine"];
const wide = matchMedia("(min-width: 70rem)");
let selected = "chat";

/** Where there is room, the machine stands beside the other parts, and needs no tab. */
function show(part, focus = false) {
  selected = wide.matches && part === "machine" ? "chat" : part;
  for (const name of PARTS) {
    const tab = id(`tab-${name}`);
    tab.setAttribute("aria-selected", name === selected);
    tab.tabIndex = name === selected ? 0 : -1;
    id(name).hidden = name !== selected && !(wide.matches && name === "machine");
  }
  id("tab-machine").hidden = wide.matches;
  if (focus) id(`tab-${selected}`).focus();
  dispatchEvent(new Event("pipeload-shown"));
}

function startTabs() {
  const tabs = () => PARTS.filter((name) => !id(`tab-${name}`).hidden);
  for (const name of PARTS) id(`tab-${name}`).addEventListener("click", () => show(name));
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    const names = tabs();
    const at = names.indexOf(selected);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: names.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(names.at(to % names.length), true);
  });
  wide.addEventListener("change", () => show(selected));
  show(selected);
}

function startKey() {
  addEventListener("pipeload-key-needed", () => {
    if (!id("key-form").hidden) return;
    id("key-form").hidden = false;
    id("key").focus();
  });
  id("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setApiKey(id("key").value.trim());
    id("key").value = "";
    loadModels();
  });
}

function offer(part, models) {
  const select = id(`${part}-model`);
  const before = select.value;
  select.replaceChildren(...models.map((model) => element("option", { value: model.id }, model.id)));
  if (models.some((model) => model.id === before)) select.value = before;
  document.querySelector(`#${part} .missing`).hidden = models.length > 0;
  for (const control of document.querySelectorAll(`#${part} :is(select, button.main)`)) control.disabled = !models.length;
}

async function loadModels() {
  try {
    const models = (await (await call("/v1/models")).json()).data;
    offer("chat", models.filter((model) => model.task === "text-generation"));
    offer("embeddings", models.filter((model) => model.task === "feature-extraction"));
    id("notice").textContent = "";
    id("key-form").hidden = !apiKey();
    dispatchEvent(new Event("pipeload-ready"));
  } catch (error) {
    id("notice").textContent = told(error);
    // A wrong key is asked for again; a server that is not there may come back.
    if (error.status !== 401) setTimeout(loadModels, 3000);
  }
}

startTabs();
startKey();
startChat();
startEmbeddings();
startMachine();
loadModels();
