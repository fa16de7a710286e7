// Machine: memory under the budget, shards, and the agents' lanes of the latest sweep, each second while it is seen.

import { call, element, told } from "./calls.js";

const EVERY_MS = 1000;
const id = (name) => document.getElementById(name);
const views = new Map();
let ready = false;
let asking = false;

const MEMORY = [
  ["process_bytes", "process", "interpreter, libraries, server"],
  ["resident_bytes", "resident", "resident shards"],
  ["buffer_bytes", "buffers", "buffers for streamed weights"],
  ["cache_bytes", "caches", "KV caches"],
  ["activation_bytes", "activations", "activations of a sweep"],
  ["packing_bytes", "packing", "a copy while packing"],
];
const KINDS = {
  run: "run",
  read: "read",
  widen: "widen to 32 bits",
  session: "make session",
  pack: "pack",
  free: "free",
  reserve: "wait for budget",
  wait: "wait",
};
const STATES = { resident: "resident", partly: "partly resident", streamed: "streamed" };

export function startMachine() {
  addEventListener("pipeload-ready", () => {
    ready = true;
    ask();
  });
  addEventListener("pipeload-key-needed", () => (ready = false));
  addEventListener("pipeload-shown", ask);
  document.addEventListener("visibilitychange", ask);
  setInterval(ask, EVERY_MS);
}

async function ask() {
  if (!ready || asking || id("machine").hidden || document.visibilityState !== "visible") return;
  asking = true;
  try {
    show(await (await call("/machine")).json());
    say("");
  } catch (error) {
    say(told(error));
  } finally {
    asking = false;
  }
}

/** Readers of the screen read it again whenever it is set. */
function say(text) {
  if (id("machine-status").textContent !== text) id("machine-status").textContent = text;
}

// Figures

const SIZES = [[1e9, "GB", 2], [1e6, "MB", 1], [1e3, "kB", 1]];

function bytes(count) {
  const [unit, name, digits] = SIZES.find(([size]) => count >= size) ?? [1, "B", 0];
  return `${(count / unit).toFixed(digits)}\u00a0${name}`;
}

const gigabytes = (rate) => `${(rate / 1e9).toFixed(2)} GB/s`;
const time = (seconds) => (seconds < 1 ? `${(1000 * seconds).toFixed(1)} ms` : `${seconds.toFixed(2)} s`);
const percent = (share) => `${Math.round(100 * share)} %`;

/** Names and values, beside each other; those without a value are left out. */
function figures(pairs) {
  const known = Object.entries(pairs).filter(([, value]) => value !== null && value !== undefined);
  return known.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
}

const swatch = (kind) => element("span", { class: `swatch ${kind}`, "aria-hidden": "true" });
const legend = (kinds) => kinds.map(([kind, name]) => element("li", {}, swatch(kind), name));

function drawing(width, height, label) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  made.setAttribute("viewBox", `0 0 ${width} ${height}`);
  made.setAttribute("preserveAspectRatio", "none");
  if (label) {
    made.setAttribute("role", "img");
    made.setAttribute("aria-label", label);
  } else {
    made.setAttribute("aria-hidden", "true");
  }
  return made;
}

function bar(svg, x, width, height, kind, title, y = 0) {
  const made = document.createElementNS(svg.namespaceURI, "rect");
  for (const [key, value] of Object.entries({ x, y, width, height, class: kind })) made.setAttribute(key, value);
  if (title) made.append(Object.assign(document.createElementNS(svg.namespaceURI, "title"), { textContent: title }));
  svg.append(made);
}

// The process

function show(machine) {
  const names = machine.models.map((model) => model.name).join("\n");
  if (id("machine-view").dataset.names !== names) {
    views.clear();
    views.set("", new ProcessView());
    for (const model of machine.models) views.set(model.name, new ModelView(model.name));
    id("machine-view").replaceChildren(...[...views.values()].map((view) => view.root));
    id("machine-view").dataset.names = names;
  }
  views.get("").update(machine);
  for (const model of machine.models) views.get(model.name).update(model);
}

class ProcessView {
  figures = element("dl", { class: "figures" });
  bar = element("div", { class: "memory" });
  table = element("table", { class: "legend" });
  root = element("div", {}, this.figures, this.bar, element("div", { class: "scroll" }, this.table));

  update(machine) {
    const budget = machine.budget_bytes;
    this.figures.replaceChildren(
      ...figures({
        "memory now": bytes(machine.rss_bytes),
        "at most so far": bytes(machine.peak_rss_bytes),
        budget: budget === null ? "free memory" : bytes(budget),
        calls: `${machine.calls} of ${machine.most_calls}`,
      }),
    );
    const open = machine.models.filter((model) => model.memory);
    const rows = MEMORY.map(([field, kind, name]) => {
      const own = open.map((model) => model.memory[field] ?? 0);
      return { kind, name, own, sum: field in machine ? machine[field] : own.reduce((sum, value) => sum + value, 0) };
    }).filter((row) => row.sum);
    this.#draw(machine, rows);
    this.#list(open, rows, budget);
  }

  #draw(machine, rows) {
    const planned = rows.reduce((sum, row) => sum + row.sum, 0);
    const whole = Math.max(machine.budget_bytes ?? 0, planned, machine.rss_bytes);
    const spoken = rows.map((row) => `${row.name} ${bytes(row.sum)}`).join(", ");
    const svg = drawing(1000, 30, `Memory: ${bytes(machine.rss_bytes)} of ${bytes(whole)}. Planned: ${spoken}.`);
    bar(svg, 0, 1000, 22, "unused", "not planned for", 4);
    let x = 0;
    for (const row of rows) {
      const width = (1000 * row.sum) / whole;
      bar(svg, x, width, 22, row.kind, `${row.name}: ${bytes(row.sum)}`, 4);
      x += width;
    }
    const now = (1000 * machine.rss_bytes) / whole;
    bar(svg, Math.min(now, 997), 3, 30, "now", `memory now: ${bytes(machine.rss_bytes)}`);
    this.bar.replaceChildren(svg);
  }

  #list(open, rows, budget) {
    const several = open.length > 1;
    const heads = ["planned for", ...(several ? open.map((model) => model.name) : []), "bytes"];
    const body = rows.map((row) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, swatch(row.kind), row.name),
        ...(several ? row.own.map((value) => element("td", {}, value ? bytes(value) : "")) : []),
        element("td", {}, bytes(row.sum)),
      ),
    );
    const rest = (budget ?? 0) - rows.reduce((sum, row) => sum + row.sum, 0);
    if (rest > 0) {
      const span = { colspan: several ? open.length + 1 : 1 };
      const head = element("th", { scope: "row" }, swatch("unused"), "not planned for");
      body.push(element("tr", {}, head, element("td", span, bytes(rest))));
    }
    const line = element("tr", {}, element("th", { scope: "row" }, swatch("now"), "the line: memory now"));
    this.table.replaceChildren(
      element("thead", {}, element("tr", {}, ...heads.map((name) => element("th", { scope: "col" }, name)))),
      element("tbody", {}, ...body, line),
    );
  }
}

// A model

class ModelView {
  state = element("p", { class: "hint" });
  figures = element("dl", { class: "figures" });
  shards = element("div", { class: "shards" });
  shardLegend = element("ul", { class: "legend" });
  title = element("h4", {});
  lanes = element("div", { class: "lanes" });
  laneLegend = element("ul", { class: "legend" });
  table = element("table", {});
  details = element("details", {}, element("summary", {}, "The same as a table"), this.table);
  changesTitle = element("h4", {}, "Latest changes of its placement");
  changes = element("ul", { class: "changes" });
  #drawn = "";

  constructor(name) {
    const parts = [this.state, this.figures, this.shards, this.shardLegend, this.title, this.lanes, this.laneLegend];
    this.root = element("section", { class: "model" }, element("h3", {}, name), ...parts, this.details);
    this.root.append(this.changesTitle, this.changes);
  }

  update(model) {
    const { memory, sweep } = model;
    const stages = placement(model.stages);
    this.state.textContent = stages
      ? `${model.task}, open on ${stages}`
      : memory
      ? `${model.task}, open: ${bytes(memory.kept_bytes)} of ${bytes(model.weight_bytes)} of weights stay, ` +
        (memory.streamed_bytes ? `each sweep reads ${bytes(memory.streamed_bytes)}` : "nothing is read again")
      : `${model.task}, closed: its next call opens it`;
    this.figures.replaceChildren(
      ...figures({
        "tokens/s": model.tokens_per_s?.toFixed(1),
        "latest sweep": sweep && time(sweep.seconds),
        efficiency: sweep?.efficiency && percent(sweep.efficiency),
        "read at": sweep?.read_bytes_per_s ? gigabytes(sweep.read_bytes_per_s) : null,
        "best in its profile": model.best_read_bytes_per_s && gigabytes(model.best_read_bytes_per_s),
        sweeps: `${model.sweeps}`,
        "placed anew": model.replacements ? `${model.replacements}` : null,
        "calls in it": sweep && `${sweep.callers}`,
      }),
    );
    this.#drawShards(model.shards);
    this.#drawSweep(sweep);
    const changes = model.reconfigurations.toReversed().map((change) => element("li", {}, ...changeLine(change)));
    this.changesTitle.hidden = this.changes.hidden = !changes.length;
    this.changes.replaceChildren(...changes);
  }

  #drawShards(shards) {
    this.shards.hidden = this.shardLegend.hidden = !shards.length;
    if (!shards.length) return;
    const count = (state) => shards.filter((shard) => shard.state === state).length;
    const counts = Object.keys(STATES).map((state) => [state, `${count(state)} ${STATES[state]}`]);
    const spoken = counts.map(([, text]) => text).join(", ");
    const width = 1000 / shards.length;
    const svg = drawing(1000, 10, `${shards.length} shards: ${spoken}`);
    shards.forEach((shard, at) => {
      const title = `${shard.name}: ${STATES[shard.state]}, ${bytes(shard.nbytes)}, reads ${bytes(shard.streamed_bytes)}`;
      bar(svg, at * width + 1, width - 2, 10, shard.state, title);
    });
    this.shards.replaceChildren(svg);
    this.shardLegend.replaceChildren(...legend(counts.filter(([state]) => count(state))));
  }

  #drawSweep(sweep) {
    const lanes = sweep?.lanes ?? [];
    const drawn = sweep ? `${sweep.number} ${sweep.seconds}` : "";
    this.title.hidden = this.lanes.hidden = this.laneLegend.hidden = this.details.hidden = !lanes.length;
    if (drawn === this.#drawn) return;
    this.#drawn = drawn;
    const seconds = sweep?.seconds ?? 0;
    this.title.textContent = `Agents in sweep ${sweep?.number}, ${time(seconds)}`;
    this.lanes.replaceChildren(...lanes.flatMap((lane) => laneRow(lane, seconds)));
    const found = Object.entries(KINDS).filter(([kind]) => lanes.some((lane) => lane.spans.some((s) => s.kind === kind)));
    this.laneLegend.replaceChildren(...legend(found));
    this.table.replaceChildren(...laneTable(lanes, seconds, found, sweep?.left_out));
  }
}

function placement(stages) {
  return stages.map((stage) => `${stage.node} (${stage.first} to ${stage.last})`).join(", ");
}

function changeLine(change) {
  const at = new Date(1000 * change.at_s);
  const where = change.after
    ? `Moved from ${placement(change.before)} to ${placement(change.after)}`
    : `Stays on ${placement(change.before)}`;
  const shown = element("time", { datetime: at.toISOString() }, at.toLocaleString());
  const waited = change.waited_s ? `calls waited ${time(change.waited_s)}` : "no call waited";
  return [shown, `: ${change.why} ${where}; ${waited}.`];
}

function laneRow(lane, seconds) {
  const svg = drawing(1000, 20);
  for (const span of lane.spans) {
    const x = (1000 * span.begin_s) / seconds;
    const width = Math.max(0.8, (1000 * (span.end_s - span.begin_s)) / seconds);
    const odd = Number(span.shard.split(".").pop()) % 2 ? " odd" : "";
    bar(svg, x, width, 20, span.kind + odd, `${span.kind} ${span.shard}: ${time(span.end_s - span.begin_s)}`);
  }
  return [
    element("span", {}, lane.agent),
    svg,
    element("span", { class: "share" }, `${percent(lane.busy_s / seconds)} busy`),
  ];
}

function laneTable(lanes, seconds, kinds, leftOut) {
  const heads = ["agent", "busy", ...kinds.map(([, name]) => name)];
  const rows = lanes.map((lane) => {
    const sums = kinds.map(([kind]) =>
      lane.spans.filter((span) => span.kind === kind).reduce((sum, span) => sum + span.end_s - span.begin_s, 0),
    );
    return element(
      "tr",
      {},
      element("th", { scope: "row" }, lane.agent),
      element("td", {}, percent(lane.busy_s / seconds)),
      ...sums.map((sum) => element("td", {}, time(sum))),
    );
  });
  const note = leftOut ? [element("caption", {}, `without the ${leftOut} shortest pieces of work`)] : [];
  return [
    ...note,
    element("thead", {}, element("tr", {}, ...heads.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...rows),
  ];
}
