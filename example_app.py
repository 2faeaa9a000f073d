"""A room where everybody hears everybody: sse_bouncer in one small Flask app.

Start it with ``python example_app.py`` and open http://127.0.0.1:5000/, or try these two:

    curl -N http://127.0.0.1:5000/subscribe
    curl -X POST http://127.0.0.1:5000/publish -d "Hey!"

``flask --app example_app run`` and ``gunicorn example_app:app`` serve it as well. With the address
of a Redis in the environment, ``REDIS_URL=redis://localhost``, any number of them share one feed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from flask import Flask, Response, jsonify, request

from sse_bouncer import EventBouncer, RedisRelay, format_sse, sse_response

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = 16 * 1024  # bytes; what one sends, everybody gets
relay = None
if url := os.environ.get("REDIS_URL"):
    import redis

    relay = RedisRelay(redis.Redis.from_url(url), key="example")
bouncer = EventBouncer(history=100, relay=relay)


@app.get("/")
def page() -> str:
    """Show it all in a browser."""
    return PAGE


@app.get("/subscribe")
def subscribe() -> Response:
    """Stream what is published from now on."""
    return bouncer.stream()


# Whoever can reach this route can publish, and so can any web page open in their browser, since a
# plain POST crosses origins unasked. A real app asks for a login here, and checks a CSRF token.
@app.post("/publish")
def publish() -> tuple[str | dict[str, str], int]:
    """Send the request's body to every subscriber, ``?event=NAME`` as an event of that name."""
    # A body that comes in chunks has no length: Flask would cut it at the limit without a word.
    if not request.content_length:
        return {"error": "expected a message as the request's body, with its Content-Length"}, 400
    try:
        bouncer.broadcast(request.get_data(), request.args.get("event"))
    except ValueError as error:  # a body that is not UTF-8, a name with a line end in it
        return {"error": str(error)}, 400
    return "", 204


@app.get("/progress")
def progress() -> Response:
    """Stream the result of a generator: one event for each step of some work."""
    return sse_response(stamp_tickets(40))


def stamp_tickets(total: int) -> Iterator[object]:
    for stamped in range(total):
        yield {"stamped": stamped, "total": total}
        time.sleep(0.1)  # the work
    # A browser connects again when a stream ends, so tell it in an event of its own to close.
    yield format_sse({"stamped": total, "total": total}, event="done")


@app.get("/stats")
def stats() -> Response:
    """Count the subscribers, and more, as JSON."""
    return jsonify(bouncer.stats())


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>sse_bouncer</title>
<link rel="icon" href="data:image/svg+xml,
  <svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>
  <path fill='%23f2b63c' d='M0 3h16v3a2 2 0 0 0 0 4v3H0v-3a2 2 0 0 0 0-4z'/></svg>">
<style>
  :root {
    --wall: #f7ece5; --ink: #2b1619; --soft: #71504f; --rule: #cfb3a7; --velvet: #94193a;
    --ticket: #f2b63c; --print: #2b1619; --line: #2b16198c;
    --slab: Rockwell, "Rockwell Nova", "Roboto Slab", "DejaVu Serif", "Sitka Small", serif;
    --sans: Seravek, "Gill Sans Nova", Ubuntu, Calibri, "DejaVu Sans", source-sans-pro, sans-serif;
    --mono: ui-monospace, "Cascadia Code", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  }
  @media (prefers-color-scheme: dark) {
    :root {
      --wall: #1c1114; --ink: #f6e7dc; --soft: #bea29a; --rule: #573c40; --velvet: #ff98a6;
      --ticket: #eeb038;
    }
  }
  * { box-sizing: border-box; margin: 0; }
  body {
    background: var(--wall); color: var(--ink); font: 1.0625rem/1.5 var(--sans);
    max-width: 76rem; margin: auto; padding: 1.5rem clamp(1rem, 4vw, 3rem);
  }
  h1, h2, button { font-family: var(--slab); font-weight: bold; line-height: 1.15; }
  h1 { font-size: 2.5rem; letter-spacing: -.03em; }
  h2 { font-size: 1.0625rem; }
  code { font: .875rem/1.6 var(--mono); }
  button, input { color: inherit; background: none; border: 0; border-radius: 0; }
  button { font-size: 1rem; cursor: pointer; }
  :focus-visible { outline: 3px solid var(--velvet); outline-offset: 3px; }
  main:focus-visible { outline-offset: -3px; }
  .row { display: flex; align-items: center; justify-content: space-between; gap: 1rem; }
  .soft { color: var(--soft); }

  .now { align-items: baseline; margin: 1.25rem 0; }
  #count { font: bold 1.5rem/1 var(--slab); margin-right: .25rem; }
  #state { font-weight: bold; }
  #state::before {
    content: ""; display: inline-block; width: 1rem; height: 1rem; margin-right: .5rem;
    border: 2px solid; border-radius: 50%; vertical-align: -.125rem;
  }
  #state[data-is=live]::before { background: var(--ticket); }
  #state[data-is=lost] { color: var(--velvet); }

  .ticket { display: grid; grid-template-columns: 1fr 5rem; color: var(--print); }
  .ticket > * {
    background: var(--ticket); padding: 1.25rem 1.5rem;
    mask: radial-gradient(circle .55rem at var(--seam) 0, #0000 96%, #000),
      radial-gradient(circle .55rem at var(--seam) 100%, #0000 96%, #000),
      radial-gradient(circle .25rem at var(--edge) 50%, #0000 92%, #000) 0 0 / 100% .85rem round;
    mask-composite: intersect;
  }
  .ticket > div { --seam: 100%; --edge: 0; border-right: 2px dashed var(--line); }
  .ticket > button { --seam: 0; --edge: 100%; padding: 0; font-size: 1.5rem; }
  .ticket button span { writing-mode: vertical-rl; letter-spacing: .08em; }
  .ticket button:focus-visible { outline-color: var(--print); outline-offset: -.75rem; }
  .ticket p { font: bold .875rem var(--slab); }
  .ticket label { display: block; font-size: .875rem; margin-top: .75rem; }
  .ticket input {
    font: inherit; width: 100%; padding: .3rem 0; border-bottom: 2px solid var(--line);
  }
  .ticket input:focus { outline: 0; border-color: var(--print); box-shadow: 0 2px var(--print); }

  #problem { color: var(--velvet); padding: .625rem 0; }
  .row button { border: 2px solid; min-width: 6rem; padding: .6rem; color: var(--velvet); }
  .row button:hover { background: var(--velvet); border-color: var(--velvet); color: var(--wall); }
  section { border-top: 2px dashed var(--rule); padding: 1.25rem 0; }
  progress {
    appearance: none; display: block; width: 100%; height: 1.75rem; margin: 1rem 0 .25rem;
    border: 0; background: var(--rule); color: var(--velvet);
    mask: linear-gradient(90deg, #000 calc(100% - 2px), #0000 0) 0 0 / calc((100% + 2px) / 40);
  }
  ::-webkit-progress-bar { background: var(--rule); }
  ::-webkit-progress-value { background: var(--velvet); }
  ::-moz-progress-bar { background: var(--velvet); }

  main {
    margin: 1.25rem -.5rem 0; padding: 0 .5rem 3rem; max-height: 65vh; overflow: auto;
    scrollbar-color: var(--rule) #0000;
    mask: linear-gradient(#000 calc(100% - 3rem), #0000);
  }
  article { padding: .9rem 0; border-top: 2px dashed var(--rule); overflow-wrap: anywhere; }
  article b { display: block; }
  article p { white-space: pre-wrap; }
  article code { display: block; margin-top: .25rem; user-select: all; }
  article time {
    float: right; margin-left: 1rem; color: var(--soft); font: .8125rem/1.8 var(--mono);
  }
  .cheer p { color: var(--velvet); font: italic bold 1.25rem/1.5 var(--slab); }
  #feed:not(:empty) + #empty { display: none; }
  #empty h2 { font-size: 1.75rem; line-height: 2.75rem; }
  #empty > p { margin-bottom: 1.25rem; }

  @media (min-width: 56rem) {
    body {
      display: grid; grid: "door feed" auto "work feed" 1fr / 25rem 1fr; gap: 1.25rem 4rem;
      min-height: 100vh; padding-block: 0;
    }
    header { padding-top: 4rem; }
    section { grid-area: work; }
    main {
      grid-area: feed; position: sticky; top: 0; height: 100vh; max-height: none;
      margin-top: 0; padding-block: 4rem;
    }
    #feed article:first-child { border: 0; padding-top: .5rem; }
  }
  @media (prefers-reduced-motion: no-preference) {
    .ticket > button { transition: transform .15s; transform-origin: 0 100%; }
    .ticket > button:hover { transform: rotate(2deg); }
    .ticket > button:active { transform: rotate(5deg) translateX(3px); }
    #feed article { animation: arrive .4s ease-out; }
    @keyframes arrive { from { opacity: 0; transform: translateY(-.75rem); } }
  }
</style>

<header>
  <h1>sse_bouncer</h1>
  <p class="soft">One says it, the whole room hears it.</p>
  <noscript>This page needs JavaScript.</noscript>
  <div class="now row">
    <span id="state" role="status">Connecting</span>
    <span><b id="count">–</b> in the room</span>
  </div>
  <form id="form" class="ticket">
    <div>
      <p class="row"><span>Admit one</span> <span>No <span id="serial">–</span></span></p>
      <label for="who">Your name</label>
      <input id="who" maxlength="40" autocomplete="nickname">
      <label for="text">Message</label>
      <input id="text" maxlength="1000" autocomplete="off" required>
    </div>
    <button><span>Send</span></button>
  </form>
  <p id="problem" role="alert"></p>
  <div class="row">
    <p><b>Nothing to say?</b> <span class="soft">Send an event named <code>cheer</code>.</span></p>
    <button id="cheer">Cheer</button>
  </div>
</header>

<main tabindex="0" aria-label="Messages">
  <div id="feed" role="log"></div>
  <div id="empty">
    <h2>Quiet so far</h2>
    <p>Fill in the ticket, or open a terminal.</p>
    <article>
      <b>Listen</b> <code>curl -N <span>subscribe</span></code>
    </article>
    <article>
      <b>Speak</b> <code>curl -X POST <span>publish</span> -d "Hey!"</code>
    </article>
    <article>
      <b>Cheer</b> <code>curl -X POST "<span>publish?event=cheer</span>" -d "Ada"</code>
    </article>
  </div>
</main>

<section>
  <div class="row">
    <h2><label for="bar">Stamp forty tickets</label></h2>
    <button id="work">Start</button>
  </div>
  <progress id="bar" value="0" max="1"></progress>
  <p class="soft"><span id="step">A generator on the server, one event a step.</span>
    <output id="outcome"></output></p>
</section>

<script type="module">
  const at = (id) => document.getElementById(id);
  const make = (tag, textContent) =>
    Object.assign(document.createElement(tag), { textContent, dir: "auto" });

  // The stream. Its URL is relative, as all are here, so that the app also works below a prefix.
  function connect() {
    const source = new EventSource("subscribe");
    source.onopen = () => show("live");
    source.onerror = () => {
      if (source.readyState === EventSource.OPEN) return;  // someone sent an event named "error"
      show("lost");
      // The browser itself tries again, except after an error page, which a proxy may have sent.
      if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
    };
    source.onmessage = (event) => {
      const { who, text } = read(event.data);
      add(event.type, make("b", who), make("p", text));
    };
    source.addEventListener("cheer", (event) => {
      add(event.type, make("p", `★ ${event.data} cheers`));
    });
  }

  function show(state) {
    at("state").dataset.is = state;
    at("state").textContent = state === "live" ? "Live" : "Lost, trying again";
    refresh();
  }

  // The form sends JSON; from curl comes any text.
  function read(data) {
    try {
      const { who, text } = JSON.parse(data);
      if (typeof who === "string" && typeof text === "string") return { who, text };
    } catch { /* not JSON */ }
    return { who: "Someone", text: data };
  }

  // What others wrote becomes textContent, never HTML.
  function add(type, ...parts) {
    const entry = make("article", "");
    entry.className = type;
    const time = new Date().toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    entry.append(make("time", time), ...parts);
    at("feed").prepend(entry);
    if (at("feed").childElementCount > 200) at("feed").lastChild.remove();
  }

  async function publish(path, body) {
    const answer = await fetch(path, { method: "POST", body }).catch(() => null);
    const said = answer ? `the server answered ${answer.status}` : "the server does not answer";
    at("problem").textContent = answer?.ok ? "" : `Not sent: ${said}.`;
    refresh();
    return answer?.ok;
  }

  const me = () => at("who").value.trim() || "Someone";
  at("form").onsubmit = async (event) => {
    event.preventDefault();
    const text = at("text").value;
    at("text").value = "";
    at("text").focus();
    if (!await publish("publish", JSON.stringify({ who: me(), text }))) at("text").value ||= text;
  };
  at("cheer").onclick = () => publish("publish?event=cheer", me());

  // Long work: a stream of its own. Left open at its end, the browser would ask for it again.
  let work = null;
  at("work").onclick = () => {
    if (work) return finish("Stopped.");
    work = new EventSource("progress");
    at("work").textContent = "Stop";
    at("outcome").textContent = "";
    const step = (event) => {
      const { stamped, total } = JSON.parse(event.data);
      at("bar").max = total;
      at("bar").value = stamped;
      at("step").textContent = `${stamped} of ${total}.`;
    };
    work.onmessage = step;
    work.addEventListener("done", (event) => { step(event); finish("All stamped."); });
    work.onerror = () => finish("Interrupted.");
  };
  function finish(outcome) {
    work.close();
    work = null;
    at("work").textContent = "Start";
    at("outcome").textContent = outcome;
  }

  async function refresh() {
    const stats = await fetch("stats", { signal: AbortSignal.timeout(2500) })
      .then((answer) => answer.json()).catch(() => null);
    at("count").textContent = stats ? stats.subscribers : "–";
    at("serial").textContent = stats ? String(stats.broadcasts + 1).padStart(4, "0") : "–";
  }
  setInterval(() => document.hidden || refresh(), 3000);

  for (const url of document.querySelectorAll("code span")) {
    url.textContent = new URL(url.textContent, location);
  }
  connect();
</script>
"""

if __name__ == "__main__":
    app.run()
