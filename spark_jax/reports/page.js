// The page itself: data out of the file, tabs, theme, alarms and tables.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function variable(name) {
  // What a custom property is now, light-dark() resolved, as a colour that a canvas takes.
  const probe = document.body.appendChild(element("i", { style: `color: var(${name})` }));
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function number(value) {
  return value === null || value === undefined ? "–" : String(Number(value.toPrecision(4)));
}

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const characters = atob(base64);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

// The JSON of a data block: base64 of gzip, so that no text in it can end the block.
async function load(name) {
  const bytes = bytesOf(document.getElementById(`data-${name}`).textContent);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const MOST_ALARMS = 6; // at a glance; more are folded

function showAlarms(root, alarms, watched) {
  if (alarms.length) {
    const runs = new Set(alarms.map((alarm) => alarm.run)).size;
    const items = alarms.map((alarm) =>
      element("li", { "data-pattern": alarm.pattern },
        `⚠ ${runs > 1 || alarm.run ? `${alarm.run}: ` : ""}${alarm.text}`));
    const list = element("ul", { class: "alarms" }, ...items);
    const summary = element("summary", {}, `⚠ ${items.length} alarms of the monitor, in ${runs} run${runs > 1 ? "s" : ""}`);
    root.append(items.length > MOST_ALARMS ? element("details", { class: "alarms" }, summary, list) : list);
  } else if (watched) {
    root.append(element("p", { class: "quiet" }, "No alarm of the monitor."));
  }
}

function showTables(root, tables) {
  for (const table of tables) {
    const head = element("tr", {}, ...table.columns.map((name) => element("th", { scope: "col" }, name)));
    const rows = table.rows.map((row) => {
      if (row.length > 1 && row.slice(1).every((cell) => !cell)) {
        const cell = element("th", { colspan: String(row.length), scope: "rowgroup" }, row[0]);
        return element("tr", { class: "section" }, cell);
      }
      return element("tr", {}, ...row.map((cell) => element("td", {}, cell)));
    });
    root.append(
      element("h2", {}, table.title),
      element("div", { class: "scroll" },
        element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows))),
      ...table.notes.map((note) => element("p", { class: "notes" }, note)),
    );
  }
}

async function start() {
  const page = await load("page");
  const byId = (id) => document.getElementById(id);
  byId("facts").textContent = page.facts.join(" · ");
  const redraw = []; // what must be drawn again in other colours

  const makers = {
    curves: (root) => {
      showAlarms(root, page.alarms, page.watched);
      for (const { title, panels, runs } of page.sections) {
        if (page.sections.length > 1) root.append(element("h2", {}, title));
        redraw.push(drawCurves(root.appendChild(element("div")), panels, runs));
      }
    },
    tables: (root) => showTables(root, page.tables),
    rollouts: (root) => showRollouts(root, page.rollouts, load),
  };
  const filled = { curves: page.sections.length + page.alarms.length, tables: page.tables.length, rollouts: page.rollouts.length };
  const names = Object.keys(makers).filter((name) => filled[name]);
  const made = new Set();

  function show(name) {
    for (const other of names) byId(other).hidden = other !== name;
    for (const tab of byId("tabs").children) {
      tab.setAttribute("aria-selected", String(tab.dataset.tab === name));
    }
    if (!made.has(name)) makers[name](byId(name));
    made.add(name);
    history.replaceState(null, "", `#${name}`);
  }
  for (const name of names) {
    const tab = element("button", { type: "button", role: "tab", "data-tab": name, "aria-controls": name });
    tab.textContent = name[0].toUpperCase() + name.slice(1);
    tab.addEventListener("click", () => show(name));
    byId("tabs").append(tab);
  }

  function labelTheme() {
    byId("theme").textContent = isDark() ? "☀ light" : "☾ dark";
  }
  byId("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    labelTheme();
    redraw.forEach((draw) => draw());
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    labelTheme();
    redraw.forEach((draw) => draw());
  });
  labelTheme();

  if (names.length) {
    const wanted = location.hash.slice(1);
    show(names.includes(wanted) ? wanted : names[0]);
  } else {
    byId("message").textContent = "There is nothing to show yet.";
    byId("message").hidden = false;
  }
  document.documentElement.dataset.ready = "true";
}

start().catch((error) => {
  const message = document.getElementById("message");
  message.textContent = `The page could not be shown: ${error}`;
  message.hidden = false;
  throw error;
});
