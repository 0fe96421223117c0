// Conversations in the browser's storage, and as files.

import { validSettings } from "./settings.js";
import { path } from "./tree.js";

const PREFIX = "jaxchat.conversation.";
const FORMAT = "jaxchat conversations";

/** The conversations of this browser, newest first. Fires "change" when the list changes, and "full" when it is full. */
export class Store extends EventTarget {
  #kept = new Map();

  constructor() {
    super();
    for (let i = 0; i < localStorage.length; i++) this.#read(localStorage.key(i));
    addEventListener("storage", ({ key }) => this.#read(key) && this.dispatchEvent(new Event("change"))); // another tab
  }

  #read(key) {
    if (!key?.startsWith(PREFIX)) return false;
    const id = key.slice(PREFIX.length);
    try {
      const text = localStorage.getItem(key);
      if (text === null) this.#kept.delete(id);
      else this.#kept.set(id, checked(JSON.parse(text), "it"));
    } catch {
      return false; // not of this page, or of a later version of it; it stays where it is
    }
    return true;
  }

  all() {
    return [...this.#kept.values()].sort((a, b) => b.updated - a.updated);
  }

  get(id) {
    return this.#kept.get(id) ?? null;
  }

  save(conversation) {
    this.#kept.set(conversation.id, conversation);
    try {
      localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    } catch {
      this.dispatchEvent(new Event("full"));
    }
    this.dispatchEvent(new Event("change"));
  }

  remove(id) {
    this.#kept.delete(id);
    localStorage.removeItem(PREFIX + id);
    this.dispatchEvent(new Event("change"));
  }

  /** Adds the conversations of a file; one that is already here is replaced if the file's is newer. Returns how many. */
  import(text) {
    let file;
    try {
      file = JSON.parse(text);
    } catch {
      throw new Error("the file is not JSON");
    }
    if (file?.format !== FORMAT || !Array.isArray(file.conversations))
      throw new Error("the file has no conversations of jaxchat");
    const read = file.conversations.map((one, index) => checked(one, `conversation ${index + 1}`));
    const added = read.filter((one) => !this.#kept.has(one.id) || this.#kept.get(one.id).updated < one.updated);
    for (const one of added) this.save(one);
    return added.length;
  }
}

/** The text of a file with `conversations`, which `Store.import` reads. */
export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 2) + "\n";
}

/** What is shown of a conversation, as Markdown. */
export function markdownOf(conversation) {
  const parts = [`# ${conversation.title || "Conversation"}\n`];
  if (conversation.kind === "text") return `${parts[0]}\n${conversation.text}\n`;
  if (conversation.settings.system) parts.push(`**System prompt**\n\n${conversation.settings.system}\n`);
  for (const node of path(conversation)) {
    const tools = (node.tools ?? []).map(({ call, output }) => "```text\n" + `${call}\n→ ${output}` + "\n```\n");
    parts.push(`**${node.role === "user" ? "You" : node.model || "Model"}**\n`, ...tools, `${node.content}\n`);
  }
  return parts.join("\n");
}

/** A name for a file. */
export function fileName(conversation, ending) {
  const words = conversation.title
    .toLowerCase()
    .replaceAll(/[^\p{L}\p{N}]+/gu, "-")
    .replaceAll(/^-|-$/g, "");
  return `${words.slice(0, 40) || "conversation"}.${ending}`;
}

const isText = (value) => typeof value === "string";
const isTime = (value) => Number.isFinite(value);
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/** `one` if it is a whole conversation: what comes from a file is not trusted. */
function checked(one, what) {
  const fits = (condition, problem) => {
    if (!condition) throw new Error(`${what} ${problem}`);
  };
  fits(isObject(one) && isText(one.id) && /^[\w-]+$/.test(one.id) && isText(one.title), "has no id or title");
  fits(["chat", "text"].includes(one.kind) && isTime(one.created) && isTime(one.updated), "has no kind or dates");
  fits(isObject(one.nodes) && isObject(one.chosen) && isObject(one.settings), "has no messages or settings");
  fits(one.kind === "chat" || isText(one.text), "has no text");
  for (const [id, node] of Object.entries(one.nodes)) {
    fits(
      isObject(node) && node.id === id && ["user", "assistant"].includes(node.role) && isText(node.content),
      "has a message without role or text",
    );
    fits(node.parent === null || one.nodes[node.parent], "has a message that follows none");
    const tools = node.tools ?? [];
    fits(
      Array.isArray(tools) && tools.every((run) => isObject(run) && isText(run.call) && isText(run.output)),
      "has a tool call without text",
    );
    for (let at = node, steps = 0; at.parent !== null; at = one.nodes[at.parent]) {
      fits(++steps < 100_000 && one.nodes[at.parent], "has messages that follow each other in a circle");
    }
  }
  return { ...one, settings: validSettings(one.settings) };
}
