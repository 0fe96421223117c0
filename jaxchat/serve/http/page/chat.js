// The chat: the messages of a conversation, and the answers as they are written.

import { ApiError, stream } from "./api.js";
import { composer } from "./composer.js";
import { announce, element, icon, toast } from "./dom.js";
import { rounded } from "./info.js";
import { answer, editor, question } from "./message.js";
import { asMessage, fit } from "./prompt.js";
import { areChanged, lastSettings, samplingFields, settingsDialog } from "./settings.js";
import { add, children, choose, conversation as newTree, path, pathTo, remove, siblings } from "./tree.js";

const SAVE_EVERY = 1000; // milliseconds, while an answer is written
const NEAR = 48; // pixels from the end that still count as the end

/** Fills the chat view. Returns `{open(id), focus(), stop(), settings()}`. */
export function mountChat(view, app) {
  const { info, store } = app;
  const running = new Map(); // conversation to {controller, node}
  let tree = null;
  let live = null; // the shown answer that is being written
  let before = 0; // where the view was scrolled to
  let following = true; // whether the reader is at the end, and new text scrolls into view

  const thread = element("div", { class: "thread" });
  const scroller = element("div", { class: "scroller", tabindex: -1 }, thread);
  const latest = element(
    "button",
    { type: "button", class: "latest", hidden: true, onclick: () => toEnd(true) },
    icon("down"),
    "Latest",
  );
  const input = composer({ send, stop, editLast });
  const note = element(
    "p",
    { class: "note hint" },
    "Enter sends, Shift + Enter breaks the line. A small model makes mistakes.",
  );
  view.append(scroller, element("div", { class: "foot" }, latest, input.element, note));
  scroller.addEventListener("scroll", () => {
    const { scrollTop, scrollHeight, clientHeight } = scroller;
    // The text may have grown since the page itself scrolled to the end; only a reader scrolls up.
    if (scrollHeight - scrollTop - clientHeight < NEAR) following = true;
    else if (scrollTop < before) following = false;
    before = scrollTop;
    latest.hidden = following;
  });
  new ResizeObserver(() => toEnd()).observe(thread);
  addEventListener("pagehide", () => [...running.keys()].forEach(keep));
  store.addEventListener("change", () => {
    for (const [one, { controller }] of running) if (!store.get(one.id)) controller.abort(); // it was deleted
    if (tree && !running.has(tree) && store.get(tree.id) && store.get(tree.id) !== tree) open(tree.id); // by another tab
  });

  /** Saves a conversation, unless it was deleted meanwhile; with the messages that another tab has added to it. */
  function keep(conversation) {
    const there = store.get(conversation.id);
    if (!there) return;
    if (there !== conversation) conversation.nodes = { ...there.nodes, ...conversation.nodes };
    store.save(conversation);
  }

  function toEnd(always = false) {
    if (always) following = true;
    if (following) scroller.scrollTop = scroller.scrollHeight;
  }

  /** Shows a conversation; a new one if there is none of this id. */
  function open(id) {
    const found = id && store.get(id)?.kind === "chat" ? store.get(id) : null;
    const same = found && tree?.id === found.id;
    tree = found ?? newTree("chat", lastSettings());
    if (id && !found) history.replaceState(null, "", "#chat");
    for (const node of Object.values(tree.nodes)) {
      if (node.finish === null && running.get(tree)?.node !== node) node.finish = "stopped"; // the page was closed
    }
    show();
    if (!same) toEnd(true);
    if (matchMedia("(hover: hover)").matches) input.focus();
  }

  function show() {
    live = null;
    const nodes = path(tree);
    const parts = [];
    const last = nodes.at(-1);
    for (const node of nodes) {
      if (last.first && node.id === last.first && node !== nodes[0]) {
        parts.push(
          element(
            "p",
            { class: "note forgotten" },
            element("span", {}, "The messages above no longer fit into the model’s context"),
          ),
        );
      }
      if (node.role === "user") parts.push(question(tree, node, actions));
      else {
        const shown = answer(tree, node, info, actions, node.finish === null);
        if (node.finish === null) live = shown;
        parts.push(shown.element);
      }
    }
    const { scrollTop } = scroller;
    const stay = following;
    const heading = element("h1", { class: "hidden-visually" }, tree.title);
    thread.replaceChildren(...(parts.length ? [heading, ...parts] : [welcome()]));
    thread.classList.toggle("empty", parts.length === 0);
    if (stay) toEnd(true);
    else scroller.scrollTop = scrollTop;
    showState();
  }

  function showState() {
    input.showRunning(running.has(tree));
    const usage = path(tree).findLast((node) => node.usage)?.usage;
    input.showContext(usage?.total_tokens ?? null, info.context);
    document.getElementById("settings-button").classList.toggle("changed", areChanged(tree.settings));
  }

  function welcome() {
    const facts = [
      info.parameters && `${rounded(info.parameters)} parameters`,
      info.context && `reads ${info.context.toLocaleString("en")} tokens at a time`,
      info.stage && `after ${info.stage}`,
    ];
    const examples = info.examples.map((text) =>
      element("button", { type: "button", onclick: () => send(text) }, text),
    );
    return element(
      "div",
      { class: "welcome" },
      element("img", { src: "icon.svg", alt: "", width: 48, height: 48 }),
      element("h1", {}, info.name),
      element("p", { class: "note" }, facts.filter(Boolean).join(" · ")),
      element("div", { class: "examples", role: "group", "aria-label": "Questions to begin with" }, ...examples),
    );
  }

  function send(text) {
    const last = path(tree).at(-1);
    if (!tree.title) tree.title = text.split("\n")[0].slice(0, 80);
    ask(add(tree, last?.id ?? null, { role: "user", content: text, created: Date.now() }));
    input.focus();
  }

  /** Has `node`, a question, answered. */
  async function ask(node) {
    const conversation = tree;
    const own = {
      role: "assistant",
      content: "",
      tools: [],
      finish: null,
      model: [info.name, info.stage].filter(Boolean).join(" · "),
      created: Date.now(),
    };
    const { seed } = conversation.settings;
    const answered = add(conversation, node.id, own);
    answered.seed =
      seed === null
        ? crypto.getRandomValues(new Uint32Array(1))[0] >>> 1
        : seed + siblings(conversation, answered).length - 1;
    const controller = new AbortController();
    running.set(conversation, { controller, node: answered });
    conversation.updated = Date.now();
    history.replaceState(null, "", `#chat/${conversation.id}`);
    store.save(conversation);
    show();
    toEnd(true);
    try {
      await write(conversation, answered, controller.signal);
    } catch (error) {
      if (error.name === "AbortError") answered.finish = "stopped";
      else {
        const { status = null, code = null, message, retryAfter = null } = error;
        Object.assign(answered, { finish: "error", error: { status, code, message, retryAfter } });
        if (!(error instanceof ApiError)) console.error(error);
      }
    }
    answered.finish ??= "stop";
    running.delete(conversation);
    keep(conversation);
    if (tree !== conversation) return;
    live?.finish();
    live = null;
    showState();
    announce(
      answered.finish === "stopped" ? "Stopped" : answered.error ? "" : answered.content || "The answer is empty",
    );
  }

  /** Writes the server's answer into `node` as it comes. */
  async function write(conversation, node, signal) {
    const { settings } = conversation;
    const before = pathTo(conversation, node).slice(0, -1);
    const { messages, first } = await fit(before, settings, info.context);
    if (first) {
      node.first = before[first].id;
      if (tree === conversation) show();
    }
    const fields = {
      model: info.model,
      messages,
      stream: true,
      stream_options: { include_usage: true },
      seed: node.seed,
      ...samplingFields(settings),
    };
    let saved = performance.now();
    for await (const { choices, usage } of stream("v1/chat/completions", { body: fields, signal })) {
      if (usage) node.usage = usage;
      const { delta = {}, finish_reason: finish = null } = choices?.[0] ?? {};
      node.content += delta.content ?? "";
      node.tools.push(...(delta.tool_runs ?? []));
      if (finish) node.reason = finish;
      if (tree === conversation) live?.update();
      if (performance.now() - saved > SAVE_EVERY) {
        saved = performance.now();
        keep(conversation);
      }
    }
    node.finish = node.reason ?? "stop";
    node.full = Boolean(node.usage && node.usage.total_tokens >= info.context);
    delete node.reason;
  }

  function stop() {
    running.get(tree)?.controller.abort();
  }

  function editLast() {
    const node = path(tree).findLast(({ role }) => role === "user");
    if (node) actions.edit(node);
  }

  function busy() {
    if (running.has(tree)) toast("Wait for the answer, or stop it.");
    return running.has(tree);
  }

  const actions = {
    /** Another answer to the same question; in place of one that failed before it began. */
    retry(node) {
      if (busy()) return;
      const asked = tree.nodes[node.parent];
      if (!node.content && !node.tools.length && !children(tree, node.id).length) remove(tree, node);
      ask(asked);
    },
    choose(node, label) {
      if (busy()) return;
      choose(tree, node);
      store.save(tree);
      show();
      const place = thread.querySelector(`[data-id="${node.id}"]`);
      (
        place.querySelector(`[aria-label="${label}"]:not(:disabled)`) ??
        place.querySelector(".branches button:not(:disabled)")
      ).focus();
    },
    edit(node) {
      if (busy()) return;
      const place = thread.querySelector(`[data-id="${node.id}"]`);
      const change = (text) => ask(add(tree, node.parent, { role: "user", content: text, created: Date.now() }));
      const field = editor(node, change, () => (show(), input.focus()));
      place.replaceWith(field.element);
      field.focus();
    },
    /** Hands over what the model read, and what it wrote. */
    inside(node) {
      const { system } = tree.settings;
      const lead = system ? [{ role: "system", content: system }] : [];
      const nodes = pathTo(tree, node);
      const first = nodes.findIndex(({ id }) => id === node.first);
      app.openInside({ messages: [...lead, ...nodes.slice(Math.max(0, first)).map(asMessage)] });
    },
  };

  function settings() {
    settingsDialog(tree.settings, false, () => {
      if (store.get(tree.id)) store.save(tree);
      showState();
    });
  }

  return { open, focus: input.focus, stop, settings };
}
