// The page: what model this is, which view is open, and what is the same in all of them.
//
// Views other than the chat are modules `inside.js` and `run.js`. Each exports `mount(element, api)`, which is called each
// time its view opens, with an empty element. `api` has
//   info            what /api/info says
//   json(path, {body, signal})    the JSON that the server answers; with a body it is a POST. Adds the API key
//   request(...)    the same, as a Response; stream(...) yields the frames of server-sent events
//   advice(error)   {title, text, retry}: what a person can do about an error of these functions
//   signal          is aborted when the view closes: stop timers and requests then
//   messages        the conversation that was handed over, as /v1/chat/completions takes it; null if there is none
//   text            the text that was handed over, of a base model; null if there is none
//   markdown(text)  safe elements for Markdown, as a DocumentFragment
//   color(name)     the colour that a custom property of app.css has now, such as color("--series-1")
// The window gets a "themechange" event when the colours change. Elements and icons are made by dom.js.

import { advice, json, onKeyNeeded, request, stream } from "./api.js";
import { mountChat } from "./chat.js";
import { element, icon, toast, typing } from "./dom.js";
import { keyDialog, shortcutsDialog } from "./dialogs.js";
import { loadInfo, summary } from "./info.js";
import { renderMarkdown } from "./markdown.js";
import { mountSidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { mountText } from "./text.js";

const $ = (id) => document.getElementById(id);
const THEMES = ["system", "light", "dark"];
const narrow = matchMedia("(max-width: 860px)");
const app = {
  info: null,
  store: new Store(),
  handed: { messages: null, text: null },
  openInside,
  openConversation,
  newConversation,
};
let chat = null;
let closing = null; // aborts what the open view does

function color(name) {
  const probe = element("span", { hidden: true });
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const computed = getComputedStyle(probe).color;
  probe.remove();
  return computed;
}

function theme() {
  return localStorage.getItem("jaxchat.theme") ?? "system";
}

function showTheme(button) {
  const names = { system: "as the system", light: "light", dark: "dark" };
  const icons = { system: "system", light: "sun", dark: "moon" };
  if (theme() === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme();
  button.replaceChildren(icon(icons[theme()]));
  button.setAttribute("aria-label", `Colours: ${names[theme()]}`);
  button.title = `Colours: ${names[theme()]}`;
  dispatchEvent(new Event("themechange"));
}

function themeButton() {
  const button = element("button", { type: "button", class: "quiet", id: "theme" });
  button.addEventListener("click", () => {
    localStorage.setItem("jaxchat.theme", THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length]);
    showTheme(button);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("themechange")));
  showTheme(button);
  return button;
}

/** Opens the inside view on a conversation or a text. */
function openInside(handed) {
  app.handed = { messages: null, text: null, ...handed };
  if (location.hash === "#inside") openView("inside");
  else location.hash = "#inside";
}

function openConversation(id) {
  if (location.hash === `#chat/${id}`) openView("chat", id);
  else location.hash = `#chat/${id}`;
  if (narrow.matches) showSidebar(false);
}

function newConversation() {
  if (location.hash === "#chat") openView("chat", null);
  else location.hash = "#chat";
  if (narrow.matches) showSidebar(false);
}

function showSidebar(shown) {
  document.body.classList.toggle("no-sidebar", !shown);
  if (!narrow.matches) localStorage.setItem("jaxchat.sidebar", shown ? "shown" : "hidden");
  if (shown && narrow.matches) $("hide-sidebar").focus();
}

async function openView(view, id = null) {
  closing?.abort();
  closing = new AbortController();
  for (const link of $("views").children) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  for (const name of ["chat", "inside", "run"]) $(`view-${name}`).hidden = name !== view;
  $("skip").hidden = $("settings-button").hidden = view !== "chat";
  document.title = { chat: app.info.name, inside: `Look inside · ${app.info.name}`, run: `Run · ${app.info.name}` }[
    view
  ];
  if (view === "chat") return chat.open(id);
  const place = $(`view-${view}`);
  const own = element("div", { class: view });
  place.replaceChildren(own);
  const { signal } = closing;
  const help = (error) => advice(error, app.info);
  const api = {
    info: app.info,
    json,
    request,
    stream,
    advice: help,
    signal,
    ...app.handed,
    markdown: renderMarkdown,
    color,
  };
  try {
    const module = await import(`./${view}.js`);
    if (!signal.aborted) await module.mount(own, api);
  } catch (error) {
    if (signal.aborted) return;
    const { title, text } = help(error);
    own.replaceChildren(
      element(
        "div",
        { class: "problem", role: "alert" },
        icon("warning"),
        element("p", {}, element("b", {}, title), ` ${text}`),
      ),
    );
  }
}

function route() {
  const [view, id = null] = location.hash.slice(1).split("/");
  const offered = [...$("views").children].filter((link) => !link.hidden).map((link) => link.dataset.view);
  openView(offered.includes(view) ? view : offered[0], id);
}

function onKey(event) {
  if (event.defaultPrevented || document.querySelector("dialog[open]")) return;
  const command = event.ctrlKey || event.metaKey;
  if (event.key === "Escape" && narrow.matches && !document.body.classList.contains("no-sidebar")) showSidebar(false);
  else if (event.key === "Escape") chat?.stop();
  else if (command && event.shiftKey && event.key.toLowerCase() === "o" && app.info.model) newConversation();
  else if (command && event.shiftKey && event.key.toLowerCase() === "s" && app.info.model)
    showSidebar(document.body.classList.contains("no-sidebar"));
  else if (typing(event) || command || event.altKey) return;
  else if (event.key === "?") shortcutsDialog(app.info);
  else if (event.key === "/" && !$("view-chat").hidden) chat.focus();
  else return;
  event.preventDefault();
}

function prepareControls() {
  $("brand").append(element("img", { src: "icon.svg", alt: "", width: 22, height: 22 }), "jaxchat");
  $("new").append(icon("plus"), "New chat");
  $("search").before(icon("search"));
  $("menu").append(icon("menu"));
  $("hide-sidebar").append(icon("menu"));
  $("settings-button").append(icon("settings"));
  $("menu").addEventListener("click", () => showSidebar(document.body.classList.contains("no-sidebar")));
  $("hide-sidebar").addEventListener("click", () => (showSidebar(false), $("menu").focus()));
  $("curtain").addEventListener("click", () => showSidebar(false));
  $("new").addEventListener("click", newConversation);
  $("skip").addEventListener("click", () => chat?.focus());
  $("settings-button").addEventListener("click", () => chat?.settings());
}

async function start() {
  prepareControls();
  const colours = themeButton();
  onKeyNeeded(keyDialog);
  app.info = await loadInfo($("status"));
  const { info } = app;
  $("model").textContent = summary(info);
  $("model").title = summary(info);
  if (info.model) {
    chat = info.base ? mountText($("view-chat"), app) : mountChat($("view-chat"), app);
    mountSidebar($("conversations"), $("search"), $("sidebar-tools"), app, colours);
    if (info.base) {
      $("new").replaceChildren(icon("plus"), "New text");
      $("views").querySelector("[data-view=chat]").textContent = "Write";
    }
    showSidebar(!narrow.matches && localStorage.getItem("jaxchat.sidebar") !== "hidden");
    narrow.addEventListener("change", () => showSidebar(!narrow.matches));
  } else {
    for (const link of $("views").children) link.hidden = link.dataset.view !== "run";
    $("menu").remove();
    $("bar").append(colours);
  }
  addEventListener("hashchange", route);
  addEventListener("keydown", onKey);
  app.store.addEventListener("full", () =>
    toast("The browser’s storage is full. Export conversations and delete some of them; the newest are not kept now."),
  );
  route();
}

start();
