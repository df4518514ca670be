// Both windows, token by token, with the transport plan as threads between them.

const ROW = 24, SPAN = 96; // pixels: height of a token, width of the threads

// A token in a cell of its own: one that is only space would not be seen.
function word(text) {
  const blank = text !== "" && text.trim() === "";
  return h("span", { class: blank ? "word blank" : "word" }, blank ? "␣".repeat(Math.min(text.length, 8)) : text.replace("↵\n", "↵"));
}

function thread(fork, [i, j, mass], heaviest) {
  const a = (i + 0.5) * ROW, b = (j + 0.5) * ROW;
  const same = fork.student.ids[i] === fork.teacher.ids[j];
  const path = svg("path", {
    d: `M0 ${a} C${SPAN / 2} ${a} ${SPAN / 2} ${b} ${SPAN} ${b}`,
    class: same ? "thread same" : "thread", "data-i": i, "data-j": j,
    "stroke-width": (0.6 + 2.4 * (mass / heaviest)).toFixed(2),
  });
  path.append(svg("title", {}, `${fork.student.texts[i]} → ${fork.teacher.texts[j]}: mass ${percent(mass)}${same ? ", the same token" : ""}`));
  return path;
}

function targetCell(target) {
  if (!target || !target.length) return h("span", { class: "target none" }, "–");
  const [text, probability] = target[0];
  const tip = target.map(([word, p]) => `${word}  ${percent(p)}`).join("\n");
  return h("span", { class: "target", "data-tip": `soft target here\n${tip}`, tabindex: target.length > 1 ? "0" : null },
    word(text), h("small", {}, percent(probability)), target.length > 1 ? h("small", {}, ` +${target.length - 1}`) : null);
}

function studentRow(fork, i, targets) {
  const partners = fork.threads.filter(([row]) => row === i);
  const heard = partners.map(([, j, mass]) => `${fork.teacher.texts[j]} (${j}, ${percent(mass)})`).join(", ");
  return h("li", { "data-i": i, "aria-label": `student token ${i}: ${fork.student.texts[i]}${heard ? `, matched with ${heard}` : ""}` },
    h("small", { class: "place" }, String(i)), targets ? targetCell(fork.targets[i]) : null,
    word(fork.student.texts[i]));
}

function teacherRow(fork, j) {
  const text = fork.teacher.texts[j];
  return h("li", { "data-j": j, "aria-label": `teacher token ${j}: ${text}` }, word(text), h("small", { class: "place" }, String(j)));
}

function drawThreads(fork) {
  const targets = fork.targets.length > 0;
  const rows = Math.max(fork.student.texts.length, fork.teacher.texts.length);
  const heaviest = Math.max(...fork.threads.map(([, , mass]) => mass), 1e-9);
  const equal = fork.threads.filter(([i, j]) => fork.student.ids[i] === fork.teacher.ids[j]).length;
  const lines = svg("svg", { width: SPAN, height: rows * ROW, viewBox: `0 0 ${SPAN} ${rows * ROW}`, role: "img", class: "threads", "aria-label": `Transport plan: ${counted(fork.threads.length, "thread")}, ${equal} between equal tokens` },
    ...fork.threads.map((entry) => thread(fork, entry, heaviest)));
  const box = h("div", { class: targets ? "loom aimed" : "loom" },
    h("p", { class: "heads", "aria-hidden": "true" }, targets ? h("span", { class: "target" }, "soft target") : null, h("span", { class: "of-student" }, "student"), h("span", { class: "of-teacher" }, "teacher")),
    h("ol", { class: "side of-student", "aria-label": "Student's window" }, ...fork.student.texts.map((_, i) => studentRow(fork, i, targets))),
    lines,
    h("ol", { class: "side of-teacher", "aria-label": "Teacher's window" }, ...fork.teacher.texts.map((_, j) => teacherRow(fork, j))));
  box.addEventListener("pointerover", (event) => light(box, fork, event.target.closest("[data-i], [data-j]")));
  box.addEventListener("pointerleave", () => light(box, fork, null));
  return box;
}

// Bring out what a token is matched with.
function light(box, fork, chosen) {
  box.classList.toggle("lighting", chosen !== null);
  for (const lit of box.querySelectorAll(".lit")) lit.classList.remove("lit");
  if (!chosen) return;
  const { i, j } = chosen.dataset;
  for (const [a, b] of fork.threads) {
    if ((i !== undefined && a !== Number(i)) || (j !== undefined && b !== Number(j))) continue;
    const parts = [`.thread[data-i="${a}"][data-j="${b}"]`, `.of-student [data-i="${a}"]`, `.of-teacher [data-j="${b}"]`];
    for (const part of parts) box.querySelector(part)?.classList.add("lit");
  }
}
