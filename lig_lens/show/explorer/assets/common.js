// What all pages share: elements, the tip under the pointer, the clipboard.

const byId = (id) => document.getElementById(id);

function tip(event, text) {
  const box = byId("tip");
  box.textContent = text;
  box.hidden = false;
  box.style.left = `${Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8)}px`;
  box.style.top = `${Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 8)}px`;
}

function hideTip() {
  byId("tip").hidden = true;
}

async function copy(text, done) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without permission, as in a file of one's own: the old way.
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    if (!copied) done = "The browser does not allow it.";
  }
  byId("status").textContent = done;
}
