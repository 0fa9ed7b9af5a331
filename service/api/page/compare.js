// The compare page: two precisions stream, every token is held against the other side's probability of it.
//
// choices() -> two Sides --stream()--> tokens, live figures --score()--> probabilities behind the first difference

const PEERS = document.querySelector('meta[name="halftone-peers"]').content.split(" ").filter(Boolean);
const FULL_COLOUR = 0.5; // a difference in probability that has a token's full colour
const LEAST_COLOUR = 0.02; // below it, rounding: reading a text and writing it differ by as much in 16 bits
const TOP = 5; // likeliest tokens that a side tells of each place
const MEMORY_PERIOD_MS = 1000;

const at = (id) => document.getElementById(id);
const percent = (p) => (p === undefined ? "not known" : `${(100 * p).toFixed(1)} %`);
const megabytes = (bytes) => `${(bytes / 1e6).toLocaleString("en", { maximumFractionDigits: 0 })} MB`;
const shown = (text) => `“${text.replaceAll("\n", "⏎")}”`;

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

// --- the servers -------------------------------------------------------------------------------

class RefusedError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(base, path, body, signal) {
  const headers = {};
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(base + path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const why = base ? `, or does not allow this page: start it with --allowed-origins ${location.origin}` : "";
    throw new RefusedError(0, `${base || location.origin} does not answer${why}`);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw new RefusedError(response.status, said.error?.message ?? `${path}: HTTP ${response.status}`);
}

// what one server has to choose from: a model name for each precision
async function choicesOf(base) {
  const listed = await (await ask(base, "/v1/models")).json();
  const version = await (await ask(base, "/version")).json();
  const accounts = version.residents ?? [version];
  return listed.data.map((card, place) => {
    const engine = (accounts[place] ?? accounts[0]).engine ?? {};
    const precision = engine.precision ?? card.precision ?? "";
    const cache = engine.kv_dtype && engine.kv_dtype !== engine.dtype ? ` + kv ${engine.kv_dtype}` : "";
    return { base, model: card.id, name: card.id.split("@")[0], precision, engine, label: `${precision}${cache}` };
  });
}

// the ledger's parts of one choice, now; those of its start where /metrics is elsewhere
async function memoryOf(choice) {
  try {
    const text = await (await ask(choice.base, "/metrics")).text();
    const parts = {};
    for (const line of text.split("\n")) {
      const found = line.match(/^halftone_memory_bytes\{(.*)\} (\S+)$/);
      if (!found) continue;
      const label = (name) => found[1].match(new RegExp(`(?:^|,)${name}="([^"]*)"`))?.[1];
      if (label("model") === choice.name && label("precision") === choice.precision) parts[label("part")] = Number(found[2]);
    }
    if (Object.keys(parts).length) return parts;
  } catch (error) {
    if (!(error instanceof RefusedError)) throw error;
  }
  return choice.engine.memory_bytes ?? {};
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new RefusedError(0, "the answer was cut off");
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue;
      if (block === "data: [DONE]") return;
      const event = JSON.parse(block.slice(6));
      if (event.error) throw new RefusedError(0, event.error.message);
      yield event;
    }
  }
}

// --- one side ----------------------------------------------------------------------------------

class Side {
  constructor(root) {
    this.root = root;
    root.append(at("side").content.cloneNode(true));
    this.find = (selector) => root.querySelector(selector);
    this.find(".answer").addEventListener("click", (event) => {
      const place = this.tokens.findIndex((token) => token.span === event.target);
      if (place >= 0) showPlace(place, this);
    });
    this.clear();
  }

  clear() {
    this.tokens = []; // {id, text, logprob, top: [[text, logprob]], other: the other side's probability, span}
    this.promptIds = [];
    this.finish = "";
    this.ttft = this.speed = undefined;
    this.decoder = new TextDecoder();
    this.find(".answer").replaceChildren();
    this.find(".state").textContent = "";
    for (const name of ["ttft", "speed"]) this.figure(name, "–");
  }

  choose(choice) {
    this.choice = choice;
    const engine = choice.engine;
    this.find(".name").textContent = choice.label || choice.model;
    const where = choice.base ? ` at ${choice.base}` : "";
    const kernel = engine.kernels?.down_proj ?? Object.values(engine.kernels ?? {})[0];
    this.find(".about").textContent = `${choice.model}${where}, ${engine.device_name ?? "device not known"}${kernel ? `, ${kernel}` : ""}`;
  }

  figure(name, text) {
    this.find(`[data-figure="${name}"] b`).textContent = text;
  }

  body(prompt, maxTokens, chat) {
    const common = { model: this.choice.model, max_tokens: maxTokens, temperature: 0, stream: true, return_token_ids: true };
    if (chat) return ["/v1/chat/completions", { ...common, messages: [{ role: "user", content: prompt }], logprobs: true, top_logprobs: TOP }];
    return ["/v1/completions", { ...common, prompt, logprobs: TOP }];
  }

  async stream(prompt, maxTokens, chat, signal, onToken) {
    const started = performance.now();
    const [path, body] = this.body(prompt, maxTokens, chat);
    this.find(".state").textContent = "waiting for the first token";
    let first;
    for await (const event of events(await ask(this.choice.base, path, body, signal))) {
      const choice = event.choices[0];
      if (!choice) continue;
      if (choice.prompt_token_ids) this.promptIds = choice.prompt_token_ids;
      const added = chat ? fromChat(choice) : fromCompletion(choice);
      const now = performance.now();
      for (const token of added) this.add(token);
      if (added.length && first === undefined) {
        this.find(".state").textContent = "writing";
        first = now;
        this.ttft = now - started;
        this.firstCount = added.length;
      } else if (added.length) {
        this.speed = (1000 * (this.tokens.length - this.firstCount)) / (now - first);
      }
      if (choice.finish_reason) this.finish = choice.finish_reason;
      if (added.length) onToken();
    }
    const ended = this.finish === "stop" ? "the model ended it" : "the limit";
    this.find(".state").textContent = `${this.tokens.length} tokens, ${ended}`;
  }

  add(token) {
    const text = this.decoder.decode(new Uint8Array(token.bytes), { stream: true });
    token.span = element("span", text, "token");
    if (/^<\|.*\|>$/.test(token.text)) token.span.classList.add("special");
    this.tokens.push(token);
    this.find(".answer").append(token.span);
  }

  paint(place, parts) {
    const { span, logprob, other } = this.tokens[place];
    const own = Math.exp(logprob);
    const difference = other === undefined ? 0 : other - own;
    const strength = Math.abs(difference) < LEAST_COLOUR ? 0 : Math.min(1, Math.abs(difference) / FULL_COLOUR);
    span.classList.toggle("less", strength > 0 && difference < 0);
    span.classList.toggle("more", strength > 0 && difference > 0);
    span.classList.toggle("parts", parts);
    span.style.setProperty("--strength", strength.toFixed(3));
    span.title = `${this.choice.label}: ${percent(own)}, the other: ${percent(other)}`;
  }
}

function fromChat(choice) {
  return (choice.logprobs?.content ?? []).map((entry, place) => ({
    id: choice.token_ids?.[place],
    text: spelled(entry),
    bytes: entry.bytes,
    logprob: entry.logprob,
    top: entry.top_logprobs.map((other) => [spelled(other), other.logprob]),
  }));
}

function fromCompletion(choice) {
  const given = choice.logprobs;
  return (given?.tokens ?? []).map((text, place) => ({
    id: choice.token_ids?.[place],
    text,
    bytes: bytesOf(text),
    logprob: given.token_logprobs[place],
    top: Object.entries(given.top_logprobs?.[place] ?? {}).sort((a, b) => b[1] - a[1]),
  }));
}

// a part of a character has no text: its bytes tell it from others
function spelled(entry) {
  if (!entry.token.includes("\ufffd")) return entry.token;
  return `bytes:${entry.bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("")}`;
}

// a part of a character is written `bytes:\xe2\x82`
function bytesOf(text) {
  if (text.startsWith("bytes:\\x")) return text.slice(8).split("\\x").map((byte) => parseInt(byte, 16));
  return [...new TextEncoder().encode(text)];
}

// --- the two together --------------------------------------------------------------------------

let choices = [];
let running = null; // the AbortController of a comparison
const left = new Side(at("left"));
const right = new Side(at("right"));
const sides = [left, right];
const otherOf = (side) => (side === left ? right : left);

const sameText = () => left.promptIds.length > 0 && left.promptIds.join() === right.promptIds.join();

// the first place at which the answers differ; undefined while they are the same as far as both have come
function parting() {
  if (!sameText()) return undefined;
  const shared = Math.min(left.tokens.length, right.tokens.length);
  for (let place = 0; place < shared; place += 1) {
    if (left.tokens[place].id !== right.tokens[place].id) return place;
  }
  const ended = sides.some((side) => side.finish && side.tokens.length === shared);
  return ended && left.tokens.length !== right.tokens.length ? shared : undefined;
}

let painted = 0;
function paintLive() {
  if (sameText()) {
    const parts = parting();
    const shared = parts ?? Math.min(left.tokens.length, right.tokens.length);
    for (; painted < shared; painted += 1) {
      for (const side of sides) {
        side.tokens[painted].other = Math.exp(otherOf(side).tokens[painted].logprob);
        side.paint(painted, false);
      }
    }
    if (parts !== undefined) for (const side of sides) if (side.tokens[parts]) side.paint(parts, true);
  }
  drawFigures();
}

function bar(side, name, shares) {
  side.find(`[data-figure="${name}"] .bar`).replaceChildren(
    ...shares.map((share) => {
      const piece = element("i");
      piece.style.setProperty("--share", `${(100 * share).toFixed(2)}%`);
      return piece;
    }),
  );
}

function drawFigures() {
  for (const name of ["ttft", "speed"]) {
    const most = Math.max(...sides.map((side) => side[name] ?? 0));
    for (const side of sides) {
      const value = side[name];
      if (value === undefined) continue;
      side.figure(name, name === "ttft" ? `${value.toFixed(0)} ms` : value.toFixed(1));
      bar(side, name, [value / most]);
    }
  }
}

// groups in the ledger's own order: what stands before a part's first dot
function groupsOf(parts) {
  const groups = new Map();
  for (const [part, bytes] of Object.entries(parts)) {
    const group = part.split(".")[0];
    groups.set(group, (groups.get(group) ?? 0) + bytes);
  }
  return [...groups].filter(([, bytes]) => bytes > 0);
}

async function drawMemory() {
  const ledgers = await Promise.all(sides.map((side) => memoryOf(side.choice)));
  const groups = ledgers.map(groupsOf);
  const totals = groups.map((found) => found.reduce((sum, [, bytes]) => sum + bytes, 0));
  sides.forEach((side, place) => {
    if (!totals[place]) return;
    side.figure("memory", megabytes(totals[place]));
    bar(side, "memory", groups[place].map(([, bytes]) => bytes / Math.max(...totals)));
    side.find(".parts-line").replaceChildren(
      ...groups[place].map(([name, bytes]) => element("span", `${name.replaceAll("_", " ")} ${megabytes(bytes)}`)),
    );
  });
}

// the probability that `reader` gives to each token of `writer`'s answer from the parting on, in the writer's context
async function score(writer, reader, signal) {
  const prompt = [...writer.promptIds, ...writer.tokens.map((token) => token.id)];
  const body = { model: reader.choice.model, prompt, max_tokens: 0, echo: true, logprobs: 1, temperature: 0 };
  const answer = await (await ask(reader.choice.base, "/v1/completions", body, signal)).json();
  const scored = answer.choices[0].logprobs.token_logprobs.slice(writer.promptIds.length);
  const parts = parting();
  for (let place = parts; place < writer.tokens.length; place += 1) {
    writer.tokens[place].other = Math.exp(scored[place]);
    writer.paint(place, place === parts);
  }
}

function table(side, place) {
  const token = side.tokens[place];
  const made = element("table");
  made.append(element("caption", `${side.choice.label} at token ${place + 1}`));
  const rows = token ? [...token.top] : [];
  if (token && !rows.some(([text]) => text === token.text)) rows.push([token.text, token.logprob]);
  for (const [text, logprob] of rows) {
    const row = element("tr", "", token.text === text ? "written" : "");
    row.append(element("td", shown(text)), element("td", percent(Math.exp(logprob))));
    made.append(row);
  }
  return made;
}

// both sides' likeliest tokens at one place; behind the first difference each has a text of its own before it
function showPlace(place, side) {
  const parts = parting();
  for (const token of sides.flatMap((each) => each.tokens)) token.span.classList.remove("chosen");
  const together = parts === undefined || place <= parts;
  const chosen = together ? sides : [side];
  for (const each of chosen) each.tokens[place]?.span.classList.add("chosen");
  at("candidates").replaceChildren(...chosen.map((each) => table(each, place)));
  if (!together) {
    const { text, logprob, other } = side.tokens[place];
    at("candidates").append(
      element("p", `${shown(text)} has ${percent(Math.exp(logprob))} from ${side.choice.label}, and ${percent(other)} from ${otherOf(side).choice.label} behind the same text.`),
    );
  }
  at("verdict").hidden = false;
}

function showVerdict() {
  const parts = parting();
  const names = sides.map((side) => side.choice.label);
  if (!sameText()) {
    at("verdict-line").textContent = "The two have read different token ids: their probabilities cannot be compared.";
  } else if (parts === undefined) {
    at("verdict-line").textContent = `Both wrote the same ${left.tokens.length} tokens.`;
  } else {
    const wrote = sides.map((side, place) => `${names[place]} ${side.tokens[parts] ? `writes ${shown(side.tokens[parts].text)}` : "has ended"}`);
    at("verdict-line").textContent = `The answers part at token ${parts + 1}: ${wrote.join(", ")}.`;
  }
  at("verdict").hidden = false;
  if (sameText()) showPlace(parts ?? 0, left);
}

function showSummary() {
  const said = sides.map((side) => {
    const apart = side.tokens.map((token) => Math.abs(token.other - Math.exp(token.logprob)));
    const mean = apart.reduce((sum, difference) => sum + difference, 0) / apart.length;
    return `${(100 * mean).toFixed(1)} points on the ${apart.length} tokens of ${side.choice.label}`;
  });
  at("summary").textContent = `Mean difference in probability: ${said.join(", ")}. One prompt is an anecdote; halftone compare measures over many.`;
}

function notice(text, wrong = false) {
  at("notice").textContent = text;
  at("notice").classList.toggle("wrong", wrong);
}

async function compare() {
  running = new AbortController();
  const { signal } = running;
  at("run").textContent = "Stop";
  at("verdict").hidden = true;
  at("summary").textContent = "";
  notice("");
  painted = 0;
  for (const side of sides) side.clear();
  const timer = setInterval(() => drawMemory().catch(() => {}), MEMORY_PERIOD_MS);
  try {
    const start = (side) => side.stream(at("prompt").value, Number(at("max-tokens").value), at("chat").checked, signal, paintLive);
    if (at("in-turn").checked) for (const side of sides) await start(side);
    else await Promise.all(sides.map(start));
    paintLive();
    showVerdict();
    if (sameText()) {
      if (parting() !== undefined) await Promise.all(sides.map((side) => score(side, otherOf(side), signal)));
      showSummary();
    }
    await drawMemory();
  } catch (error) {
    running.abort();
    if (error.name === "AbortError") notice("Stopped.");
    else notice(error.message, true);
    for (const side of sides) if (!side.finish) side.find(".state").textContent = "";
    at("key-field").hidden &&= error.status !== 401;
  } finally {
    clearInterval(timer);
    running = null;
    at("run").textContent = "Compare";
    document.body.dataset.compared = String(Number(document.body.dataset.compared ?? 0) + 1);
  }
}

async function begin() {
  const found = await Promise.allSettled(["", ...PEERS].map(choicesOf));
  choices = found.flatMap((result) => result.value ?? []);
  const refused = found.filter((result) => result.status === "rejected").map((result) => result.reason);
  at("key-field").hidden &&= !refused.some((error) => error.status === 401);
  for (const [place, id] of ["choose-left", "choose-right"].entries()) {
    const before = at(id).value;
    at(id).replaceChildren(
      ...choices.map((choice, index) => {
        const option = element("option", `${choice.label || choice.model}${choice.base ? ` at ${new URL(choice.base).host}` : ""}`);
        option.value = String(index);
        return option;
      }),
    );
    at(id).value = before || String(Math.min(place, choices.length - 1));
  }
  at("run").disabled = !choices.length;
  if (refused.length) notice(refused.map((error) => error.message).join("; "), true);
  else if (choices.length === 1) notice("One precision is served here. For a second one: halftone serve --resident fp16,nf4, or another server named by --allowed-origins.");
  else notice("");
  if (choices.length) await chosen();
}

async function chosen() {
  sides.forEach((side, place) => side.choose(choices[Number(at(["choose-left", "choose-right"][place]).value)]));
  await drawMemory();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else compare();
});
at("key").addEventListener("change", begin);
for (const id of ["choose-left", "choose-right"]) {
  at(id).addEventListener("change", () => {
    for (const side of sides) side.clear();
    at("verdict").hidden = true;
    chosen();
  });
}
begin().finally(() => (document.body.dataset.ready = "yes"));
