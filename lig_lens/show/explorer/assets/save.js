// What leaves the page: pictures, tables, links.

const CAPTION_ROOM = 46;

/** The picture as it would be unscrolled, with two lines that say what it is. */
function pictureToSave() {
  const view = currentView();
  const colours = palette();
  const picture = byId("graph").firstElementChild.cloneNode(true);
  picture.querySelectorAll("[data-sticky]").forEach((group) => group.removeAttribute("transform"));
  const { width, height } = picture.viewBox.baseVal;
  const lines = captionOf(view);
  const room = Math.max(width, 24 + 6.6 * Math.max(...lines.map((line) => line.length)));
  picture.setAttribute("viewBox", `0 ${-CAPTION_ROOM} ${room} ${height + CAPTION_ROOM}`);
  picture.setAttribute("width", room);
  picture.setAttribute("height", height + CAPTION_ROOM);
  picture.querySelector("rect").setAttribute("y", -CAPTION_ROOM);
  lines.forEach((line, number) => {
    const text = document.createElementNS("http://www.w3.org/2000/svg", "text");
    text.setAttribute("x", 12);
    text.setAttribute("y", 20 + 18 * number - CAPTION_ROOM);
    text.setAttribute("fill", number ? colours.quiet : colours.ink);
    text.textContent = line;
    picture.append(text);
  });
  return picture;
}

/** What a picture shows: the prompt and the choice, then how it was computed. */
function captionOf(view) {
  const chosen = state.node ? `, ${nodeName(view, state.node)} chosen` : "";
  const head = state.head !== null ? `, head ${state.head} of block ${view.spec.layers[state.layer]}` : "";
  const threshold = `threshold ${byId("threshold-value").textContent}`;
  const unit = scene.cone ? "shares followed through blocks" : unitOf(view);
  return [`${view.sample.label}${chosen}${head}`, [MAP_NAMES[state.map], unit, threshold, view.spec.label, view.spec.facts].join(" · ")];
}

const svgText = () => new XMLSerializer().serializeToString(pictureToSave());

function fileName(ending) {
  const view = currentView();
  return `lig_lens-${view.spec.model.replace(/[^\w.-]+/g, "_")}-${state.map}.${ending}`;
}

function save(blob, ending) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: fileName(ending) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function savePng() {
  const picture = new Image();
  const { width, height } = pictureToSave().viewBox.baseVal;
  picture.onload = () => {
    const scale = Math.min(2, 16000 / Math.max(width, height)); // browsers refuse larger pictures
    const canvas = Object.assign(document.createElement("canvas"), { width: scale * width, height: scale * height });
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => (blob ? save(blob, "png") : (byId("status").textContent = "The picture is too large for a PNG: save the SVG.")));
  };
  picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svgText())}`;
}
