"use strict";
// Filters, pages and draws the samples. Text from data is set by textContent only and never parsed as HTML.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const form = byId("filters");
  if (!form) return;
  const MARKS = { right: "✓ right", partly: "◐ partly right", wrong: "✗ wrong", unscored: "not scored" };

  const samples = data.tasks.flatMap((task) => task.samples.map((sample) => ({ ...sample, task: task.name })));
  const outcomeOf = (answer) => {
    if (!answer) return null;
    if (answer.score === null) return "unscored";
    return answer.score >= 1 ? "right" : answer.score <= 0 ? "wrong" : "partly";
  };
  for (const sample of samples) {
    sample.outcomes = sample.models.map(outcomeOf);
    const answers = sample.models.flatMap((answer) => (answer ? [answer.prediction, answer.response || ""] : []));
    sample.text = [sample.id, sample.prompt, sample.answer, ...answers].join("\n").toLowerCase();
  }

  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const fill = (select, options) => {
    select.replaceChildren(
      ...options.map(([value, text]) => {
        const option = element("option", "", text);
        option.value = value;
        return option;
      }),
    );
  };

  const controls = {};
  for (const name of ["task", "category", "model", "outcome", "first", "second", "relation", "search"]) {
    controls[name] = byId(name);
  }
  let page = 0;

  const fillCategories = () => {
    const task = controls.task.value;
    const names = new Set();
    for (const sample of samples) if (sample.task === task && sample.category !== null) names.add(sample.category);
    fill(controls.category, [["", "all"], ...[...names].sort().map((name) => ["=" + name, name])]);
    controls.category.disabled = names.size === 0;
  };

  const relates = (sample) => {
    const [first, second] = [controls.first, controls.second].map((control) => sample.models[Number(control.value)]);
    if (!first || !second || first.score === null || second.score === null) return false;
    const difference = first.score - second.score;
    const test = { differ: difference !== 0, first: difference > 0, second: difference < 0, same: difference === 0 };
    return test[controls.relation.value];
  };
  const hasOutcome = (sample) => {
    const wanted = controls.outcome.value;
    const model = controls.model.value;
    return model === "" ? sample.outcomes.includes(wanted) : sample.outcomes[Number(model)] === wanted;
  };
  const passes = (sample, searched) =>
    (controls.task.value === "" || sample.task === controls.task.value) &&
    (controls.category.value === "" || "=" + sample.category === controls.category.value) &&
    (controls.outcome.value === "" || hasOutcome(sample)) &&
    (controls.relation.value === "" || relates(sample)) &&
    sample.text.includes(searched);

  const picture = (number, sample) => {
    const button = element("button", "picture");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    button.title = "Larger or smaller";
    const image = element("img");
    image.src = byId("image-" + number).textContent;
    image.alt = "image of sample " + sample.id;
    image.loading = "lazy";
    button.append(image);
    button.addEventListener("click", () => {
      const large = button.classList.toggle("large");
      button.setAttribute("aria-pressed", String(large));
    });
    return button;
  };
  const passage = (className, text) => {
    const made = element("p", "text " + className, text);
    made.dir = "auto";
    return made;
  };
  const more = (title, text) => {
    const made = element("details");
    made.append(element("summary", "", title), passage("raw", text));
    return made;
  };
  const answerLine = (answer, number, outcome) => {
    const line = element("li", outcome || "missing");
    const head = element("div", "who");
    const dot = element("span", "dot c" + (number % data.colors));
    dot.setAttribute("aria-hidden", "true");
    head.append(dot, element("bdi", "", data.models[number]));
    line.append(head);
    if (!answer) {
      head.append(element("span", "mark", "not asked"));
      return line;
    }
    const share = outcome === "partly" ? " (" + answer.score.toFixed(2) + ")" : "";
    head.append(element("span", "mark", MARKS[outcome] + share));
    line.append(passage("prediction", answer.prediction || "(nothing)"));
    if (answer.response !== undefined) line.append(more("whole response", answer.response));
    if (answer.prompt !== undefined) line.append(more("its own prompt", answer.prompt));
    return line;
  };
  const card = (sample) => {
    const made = element("li", "card");
    const head = element("div", "head");
    head.append(element("bdi", "tag", sample.task));
    if (sample.category !== null) head.append(element("bdi", "tag quiet", sample.category));
    head.append(element("bdi", "id", sample.id));
    made.append(head);
    if (sample.images.length) {
      const pictures = element("div", "pictures");
      pictures.append(...sample.images.map((number) => picture(number, sample)));
      made.append(pictures);
    }
    const truth = element("p", "truth");
    truth.append(element("span", "", "Answer "), element("bdi", "text", sample.answer || "(none)"));
    const answers = element("ul", "answers");
    answers.append(...sample.models.map((answer, number) => answerLine(answer, number, sample.outcomes[number])));
    made.append(passage("question", sample.question || sample.prompt));
    if (sample.question !== sample.prompt) made.append(more("whole prompt", sample.prompt));
    made.append(truth, answers);
    return made;
  };

  const show = () => {
    const searched = controls.search.value.trim().toLowerCase();
    const found = samples.filter((sample) => passes(sample, searched));
    const pages = Math.max(1, Math.ceil(found.length / data.samplesPerView));
    page = Math.min(page, pages - 1);
    const start = page * data.samplesPerView;
    const view = found.slice(start, start + data.samplesPerView);
    byId("list").replaceChildren(...view.map(card));
    const total = samples.length.toLocaleString("en");
    byId("count").textContent = found.length
      ? found.length.toLocaleString("en") + " of " + total + " samples"
      : "No sample fits these filters (of " + total + ").";
    byId("pager").hidden = pages === 1;
    byId("where").textContent = "Page " + (page + 1) + " of " + pages;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page === pages - 1;
  };
  const turn = (step) => {
    page += step;
    show();
    byId("count").focus({ preventScroll: true });
    byId("samples").scrollIntoView();
  };

  const models = data.models.map((name, number) => [String(number), name]);
  const start = () => {
    fill(controls.task, [["", "all"], ...data.tasks.map((task) => [task.name, task.name])]);
    fill(controls.model, [["", "any model"], ...models]);
    fill(controls.first, models);
    fill(controls.second, models);
    if (models.length > 1) controls.second.selectedIndex = 1;
    fillCategories();
  };
  start();
  byId("compare").hidden = models.length < 2;
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => {
    setTimeout(() => {
      start();
      page = 0;
      show();
    });
  });
  form.addEventListener("input", (event) => {
    if (event.target === controls.task) fillCategories();
    page = 0;
    show();
  });
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  show();
})();
