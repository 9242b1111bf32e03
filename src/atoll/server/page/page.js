"use strict";
// Asks for this very page every second, and puts in place only what has changed: nothing flickers, nothing scrolls.
const away = document.getElementById("away");
let seen = new Date();
async function look() {
  try {
    const answer = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error(answer.statusText);
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    document.title = fresh.title;
    for (const part of document.querySelectorAll("[data-live]")) {
      const now = fresh.getElementById(part.id).innerHTML;
      if (part.innerHTML === now) continue;
      const focus = part.contains(document.activeElement) ? document.activeElement.id : "";
      part.innerHTML = now;
      if (focus) document.getElementById(focus)?.focus({ preventScroll: true });
    }
    seen = new Date();
    away.hidden = true;
  } catch {
    if (away.hidden) away.textContent = `The server can't be reached: this is what was last seen at ${seen.toLocaleTimeString()}.`;
    away.hidden = false;
  }
  setTimeout(look, 1000);
}
setTimeout(look, 1000);
