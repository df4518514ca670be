// A rollout as text: one element a token, shaded by its loss, candidates as buttons.

const FIRST_TOKENS = 2000; // longer rollouts are shown in parts
const NAMES = about.names;
const SIGNS = { real: "◆", alarm: "○", quiet: "·" };

function lossAt(rollout, position) {
  const own = rollout.student[position], teachers = rollout.teacher[position];
  return (own ?? null) === null || (teachers ?? null) === null ? null : own - teachers;
}

// Half a nat a level: up to 8 where the student is surer than the teacher, up to 4 where less.
function shade(loss) {
  if (loss === null) return "";
  const level = Math.min(Math.round(Math.abs(loss) * 2), loss > 0 ? 8 : 4);
  return level ? (loss > 0 ? `h${level}` : `c${level}`) : "h0";
}

function valueAt(pairs, position) {
  return pairs.find(([at]) => at === position)?.[1] ?? null;
}

function weightAt(rollout, position) {
  return valueAt(rollout.weights, position) ?? 1;
}

function isReply(rollout, position) {
  return rollout.replies.some(([from, to]) => from <= position && position < to);
}

// An answer to learn from: no student wrote it, so it has no log-probs.
function isAnswer(rollout) {
  return rollout.texts.length > 0 && !rollout.student.length;
}

function tokenTip(rollout, position) {
  const loss = lossAt(rollout, position);
  const parts = [`token ${position} of ${rollout.texts.length}, id ${rollout.ids[position]}`];
  if (isReply(rollout, position)) return `${parts[0]}\nwritten by the environment: not learned`;
  if (loss === null) return `${parts[0]}\nno log-probs of both models`;
  const one = (name, value) => `${name}: ${percent(Math.exp(value))} (log-prob ${fixed(value, 3)} nats)`;
  parts.push(`token loss ${fixed(loss, 3)} nats`);
  parts.push(one("student", rollout.student[position]), one("teacher", rollout.teacher[position]));
  const weight = weightAt(rollout, position), advantage = valueAt(rollout.advantages, position);
  if (weight !== 1) parts.push(`its loss counts ${weight} times`);
  if (advantage !== null) parts.push(`advantage ${advantage}`);
  return parts.join("\n");
}

function token(rollout, position, number, less) {
  const text = rollout.texts[position], fork = rollout.forks[number];
  if (isReply(rollout, position)) return h("span", { class: "t reply", "data-at": position }, text);
  const kind = `t ${shade(lossAt(rollout, position))}${less.has(position) ? " less" : ""}`;
  if (!fork) return h("span", { class: kind, "data-at": position }, text);
  const label = `Candidate ${number + 1}, ${NAMES[fork.verdict]}, OT distance ${fixed(fork.distance, 3)}, `
    + `${fork.loss === null ? "" : `token loss ${fixed(fork.loss, 2)} nats, `}token ${JSON.stringify(text)}`;
  return h("button", { type: "button", class: `${kind} fork ${fork.verdict}`, "data-at": position, "data-fork": number, "data-badge": `${SIGNS[fork.verdict]}${number + 1}`, "aria-label": label, "aria-pressed": "false" }, text);
}

function tokensOf(rollout, from, to) {
  const numbers = new Map(rollout.forks.map((fork, i) => [fork.position, i]));
  const less = new Set(rollout.weights.filter(([, weight]) => weight < 1).map(([at]) => at));
  const made = [];
  for (let position = from; position < to; position += 1) made.push(token(rollout, position, numbers.get(position), less));
  return made;
}

// The tokens that a search hit touches, marked.
function markHits(box, rollout, words) {
  if (!words) return;
  const texts = rollout.texts.map((text) => text.replaceAll("↵\n", "\n").toLowerCase());
  const joined = texts.join(""), hits = [];
  for (let at = joined.indexOf(words); at >= 0 && hits.length < 500; at = joined.indexOf(words, at + words.length)) hits.push(at);
  let start = 0, hit = 0;
  texts.forEach((text, position) => {
    while (hit < hits.length && hits[hit] + words.length <= start) hit += 1;
    if (hit < hits.length && hits[hit] < start + text.length) box.querySelector(`[data-at="${position}"]`)?.classList.add("hit");
    start += text.length;
  });
}

function textBox(rollout, words) {
  const box = h("div", { class: "text", lang: "" });
  const show = (to) => {
    box.querySelector(".more")?.remove();
    box.append(...tokensOf(rollout, box.childElementCount, Math.min(to, rollout.texts.length)));
    const left = rollout.texts.length - box.childElementCount;
    if (left > 0) {
      const more = h("button", { type: "button", class: "more" }, `Show ${counted(left, "more token")}`);
      more.addEventListener("click", () => show(box.childElementCount - 1 + 4 * FIRST_TOKENS));
      box.append(more);
    }
    markHits(box, rollout, words);
  };
  show(FIRST_TOKENS);
  box.showUpTo = (position) => { if (!box.querySelector(`[data-at="${position}"]`)) show(position + 200); };
  return box;
}

function drawRollout(index, words) {
  const rollout = readRollout(index);
  const box = textBox(rollout, words);
  const end = rollout.finished ? "ended by itself" : "cut by the length limit";
  const alarms = rollout.forks.filter((fork) => fork.verdict === "alarm").length;
  const real = rollout.forks.filter((fork) => fork.verdict === "real").length;
  const alarmed = about.why.alarm ? `, ${counted(alarms, "false alarm")}` : "";
  const replied = rollout.replies.reduce((sum, [from, to]) => sum + to - from, 0);
  const turns = rollout.replies.length ? ` in ${rollout.replies.length + 1} turns (${rollout.texts.length - replied} by the student)` : "";
  const found = rollout.forks.length ? ` · ${real} real${alarmed}` : "";
  byId("rollout").replaceChildren(...[
    h("h2", {}, `Prompt ${rollout.prompt}`, h("small", {}, `${about.trained ? `update ${rollout.step} · ` : ""}rollout ${rollout.number}${rollout.whose ? ` · teacher ${rollout.whose}` : ""} · ${counted(rollout.texts.length, "token")}${turns}, ${end}${found}`)),
    rollout.prompt_text ? h("details", { class: "prompt" }, h("summary", {}, "Prompt"), h("div", { class: "text", lang: "" }, rollout.prompt_text)) : null,
    isAnswer(rollout) ? h("p", { class: "note" }, "The student did not write this: it is an answer to learn from, so without shading by loss.") : null,
    rollout.asked.length ? h("ul", { class: "asked", "aria-label": "What the method asks of this rollout" }, ...rollout.asked.map((words) => h("li", {}, words))) : null,
    box,
    beforeAndAfter(index, rollout),
  ].filter((part) => part !== null));
  return box;
}

// The same prompt elsewhere in the run: links, and first beside last.
function beforeAndAfter(index, rollout) {
  const same = visits(index);
  if (same.length < 2) return null;
  const links = same.map((other) => h("button", { type: "button", class: "visit", "data-open": other, "aria-current": other === index ? "true" : null }, whenOf(entries[other])));
  const first = same[0], last = same[same.length - 1];
  const other = index === last ? first : last;
  const theirs = readRollout(other);
  const shared = commonPrefix(rollout.ids, theirs.ids);
  return h("section", { class: "visits", "aria-label": "The same prompt in this run" },
    h("h3", {}, "The same prompt in this run"), h("p", { class: "links" }, ...links),
    h("details", {}, h("summary", {}, `${isAnswer(theirs) ? "The answer" : "What the student wrote"}, ${whenOf(theirs)}`),
      h("p", { class: "note" }, `The two answers share their first ${counted(shared, "token")}; after that their prefixes differ.`),
      h("div", { class: "text calm", lang: "" }, ...theirs.texts.slice(0, FIRST_TOKENS).map((text, at) => h("span", { class: at < shared ? "t shared" : `t ${shade(lossAt(theirs, at))}` }, text)))));
}
