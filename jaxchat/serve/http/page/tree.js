// A conversation as a tree of messages. Each edit and each retry is a branch; one path through it is shown.
//
// conversation: {id, kind: "chat" | "text", title, created, updated, settings, nodes: {id: node}, chosen: {parent: id}}
// node: {id, parent (null: a beginning), role, content, tools, finish, …}, in the order in which they were made

/** A new conversation without messages. */
export function conversation(kind, settings, fields = {}) {
  const now = Date.now();
  return { id: random(), kind, title: "", created: now, updated: now, settings, nodes: {}, chosen: {}, ...fields };
}

// crypto.randomUUID would do, but is not there on a page that comes over plain HTTP from another machine.
function random() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Adds a message after `parent` (null: at the beginning) and shows it. */
export function add(tree, parent, fields) {
  const node = { id: random().slice(0, 12), parent, ...fields };
  tree.nodes[node.id] = node;
  choose(tree, node);
  return node;
}

/** The messages that follow `parent` in one branch or another. */
export function children(tree, parent) {
  return Object.values(tree.nodes).filter((node) => node.parent === parent);
}

/** The branches at a message, itself among them. */
export function siblings(tree, node) {
  return children(tree, node.parent);
}

/** Shows the branch that `node` is on. */
export function choose(tree, node) {
  tree.chosen[node.parent ?? ""] = node.id;
}

/** Takes out a message and all that follows it, and shows the branch beside it. */
export function remove(tree, node) {
  for (const child of children(tree, node.id)) remove(tree, child);
  delete tree.nodes[node.id];
  delete tree.chosen[node.id];
  const left = children(tree, node.parent);
  if (left.length) choose(tree, left.at(-1));
  else delete tree.chosen[node.parent ?? ""];
}

/** The messages that are shown, from the first to the last. */
export function path(tree) {
  const shown = [];
  for (let parent = null; ; parent = shown.at(-1).id) {
    const next = tree.nodes[tree.chosen[parent ?? ""]] ?? children(tree, parent).at(-1);
    if (!next) return shown;
    shown.push(next);
  }
}

/** The messages from the first to `node`. */
export function pathTo(tree, node) {
  const way = [];
  for (let at = node; at; at = tree.nodes[at.parent]) way.unshift(at);
  return way;
}
