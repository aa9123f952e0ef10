// The chat page: one conversation, streamed from /v1. No build step, nothing from elsewhere; all text goes in by textContent.
"use strict";

const $ = (id) => document.getElementById(id);
const state = { models: [], turns: [], stop: null };
const GONE = "The server cannot be reached, or broke off. Is it still running?";

// ── talking to the server ───────────────────────────────────────────────────────────────────────────────────────────────

function headers() {
  const key = $("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, { headers: headers(), ...options });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(GONE);
  }
}

async function loadModels() {
  const response = await reach("/v1/models").catch((error) => ({ error }));
  if (response.error) {
    $("status").textContent = response.error.message;
    return;
  }
  if (!response.ok) {
    $("status").textContent = response.status === 401 ? "This server wants an API key: see Parameters." : await failure(response);
    return;
  }
  state.models = (await response.json()).data;
  const chosen = $("model").value;
  $("model").replaceChildren(...state.models.map((model) => new Option(model.id, model.id, false, model.id === chosen)));
  $("status").textContent = "";
  showKind();
}

const model = () => state.models.find((one) => one.id === $("model").value);

function showKind() {
  const chats = Boolean(model()?.chat);
  $("prompt-label").textContent = chats ? "Message" : "Text to continue (a base model: it continues, it does not answer)";
  $("send").textContent = chats ? "Send" : "Continue";
  $("system-label").hidden = !chats;
}

function request(prompt) {
  const number = (id) => ($(id).value === "" ? null : Number($(id).value));
  const body = { model: $("model").value, stream: true, stream_options: { include_usage: true }, gates: $("gates").checked };
  for (const id of ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"]) {
    if (number(id) !== null) body[id] = number(id);
  }
  if (!model().chat) return ["/v1/completions", { ...body, prompt }];
  const system = $("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...state.turns, { role: "user", content: prompt }];
  return ["/v1/chat/completions", { ...body, messages }];
}

async function* serverSent(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => { throw error.name === "AbortError" ? error : new Error(GONE); });
    if (done) throw new Error(GONE); // an answer that is whole ends with [DONE]
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// ── showing ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function addTurn(who, className, text) {
  const turn = element("article", `turn ${className}`);
  turn.append(element("span", "who", who));
  const body = element("span", "body");
  if (text) body.append(element("span", className === "text" ? "given" : "", text));
  turn.append(body);
  $("log").append(turn);
  turn.scrollIntoView({ block: "end" });
  return body;
}

function addThought(body, text, gates) {
  let thought = body.querySelector("details.thought");
  if (!thought) {
    thought = element("details", "thought");
    thought.append(element("summary", "", "Reasoning"), element("span", ""));
    body.prepend(thought);
  }
  addText(thought.lastChild, text, gates);
}

// Tokens of tags that split off the reasoning stand in `gates` and not in `text`.
function addText(body, text, gates) {
  const joined = (gates ?? []).map(({ token }) => token).join("");
  if (!gates || !joined.endsWith(text)) return body.append(text);
  let hidden = joined.length - text.length;
  for (const { token, gate } of gates) {
    const part = token.slice(Math.max(hidden, 0));
    hidden -= token.length;
    if (!part) continue;
    const shown = element("span", "token", part);
    if (gate !== null) {
      shown.style.backgroundColor = `rgb(240 150 0 / ${(0.75 * gate).toFixed(3)})`;
      shown.title = `gate ${gate.toFixed(3)}`;
      shown.setAttribute("aria-description", shown.title);
      shown.tabIndex = body.querySelector(".token[tabindex='0']") ? -1 : 0; // Tab reaches an answer once, arrows go on from there
    }
    body.append(shown);
  }
}

async function showSpeculation() {
  const response = await reach("/metrics");
  if (!response.ok) return "";
  const counts = { drafted: [], accepted: [] };
  for (const [, name, position, value] of (await response.text()).matchAll(/byrote_(drafted|accepted)_tokens_total\{position="(\d+)"\} ([\d.e+]+)/g)) {
    counts[name][position - 1] = Number(value);
  }
  const shares = counts.drafted.map((drafted, index) => (drafted ? `${Math.round((100 * counts.accepted[index]) / drafted)} %` : ""));
  return shares.some(Boolean) ? ` · drafts accepted: ${shares.filter(Boolean).join(", ")}` : "";
}

// ── one turn ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

async function answer(prompt) {
  const chats = model().chat;
  if (chats) addTurn("You", "user", prompt);
  const body = addTurn($("model").value, chats ? "" : "text", chats ? "" : prompt);
  const [path, asked] = request(prompt);
  const began = performance.now();
  let content = "", usage = null;
  const response = await reach(path, { method: "POST", body: JSON.stringify(asked), signal: state.stop.signal });
  if (!response.ok) throw new Error(await failure(response));
  for await (const chunk of serverSent(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    usage = chunk.usage ?? usage;
    const choice = chunk.choices[0];
    if (!choice) continue;
    const text = choice.text ?? choice.delta.content ?? "", thought = choice.delta?.reasoning_content;
    if (thought) addThought(body, thought, text ? null : choice.gates);
    content += text;
    if (text) addText(body, text, choice.gates);
  }
  if (chats) state.turns.push({ role: "user", content: prompt }, { role: "assistant", content });
  const seconds = (performance.now() - began) / 1000;
  if (usage) $("speed").textContent = `${usage.completion_tokens} tokens, ${(usage.completion_tokens / seconds).toFixed(0)} a second${await showSpeculation()}`;
}

async function send(event) {
  event?.preventDefault();
  const prompt = $("prompt").value;
  if (!prompt.trim() || state.stop || !model()) return;
  state.stop = new AbortController();
  busy(true);
  try {
    $("prompt").value = "";
    await answer(prompt);
    $("status").textContent = "Done.";
  } catch (error) {
    if (error.name === "AbortError") {
      $("status").textContent = "Stopped.";
    } else {
      addTurn("Error", "error", error.message);
      $("status").textContent = "";
      $("prompt").value = prompt;
    }
  } finally {
    state.stop = null;
    busy(false);
    $("prompt").focus();
  }
}

function busy(is) {
  $("send").disabled = is;
  $("stop").disabled = !is;
  $("log").setAttribute("aria-busy", String(is)); // a screen reader hears an answer when it is whole
  if (is) $("status").textContent = "Writing …";
}

// ── controls ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").setAttribute("aria-pressed", String(theme === "dark"));
}

$("form").addEventListener("submit", send);
$("stop").addEventListener("click", () => state.stop?.abort());
$("model").addEventListener("change", showKind);
$("gates").addEventListener("change", () => { $("scale").hidden = !$("gates").checked; });
$("key").addEventListener("change", loadModels);
$("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
$("clear").addEventListener("click", () => {
  state.turns = [];
  $("log").replaceChildren();
  $("speed").textContent = $("status").textContent = "";
  $("prompt").focus();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.stop?.abort();
});
$("log").addEventListener("keydown", ({ key, target }) => {
  const next = { ArrowLeft: target.previousElementSibling, ArrowRight: target.nextElementSibling }[key];
  if (!target.matches(".token") || !next?.matches(".token")) return;
  target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
loadModels();
