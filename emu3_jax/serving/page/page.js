"use strict";
// The page of `emu3-jax serve`. Text of the server is only ever set as text, never as HTML.
const $ = (id) => document.getElementById(id);
let stopper = null;

function say(text) { $("error").textContent = text; }

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  if (options.body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  let message = `The server answered ${answer.status}.`;
  try { message = (await answer.json()).error.message; } catch { /* not JSON */ }
  if (answer.status === 401) { $("key-form").hidden = false; $("key").focus(); }
  throw new Error(message);
}

const post = (path, body, signal) => ask(path, { method: "POST", body: JSON.stringify(body), signal });

// Calls `take` with the JSON of each event of a stream.
async function events(answer, take) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((one) => one.startsWith("data: "));
      if (!line || line === "data: [DONE]") continue;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new Error(data.error.message);
      take(data);
    }
  }
}

// Runs a form: its button is off meanwhile, and an error is shown in one line.
function onSubmit(form, work) {
  $(form).addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = $(form).querySelector("button:not([type=button])");
    button.disabled = true;
    say("");
    try { await work(); } catch (error) { if (error.name !== "AbortError") say(error.message); }
    button.disabled = false;
  });
}

const dataUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(new Error("The file cannot be read."));
  reader.readAsDataURL(file);
});

const shown = (event) => `data:image/${event.output_format};base64,${event.b64_json}`;

function remember(source, metadata) {
  const item = document.createElement("li"), image = document.createElement("img"), list = document.createElement("dl");
  image.src = source;
  image.alt = metadata.prompt || "picture";
  for (const [name, value] of Object.entries(metadata)) {
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    list.append(term, text);
  }
  item.append(image, list);
  $("past").prepend(item);
  if ($("past").children.length > 100) $("past").lastChild.remove();
}

onSubmit("draw-form", async () => {
  const body = {
    prompt: $("prompt").value, negative_prompt: $("negative").value, ratio: $("ratio").value,
    guidance_scale: Number($("guidance").value), stream: true, partial_images: 100,
  };
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  stopper = new AbortController();
  $("stop").disabled = false;
  $("progress").textContent = "Waiting for a free row";
  try {
    await events(await post("/v1/images/generations", body, stopper.signal), (event) => {
      $("picture").hidden = false;
      $("picture").src = shown(event);
      $("picture").alt = body.prompt;
      if (event.type.endsWith("partial_image")) {
        $("progress").textContent = `${event.rows} of ${event.size.split("x")[1]} pixel rows`;
      } else {
        $("progress").textContent = `Done, ${event.size}, seed ${event.metadata.seed}`;
        remember(shown(event), event.metadata);
      }
    });
  } catch (error) {
    $("progress").textContent = error.name === "AbortError" ? "Stopped" : "";
    throw error;
  } finally { $("stop").disabled = true; }
});
$("stop").addEventListener("click", () => stopper && stopper.abort());

onSubmit("ask-form", async () => {
  const url = await dataUrl($("ask-file").files[0]), text = $("question").value;
  const content = [{ type: "image_url", image_url: { url } }, { type: "text", text }];
  const asked = document.createElement("p"), answer = document.createElement("p");
  asked.textContent = `You: ${text}`;
  answer.textContent = "Model: ";
  $("answers").append(asked, answer);
  const body = { messages: [{ role: "user", content }], stream: true };
  await events(await post("/v1/chat/completions", body), (chunk) => {
    for (const choice of chunk.choices) answer.textContent += choice.delta.content || "";
  });
});

onSubmit("codes-form", async () => {
  const answer = await (await post("/v1/reconstructions", { image: await dataUrl($("codes-file").files[0]) })).json();
  $("again").hidden = false;
  $("again").src = shown(answer);
  $("again").alt = "The picture, decoded from its codes";
  $("again-text").textContent = `${answer.codes.length} rows of ${answer.codes[0].length} codes, ${answer.size} pixels`;
  $("codes-text").textContent = answer.codes.map((row) => row.join(" ")).join("\n");
});

onSubmit("clip-form", async () => {
  const body = { prompt: $("clip-prompt").value, frames: Number($("frames").value) };
  let video = await (await post("/v1/videos", body)).json();
  while (video.status === "queued" || video.status === "in_progress") {
    $("clip-progress").textContent = `${video.progress}%`;
    await new Promise((resolve) => setTimeout(resolve, 500));
    video = await (await ask(`/v1/videos/${video.id}`)).json();
  }
  $("clip-progress").textContent = video.status;
  if (video.error) throw new Error(video.error.message);
  const file = await (await ask(`/v1/videos/${video.id}/content`)).blob();
  const place = document.createElement(file.type.startsWith("video/") ? "video" : "img");
  if (place.tagName === "VIDEO") Object.assign(place, { controls: true, loop: true, muted: true, autoplay: true });
  place.setAttribute(place.tagName === "VIDEO" ? "aria-label" : "alt", body.prompt);
  place.src = URL.createObjectURL(file);
  $("clip-place").replaceChildren(place);
});

async function start() {
  try {
    const models = await (await ask("/v1/models")).json();
    $("model").textContent = models.data[0].id;
    $("key-form").hidden = true;
  } catch (error) { say(error.message); }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  say("");
  start();
});
start();
