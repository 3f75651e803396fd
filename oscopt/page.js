"use strict";
// Heat maps: each <div class="heat" data-map="..."> holds a JSON of layers, numbers of epochs or steps, and values (one
// signed byte a cell, in hundredths, -128 where nothing is known, layer by layer). Hover, touch or arrow keys tell a cell.
for (const box of document.querySelectorAll(".heat")) {
  const map = JSON.parse(box.dataset.map);
  const bytes = Int8Array.from(atob(map.values), (c) => c.charCodeAt(0));
  const rows = map.layers.length, columns = bytes.length / rows;
  const canvas = box.querySelector("canvas"), told = box.querySelector("output");
  const height = rows > 100 ? 600 / rows : Math.max(6, Math.min(22, 420 / rows));
  canvas.width = columns;
  canvas.height = rows;
  canvas.style.height = `${rows * height}px`;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  bytes.forEach((byte, i) => image.data.set(byte === -128 ? [0, 0, 0, 0] : colour(byte / 100), 4 * i));
  context.putImageData(image, 0, 0);
  const named = box.querySelector(".rows"), apart = Math.ceil(14 / height); // a name is 14 pixels high
  let longest = 0;
  for (let row = 0; row < rows; row += apart) {
    const whole = map.layers[row], name = document.createElement("span");
    name.textContent = whole.length > 30 ? `…${whole.slice(-29).replace(/^\W+/, "")}` : whole; // its end says more than its beginning
    name.style.top = `${(row + 0.5) * height}px`;
    longest = Math.max(longest, name.textContent.length);
    named.append(name);
  }
  named.style.width = `${longest}ch`;

  function colour(value) {
    const at = Math.min(Math.max((value + 1) / 2, 0), 0.9999) * (map.colours.length - 1);
    const [low, high] = [map.colours[Math.floor(at)], map.colours[Math.floor(at) + 1]];
    return [...low.map((c, i) => c + (at % 1) * (high[i] - c)), 255];
  }
  let cell = [0, 0];
  function tell(column, row) {
    cell = [Math.min(Math.max(column, 0), columns - 1), Math.min(Math.max(row, 0), rows - 1)];
    const byte = bytes[cell[1] * columns + cell[0]];
    const first = map.first[cell[0]], last = map.last[cell[0]];
    const value = byte === -128 ? "unknown" : (byte < 0 ? "−" : "+") + (Math.abs(byte) / 100).toFixed(2);
    told.textContent = `${map.layers[cell[1]]}, ${map.unit} ${first === last ? first : `${first}–${last}`}: ${value}`;
    const x = ((cell[0] + 0.5) / columns) * canvas.clientWidth, y = (cell[1] + 1) * height + 8;
    told.style.left = `${Math.max(0, Math.min(x - told.offsetWidth / 2, canvas.clientWidth - told.offsetWidth))}px`;
    told.style.top = `${y}px`;
  }
  function point(event) {
    const area = canvas.getBoundingClientRect();
    tell(Math.floor(((event.clientX - area.left) / area.width) * columns),
      Math.floor(((event.clientY - area.top) / area.height) * rows));
  }
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("pointerleave", () => { told.textContent = ""; });
  canvas.addEventListener("blur", () => { told.textContent = ""; });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    tell(cell[0] + step[0], cell[1] + step[1]);
  });
}
