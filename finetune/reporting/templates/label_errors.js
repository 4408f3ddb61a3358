
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const cards = Array.from(document.querySelectorAll(".suspect"));
const marks = cards.map(() => "");
const corrected = data.suspects.map(suspect => suspect[3]);
const split = label => data.separator ? label.split(data.separator) : [label];
let saved = true;

function show() {
  const count = mark => marks.filter(one => one === mark).length;
  const marked = marks.length - count("");
  const parts = ["right", "wrong", "unsure"].map(mark => `${count(mark)} ${mark}`).join(", ");
  document.getElementById("count").textContent =
    `${marked} of ${marks.length} marked: ${parts}${saved ? "" : " (not saved)"}`;
  document.getElementById("save").disabled = marked === 0;
}

// Filled only when needed: many classes in every card would make the page slow.
function fillChoice(select, position) {
  if (select.options.length) return;
  const likely = split(data.suspects[position][3]);
  const given = data.suspects[position][2];
  for (const name of data.classes) {
    if (!data.separator && name === given) continue;
    select.add(new Option(name, name, false, likely.includes(name)));
  }
}

function setMark(position, mark, moves = true) {
  const card = cards[position];
  // The same mark again removes it.
  marks[position] = marks[position] === mark ? "" : mark;
  saved = false;
  card.dataset.mark = marks[position];
  for (const button of card.querySelectorAll("[data-mark]")) {
    button.setAttribute("aria-pressed", String(button.dataset.mark === marks[position]));
  }
  const choice = card.querySelector(".choice");
  choice.hidden = marks[position] !== "wrong";
  if (!choice.hidden) fillChoice(choice.querySelector("select"), position);
  show();
  if (marks[position] && moves) move(position + 1, card);
}

function choose(position) {
  if (marks[position] !== "wrong") setMark(position, "wrong", false);
  cards[position].querySelector("select").focus();
}

function move(position, fallback) {
  const card = cards[position] || fallback;
  if (!card) return;
  card.focus({preventScroll: true});
  card.scrollIntoView({block: "nearest"});
}

function writeField(value) {
  const text = String(value);
  return /[",\r\n]|^\s|\s$/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function writeCorrections() {
  const lines = [data.columns];
  data.suspects.forEach(([row, path, given], position) => {
    const mark = marks[position];
    if (mark) lines.push([row, path, given, mark, mark === "wrong" ? corrected[position] : given]);
  });
  return lines.map(line => line.map(writeField).join(",")).join("\n") + "\n";
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([writeCorrections()], {type: "text/csv"}));
  link.download = "corrections.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  saved = true;
  show();
}

cards.forEach((card, position) => {
  card.addEventListener("click", event => {
    const button = event.target.closest("[data-mark]");
    if (button && button !== card) setMark(position, button.dataset.mark);
  });
  card.querySelector("select").addEventListener("change", event => {
    const names = Array.from(event.target.selectedOptions, option => option.value);
    corrected[position] = names.join(data.separator);
    saved = false;
    show();
  });
});
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select")) return;
  const position = cards.indexOf(document.activeElement.closest(".suspect"));
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const mark = {r: "right", w: "wrong", u: "unsure"}[key];
  if (mark && position >= 0) setMark(position, mark);
  else if (key === "c" && position >= 0) choose(position);
  // If no card has the focus, a key moves to the first card without a mark.
  else if (mark) move(Math.max(marks.indexOf(""), 0));
  else if (key === "j" || key === "ArrowDown" && position >= 0) move(position + 1, cards[position]);
  else if (key === "k" || key === "ArrowUp" && position >= 0) move(Math.max(position - 1, 0));
  else return;
  event.preventDefault();
});
document.getElementById("save").addEventListener("click", save);
window.addEventListener("beforeunload", event => {
  if (!saved) event.preventDefault();
});
show();
