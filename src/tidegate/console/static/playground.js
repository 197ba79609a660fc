// The playground: sends a prompt (or a text to judge), reads the server's events, and shows each token as judged.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const page = $("playground");
  const answer = document.querySelector(".answer");
  const tokensBox = $("tokens");
  const percent = (p) => (p >= 0.9995 ? "100%" : p < 0.0005 ? "0%" : `${(100 * p).toFixed(p < 0.1 ? 1 : 0)}%`);
  const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
  const milliseconds = (ms) => (ms === null || ms === undefined ? "–" : ms < 10 ? `${ms.toFixed(1)} ms` : `${Math.round(ms).toLocaleString("en")} ms`);

  const first = Object.fromEntries(["state", "why", "prompt-verdict"].map((id) => [id, $(id).textContent])); // before any run

  const calm = window.matchMedia("(prefers-reduced-motion: reduce)");

  let tokens = []; // what the server said of each shown token, with its element
  let running = null; // the AbortController of the run in progress
  let chosen = -1; // the token whose facts are shown
  let cutAt = null; // number of tokens before the cut
  let plotPlanned = false;
  let seen = { shown: 0, ended: false };

  // --- what is judged: a model's answer, or a text of the reader's own ---------------------------------------------

  const mode = () => document.querySelector("input[name=mode]:checked").value;

  function showMode() {
    for (const element of document.querySelectorAll("[data-for-mode]")) element.hidden = element.dataset.forMode !== mode();
  }

  // Another mode is another question: what was said to the one before does not stay beside it.
  function changeMode() {
    showMode();
    const gone = running;
    running = null;
    gone?.abort();
    reset();
    for (const id of ["why", "prompt-verdict"]) $(id).textContent = first[id];
    $("empty").hidden = false;
    say("empty", first.state);
    buttons();
  }

  function take(example) {
    $("prompt").value = example.dataset.prompt;
    if (example.dataset.response !== undefined) $("response").value = example.dataset.response;
    run();
  }

  // --- a run -------------------------------------------------------------------------------------------------------

  async function run() {
    const judging = mode() === "judge";
    const needed = judging ? $("response") : $("prompt");
    if (!needed.value.trim()) {
      needed.focus();
      say("empty", judging ? "Paste a text to judge first" : "Type a prompt first");
      return;
    }
    stop();
    reset();
    const mine = new AbortController();
    running = mine;
    buttons();
    say("running", "Running");
    answer.scrollIntoView({ block: "nearest", behavior: calm.matches ? "auto" : "smooth" });
    const body = { mode: mode(), prompt: $("prompt").value, policy: $("policy").value };
    if (judging) body.response = $("response").value;
    try {
      const reply = await fetch("/playground/stream", {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify(body),
        signal: mine.signal,
      });
      if (!reply.ok) throw new Error((await reply.json().catch(() => null))?.error?.message ?? `the server answered ${reply.status}`);
      for await (const [name, data] of events(reply.body)) {
        if (running !== mine) return; // a newer run has begun
        hear[name]?.(data);
      }
      if (running === mine && !seen.ended) fail("The connection ended before the decision. What is shown was judged.");
    } catch (error) {
      if (running !== mine) return;
      if (mine.signal.aborted) stoppedByReader();
      else fail(error instanceof TypeError ? "The server cannot be reached. Is it still running?" : error.message);
    } finally {
      if (running === mine) {
        running = null;
        $("held").hidden = true;
        buttons();
        plot();
      }
    }
  }

  function stop() {
    running?.abort();
  }

  async function* events(stream) {
    const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n");
        const name = lines.find((line) => line.startsWith("event: "))?.slice(7);
        const data = lines.find((line) => line.startsWith("data: "))?.slice(6);
        if (name && data) yield [name, JSON.parse(data)];
      }
    }
  }

  const hear = {
    prompt(data) {
      const verdict = data.verdict;
      const box = $("prompt-verdict");
      if (!verdict) {
        box.dataset.severity = "none";
        box.textContent = data.failure ? "Not judged: the guard failed" : "No prompt given";
        $("prompt-why").textContent = data.failure?.message ?? "";
        return;
      }
      box.dataset.severity = verdict.severity;
      box.textContent = `${verdict.severity[0].toUpperCase()}${verdict.severity.slice(1)}, ${data.decision.action}`;
      const parts = [`not safe ${percent(flagged(verdict))}`];
      if (verdict.categories.length) parts.push(verdict.categories.join(", "));
      parts.push(`rule ${data.decision.rule}`);
      $("prompt-why").textContent = parts.join(" · ");
    },
    token(data) {
      addToken(data);
      planPlot();
    },
    unjudged(data) {
      const element = document.createElement("span");
      element.className = "unjudged";
      element.title = "Not judged: the guard failed, and the policy lets text through then";
      element.textContent = data.text;
      tokensBox.append(element);
      seen.shown += [...data.text].length;
    },
    held(data) {
      $("held").hidden = data.characters === 0;
      $("held-text").textContent = `${plural(data.characters, "character")} held until judged`;
    },
    cut(data) {
      cutAt = tokens.filter((token) => !token.withheld).length;
      $("held").hidden = true;
      $("cut").hidden = false;
      $("cut").textContent =
        data.withheld > 0 ? `Stopped here: ${plural(data.withheld, "character")} never left` : "Stopped here: nothing more was let through";
      if (mode() === "judge") {
        $("rest").textContent = [...$("response").value].slice(data.at).join("");
        $("rest").hidden = false;
      }
      planPlot();
    },
    decision(data) {
      seen.ended = true;
      $("empty").hidden = true;
      showDecision(data);
    },
    timing(data) {
      $("time-upstream").textContent = milliseconds(data.first_text_ms);
      $("time-first").textContent = milliseconds(data.first_shown_ms);
      $("time-median").textContent = milliseconds(data.held_median_ms);
      $("time-longest").textContent = milliseconds(data.held_longest_ms);
    },
    error(data) {
      seen.ended = true;
      fail(data.message);
    },
  };

  function showDecision({ decision, verdict, failure, message, about }) {
    const action = decision.action;
    const words = { allow: "Allow", warn: "Warn", review: "Review", redact: "Redact", block: "Block" };
    const meaning = { allow: "", warn: "Passes, with a mark.", review: "Passes, and a person looks at it.", redact: "Passes, with personal data masked." };
    $("decision").dataset.action = action;
    $("decision-title").textContent = `Decision on the ${about}`;
    $("action").textContent = words[action] ?? action;
    $("why").textContent = failure ? `The guard failed: ${failure.message}` : meaning[action] ?? message;
    $("rule").textContent = decision.rule;
    $("policy-version").textContent = `${decision.policy} ${decision.policy_version}`;
    $("verdict").textContent = verdict ? `${verdict.severity}, not safe ${percent(flagged(verdict))}` : "none";
    $("category").textContent = verdict?.categories.join(", ") || "none named";
    $("advice-row").hidden = decision.advice.length === 0;
    $("advice").textContent = decision.advice.join(", ").replaceAll("_", " ");
    $("decision-facts").hidden = false;
    const shown = plural(seen.shown, "character");
    if (action === "block" && about === "prompt") {
      say("stopped", "The prompt was stopped; no answer was shown");
      $("cut").hidden = false;
      $("cut").textContent = "The prompt was blocked: no answer was let through";
    } else if (action === "block") say("stopped", `Stopped after ${shown}`);
    else if (failure) say("noticed", `Passed unjudged after ${shown}, as the policy says`);
    else if (action === "redact") say("noticed", `Passed with personal data masked: ${shown}`);
    else if (action === "allow") say("passed", `Passed whole: ${shown}`);
    else say("noticed", `Passed whole, ${action === "warn" ? "marked" : "for review"}: ${shown}`);
  }

  function say(state, words) {
    answer.dataset.state = state;
    $("state").textContent = words;
  }

  function fail(message) {
    $("empty").hidden = true;
    $("held").hidden = true;
    $("problem").hidden = false;
    $("problem").textContent = message;
    if ($("decision").dataset.action === "none") $("why").textContent = "No decision was made.";
    if ($("prompt-verdict").textContent === "Being judged") $("prompt-verdict").textContent = "Not judged";
    say("failed", "Something went wrong");
  }

  function stoppedByReader() {
    $("why").textContent = "Stopped by you before the end.";
    say("noticed", `You stopped it after ${plural(seen.shown, "character")}`);
  }

  function buttons() {
    $("stop").disabled = running === null;
    $("run").disabled = running !== null;
  }

  function reset() {
    tokens = [];
    chosen = -1;
    cutAt = null;
    seen = { shown: 0, ended: false };
    tokensBox.replaceChildren();
    for (const id of ["cut", "rest", "problem", "held", "inspect-facts", "decision-facts"]) $(id).hidden = true;
    $("empty").hidden = true;
    $("inspect-empty").hidden = false;
    $("decision").dataset.action = "none";
    $("decision-title").textContent = "Decision";
    $("action").textContent = "–";
    $("why").textContent = "Being judged.";
    $("prompt-verdict").dataset.severity = "none";
    $("prompt-verdict").textContent = "Being judged";
    $("prompt-why").textContent = "";
    for (const id of ["time-upstream", "time-first", "time-median", "time-longest"]) $(id).textContent = "–";
    plot();
  }

  // --- tokens ------------------------------------------------------------------------------------------------------

  function addToken(data) {
    const last = tokens.at(-1);
    if (data.length === 0 && last) {
      // one more token of the same character: show the worse of the two
      if (flagged(data) > flagged(last)) Object.assign(last, { probabilities: data.probabilities, severity: data.severity, category: data.category, category_probability: data.category_probability });
      paint(last);
      return;
    }
    const element = document.createElement("span");
    const token = { ...data, element, withheld: data.text === null };
    element.className = token.withheld ? "token withheld" : "token";
    element.textContent = token.withheld ? "\u2007".repeat(Math.min(data.length, 24)) : data.text;
    element.dataset.index = tokens.length;
    if (token.withheld) element.setAttribute("aria-label", `${plural(data.length, "character")} never left`);
    tokens.push(token);
    if (!token.withheld) seen.shown += data.length;
    paint(token);
    const space = token.withheld ? "" : data.text.slice(0, data.text.length - data.text.trimStart().length);
    if (space && space !== data.text) {
      // the space before a word is not tinted
      tokensBox.append(space);
      element.textContent = data.text.trimStart();
    }
    tokensBox.append(element);
  }

  const flagged = (token) => Math.min(1, token.probabilities.controversial + token.probabilities.unsafe);

  function paint(token) {
    token.element.style.setProperty("--p", flagged(token).toFixed(3));
    token.element.dataset.severity = token.severity;
    token.element.title = `not safe ${percent(flagged(token))}${token.category && token.severity !== "safe" ? `, ${token.category}` : ""}`;
  }

  function inspect(index) {
    if (index < 0 || index >= tokens.length) return;
    tokens[chosen]?.element.classList.remove("here");
    chosen = index;
    const token = tokens[index];
    token.element.classList.add("here");
    $("inspect-empty").hidden = true;
    $("inspect-facts").hidden = false;
    $("inspect-text").textContent = token.withheld ? `withheld, ${token.length}` : JSON.stringify(token.text).slice(1, -1);
    for (const name of ["safe", "controversial", "unsafe"]) {
      $(`meter-${name}`).value = token.probabilities[name];
      $(`number-${name}`).textContent = percent(token.probabilities[name]);
    }
    $("inspect-category").textContent = token.category ? `${token.category} ${percent(token.category_probability)}` : "no category";
    here();
  }

  const tokenOf = (event) => event.target.closest?.(".token");

  tokensBox.addEventListener("pointerover", (event) => tokenOf(event) && inspect(Number(tokenOf(event).dataset.index)));
  tokensBox.addEventListener("click", (event) => tokenOf(event) && inspect(Number(tokenOf(event).dataset.index)));
  tokensBox.addEventListener("focus", () => chosen < 0 && inspect(0));
  tokensBox.addEventListener("keydown", (event) => {
    const to = { ArrowRight: chosen + 1, ArrowDown: chosen + 1, ArrowLeft: chosen - 1, ArrowUp: chosen - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    inspect(Math.max(0, Math.min(tokens.length - 1, to)));
    tokens[chosen]?.element.scrollIntoView({ block: "nearest" });
  });

  // --- the plot ----------------------------------------------------------------------------------------------------

  const WIDTH = 320;
  const y = (p) => (124 - 120 * p).toFixed(1);
  const x = (i) => (tokens.length < 2 ? WIDTH / 2 : (i * WIDTH) / (tokens.length - 1));

  function planPlot() {
    if (plotPlanned) return;
    plotPlanned = true;
    requestAnimationFrame(() => {
      plotPlanned = false;
      plot();
    });
  }

  function plot() {
    $("plot-count").textContent = plural(tokens.length, "token");
    if (tokens.length === 0) {
      for (const id of ["plot-area", "plot-line", "plot-cut", "plot-here"]) $(id).setAttribute("d", "");
      $("plot-words").textContent = "No tokens yet.";
      return;
    }
    const points = columns();
    const line = points.map((point) => `${x(point.at).toFixed(1)} ${y(point.unsafe)}`);
    const area = points.map((point) => `${x(point.at).toFixed(1)} ${y(point.flagged)}`);
    if (points.length === 1) {
      line.push(`${WIDTH} ${y(points[0].unsafe)}`);
      area.push(`${WIDTH} ${y(points[0].flagged)}`);
    }
    $("plot-line").setAttribute("d", `M${line.join("L")}`);
    $("plot-area").setAttribute("d", `M${area.join("L")}L${area.at(-1).split(" ")[0]} 124L${area[0].split(" ")[0]} 124Z`);
    $("plot-cut").setAttribute("d", cutAt === null ? "" : `M${x(Math.max(0, cutAt - 0.5)).toFixed(1)} 0V128`);
    const highest = Math.max(...points.map((point) => point.unsafe));
    $("plot-words").textContent = `Probability of unsafe over ${plural(tokens.length, "token")}; highest ${percent(highest)}.`;
    here();
  }

  // At most one point for each unit of width; the worst token of a column stands for it.
  function columns() {
    const step = Math.max(1, Math.ceil(tokens.length / WIDTH));
    const points = [];
    for (let i = 0; i < tokens.length; i += step) {
      const some = tokens.slice(i, i + step);
      points.push({ at: i, unsafe: Math.max(...some.map((token) => token.probabilities.unsafe)), flagged: Math.max(...some.map(flagged)) });
    }
    return points;
  }

  function here() {
    $("plot-here").setAttribute("d", chosen < 0 ? "" : `M${x(chosen).toFixed(1)} 0V128`);
  }

  $("plot").addEventListener("pointermove", (event) => {
    if (tokens.length === 0) return;
    const box = $("plot").getBoundingClientRect();
    inspect(Math.round(((event.clientX - box.left) / box.width) * (tokens.length - 1)));
  });

  // --- keys and buttons --------------------------------------------------------------------------------------------

  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  $("stop").addEventListener("click", stop);
  for (const input of document.querySelectorAll("input[name=mode]")) input.addEventListener("change", changeMode);
  for (const example of document.querySelectorAll(".example")) example.addEventListener("click", () => take(example));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      run();
    } else if (event.key === "Escape" && running) {
      event.preventDefault();
      stop();
    }
  });

  if (/Mac|iPhone|iPad/.test(navigator.platform)) document.querySelector("#run kbd").textContent = "⌘ ⏎";
  showMode();
  page.dataset.ready = "yes";
})();
