"use strict";
(() => {
  for (const button of document.querySelectorAll(".copy")) {
    const code = button.parentElement.querySelector("code");
    button.hidden = false;
    button.addEventListener("click", async () => {
      const range = document.createRange();
      range.selectNodeContents(code);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch (error) {
        button.textContent = "Selected";
      }
    });
  }

  const section = document.getElementById("walk");
  if (!section) return;
  const { views, titles: TITLES } = JSON.parse(document.getElementById("walk-numbers").textContent);
  const find = (name) => document.getElementById("walk-" + name);
  const select = find("view"), layer = find("layer"), step = find("step");
  const SVG = "http" + "://www.w3.org/2000/svg";

  const make = (name, attributes, text) => {
    const one = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) one.setAttribute(key, value);
    if (text !== undefined) one.textContent = text;
    return one;
  };
  const draw = (name, attributes, text) => {
    const one = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes || {})) one.setAttribute(key, value);
    if (text !== undefined) one.textContent = text;
    return one;
  };
  const show = (value) => {
    if (value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5)) return String(Number(value.toPrecision(3)));
    return value.toExponential(2).replace(/\.?0+e/, "e");
  };
  const at = (column, place) => (column.length === 1 ? column[0] : column[place]);
  const view = () => views[Number(select.value)];
  const placeOf = (one) => Number(step.value) * one.layers.length + Number(layer.value);

  function fillTable(one, place, number) {
    const names = Object.keys(TITLES).filter((name) => one.tensors.some((tensor) => (tensor.values[name] || []).some(Boolean)));
    const head = make("tr");
    head.append(make("th", { scope: "col" }, "tensor"));
    for (const name of names) head.append(make("th", { scope: "col", class: "number" }, TITLES[name]));
    const rows = one.tensors.filter((tensor) => tensor.layers.includes(number)).map((tensor) => {
      const row = make("tr");
      row.append(make("th", { scope: "row", class: "short" }, tensor.name));
      for (const name of names) {
        const column = tensor.values[name], lost = at(tensor.values.nonfinite || [1], place);
        const value = column ? at(column, place) : null;
        row.append(make("td", { class: "number" }, value !== null ? show(value) : column && lost ? "not finite" : ""));
      }
      return row;
    });
    const top = make("thead"), body = make("tbody");
    top.append(head);
    body.append(...rows);
    find("table").replaceChildren(make("caption", {}, "Median over " + one.networks + " networks; smallest and largest entry of all"), top, body);
  }

  function frame(title, about) {
    const figure = make("figure"), svg = draw("svg", { viewBox: "0 0 400 190", role: "img", "aria-label": about });
    svg.append(draw("title", {}, about));
    figure.append(svg, make("figcaption", {}, title));
    return [figure, svg];
  }

  function drawProfile(one, tensor, number) {
    const start = Number(step.value) * one.layers.length, column = tensor.values.std;
    if (!column) return null;
    const points = one.layers
      .map((layer, k) => [layer, at(column, start + k)])
      .filter(([layer, value]) => tensor.layers.includes(layer) && value !== null && value > 0);
    if (!points.length) return null;
    const logs = points.map(([, value]) => Math.log2(value));
    const low = Math.floor(Math.min(...logs, 0)), high = Math.max(Math.ceil(Math.max(...logs, 0)), low + 1);
    const first = one.layers[0], last = Math.max(one.layers[one.layers.length - 1], first + 1);
    const x = (layer) => 52 + (335 * (layer - first)) / (last - first);
    const y = (log) => 160 - (145 * (log - low)) / (high - low);
    const about = "std of the " + tensor.name + " over the layers, from 2^" + low + " to 2^" + high;
    const [figure, svg] = frame("std of the " + tensor.name + " over the layers; the dashed line is this layer", about);
    svg.append(draw("path", { class: "line", d: "M" + points.map(([layer], k) => x(layer).toFixed(1) + " " + y(logs[k]).toFixed(1)).join("L") }));
    if (points.length === 1) svg.append(draw("circle", { class: "bar", cx: x(points[0][0]), cy: y(logs[0]), r: 4 }));
    svg.append(draw("line", { class: "cursor", x1: x(number), x2: x(number), y1: 12, y2: 164 }));
    svg.append(draw("text", { x: 46, y: 164, "text-anchor": "end" }, "2^" + low), draw("text", { x: 46, y: 24, "text-anchor": "end" }, "2^" + high));
    svg.append(draw("text", { x: x(first), y: 182 }, String(first)), draw("text", { x: x(last), y: 182, "text-anchor": "end" }, "layer " + last));
    return figure;
  }

  function drawHistogram(tensor, place) {
    const found = tensor.histograms && tensor.histograms[place];
    if (!found) return null;
    const [first, shares] = found, most = Math.max(...shares), width = 375 / shares.length;
    const end = first + shares.length - 1;
    const about = tensor.name + ": octaves from 2^" + first + " to 2^" + end + ", at most " + show(most) + " % in one";
    const [figure, svg] = frame(tensor.name + ": share of the entries in each octave, at most " + show(most) + " %", about);
    shares.forEach((share, k) => {
      const height = (145 * share) / most;
      svg.append(draw("rect", { class: "bar", x: 12 + k * width, y: 160 - height, width: Math.max(width - 1, 0.5), height }));
    });
    svg.append(draw("text", { x: 12, y: 182 }, "2^" + first), draw("text", { x: 388, y: 182, "text-anchor": "end" }, "2^" + end));
    return figure;
  }

  function update() {
    const one = view(), number = one.layers[Number(layer.value)], place = placeOf(one);
    const time = one.steps[Number(step.value)];
    find("layer-value").textContent = number + " of " + one.layers[one.layers.length - 1];
    find("step-value").textContent = time + " of " + one.steps[one.steps.length - 1];
    layer.setAttribute("aria-valuetext", "layer " + number);
    step.setAttribute("aria-valuetext", "step " + time);
    find("place").textContent = "Layer " + number + (one.steps.length > 1 ? ", step " + time : "") + " of " + one.title;
    fillTable(one, place, number);
    const here = one.tensors.filter((tensor) => tensor.layers.includes(number));
    const shown = here.some((tensor) => tensor.histograms)
      ? here.map((tensor) => drawHistogram(tensor, place))
      : here.filter((tensor) => tensor.name !== "update").map((tensor) => drawProfile(one, tensor, number));
    find("pictures").replaceChildren(...shown.filter(Boolean));
    const thinned = one.thinned ? "Kept in this page: " + one.thinned + "; the tables have all. " : "";
    const bare = here.some((tensor) => tensor.histograms) ? "" : "Histograms are recorded with histograms=true.";
    find("note").textContent = thinned + bare;
  }

  function change() {
    const one = view();
    layer.max = one.layers.length - 1;
    step.max = one.steps.length - 1;
    layer.value = one.layers[0] === 0 && one.layers.length > 1 ? 1 : 0;
    step.value = 0;
    find("step-label").hidden = one.steps.length < 2;
    update();
  }

  function move(slider, by) {
    slider.value = Number(slider.value) + by;
    update();
  }

  const KEYS = {
    ArrowLeft: () => move(layer, -1), ArrowRight: () => move(layer, 1),
    ArrowDown: () => move(step, -1), ArrowUp: () => move(step, 1),
    Home: () => move(layer, -layer.max), End: () => move(layer, layer.max),
  };
  document.addEventListener("keydown", (event) => {
    const key = KEYS[event.key], target = event.target;
    if (!key || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    const outside = target === document.body || target === document.documentElement;
    const sideways = event.key === "ArrowLeft" || event.key === "ArrowRight";
    if (target !== section && target !== layer && !(outside && sideways)) return;
    event.preventDefault();
    key();
  });
  views.forEach((one, k) => select.append(make("option", { value: k }, one.label + ": " + one.title)));
  select.addEventListener("change", change);
  layer.addEventListener("input", update);
  step.addEventListener("input", update);
  find("controls").hidden = false;
  change();
})();
