// The list of conversations: search, rename, export, import, delete.

import { shortcutsDialog } from "./dialogs.js";
import { download, element, icon, iconButton, toast } from "./dom.js";
import { exported, fileName, markdownOf } from "./store.js";

const DAY = 86_400_000;

function period(time) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (time >= today) return "Today";
  if (time >= today - DAY) return "Yesterday";
  return time >= today - 6 * DAY ? "Earlier this week" : "Before";
}

function matches(conversation, words) {
  const text = [
    conversation.title,
    conversation.text ?? "",
    ...Object.values(conversation.nodes).map((node) => node.content),
  ]
    .join("\n")
    .toLowerCase();
  return words.every((word) => text.includes(word));
}

/** Fills the sidebar, and keeps it up to date. */
export function mountSidebar(list, search, tools, app, themeButton) {
  const { store } = app;
  const kind = app.info.base ? "text" : "chat";
  const things = app.info.base ? "texts" : "conversations";
  const mine = () => store.all().filter((one) => one.kind === kind);

  function show() {
    if (list.querySelector("input")) return; // a title is being typed
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = mine().filter((one) => matches(one, words));
    const focused = list.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
    const groups = Map.groupBy(found, (one) => period(one.updated));
    list.replaceChildren();
    for (const [name, conversations] of groups) {
      list.append(element("h2", {}, name), element("ul", {}, ...conversations.map(row)));
    }
    if (!found.length)
      list.append(
        element(
          "p",
          { class: "note" },
          words.length ? "Nothing found." : `Your ${things} are kept in this browser only.`,
        ),
      );
    if (focused) list.querySelector(`a[href="${focused}"]`)?.focus();
  }

  function row(conversation) {
    const address = `#chat/${conversation.id}`;
    const current = location.hash === address;
    const link = element(
      "a",
      { href: address, title: conversation.title, "aria-current": current ? "page" : null },
      conversation.title || "Untitled",
    );
    link.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      app.openConversation(conversation.id);
    });
    const more = iconButton("more", `More for “${conversation.title}”`, () => menu(more, conversation), {
      "aria-haspopup": "menu",
    });
    return element("li", { class: current ? "current" : null }, link, more);
  }

  function menu(anchor, conversation) {
    const choices = [
      ["edit", "Rename", () => rename(anchor.parentElement, conversation)],
      [
        "export",
        "Export as Markdown",
        () => download(fileName(conversation, "md"), "text/markdown", markdownOf(conversation)),
      ],
      [
        "export",
        "Export as JSON",
        () => download(fileName(conversation, "json"), "application/json", exported([conversation])),
      ],
      ["close", "Delete", () => discard(conversation)],
    ];
    const box = element("div", { class: "menu", role: "menu", popover: "auto" });
    for (const [picture, label, run] of choices) {
      const choose = () => (box.hidePopover(), run());
      box.append(
        element(
          "button",
          { type: "button", role: "menuitem", class: label === "Delete" ? "danger" : null, onclick: choose },
          icon(picture),
          label,
        ),
      );
    }
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") event.stopPropagation(); // closes the menu, and stops no answer
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const items = [...box.children];
      items[(items.indexOf(document.activeElement) + step + items.length) % items.length].focus();
    });
    box.addEventListener("toggle", ({ newState }) => newState === "closed" && (box.remove(), anchor.focus()));
    document.getElementById("dialogs").append(box);
    box.showPopover();
    const place = anchor.getBoundingClientRect();
    box.style.left = `${Math.max(8, Math.min(place.left, innerWidth - box.offsetWidth - 8))}px`;
    box.style.top = `${Math.min(place.bottom + 4, innerHeight - box.offsetHeight - 8)}px`;
    box.firstElementChild.focus();
  }

  function rename(item, conversation) {
    const input = element("input", { "aria-label": "New title", maxlength: 200 });
    input.value = conversation.title;
    let done = false;
    const finish = (keep) => {
      if (done) return;
      done = true;
      input.remove();
      const title = input.value.trim();
      if (keep && title) store.save(Object.assign(conversation, { title }));
      else show();
      list.querySelector(`a[href="#chat/${conversation.id}"]`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) finish(true);
      else if (event.key === "Escape") finish(false);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    input.addEventListener("blur", () => finish(true));
    item.replaceChildren(input);
    setTimeout(() => input.select()); // once the menu has given the focus back
  }

  function discard(conversation) {
    store.remove(conversation.id);
    if (location.hash === `#chat/${conversation.id}`) app.newConversation();
    toast("Deleted.", { label: "Undo", run: () => (store.save(conversation), app.openConversation(conversation.id)) });
  }

  const file = element("input", { type: "file", accept: "application/json,.json", hidden: true });
  file.addEventListener("change", async () => {
    try {
      const count = store.import(await file.files[0].text());
      toast(
        count
          ? `Imported ${count} ${count === 1 ? things.slice(0, -1) : things}.`
          : `All of these ${things} are here already.`,
      );
    } catch (error) {
      toast(`Nothing was imported: ${error.message}.`);
    }
    file.value = "";
  });
  const exportAll = () => {
    if (mine().length) download("jaxchat-conversations.json", "application/json", exported(mine()));
    else toast("There is nothing to export yet.");
  };
  tools.append(
    iconButton("import", `Import ${things}`, () => file.click()),
    iconButton("export", `Export all ${things}`, exportAll),
    iconButton("keyboard", "Keyboard", () => shortcutsDialog(app.info)),
    themeButton,
    file,
  );
  search.addEventListener("input", show);
  store.addEventListener("change", show);
  addEventListener("hashchange", show);
  show();
}
