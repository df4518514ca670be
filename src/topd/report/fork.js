// The chosen fork: what it is, both windows as text, the threads, the same prefix at other times.

// Why it has this verdict, and what both models gave the token: numbers, no reading of them.
function story(fork, rollout) {
  const why = about.why[fork.verdict], at = fork.position;
  if (lossAt(rollout, at) === null) return why;
  return `${why} The student gave this token ${percent(Math.exp(rollout.student[at]))}, the teacher ${percent(Math.exp(rollout.teacher[at]))}.`;
}

function figures(fork, rollout) {
  const rows = [
    ["OT distance", fixed(fork.distance, 3), "0: the same tokens, about 1: unrelated ones"],
    ...(fork.loss === null ? [] : [["token loss", `${fixed(fork.loss, 2)} nats`, "how much likelier the token was to the student"]]),
    ["place", `token ${fork.position}`, `of ${rollout.texts.length}`],
    ["equal tokens", `${fork.equal} of ${Math.min(fork.student.ids.length, fork.teacher.ids.length)}`, "at the same place in both windows"],
    ...fork.facts,
  ];
  return h("dl", { class: "facts small" }, ...rows.map(([name, value, note]) => h("div", { "data-tip": note || null }, h("dt", {}, name), h("dd", {}, value))));
}

// Tokens as text, marked where another window has another token at the same place.
function compared({ texts, ids }, other) {
  return h("div", { class: "text", lang: "" }, ...texts.map((text, i) => h("span", { class: ids[i] === other.ids[i] ? "t shared" : "t parted" }, text)));
}

function windowText(side, name, other) {
  const box = compared(side, other);
  if (!side.texts.length) box.append("nothing: the answer ends here");
  return h("div", { class: `window ${name}` }, h("h4", {}, name === "of-student" ? "Student wrote" : "Teacher would write"), box);
}

// What the student wrote from this very prefix at other visits of the prompt, first and last.
function samePrefix(index, rollout, fork) {
  const others = visits(index).filter((other) => other !== index
    && commonPrefix(readRollout(other).ids, rollout.ids) >= fork.position && readRollout(other).ids.length > fork.position);
  if (!others.length) return "";
  const shown = others.length > 1 ? [others[0], others[others.length - 1]] : others;
  const end = fork.position + Math.max(fork.student.ids.length, 1);
  return h("section", { class: "elsewhere" }, h("h4", {}, "From the same prefix at another time"),
    ...shown.map((other) => {
      const theirs = readRollout(other);
      const window = { texts: theirs.texts.slice(fork.position, end), ids: theirs.ids.slice(fork.position, end) };
      return h("div", { class: "window of-student" }, h("button", { type: "button", class: "visit", "data-open": other }, whenOf(theirs)), compared(window, fork.teacher));
    }));
}

// A repair: the same prefix before and after a few updates on it, one arm after another.
function repaired(fork) {
  if (!fork.after.length) return "";
  return h("section", { class: "elsewhere" }, h("h4", {}, "From the same prefix, before and after the updates of each arm"),
    ...fork.after.map(({ arm, distance, window }) => h("div", { class: "window of-student" },
      h("p", { class: "arm" }, h("b", {}, arm), ` OT distance ${fixed(distance, 3)}`), compared(window, fork.teacher))));
}

// Threads where a plan was recorded.
function matching(fork) {
  if (!fork.threads.length) return [];
  const aimed = fork.targets.length
    ? h("p", { class: "note" }, "Soft target: the teacher's tokens that the student's token is matched with; what it is taught there.")
    : "";
  return [h("h4", {}, "Which token is matched with which"), aimed, drawThreads(fork)];
}

// What is learned in the rollout's place, where it is more or less than the teacher's window.
function branch(fork) {
  if (!fork.branch || String(fork.branch.ids) === String(fork.teacher.ids)) return "";
  const { ids, texts } = fork.branch;
  return h("section", { class: "elsewhere branch" }, h("h4", {}, `Learned in the rollout's place: ${counted(ids.length, "token")}`),
    h("div", { class: "window of-teacher" }, h("div", { class: "text", lang: "" }, ...texts.map((text, i) => h("span", { class: i < fork.teacher.ids.length ? "t" : "t parted" }, text)))),
    h("p", { class: "note" }, "Marked: what the student wrote after the teacher's window."));
}

function drawFork(index, number) {
  const rollout = readRollout(index);
  const fork = rollout.forks[number];
  const close = h("button", { type: "button", class: "quiet", id: "close-fork", "aria-label": "Close the fork (Escape)" }, "Close");
  byId("fork").replaceChildren(
    h("header", {}, h("h3", {}, h("span", { class: `mark ${fork.verdict}`, "aria-hidden": "true" }, SIGNS[fork.verdict]), ` Candidate ${number + 1}: ${NAMES[fork.verdict]}`), close),
    h("p", { class: "story" }, story(fork, rollout)),
    fork.asked ? h("p", { class: "asked" }, fork.asked) : "",
    figures(fork, rollout),
    h("div", { class: "windows" }, windowText(fork.student, "of-student", fork.teacher), windowText(fork.teacher, "of-teacher", fork.student)),
    h("p", { class: "note" }, "Marked: another token than the other model's at the same place."),
    branch(fork),
    samePrefix(index, rollout, fork),
    repaired(fork),
    ...matching(fork),
  );
  byId("fork").scrollTop = 0;
}

function drawNoFork(rollout) {
  const words = rollout.forks.length ? "Choose a numbered token to see both models' windows." : entries.some((entry) => entry.forks.length) ? "This rollout has no candidate." : "No rollout here has a candidate, so there are no windows to compare.";
  byId("fork").replaceChildren(h("p", { class: "empty" }, words));
}
