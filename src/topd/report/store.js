// The data of the page. A rollout's block is parsed when it is first asked for.

const about = JSON.parse(byId("about").textContent);
const entries = JSON.parse(byId("entries").textContent);
const opened = new Map();
const haystacks = new Map();

function readBlock(index) {
  return JSON.parse(byId(`rollout-${index}`).textContent);
}

function readRollout(index) {
  if (!opened.has(index)) {
    if (opened.size > 50) opened.clear(); // memory stays small in a long session
    opened.set(index, readBlock(index));
  }
  return opened.get(index);
}

// What a search looks through: prompt and answer, in lower case, without the signs for line ends.
function haystack(index) {
  if (!haystacks.has(index)) {
    const { prompt_text, texts } = readBlock(index);
    haystacks.set(index, `${prompt_text}\n${texts.join("")}`.replaceAll("↵\n", "\n").toLowerCase());
  }
  return haystacks.get(index);
}

// Which forks of an entry pass the filters. An entry without filters on forks passes as it is.
function forkPasses([, distance, verdict], filters) {
  if (filters.verdict && verdict !== filters.verdict) return false;
  if (filters.low !== null && !(distance >= filters.low)) return false;
  return filters.high === null || distance <= filters.high;
}

function select(filters) {
  const words = filters.text.toLowerCase();
  const onForks = filters.verdict || filters.low !== null || filters.high !== null;
  const found = [...entries.keys()].filter((index) => {
    const entry = entries[index];
    if (filters.prompt !== null && entry.prompt !== filters.prompt) return false;
    if (onForks && !entry.forks.some((fork) => forkPasses(fork, filters))) return false;
    return !words || haystack(index).includes(words);
  });
  if (filters.order !== "distance") return found;
  const farthest = (index) => Math.max(-1, ...entries[index].forks.map(([, distance]) => distance ?? -1));
  return found.sort((a, b) => farthest(b) - farthest(a) || a - b);
}

// Probes and repairs make no updates that last.
function whenOf({ step, number }) {
  return about.trained ? `update ${step}` : `rollout ${number}`;
}

// Rollouts of the same prompt, in the order of the run.
function visits(index) {
  const { prompt } = entries[index];
  return [...entries.keys()].filter((other) => entries[other].prompt === prompt);
}

function commonPrefix(a, b) {
  let length = 0;
  while (length < a.length && length < b.length && a[length] === b[length]) length += 1;
  return length;
}
