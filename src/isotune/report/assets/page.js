"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const palettes = read("palettes");
  const figures = read("figures");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)").matches;
  const hidden = {};
  let printing = false;

  const palette = () => palettes[dark.matches && !printing ? "dark" : "light"];

  // A figure says "@ink" or "@3" where it means a colour of the scheme in use.
  function coloured(value, colours) {
    if (typeof value === "string" && value.startsWith("@")) {
      const name = value.slice(1);
      return /^\d+$/.test(name) ? colours.series[Number(name)] : colours[name];
    }
    if (Array.isArray(value)) return value.map((one) => coloured(one, colours));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, coloured(one, colours)]));
    }
    return value;
  }

  function axis(given, colours) {
    return {
      automargin: true, gridcolor: colours.grid, linecolor: colours.muted, tickcolor: colours.muted,
      zeroline: false, ticks: "outside", ticklen: 4, ...given,
      title: { standoff: 8, font: { size: 13 }, ...(given && given.title) },
    };
  }

  // Before printing the screen's layout still holds; these are of a page of A4, in pixels.
  const onPaper = { wide: 680, half: 332, third: 216 };
  const widthOf = (element) => (printing ? onPaper[element.parentElement.className] : element.clientWidth);

  function layoutOf(element, spec, colours) {
    const width = widthOf(element);
    const given = coloured(spec.layout, colours);
    const square = spec.data[0].type === "heatmap";
    const height = Number(element.dataset.height);
    element.style.height = `${square ? Math.min(height, Math.round(0.86 * width)) : height}px`;
    return {
      margin: { l: 46, r: 14, t: 10, b: 46 },
      showlegend: false,
      legend: { orientation: "h", y: -0.28, yanchor: "top", x: 0 },
      hovermode: "closest",
      dragmode: coarse ? false : "zoom",
      ...given,
      width,
      height: parseFloat(element.style.height),
      xaxis: axis(given.xaxis, colours),
      yaxis: axis(given.yaxis, colours),
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colours.ink },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { bgcolor: colours.panel, bordercolor: colours.muted, font: { color: colours.ink } },
    };
  }

  const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  const pen = document.createElement("canvas").getContext("2d");
  const size = 11; // of labels, in pixels

  // Where a label may stand beside its point: which corner of it, and how far from the point, past its error bar too.
  const corners = (up, down) => [
    ["right", "bottom", -5, 5], ["left", "top", 5, -5], ["left", "middle", 9, 0], ["right", "middle", -9, 0],
    ["left", "bottom", 5, 5], ["right", "top", -5, -5], ["center", "bottom", 0, up], ["center", "top", 0, -down],
    ["left", "bottom", -6, up], ["left", "top", -6, -down], ["center", "bottom", 0, up + 8], ["center", "top", 0, -down - 8],
  ];

  const distance = (box, { x, y }) =>
    Math.hypot(Math.max(box.left - x, x - box.right, 0), Math.max(box.top - y, y - box.bottom, 0));

  // The names of points as annotations, each where it covers no mark and no other name, is nearer to its own point than
  // to another, and if it can does not cross the line of the front; what finds no place is left out.
  function placed(element, labels, off, colours) {
    const own = element.getBoundingClientRect();
    const box = (one) => {
      const { left, right, top, bottom } = one.getBoundingClientRect();
      return { left: left - own.left, right: right - own.left, top: top - own.top, bottom: bottom - own.top };
    };
    const { xaxis, yaxis } = element.layout;
    const area = box(element.querySelector(".nsewdrag"));
    const at = (value, [low, high], from, to) => from + ((value - low) / (high - low)) * (to - from);
    const right = (x) => at(x, xaxis.range, area.left, area.right);
    const down = (y) => at(y, yaxis.range, area.bottom, area.top);
    const bars = [...element.querySelectorAll(".yerror")].map(box);
    const marks = [...element.querySelectorAll(".points .point")].map(box);
    const taken = [...bars, ...marks];
    const points = labels
      .filter((one) => !(off && off.has(one.method)))
      .map((one) => ({ ...one, x: right(one.x), y: down(one.y) }));
    const front = points.filter((one) => one.front).sort((a, b) => a.x - b.x);
    const line = front.slice(1).flatMap((end, i) => [
      { left: front[i].x, right: end.x, top: front[i].y - 1, bottom: front[i].y + 1 },
      { left: end.x - 1, right: end.x + 1, top: end.y, bottom: front[i].y },
    ]);
    pen.font = `${size}px ${getComputedStyle(document.body).fontFamily}`;
    const found = [];
    for (const label of labels) {
      const point = points.find((one) => one.method === label.method);
      if (!point) continue;
      const [x, y, width] = [point.x, point.y, pen.measureText(label.text).width + 2];
      const bar = bars.find((one) => one.left <= x && x <= one.right && one.top <= y && y <= one.bottom) || { top: y, bottom: y };
      const free = (avoided) => ([xanchor, yanchor, dx, dy]) => {
        const left = x + dx - { left: 0, center: width / 2, right: width }[xanchor];
        const top = y - dy - { top: 0, middle: size / 2 + 1, bottom: size + 2 }[yanchor];
        const space = { left, right: left + width, top, bottom: top + size + 2 };
        const inside = left >= area.left && space.right <= area.right && top >= area.top && space.bottom <= area.bottom;
        const nearest = points.every((one) => one === point || distance(space, one) > distance(space, point));
        return inside && nearest && !avoided.some((one) => overlap(one, space)) && space;
      };
      const tried = corners(Math.max(9, y - bar.top + 2), Math.max(9, bar.bottom - y + 2));
      const corner = tried.find(free([...taken, ...line])) || tried.find(free(taken));
      if (!corner) continue;
      taken.push(free([])(corner));
      const [xanchor, yanchor, xshift, yshift] = corner;
      const font = { size, color: label.front ? colours.ink : colours.muted };
      found.push({
        x: label.x, y: label.y, text: label.text, xanchor, yanchor, xshift, yshift, font, showarrow: false, borderpad: 0,
      });
    }
    return found;
  }

  async function draw(element) {
    const spec = figures[element.id];
    const colours = palette();
    const off = hidden[element.dataset.part];
    const data = coloured(spec.data, colours).map((trace) => {
      if (trace.type === "heatmap") trace.colorbar = { ...trace.colorbar, tickfont: { color: colours.ink } };
      return off && off.has(trace.meta) ? { ...trace, visible: false } : trace;
    });
    await Plotly.react(element, data, layoutOf(element, spec, colours), { displaylogo: false, displayModeBar: false });
    const labels = (spec.layout.meta || {}).labels;
    if (labels) await Plotly.relayout(element, { annotations: placed(element, labels, off, colours) });
  }

  const plots = [...document.querySelectorAll(".plot")];
  const drawn = (async () => {
    for (const element of plots) {
      await draw(element);
      await new Promise((resolve) => setTimeout(resolve));
    }
    document.documentElement.dataset.drawn = String(plots.length);
  })();
  const redraw = () => plots.forEach(draw);

  let width = window.innerWidth;
  let waiting = 0;
  window.addEventListener("resize", () => {
    if (printing || window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 150);
  });
  dark.addEventListener("change", redraw);
  const print = (state) => () => { printing = state; redraw(); };
  window.addEventListener("beforeprint", print(true));
  window.addEventListener("afterprint", print(false));

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", async () => {
      const part = button.closest("article").id;
      const shown = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!shown));
      hidden[part] = hidden[part] || new Set();
      hidden[part][shown ? "add" : "delete"](button.dataset.method);
      await drawn;
      plots.filter((element) => element.dataset.part === part).forEach(draw);
    });
  }

  // -- the table: a click, Enter or Space on a heading sorts by its column, a second one the other way round --------
  function sort(table, column, direction) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const numeric = table.tHead.rows[0].cells[column].classList.contains("number");
    const key = (row) => {
      const text = row.cells[column].dataset.value;
      return text === "" ? null : numeric ? Number(text) : text;
    };
    const sign = direction === "ascending" ? 1 : -1;
    rows.sort((first, second) => {
      const [a, b] = [key(first), key(second)];
      if (a === null || b === null) return (a === null) - (b === null); // what is missing stays last
      return sign * (numeric ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    });
    body.append(...rows);
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const first = head.classList.contains("number") && column === 1 ? "descending" : "ascending";
        const other = first === "ascending" ? "descending" : "ascending";
        const direction = before === first ? other : first;
        heads.forEach((one) => one.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", direction);
        sort(table, column, direction);
        const name = head.querySelector("button").firstChild.textContent;
        document.getElementById(`${table.id}-status`).textContent = `sorted by ${name}, ${direction}`;
      });
    });
  }
})();
