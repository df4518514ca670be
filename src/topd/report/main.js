// Tabs, theme, tooltip, keys.

const THEMES = ["system", "light", "dark"];

function showTab(name) {
  const tab = byId(`tab-${name}`);
  if (!tab) return;
  for (const other of document.querySelectorAll('[role="tab"]')) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    byId(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  document.body.classList.toggle("fixed", name === "forks");
  if (name === "forks" && state.open === null && entries.length) openRollout(state.found[0] ?? null);
  else if (name !== "forks") history.replaceState(null, "", `#/${name}`);
}

function turnTab(event) {
  const tabs = [...document.querySelectorAll('[role="tab"]')];
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!by) return;
  const next = tabs[(tabs.indexOf(event.target) + by + tabs.length) % tabs.length];
  showTab(next.getAttribute("aria-controls"));
  next.focus();
}

function nextTheme() {
  const root = document.documentElement;
  const now = root.dataset.theme === "auto" ? "system" : root.dataset.theme;
  const next = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
  root.dataset.theme = next === "system" ? "auto" : next;
  byId("theme").querySelector("span").textContent = next;
}

function tipText(element) {
  if (element.dataset.tip) return element.dataset.tip;
  if (element.closest("#rollout .text") && element.dataset.at) return tokenTip(readRollout(state.open), Number(element.dataset.at));
  return element.querySelector(":scope > title")?.textContent ?? "";
}

function showTip(event) {
  const tip = byId("tip");
  const element = event.target.closest?.("[data-tip], [data-at], .hinted, .thread");
  const text = element ? tipText(element) : "";
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const box = element.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left), innerWidth - tip.offsetWidth - 8);
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? box.bottom + 6 : Math.max(4, box.top - tip.offsetHeight - 6)}px`;
}

const KEYS = {
  j: () => step(1), ArrowDown: () => step(1),
  k: () => step(-1), ArrowUp: () => step(-1),
  n: () => stepFork(1), ArrowRight: () => stepFork(1),
  p: () => stepFork(-1), ArrowLeft: () => stepFork(-1),
  "/": () => { byId("search").focus(); byId("search").select(); },
  Escape: closeFork,
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  byId("tip").hidden = true;
  const { target } = event;
  if (target.matches("input, select, textarea")) {
    if (event.key === "Escape" || (event.key === "Enter" && target.id === "search")) {
      byId("rollout").focus();
      event.preventDefault();
    }
    return;
  }
  if (byId("forks")?.hidden !== false || target.matches('[role="tab"]')) return;
  if (event.key.startsWith("Arrow") && target.closest(".pane.fork, .wide")) return; // they scroll
  if (event.key === "Enter" && !target.closest("button, summary")) {
    if (state.fork === null) stepFork(1);
    byId("fork").focus();
  }
  const action = KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

function onClick(event) {
  const { target } = event;
  const opener = target.closest("[data-open]");
  const fork = target.closest("#rollout .fork");
  if (opener) openRollout(Number(opener.dataset.open));
  else if (fork) chooseFork(Number(fork.dataset.fork));
  else if (target.closest("#close-fork")) closeFork();
}

function startForks() {
  let waiting = 0;
  const later = () => { clearTimeout(waiting); waiting = setTimeout(applyFilters, 120); };
  byId("filters").addEventListener("input", later);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("previous-page").addEventListener("click", () => turn(-1));
  byId("next-page").addEventListener("click", () => turn(1));
  state.filters = readFilters();
}

function start() {
  for (const tab of document.querySelectorAll('[role="tab"]')) {
    tab.addEventListener("click", () => showTab(tab.getAttribute("aria-controls")));
    tab.addEventListener("keydown", turnTab);
  }
  byId("theme").addEventListener("click", nextTheme);
  document.addEventListener("pointerover", showTip);
  document.addEventListener("focusin", showTip);
  document.addEventListener("scroll", () => { byId("tip").hidden = true; }, true);
  document.addEventListener("keydown", onKey);
  document.addEventListener("click", onClick);
  if (byId("forks")) startForks();
  const [name, index, fork] = location.hash.slice(2).split("/");
  if (name === "forks" && index !== undefined && entries[Number(index)]) {
    openRollout(Number(index), fork === undefined ? null : Number(fork));
  }
  showTab(name && byId(`tab-${name}`) ? name : "overview");
  document.documentElement.dataset.ready = "true";
}

start();
