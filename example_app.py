"""A room where everybody hears everybody: sse_bouncer in one small Flask app, page included.

Run ``python example_app.py``, open http://127.0.0.1:5000/ in two windows, and use a terminal too:

    curl -N http://127.0.0.1:5000/subscribe
    curl -d Hey http://127.0.0.1:5000/publish

``flask --app example_app run`` and ``gunicorn example_app:app`` serve it as well. With the address
of a Redis in the environment, ``REDIS_URL=redis://localhost``, several processes share one feed.
"""

import os
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from flask import Flask, Response, request

from sse_bouncer import EventBouncer, RedisRelay, format_sse, sse_response

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = 8 * 1024  # bytes; every subscriber gets what one sends
redis_url = os.environ.get("REDIS_URL")
relay = RedisRelay.from_url(redis_url, key="example") if redis_url else None
# A hundred messages, and room for the news about who comes and goes, which are events as well.
bouncer = EventBouncer(history=500, relay=relay)
room_lock = threading.Lock()


@app.get("/")
def page() -> str:
    return PAGE


@app.get("/subscribe")
def subscribe() -> Response:
    """Stream the messages that are kept, then new ones. A browser that reconnects goes on."""
    response = bouncer.stream(last_event_id="earliest", on_close=tell_room)
    tell_room()  # the newcomer is subscribed already, and hears it too
    return response


def tell_room() -> None:
    """Tell everyone how many are in the room: a stream has begun or ended."""
    if relay is None:  # with several processes, each one knows its own streams only
        with room_lock:  # or an older number could overtake a newer one
            bouncer.broadcast(bouncer.stats()["subscribers"], "room")


# Anyone can publish here, and so can any web page open in their browser, because a plain POST may
# cross origins. A real app asks for a login here and checks a CSRF token.
@app.post("/publish")
def publish() -> tuple[str | dict[str, str], int]:
    """Send the request's body to everyone, said by ``?who=NAME``."""
    if not request.content_length:  # Flask would cut a body without a length off at the limit
        return {"error": "expected a body with a length"}, 400
    try:
        text = request.get_data().decode()
    except UnicodeDecodeError as error:
        return {"error": f"expected text in UTF-8: {error}"}, 400
    # By "tab" a page knows its own messages. Everybody gets it, so it proves nothing.
    who, tab = (request.args.get(name, "")[:40] for name in ("who", "tab"))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    bouncer.broadcast({"text": text, "who": who, "tab": tab, "time": now})
    return "", 204


@app.get("/progress")
def progress() -> Response:
    """Stream what a generator yields. It runs in a thread of its own, and holds no worker."""
    return sse_response(stamp_tickets(40), detach=True)


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
<!doctype html> <html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>sse_bouncer</title> <link rel="icon" href="data:,">
<style>
  :root { color-scheme: light dark; scroll-padding-top: 14rem;  /* for the header */
    --wall: light-dark(#f7ece5, #1c1114); --ink: light-dark(#2b1619, #f6e7dc);
    --soft: light-dark(#71504f, #bea29a); --rule: light-dark(#cfb3a7, #573c40);
    --mine: light-dark(#fbdfcf, #34191f); --velvet: light-dark(#94193a, #ff98a6);
    --ticket: #f2b63c; --print: #2b1619 }
  * { box-sizing: border-box; margin: 0 }
  body { background: var(--wall); color: var(--ink); max-width: 76rem; margin: auto;
    padding: 0 clamp(1rem, 4vw, 3rem) 3rem; overflow-wrap: anywhere;
    font: 1.0625rem/1.5 Seravek, "Gill Sans Nova", Ubuntu, Calibri, "DejaVu Sans", sans-serif }
  h1, h2, button { font: bold 1.0625rem/1.2 Rockwell, "Roboto Slab", "DejaVu Serif", serif }
  button, input { color: inherit; background: none; border: 0; border-radius: 0 }
  a, #problem, #work, #state[data-is=lost] { color: var(--velvet) }
  .soft, time { color: var(--soft) }
  .row { display: flex; flex-wrap: wrap; align-items: center; justify-content: space-between }
  header { position: sticky; top: 0; background: var(--wall); padding-top: .75rem;
    border-bottom: 2px dashed var(--rule) }
  #state::before { content: ""; display: inline-block; width: 1rem; height: 1rem;
    margin-right: .5rem; border: 2px solid; border-radius: 50%; vertical-align: -.125rem }
  #state[data-is=live]::before { background: var(--ticket) }
  form { display: grid; grid-template-columns: minmax(0, 1fr) 5rem; margin: .75rem 0 .25rem;
    color: var(--print); background: var(--ticket); mask-size: 100% .85rem;
    mask-composite: intersect; mask-image: radial-gradient(circle .25rem at 0, #0000 92%, #000),
      radial-gradient(circle .25rem at 100%, #0000 92%, #000) }
  label { margin: .375rem 1rem; font-size: .875rem }
  input { width: 100%; height: 2rem; border-bottom: 2px solid; font: inherit; font-size: 1.0625rem }
  form button { grid-area: 1 / -2 / span 2; border-left: 2px dashed }
  form :focus-visible { outline: 3px solid var(--print); outline-offset: -3px }
  #note { min-height: 1.5em }  /* "Not sent" takes the place of the count, and moves nothing */
  #problem:not(:empty) + #count { display: none }
  article, #feed > p, main > p { border-bottom: 2px dashed var(--rule); padding: .5rem .75rem }
  .mine { background: var(--mine); box-shadow: inset .25rem 0 var(--velvet) }
  article p + p { white-space: pre-wrap }
  #feed:not(:empty) + p { display: none }
  aside h2, #work { margin: .75rem 0 }
  #work { border: 2px solid; min-width: 5rem; padding: .5rem }
  progress { appearance: none; width: 100%; height: 1.5rem; margin-top: .75rem; border: 0;
    mask: linear-gradient(90deg, #000 calc(100% - 2px), #0000 0) 0 0 / calc((100% + 2px) / 40) }
  progress, ::-webkit-progress-bar { background: var(--rule) }
  ::-webkit-progress-value { background: var(--velvet) }
  ::-moz-progress-bar { background: var(--velvet) }
  pre { overflow-x: auto; font: .8125rem/2 ui-monospace, Consolas, monospace }
  @media (max-height: 30rem) { header { position: static } }
  @media (min-width: 64rem) {
    body { display: grid; grid-template: auto 1fr / minmax(0, 1fr) 25rem; column-gap: 3rem }
    aside { grid-area: 1 / 2 / span 2; position: sticky; top: 0; align-self: start }
    form { grid-template-columns: 12rem minmax(0, 1fr) 6rem }
  }
</style>
<header>
  <div class="row"><h1>sse_bouncer</h1> <b id="state" role="status">Connecting</b></div>
  <form id="form">
    <label>Name <input id="who" maxlength="40" autocomplete="nickname"></label>
    <label>Message <input id="text" maxlength="1000" autocomplete="off" required></label>
    <button>Send</button>
  </form>
  <p id="note"><span id="problem" role="alert"></span><span id="count" class="soft"></span></p>
</header>
<main> <noscript>This page needs JavaScript.</noscript>
  <div id="feed" role="log" aria-label="Messages"></div>
  <p class="soft">Nothing has been said yet. Write something, and
    <a href="" target="_blank">open a second window</a> to see it arrive there.</p>
  <template id="entry"><article><p class="row"><b dir="auto"></b> <time></time></p>
    <p dir="auto"></p></article></template>
</main>
<aside>
  <div class="row"><h2 id="job">Stamp forty tickets</h2> <button id="work">Start</button></div>
  <progress id="bar" value="0" max="1" aria-labelledby="job"></progress>
  <p class="soft"><span id="step">A generator, one event a step.</span>
    <span id="outcome" role="status"></span></p>
  <h2>From a terminal</h2>
  <pre tabindex="0" role="region" aria-label="Commands">curl -N <span>subscribe</span>
curl -d Hey <span>publish</span>
curl -d Hi "<span>publish?who=Ada</span>"</pre>
</aside>
<script type="module">
  const at = (id) => document.getElementById(id);
  const me = sessionStorage.tab ??= Math.random().toString(36).slice(2);

  // The URLs are relative, so that the app also works below a prefix.
  function connect() {
    const newest = at("feed").firstElementChild?.id ?? "";
    const source = new EventSource(`subscribe?lastEventId=${newest}`);
    source.onopen = () => show("live", "Live");
    source.onerror = () => {
      show("lost", "Connecting");
      // After an error page, perhaps from a proxy, the browser does not try again.
      if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
    };
    source.onmessage = add;
    source.addEventListener("room", ({ data }) => at("count").textContent = `${data} in the room`);
    // Something that this page missed is no longer kept. All that is kept comes next.
    source.addEventListener("gap", () => document.querySelector("article:first-child")
      ?.insertAdjacentHTML("beforebegin", "<p class=soft>Something may be missing here.</p>"));
  }

  function show(state, text) {
    at("state").dataset.is = state;
    at("state").textContent = text;
    at(state === "live" ? "problem" : "count").textContent = "";
  }

  function add({ data, lastEventId }) {
    if (at(lastEventId)) return;  // what is kept comes again after a gap
    const { text, who, tab, time } = JSON.parse(data);
    const entry = at("entry").content.cloneNode(true).firstElementChild;
    const [name, clock, said] = entry.querySelectorAll("b, time, p + p");
    entry.id = lastEventId;
    entry.classList.toggle("mine", tab === me);
    // Never as HTML: others wrote it.
    name.textContent = (who || "Someone") + (tab === me ? " (you)" : "");
    said.textContent = text;
    clock.dateTime = time;
    clock.textContent = new Date(time).toLocaleString([],
      { weekday: "short", hour: "numeric", minute: "2-digit" });
    at("feed").prepend(entry);
    if (at("feed").childElementCount > 600) at("feed").lastChild.remove();  // more than is kept
  }

  at("form").onsubmit = async (event) => {
    event.preventDefault();
    const text = at("text").value;
    const query = new URLSearchParams({ who: at("who").value.trim(), tab: me });
    const reply = await fetch(`publish?${query}`, { method: "POST", body: text }).catch(() => null);
    const why = reply ? `the server said ${reply.status}` : "the server is away";
    at("problem").textContent = reply?.ok ? "" : `Not sent: ${why}.`;
    if (reply?.ok && at("text").value === text) at("text").value = "";
  };

  let work = null;
  at("work").onclick = () => {
    if (work) return finish("Stopped.");
    work = new EventSource("progress");
    work.onmessage = ({ data }) => {
      const { stamped, total } = JSON.parse(data);
      Object.assign(at("bar"), { max: total, value: stamped });
      at("step").textContent = `${stamped} of ${total}.`;
    };
    work.addEventListener("done", ({ data }) => finish(data));
    work.onerror = () => finish("Interrupted.");
    at("work").textContent = "Stop";
    at("step").textContent = at("outcome").textContent = "";
  };
  function finish(outcome) {
    work.close();  // or the browser asks for it again
    work = null;
    at("work").textContent = "Start";
    at("outcome").textContent = outcome;
  }

  for (const url of document.querySelectorAll("pre span")) url.prepend(new URL(".", location));
  connect();
</script>
"""

if __name__ == "__main__":
    app.run()
