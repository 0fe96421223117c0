// Runs before anything is drawn, so that a page in the chosen colours never flashes in the others.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("jaxchat.theme");
  } catch {
    // A browser that keeps nothing follows the system.
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
