// What of a conversation goes to the model: all of it, or as much as fits into the model's context.

import { json } from "./api.js";

const MARKS = 2; // special tokens around a message
const sizes = new WeakMap();

async function count(text) {
  try {
    return (await json("tokenize", { body: { prompt: text, add_special_tokens: false } })).count;
  } catch {
    return Math.ceil(text.length / 3); // an estimate: the server has the last word anyway
  }
}

/**
 * The prompt to send for a text: the text, or the ids of its end where all of it leaves no room in the context.
 *
 * `room` tokens are kept free, or half of the context if that is less.
 */
export async function fitText(text, room, context) {
  const { tokens } = await json("tokenize", { body: { prompt: text, add_special_tokens: true } });
  const fits = context - Math.min(room, Math.floor(context / 2));
  return tokens.length <= fits ? text : [tokens[0], ...tokens.slice(1 - fits)]; // the first is <|bos|>
}

/** A message as /v1/chat/completions takes it. The server puts tool calls back where they were. */
export function asMessage({ role, content, tools }) {
  return tools?.length ? { role, content, tool_runs: tools } : { role, content };
}

async function sizeOf(node) {
  if (!sizes.has(node)) {
    const calls = node.tools ?? [];
    const text = node.content + calls.map(({ call, output }) => call + output).join("");
    sizes.set(node, (await count(text)) + MARKS * (1 + 2 * calls.length));
  }
  return sizes.get(node);
}

/**
 * The messages to send for `nodes`, which end with a question.
 *
 * As in the terminal, half of the context, or the longest answer wanted if that is less, is kept free for the answer:
 * the oldest turns are left out for it. The question itself is always sent. `first` is the index of the first node sent.
 */
export async function fit(nodes, { system, max_tokens }, context) {
  const lead = system ? [{ role: "system", content: system }] : [];
  const room = Math.min(max_tokens ?? context, Math.floor(context / 2));
  let total = 1 + (system ? (await count(system)) + MARKS : 0) + (await sizeOf(nodes.at(-1)));
  let first = nodes.length - 1;
  while (first > 0) {
    total += (await sizeOf(nodes[first - 1])) + (await sizeOf(nodes[first - 2]));
    if (total + room > context) break;
    first -= 2;
  }
  return { messages: [...lead, ...nodes.slice(first).map(asMessage)], first };
}
