"use strict";
// Sort tables whose headings are buttons, by the cells' data-value or their text.
for (const button of document.querySelectorAll("th > button.sort")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
    const column = [...head.parentElement.children].indexOf(head);
    const rising = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const key = (row) => {
      const cell = row.children[column], value = cell.dataset.value ?? cell.textContent.trim();
      return value !== "" && !isNaN(value) ? Number(value) : value;
    };
    const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
    const rows = [...body.rows].sort((a, b) => order(key(a), key(b)) * (rising ? 1 : -1));
    body.append(...rows);
  });
}
// Sliders over decoding steps: show the first picture of each strip beside that of the chosen step.
for (const slider of document.querySelectorAll("input[type=range][data-steps]")) {
  const steps = slider.dataset.steps.split(","), target = document.getElementById(slider.dataset.to);
  const label = document.getElementById(slider.dataset.label), shown = [];
  for (const strip of document.querySelectorAll(`#${slider.dataset.from} .strip`)) {
    const pictures = [...strip.querySelectorAll("img")], pair = document.createElement("figure");
    const [before, after] = [new Image(), new Image()];
    pair.className = "pair";
    [before.src, before.alt] = [pictures[0].src, pictures[0].alt];
    pair.append(before, after);
    target.append(pair);
    shown.push([after, pictures]);
  }
  const show = () => {
    const step = steps[slider.value];
    for (const [after, pictures] of shown) {
      [after.src, after.alt] = [pictures[1 + Number(slider.value)].src, pictures[1 + Number(slider.value)].alt];
    }
    slider.setAttribute("aria-valuetext", label.textContent = step + (step === "1" ? " decoding step" : " decoding steps"));
  };
  slider.addEventListener("input", show);
  show();
  target.parentElement.hidden = false;
}
// Filters: show an item if it matches every filter (data attribute of the filter's name).
const filters = [...document.querySelectorAll("[data-filter]")];
for (const filter of filters) {
  filter.addEventListener("input", () => {
    let count = 0;
    for (const item of document.querySelectorAll("[data-item]")) {
      item.hidden = !filters.every((one) => {
        const value = (item.dataset[one.dataset.filter] ?? "").toLowerCase(), wanted = one.value.trim().toLowerCase();
        return !wanted || (one.tagName === "SELECT" ? value === wanted : value.includes(wanted));
      });
      if (!item.hidden && item.tagName === "TR") count += 1;
    }
    const label = document.getElementById("found");
    if (label) label.textContent = count + " runs shown";
  });
}
