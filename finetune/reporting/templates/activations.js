"use strict";
const gallery = document.querySelector(".gallery");
const cards = Array.from(gallery.children);
// Only the page of a model that may leave photos unanswered has the last one.
const filters = ["true", "predicted", "answer", "given"].map(name => document.getElementById(name)).filter(Boolean);
const order = document.getElementById("order");

function filter() {
  for (const card of cards) {
    card.hidden = !filters.every(({id, value}) => value === "" || card.dataset[id].split(" ").includes(value));
  }
  const shown = cards.filter(card => !card.hidden).length;
  document.getElementById("count").textContent = `${shown} of ${cards.length} pictures`;
}

function sort() {
  // The sort is stable: ties, and all cards at order 0, keep the table's order.
  const compare = (first, second) => order.value * (first.dataset.confidence - second.dataset.confidence);
  gallery.append(...cards.slice().sort(compare));
}

filters.forEach(select => select.addEventListener("change", filter));
order.addEventListener("change", sort);
// Browsers restore the choices when a user comes back to the page.
window.addEventListener("pageshow", () => {
  filter();
  sort();
});
