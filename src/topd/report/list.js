// The list of rollouts: filters, pages, and which is open.

const PAGE = 25;
const state = { found: [...entries.keys()], page: 0, open: null, fork: null, filters: null };

function numberOrNull(id) {
  const text = byId(id).value.trim();
  return text === "" || Number.isNaN(Number(text)) ? null : Number(text);
}

function readFilters() {
  return {
    text: byId("search").value.trim(),
    verdict: byId("verdicts").value,
    prompt: numberOrNull("prompt"),
    low: numberOrNull("low"),
    high: numberOrNull("high"),
    order: byId("order").value,
  };
}

function applyFilters() {
  state.filters = readFilters();
  state.found = select(state.filters);
  state.page = 0;
  drawList();
  const stays = state.found.slice(0, PAGE).includes(state.open);
  if (stays) openRollout(state.open, state.fork);
  else openRollout(state.found[0] ?? null);
}

function line(index) {
  const entry = entries[index];
  const marks = entry.forks.slice(0, 12).map((fork) => h("span", { class: `mark ${fork[2]} ${forkPasses(fork, state.filters) ? "" : "dim"}` }, SIGNS[fork[2]]));
  const farthest = Math.max(...entry.forks.map(([, distance]) => distance ?? 0), 0);
  const found = `${counted(entry.forks.length, "candidate")}, largest OT ${fixed(farthest, 3)}`;
  return h("li", {}, h("button", { type: "button", "data-open": index, "aria-current": index === state.open ? "true" : null },
    h("span", { class: "line" }, h("b", { title: `Prompt ${entry.prompt}`, lang: "" }, entry.words || `Prompt ${entry.prompt}`), h("small", {}, whenOf(entry)), h("span", { class: "marks", title: found, "aria-label": found }, ...marks, entry.forks.length > 12 ? "…" : null)),
    h("span", { class: "preview", lang: "" }, entry.preview)));
}

function drawList() {
  const pages = Math.max(1, Math.ceil(state.found.length / PAGE));
  const shown = state.found.slice(state.page * PAGE, (state.page + 1) * PAGE);
  byId("rollouts").replaceChildren(...shown.map(line));
  byId("count").textContent = state.found.length === entries.length ? counted(entries.length, "rollout") : `${state.found.length.toLocaleString("en")} of ${counted(entries.length, "rollout")}`;
  byId("pages").textContent = `page ${state.page + 1} of ${pages}`;
  byId("previous-page").disabled = state.page === 0;
  byId("next-page").disabled = state.page >= pages - 1;
}

function turn(by) {
  state.page += by;
  drawList();
  byId("rollouts").scrollTop = 0;
}

function openRollout(index, fork = null) {
  state.open = index;
  state.fork = null;
  if (index === null) {
    byId("rollout").replaceChildren(h("p", { class: "empty" }, "No rollout passes the filters."));
    byId("fork").replaceChildren();
    return;
  }
  const place = state.found.indexOf(index);
  if (place >= 0) state.page = Math.floor(place / PAGE);
  drawList();
  byId("rollouts").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  state.box = drawRollout(index, state.filters.text.toLowerCase());
  byId("rollout").parentElement.scrollTop = 0;
  drawNoFork(readRollout(index));
  if (fork !== null) chooseFork(fork);
  else remember();
}

function chooseFork(number) {
  const rollout = readRollout(state.open);
  if (!rollout.forks[number]) return;
  state.fork = number;
  state.box.showUpTo(rollout.forks[number].position);
  for (const button of state.box.querySelectorAll(".fork")) {
    button.setAttribute("aria-pressed", String(button.dataset.fork === String(number)));
  }
  drawFork(state.open, number);
  state.box.querySelector(`[data-fork="${number}"]`).scrollIntoView({ block: "nearest" });
  if (matchMedia("(max-width: 999px)").matches) byId("fork").scrollIntoView({ block: "start" }); // it is below
  remember();
}

function closeFork() {
  const button = state.box?.querySelector('[aria-pressed="true"]');
  button?.setAttribute("aria-pressed", "false");
  state.fork = null;
  if (state.open !== null) drawNoFork(readRollout(state.open));
  button?.focus();
  remember();
}

// Next or previous rollout of those found; next or previous fork that passes the filters.
function step(by) {
  const place = state.found.indexOf(state.open) + by;
  if (place >= 0 && place < state.found.length) openRollout(state.found[place]);
}

function stepFork(by) {
  if (state.open === null) return;
  const forks = entries[state.open].forks;
  const start = state.fork === null ? (by > 0 ? -1 : forks.length) : state.fork;
  for (let i = start + by; i >= 0 && i < forks.length; i += by) {
    if (forkPasses(forks[i], state.filters)) return chooseFork(i);
  }
}

// The address of the page names what is open, so that a link can be sent with the file.
function remember() {
  const parts = ["forks", state.open, state.fork].filter((part) => part !== null);
  if (!byId("forks").hidden) history.replaceState(null, "", `#/${parts.join("/")}`);
}
