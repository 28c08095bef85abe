// Arrays of the page, as numbers.

let halfValues = null;

/** Value of every half-precision number, by its bits. */
function halfTable() {
  if (halfValues) return halfValues;
  halfValues = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    let value = (1 + fraction / 1024) * 2 ** (exponent - 15);
    if (exponent === 0) value = fraction * 2 ** -24;
    if (exponent === 31) value = fraction ? NaN : Infinity;
    halfValues[bits] = bits & 32768 ? -value : value;
  }
  return halfValues;
}

/** Numbers of one array: base64 of float32 or float16, each layer divided by its scale. */
function decode(spec) {
  const text = atob(document.getElementById(spec.id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const half = spec.dtype === "f2";
  const raw = half ? new Uint16Array(bytes.buffer) : new Float32Array(bytes.buffer);
  const result = half ? new Float32Array(raw.length) : raw;
  const table = half ? halfTable() : null;
  const step = raw.length / Math.max(1, spec.scales.length);
  spec.scales.forEach((scale, layer) => {
    for (let i = layer * step; i < (layer + 1) * step; i++) result[i] = (half ? table[raw[i]] : raw[i]) * scale;
  });
  return result;
}
