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

  function draw(element) {
    const spec = figures[element.id];
    const colours = palette();
    const off = hidden[element.dataset.part];
    const data = coloured(spec.data, colours).map((trace) => {
      if (trace.type === "heatmap") trace.colorbar = { ...trace.colorbar, tickfont: { color: colours.ink } };
      return off && off.has(trace.meta) ? { ...trace, visible: false } : trace;
    });
    return Plotly.react(element, data, layoutOf(element, spec, colours), { displaylogo: false, displayModeBar: false });
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
