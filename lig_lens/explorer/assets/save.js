// What leaves the page: pictures, tables, links.

const svgText = () => new XMLSerializer().serializeToString(byId("graph").firstElementChild);

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
  const { width, height } = byId("graph").firstElementChild.viewBox.baseVal;
  picture.onload = () => {
    const scale = Math.min(2, 16000 / Math.max(width, height)); // browsers refuse larger pictures
    const canvas = Object.assign(document.createElement("canvas"), { width: scale * width, height: scale * height });
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => (blob ? save(blob, "png") : (byId("status").textContent = "The picture is too large for a PNG: save the SVG.")));
  };
  picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svgText())}`;
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
