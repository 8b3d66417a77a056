"use strict";
document.documentElement.classList.add("scripted");
const SHADES = 10;
const unpacked = (text, tokens) => {
  const bytes = atob(text);
  return Uint8Array.from({ length: tokens }, (_, i) => (bytes.charCodeAt(i >> 3) >> (7 - (i & 7))) & 1);
};
for (const sample of document.querySelectorAll(".sample")) {
  const data = JSON.parse(sample.querySelector("script").textContent);
  const select = sample.querySelector("select");
  const output = sample.querySelector("output");
  const spans = [];
  let tokens = 0;
  for (const span of sample.querySelectorAll(".text > span")) {
    if (span.dataset.n) {
      tokens += Number(span.dataset.n);
    } else {
      spans.push([span, tokens++, span.classList.contains("l") ? " l" : ""]);
    }
  }
  const bits = { kept: null, replayed: null };
  const rowsOf = (key) => (bits[key] ??= data[key].map((row) => unpacked(row, tokens)));
  const count = (rows, index) => rows.reduce((sum, row) => sum + row[index], 0);
  const option = (text, value, parent) => {
    const made = new Option(text, value);
    parent.append(made);
  };
  option("how many blocks kept a token", "kept", select);
  option("how many blocks replayed it", "replayed", select);
  const group = document.createElement("optgroup");
  group.label = "one block";
  data.blocks.forEach((name, index) => option(name, String(index), group));
  select.append(group);

  const shadeByCount = (key) => {
    const rows = rowsOf(key);
    for (const [span, index, mark] of spans) {
      const shade = Math.ceil((SHADES * count(rows, index)) / rows.length);
      span.className = (key === "kept" ? "k" : "r") + shade + mark;
    }
    output.textContent = "";
  };
  const shadeByBlock = (block) => {
    const [kept, replayed] = [rowsOf("kept")[block], rowsOf("replayed")[block]];
    let [held, again] = [0, 0];
    for (const [span, index, mark] of spans) {
      held += kept[index];
      again += replayed[index];
      span.className = (replayed[index] ? "again" : kept[index] ? "kept" : "k0") + mark;
    }
    output.textContent = `${held} kept, ${again} of them replayed`;
  };
  const tableRows = [...sample.querySelectorAll(".rows tbody tr")];
  const shade = () => {
    const block = /^\d+$/.test(select.value) ? Number(select.value) : -1;
    tableRows.forEach((row, index) => row.classList.toggle("chosen", index === block));
    if (block < 0) shadeByCount(select.value);
    else shadeByBlock(block);
  };
  select.addEventListener("change", shade);
  tableRows.forEach((row, index) => row.addEventListener("click", () => {
    select.value = String(index);
    shade();
  }));
  // titles are made when asked for: thousands of them would be most of the page
  const places = new Map(spans.map(([span, index]) => [span, index]));
  sample.querySelector(".text").addEventListener("mouseover", (event) => {
    const span = event.target.closest("span");
    if (!places.has(span) || span.title) return;
    const index = places.get(span);
    span.title = `token ${index}: kept by ${count(rowsOf("kept"), index)} and replayed by `
      + `${count(rowsOf("replayed"), index)} of ${data.blocks.length} blocks`;
  });
  sample.querySelector(".shading").hidden = false;
}
