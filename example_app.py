"""A room where everybody hears everybody: sse_bouncer in one small Flask app, page included.

Run ``python example_app.py``, open http://127.0.0.1:5000/ in two windows, and use a terminal too:

    curl -N http://127.0.0.1:5000/subscribe
    curl -d Hey http://127.0.0.1:5000/publish

``flask --app example_app run`` and ``gunicorn example_app:app`` serve it as well. With the address
of a Redis in the environment, ``REDIS_URL=redis://localhost``, several processes share one feed.
"""

import os
import time
from collections.abc import Iterator

from flask import Flask, Response, request

from sse_bouncer import EventBouncer, RedisRelay, format_sse, sse_response

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = 16 * 1024  # bytes; every subscriber gets what one sends
relay = None
if url := os.environ.get("REDIS_URL"):
    import redis

    relay = RedisRelay(redis.Redis.from_url(url), key="example")
bouncer = EventBouncer(history=100, relay=relay)


@app.get("/")
def page() -> str:
    return PAGE


@app.get("/subscribe")
def subscribe() -> Response:
    """Stream the messages that are kept, then new ones. A browser that reconnects goes on."""
    return bouncer.stream(last_event_id="earliest")


# Anyone can publish here, and so can any web page open in their browser, because a plain POST may
# cross origins. A real app asks for a login here and checks a CSRF token.
@app.post("/publish")
def publish() -> tuple[str | dict[str, str], int]:
    """Send the request's body to every subscriber, ``?event=NAME`` as an event of that name."""
    event = request.args.get("event", "")
    # Flask would cut a body without a length off at the limit. A "gap" would reload all feeds.
    if not request.content_length or event not in ("", "chat", "cheer"):
        return {"error": "expected a body with a length, and event chat, cheer or none"}, 400
    try:
        bouncer.broadcast(request.get_data(), event)
    except ValueError as error:  # the body is not UTF-8
        return {"error": str(error)}, 400
    return "", 204


@app.get("/progress")
def progress() -> Response:
    """Stream what a generator yields. Unlike the feed, this holds a worker until it ends."""
    return sse_response(stamp_tickets(40))


def stamp_tickets(total: int) -> Iterator[object]:
    for stamped in range(total + 1):
        yield {"stamped": stamped, "total": total}
        time.sleep(0.1)  # the work
    # A browser reconnects when a stream ends, so the last event tells the page to close it.
    yield format_sse("All stamped.", event="done")


@app.get("/stats")
def stats() -> dict[str, int]:
    """Count the subscribers of this process, and more."""
    return bouncer.stats()


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sse_bouncer</title> <link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; scroll-padding-top: 6rem;  /* for the header */
    --wall: light-dark(#f7ece5, #1c1114); --ink: light-dark(#2b1619, #f6e7dc);
    --soft: light-dark(#71504f, #bea29a); --rule: light-dark(#cfb3a7, #573c40);
    --velvet: light-dark(#94193a, #ff98a6); --ticket: #f2b63c; --print: #2b1619 }
  * { box-sizing: border-box; margin: 0 }
  body { background: var(--wall); color: var(--ink); max-width: 76rem; margin: auto;
    padding: 0 clamp(1rem, 4vw, 3rem) 3rem; overflow-wrap: anywhere;
    font: 1.0625rem/1.5 Seravek, "Gill Sans Nova", Ubuntu, Calibri, "DejaVu Sans", sans-serif }
  h1, h2, button, #count { font: bold 1.0625rem/1.2 Rockwell, "Roboto Slab", "DejaVu Serif", serif }
  h1 { font-size: clamp(1.5rem, 4vw, 2.5rem); letter-spacing: -.03em }
  code { display: block; font: .875rem/1.6 ui-monospace, Consolas, monospace; user-select: all }
  button, input { color: inherit; background: none; border: 0; border-radius: 0 }
  .row { display: flex; align-items: center; justify-content: space-between; gap: .75rem }
  .row button { border: 2px solid var(--velvet); min-width: 5rem; padding: .5rem }
  .soft { color: var(--soft) }

  header { position: sticky; top: 0; z-index: 1; background: var(--wall) }
  header, main { display: grid; gap: 0 4rem }
  header, article { border-bottom: 2px dashed var(--rule); padding: .75rem 0 }
  section, details { border-top: 2px dashed var(--rule); padding: .75rem 0; margin-top: .75rem }
  #count, form button { font-size: 1.5rem }
  #state::before { content: ""; display: inline-block; width: 1rem; height: 1rem;
    margin-right: .5rem; border: 2px solid; border-radius: 50%; vertical-align: -.125rem }
  #state[data-is=live]::before { background: var(--ticket) }
  #state[data-is=lost], #problem, .row button, b:has(+ p:empty) { color: var(--velvet) }

  main { row-gap: 1.5rem; padding-top: 1.25rem }
  @media (min-width: 56rem) {
    header, main { grid-template-columns: 25rem minmax(0, 1fr) }
    main > :first-child { align-self: start; position: sticky; top: min(5.75rem, 100vh - 38rem) }
  }
  form { display: grid; grid-template-columns: 1fr 4.5rem; margin: .75rem 0; color: var(--print);
    background: var(--ticket); mask-size: 100% .85rem; mask-composite: intersect;
    mask-image: radial-gradient(circle .25rem at 0, #0000 92%, #000),
      radial-gradient(circle .25rem at 100%, #0000 92%, #000) }
  form label { grid-column: 1; margin: 1rem 1.5rem }
  form input { font: inherit; width: 100%; padding: .25rem; border-bottom: 2px solid #0009 }
  form button { grid-area: 1 / 2 / 3; border-left: 2px dashed #0009; writing-mode: vertical-rl }
  form :focus-visible { outline: 3px solid var(--print); outline-offset: -3px }
  progress { appearance: none; width: 100%; height: 1.5rem; margin-top: .75rem; border: 0;
    mask: linear-gradient(90deg, #000 calc(100% - 2px), #0000 0) 0 0 / calc((100% + 2px) / 40) }
  progress, ::-webkit-progress-bar { background: var(--rule) }
  ::-webkit-progress-value { background: var(--velvet) }
  ::-moz-progress-bar { background: var(--velvet) }
  article p { white-space: pre-wrap }
  #feed:not(:empty) + p { display: none }
  @media (hover: hover) { .row button:hover { background: var(--velvet); color: var(--wall) } }
</style>

<header>
  <h1>sse_bouncer</h1>
  <p class="row"><b id="state" role="status">Connecting</b>
    <span><b id="count">–</b> in the room</span></p>
</header>
<main>
  <div>
    <p class="soft">One says it, the whole room hears it.</p>
    <noscript>This page needs JavaScript.</noscript>
    <form id="form">
      <label>Your name <input id="who" maxlength="40" autocomplete="nickname"></label>
      <label>Message <input id="text" maxlength="1000" autocomplete="off" required></label>
      <button>Send</button>
    </form>
    <p id="problem" role="alert"></p>
    <div class="row"><p>Nothing to say?</p> <button id="cheer">Cheer</button></div>
    <section>
      <div class="row"><h2 id="job">Stamp forty tickets</h2> <button id="work">Start</button></div>
      <progress id="bar" value="0" max="1" aria-labelledby="job"></progress>
      <p id="outcome" class="soft">A generator on the server, one event a step.</p>
    </section>
    <details><summary>From a terminal</summary>
      <code>curl -N <span>subscribe</span></code>
      <code>curl -d Hey <span>publish</span></code>
      <code>curl -d Ada "<span>publish?event=cheer</span>"</code></details>
  </div>
  <div>
    <h2>Messages</h2>
    <div id="feed" role="log"></div>
    <p class="soft">Quiet so far. Fill in the ticket, or use a terminal.</p>
    <template id="entry"><article><b dir="auto"></b><p dir="auto"></p></article></template>
  </div>
</main>

<script type="module">
  const at = (id) => document.getElementById(id);

  // The URLs are relative, so that the app also works below a prefix.
  function connect() {
    const source = new EventSource("subscribe");
    // A new stream begins with all that is kept, so the feed starts anew. When the browser
    // reconnects by itself, it is the same EventSource, and gets what it missed.
    source.addEventListener("open", () => at("feed").replaceChildren(), { once: true });
    source.onopen = () => show("live", "Live");
    source.onerror = () => {
      show("lost", "Reconnecting");
      // After an error page, perhaps from a proxy, the browser does not try again.
      if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
    };
    // Something that this page missed is no longer kept: load the feed again.
    source.addEventListener("gap", () => { source.close(); connect(); });
    source.addEventListener("chat", ({ data }) => add(JSON.parse(data)));
    source.addEventListener("cheer", ({ data }) => add({ who: `★ ${data} cheers`, text: "" }));
    source.onmessage = ({ data }) => add({ who: "Someone", text: data });
  }

  function show(state, text) {
    at("state").dataset.is = state;
    at("state").textContent = text;
    if (state === "live") at("problem").textContent = "";
    count();
  }

  async function count() {
    const stats = await fetch("stats").then((reply) => reply.json()).catch(() => null);
    at("count").textContent = stats ? stats.subscribers : "–";
  }

  function add({ who, text }) {
    const entry = at("entry").content.cloneNode(true);
    entry.querySelector("b").textContent = who;  // never as HTML: others wrote it
    entry.querySelector("p").textContent = text;
    at("feed").prepend(entry);
    if (at("feed").childElementCount > 200) at("feed").lastChild.remove();
  }

  async function publish(event, body) {
    const reply = await fetch(`publish?event=${event}`, { method: "POST", body }).catch(() => null);
    const why = reply ? `the server answered ${reply.status}` : "the server does not answer";
    at("problem").textContent = reply?.ok ? "" : `Not sent: ${why}.`;
    return reply?.ok;
  }
  const me = () => at("who").value.trim() || "Someone";
  at("cheer").onclick = () => publish("cheer", me());
  at("form").onsubmit = async (event) => {
    event.preventDefault();
    const said = { who: me(), text: at("text").value };
    at("text").value = "";
    if (!await publish("chat", JSON.stringify(said))) at("text").value ||= said.text;
  };

  let work = null;
  at("work").onclick = () => {
    if (work) return finish("Stopped.");
    work = new EventSource("progress");
    work.onmessage = ({ data }) => {
      const { stamped, total } = JSON.parse(data);
      Object.assign(at("bar"), { max: total, value: stamped });
      at("outcome").textContent = `${stamped} of ${total}.`;
    };
    work.addEventListener("done", ({ data }) => finish(data));
    work.onerror = () => finish("Interrupted.");
    at("work").textContent = "Stop";
  };
  function finish(outcome) {
    work = work.close();  // or the browser asks for it again
    at("work").textContent = "Start";
    at("outcome").textContent = outcome;
  }

  setInterval(() => document.hidden || count(), 3000);
  for (const url of document.querySelectorAll("code span")) url.prepend(new URL(".", location));
  connect();
</script>
"""

if __name__ == "__main__":
    app.run()
