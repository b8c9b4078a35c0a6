// The rollout view: one problem at a time, its responses side by side, token by token.

const VALUE_LABELS = {
  logprob: "log-prob",
  ref_logprob: "reference log-prob",
  cpr: "cumulative process reward",
  grpo: "GRPO",
  dr_grpo: "Dr. GRPO",
  rloo: "RLOO",
  "reinforce++": "REINFORCE++",
  prime: "PRIME",
  spro: "SPRO",
  selective: "selective",
  global_step: "global step",
  masked_step: "masked step (MSA)",
};
const MEASURES = ["logprob", "ref_logprob", "cpr"]; // the other values are advantages

// title → name of a choice → whether a response of a group is of that kind; null: all are.
const FILTERS = {
  reward: {
    "any reward": null,
    "reward above 0": (response) => response.reward > 0,
    "reward 0": (response) => response.reward === 0,
    "groups whose rewards differ": (_, group) => new Set(group.responses.map((r) => r.reward)).size > 1,
  },
  verdicts: {
    "any verdict": null,
    "Yes for a wrong answer": (r) => r.overall === true && r.correct === false,
    "No for a right answer": (r) => r.overall === false && r.correct === true,
    "overall against its own steps": (r) =>
      r.overall !== null && r.verdicts.length > 0 && r.overall === r.verdicts.some((v) => v < 0),
    "a step against the truth": (r) => r.verdicts.some((_, step) => isMistaken(r, step)),
    "verifications that differ": (r) =>
      new Set(r.verifications.map((v) => v.overall).filter((overall) => overall !== null)).size > 1,
  },
  alarms: { "with or without alarm": null, "any alarm": (response) => response.flags.length > 0 },
};

function showRollouts(root, sources, load) {
  const state = { data: null, problems: [], position: 0, colour: "", filters: {}, all: false };
  const tip = document.body.appendChild(element("div", { id: "tip", role: "tooltip", hidden: "" }));
  const dialog = document.body.appendChild(element("dialog", { id: "verifications" }));
  const select = {
    source: menu("Rollouts", sources.map((source, i) => [String(i), source.name])),
    colour: menu("Colour tokens by", []),
    reward: menu("Reward", []),
    verdicts: menu("Verdict disagreement", []),
    alarms: menu("Hacking alarms", []),
  };
  const count = element("output", { class: "count" });
  const problems = element("ol", { class: "problems", "aria-label": "problems" });
  const shown = element("div", { class: "shown" });
  root.append(
    element("div", { class: "toolbar" }, ...Object.values(select).map((s) => s.parentElement), count),
    element("div", { class: "view" }, problems, shown),
    help(),
  );

  // A menu that keeps the focus would take the keys that move between problems.
  for (const one of Object.values(select)) one.addEventListener("change", () => one.blur());
  select.source.addEventListener("change", () => open(Number(select.source.value)));
  select.colour.addEventListener("change", () => {
    state.colour = select.colour.value;
    drawProblem();
  });
  for (const name of Object.keys(FILTERS)) {
    select[name].addEventListener("change", () => {
      state.filters[name] = select[name].value;
      filter();
    });
  }
  document.addEventListener("keydown", (event) => {
    if (!root.hidden && !dialog.open) press(event);
  });
  shown.addEventListener("pointerover", (event) => showTip(event.target.closest(".token"), event));
  shown.addEventListener("pointerleave", () => { tip.hidden = true; });
  open(0);

  async function open(index) {
    const source = sources[index];
    root.dataset.loading = "true";
    const data = await load(`rollout-${index}`);
    if (Number(select.source.value) !== index) return; // another one was asked for meanwhile
    state.data = data;
    state.source = source;
    const advantages = source.values.filter((name) => !MEASURES.includes(name));
    const names = [...advantages, ...source.values.filter((name) => MEASURES.includes(name))];
    if (!names.includes(state.colour)) {
      state.colour = names.includes(source.advantage) ? source.advantage : (names[0] ?? "");
    }
    fill(select.colour, names.map((name) => [name, label(name)]), state.colour);
    select.colour.parentElement.hidden = !names.length;
    fillFilters();
    filter();
    delete root.dataset.loading;
  }

  // Every choice says how many responses it has; those without any cannot be chosen.
  function fillFilters() {
    const all = state.data.groups.flatMap((group) => group.responses.map((r) => [r, group]));
    for (const [name, choices] of Object.entries(FILTERS)) {
      const kinds = { ...choices };
      if (name === "alarms") {
        for (const flag of new Set(all.flatMap(([response]) => response.flags))) {
          kinds[words(flag)] = (response) => response.flags.includes(flag);
        }
      }
      select[name].kinds = kinds;
      const options = Object.entries(kinds).map(([kind, holds]) => {
        const number = holds ? all.filter(([r, group]) => holds(r, group)).length : all.length;
        return [kind, holds ? `${kind} (${number})` : kind, number === 0];
      });
      const kept = options.some(([kind, , none]) => kind === state.filters[name] && !none);
      state.filters[name] = kept ? state.filters[name] : options[0][0];
      fill(select[name], options, state.filters[name]);
    }
  }

  function matches(response, group) {
    return Object.entries(state.filters).every(([name, kind]) => {
      const holds = select[name].kinds[kind];
      return !holds || holds(response, group);
    });
  }

  function filter() {
    state.problems = state.data.groups
      .map((group) => ({ group, rows: group.responses.map((r) => matches(r, group)) }))
      .filter(({ rows }) => rows.some(Boolean));
    state.position = 0;
    state.all = false;
    drawList();
    drawProblem();
  }

  function drawList() {
    const { groups } = state.data;
    const responses = state.problems.reduce((n, { rows }) => n + rows.filter(Boolean).length, 0);
    const total = groups.reduce((n, group) => n + group.responses.length, 0);
    const of = state.source.numGroups > groups.length ? ` (of ${state.source.numGroups} in the run)` : "";
    count.textContent =
      `${state.problems.length} of ${groups.length} problems${of}, ${responses} of ${total} responses`;
    problems.replaceChildren(...state.problems.map(({ group }, i) => {
      const button = element("button", { type: "button" });
      button.append(
        element("span", { class: "question" }, firstLine(group.question || group.problem_id)),
        element("span", { class: "dots" }, ...group.responses.map(dot)),
      );
      button.addEventListener("click", () => go(i));
      return element("li", {}, button);
    }));
  }

  function go(position) {
    state.position = Math.max(0, Math.min(position, state.problems.length - 1));
    state.all = false;
    drawProblem();
    problems.children[state.position]?.scrollIntoView({ block: "nearest" });
  }

  function drawProblem() {
    tip.hidden = true;
    [...problems.children].forEach((item, i) => {
      item.firstChild.setAttribute("aria-current", String(i === state.position));
    });
    if (!state.problems.length) {
      shown.replaceChildren(element("p", { class: "quiet" }, "No response is of this kind."));
      return;
    }
    const { group, rows } = state.problems[state.position];
    const limit = largest(group);
    const cards = group.responses
      .map((response, i) => [response, i])
      .filter(([, i]) => state.all || rows[i])
      .map(([response, i]) => card(response, i, limit));
    const hidden = group.responses.length - cards.length;
    shown.replaceChildren(
      heading(group),
      element("div", { class: "question-text" }, element("pre", {}, group.question || group.problem_id)),
      ...(state.colour ? [scale(limit)] : []),
      element("div", { class: "group" }, ...cards),
      ...(hidden || state.all ? [rest(hidden)] : []),
    );
  }

  function heading(group) {
    const move = (sign, step) => {
      const button = element("button", { type: "button" }, sign);
      button.addEventListener("click", () => go(state.position + step));
      return button;
    };
    const reference = group.reference === null ? "" : `reference: ${group.reference}`;
    return element("div", { class: "problem" },
      element("h3", {}, group.problem_id),
      element("span", { class: "reference" }, reference),
      element("span", { class: "move" },
        move("←", -1), `${state.position + 1} / ${state.problems.length}`, move("→", 1)));
  }

  function rest(hidden) {
    const text = hidden ? `show the other ${hidden} of the group` : "show only what the filters ask for";
    const button = element("button", { type: "button", class: "rest" }, text);
    button.addEventListener("click", () => {
      state.all = hidden > 0;
      drawProblem();
    });
    return button;
  }

  function largest(group) {
    let limit = 0;
    for (const response of group.responses) {
      for (let i = 0; i < response.tokens.length; i++) {
        limit = Math.max(limit, Math.abs(valueAt(response, state.colour, i) ?? 0));
      }
    }
    return limit;
  }

  function scale(limit) {
    return element("div", { class: "scale" },
      element("strong", {}, label(state.colour)), element("span", {}, number(-limit)),
      element("span", { class: "bar" }), element("span", {}, `+${number(limit)}`));
  }

  function card(response, index, limit) {
    const text = element("div", { class: "text" });
    let block = null;
    response.tokens.forEach((token, i) => {
      const step = response.steps[i];
      const first = i === 0 || step !== response.steps[i - 1];
      const last = step !== response.steps[i + 1];
      if (first) block = text.appendChild(stepBlock(response, step));
      const shownToken = element("span", { class: "token" }, inBlock(token, first, last));
      shownToken.response = response;
      shownToken.index = i;
      const value = state.colour ? valueAt(response, state.colour, i) : null;
      if (value && limit) {
        const side = value > 0 ? "positive" : "negative";
        shownToken.classList.add("coloured");
        const share = Math.round((Math.abs(value) / limit) * 85);
        shownToken.style.background = `color-mix(in srgb, var(--${side}) ${share}%, transparent)`;
      }
      block.append(shownToken);
    });
    text.addEventListener("click", (event) => {
      if (event.target.closest(".step")) showVerifications(response, index);
    });
    const made = element("article", { class: "card" },
      element("header", {}, ...badges(response, index)), text);
    if (response.verifications.length) {
      const several = response.verifications.length > 1;
      const button = element("button", { type: "button", class: "open" },
        several ? `${response.verifications.length} verifications` : "verification");
      button.addEventListener("click", () => showVerifications(response, index));
      made.append(element("footer", {}, button));
    }
    return made;
  }

  function showTip(token, event) {
    if (!token) {
      tip.hidden = true;
      return;
    }
    const { response, index } = token;
    const step = response.steps[index];
    const where = `token ${index + 1} of ${response.tokens.length}, ` +
      (step < 0 ? "outside any step" : `step ${step + 1}: ${verdictText(response, step)}`);
    const rows = state.source.values.map((name) =>
      element("tr", { "data-value": name, class: name === state.colour ? "chosen" : "" },
        element("td", {}, label(name)), element("td", {}, number(valueAt(response, name, index)))));
    tip.replaceChildren(
      element("pre", {}, JSON.stringify(response.tokens[index])),
      element("div", { class: "where" }, where),
      element("table", {}, element("tbody", {}, ...rows)),
    );
    tip.hidden = false;
    const x = event.clientX + 16;
    const y = event.clientY + 18;
    tip.style.left = `${Math.max(0, Math.min(x, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${y + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : y}px`;
  }

  function showVerifications(response, index) {
    if (!response.verifications.length) return;
    const said = element("pre", {});
    const chosenBy = response.verifications.map((_, i) =>
      Object.keys(response.chosen).filter((method) => response.chosen[method] === i));
    const steps = Math.max(...response.verifications.map((v) => v.verdicts.length), 0);
    const soft = response.verifications.some((v) => v.soft_score !== null);
    const failed = response.verifications.some((v) => v.failure);
    const columns = ["#", "overall", ...(soft ? ["soft"] : []),
      ...Array.from({ length: steps }, (_, k) => String(k + 1)),
      "chosen by", ...(failed ? ["unreadable because"] : [])];
    const rows = response.verifications.map((verification, i) => {
      const row = element("tr", { "aria-selected": "false", tabindex: "0" },
        element("td", {}, String(i + 1)), sign(verification.overall, "Yes", "No"),
        ...(soft ? [element("td", {}, number(verification.soft_score))] : []),
        ...Array.from({ length: steps }, (_, k) => sign(verification.verdicts[k], "✓", "✗")),
        element("td", {}, chosenBy[i].map(words).join(", ")),
        ...(failed ? [element("td", {}, words(verification.failure ?? ""))] : []));
      const choose = () => {
        rows.forEach((other) => other.setAttribute("aria-selected", String(other === row)));
        said.textContent = verification.text;
      };
      row.addEventListener("click", choose);
      row.addEventListener("focus", choose);
      row.choose = choose;
      return row;
    });
    const close = element("button", { type: "button" }, "close");
    close.addEventListener("click", () => dialog.close());
    const head = element("tr", {}, ...columns.map((name) => element("th", { scope: "col" }, name)));
    dialog.replaceChildren(
      element("div", { class: "head" }, element("h3", {}, `Response ${index + 1}: what was said of it`), close),
      element("div", { class: "body" },
        element("div", { class: "sheet" },
          element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows))),
        element("div", { class: "said" }, said)),
    );
    rows[Math.max(0, chosenBy.findIndex((methods) => methods.length))].choose();
    tip.hidden = true;
    dialog.showModal();
  }

  function press(event) {
    if (event.target.closest("select, input") || event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1, Home: -Infinity, End: Infinity };
    if (event.key in moves) {
      event.preventDefault();
      go(state.position + moves[event.key]);
    } else if (event.key === "v") {
      shown.querySelector("button.open")?.click();
    } else if (/^[1-9]$/.test(event.key) && select.colour.options[event.key - 1]) {
      select.colour.selectedIndex = event.key - 1;
      select.colour.dispatchEvent(new Event("change"));
    }
  }
}

// --- parts ---------------------------------------------------------------------------------------

function valueAt(response, name, index) {
  const values = response.values[name];
  return Array.isArray(values) ? values[index] : (values ?? null);
}

function isMistaken(response, step) {
  const verdict = response.verdicts[step];
  const truth = response.step_labels?.[step];
  return Boolean(verdict) && truth !== undefined && verdict > 0 !== truth;
}

function verdictText(response, step) {
  const verdict = { 1: "judged correct", "-1": "judged incorrect" }[response.verdicts[step]] ?? "not judged";
  const truth = response.step_labels?.[step];
  return truth === undefined ? verdict : `${verdict}, in truth ${truth ? "correct" : "incorrect"}`;
}

function stepBlock(response, step) {
  if (step < 0) return element("span", { class: "outside" });
  const verdict = { 1: "correct", "-1": "incorrect" }[response.verdicts[step]] ?? "unjudged";
  const mistaken = isMistaken(response, step) ? " mistaken" : "";
  const label = `step ${step + 1}: ${verdictText(response, step)}`;
  return element("span", { class: `step ${verdict}${mistaken}`, "data-step": String(step), "aria-label": label });
}

// A step stands on lines of its own: white space around it would only push things about.
function inBlock(token, first, last) {
  if (!token.trim()) return token || "◦";
  const begun = first ? token.trimStart() : token;
  return last ? begun.trimEnd() : begun;
}

function badges(response, index) {
  const made = [badge("number", `#${index + 1}`, "position in the group")];
  if (response.reward !== null) {
    made.push(badge(response.reward > 0 ? "good" : "bad", `reward ${number(response.reward)}`, "reward"));
  }
  if (response.overall !== null) {
    const soft = response.verifications.length === 1 ? response.verifications[0].soft_score : null;
    const score = soft === null ? "" : `, soft score ${number(soft)}`;
    made.push(badge(response.overall ? "good" : "bad", response.overall ? "verdict Yes" : "verdict No",
      `the overall verdict${score}`));
  }
  if (response.correct !== null) {
    made.push(badge(response.correct ? "good" : "bad", response.correct ? "✓ right" : "✗ wrong",
      "the answer against the reference"));
  }
  for (const [name, holds] of Object.entries(response.checks)) {
    made.push(badge(holds ? "check" : "bad check", `${holds ? "✓" : "✗"} ${words(name)}`, "format check"));
  }
  if (!response.trained) made.push(badge("check", "not trained on", "its group was filtered out"));
  if (!response.finished) made.push(badge("bad", "✗ cut off", "ended by the token limit"));
  for (const flag of response.flags) made.push(badge("alarm", `⚠ ${words(flag)}`, "shows this pattern"));
  return made;
}

function badge(kind, text, title) {
  return element("span", { class: `badge ${kind}`, title }, text);
}

function dot(response) {
  const share = Math.round(Math.max(0, Math.min(1, response.reward ?? (response.overall ? 1 : 0))) * 100);
  const made = element("span", { class: `dot${response.correct === false ? " wrong" : ""}` });
  made.title = `reward ${number(response.reward)}${response.correct === false ? ", wrong" : ""}`;
  made.style.background = `color-mix(in srgb, var(--good) ${share}%, transparent)`;
  return made;
}

function sign(value, yes, no) {
  if (value === null || value === undefined) return element("td", {}, "–");
  return element("td", { class: value ? "good-text" : "bad-text" }, value ? yes : no);
}

function menu(title, options) {
  const made = element("select", { "aria-label": title });
  fill(made, options, options[0]?.[0]);
  element("label", {}, title, made);
  return made;
}

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text, disabled]) => {
    const option = element("option", { value }, text);
    option.disabled = Boolean(disabled);
    option.selected = value === chosen;
    return option;
  }));
}

function help() {
  const key = (name) => element("kbd", {}, name);
  return element("p", { class: "help" }, key("←"), " ", key("→"), " problems, ", key("1"), " … ", key("9"),
    " colours, ", key("v"), " verifications. A step's sign is its verdict. Squares in the list: a response each, filled by its reward, framed where wrong.");
}

function label(name) {
  return VALUE_LABELS[name] ?? words(name);
}

function words(name) {
  return name.replaceAll("_", " ");
}

function firstLine(text) {
  return text.trim().split("\n", 1)[0].slice(0, 120);
}
