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
    const canvas = Object.assign(document.createElement("canvas"), { width: 2 * width, height: 2 * height });
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => save(blob, "png"));
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
    document.execCommand("copy");
    area.remove();
  }
  byId("status").textContent = done;
}
