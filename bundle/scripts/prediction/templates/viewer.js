(async () => {
  const element = id => document.getElementById(id);
  const message = element("message"), canvas = element("scene");
  if (!document.createElement("canvas").getContext("webgl2")) {
    message.textContent = "The viewer needs WebGL 2, which this browser does not have or does not allow. "
      + "Below are pictures of the largest lesions instead.";
    return;
  }
  message.textContent = "Reading the scans ...";
  const data = JSON.parse(element("data").textContent);
  const chosen = { scan: "fused", plane: "all", window: data.windows[0].name, lesion: null };
  const lesions = [...document.querySelectorAll("button.lesion")].map(button => JSON.parse(button.dataset.centre));
  const planes = { axial: 0, coronal: 1, sagittal: 2, all: 3 };
  // red, green, blue, opacity and place: the colours of the report's pictures
  const heat = { R: [11, 255, 255, 255], G: [0, 0, 255, 255], B: [0, 0, 0, 255], A: [255, 255, 255, 255], I: [0, 93, 190, 255] };
  const grey = { R: [255, 0], G: [255, 0], B: [255, 0], A: [255, 255], I: [0, 255] };

  const show = new niivue.Niivue({
    backColor: [0, 0, 0, 1], crosshairColor: [0.2, 0.9, 0.3, 0.8], crosshairWidth: 0.6, crosshairWidthUnit: "mm", crosshairGap: 6, fontColor: [1, 1, 1, 1], isRadiologicalConvention: true,
    multiplanarShowRender: 0, sagittalNoseLeft: true, showAllOrientationMarkers: true, dragMode: 9, loadingText: "", dragAndDropEnabled: false,
    viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "", isResizeCanvas: true, show3Dcrosshair: false,
    yoke3Dto2DZoom: false, logLevel: "error",
  });
  show.addColormap("heat", heat);
  show.addColormap("uptake", grey);
  const side = (value, letters) => `${letters[value < 0 ? 1 : 0]} ${Math.abs(value).toFixed(1)}`;
  show.onLocationChange = place => {
    const [x, y, z] = place.mm, [ct, pet] = place.values;
    element("position").textContent = `${side(x, "RL")}  ${side(y, "AP")}  ${side(z, "SI")} mm\n`
      + `${Math.round(ct.value)} HU, SUV ${pet.value.toFixed(1)}`;
  };
  message.hidden = false;
  element("viewer").hidden = false;
  await show.attachToCanvas(canvas);
  const volume = async (name, options) =>
    show.addVolume(await niivue.NVImage.loadFromBase64({ base64: data.volumes[name], name: `${name}.nii.gz`, ...options }));
  await volume("ct", { colormap: "gray", cal_min: data.windows[0].hu[0], cal_max: data.windows[0].hu[1] });
  await volume("pet", { colormap: "heat", cal_min: data.suv[0], cal_max: data.suv[1] });
  if (data.volumes.mask) {
    await volume("mask", {});
    show.volumes[2].setColormapLabel({
      R: [0, ...data.colours.map(colour => colour[0])], G: [0, ...data.colours.map(colour => colour[1])],
      B: [0, ...data.colours.map(colour => colour[2])], A: [0, ...data.colours.map(() => 255)],
      I: [0, ...data.colours.map((_, k) => k + 1)],
    });
    show.setAtlasOutline(1);
  }

  const draw = () => {
    const [ct, pet, mask] = show.volumes;
    ct.opacity = chosen.scan === "PET" ? 0 : 1;
    pet.opacity = chosen.scan === "CT" ? 0 : 1;
    pet.colormap = chosen.scan === "PET" ? "uptake" : "heat";
    pet.modulationImage = chosen.scan === "fused" ? 1 : null; // by itself: without uptake the CT alone is seen
    pet.modulateAlpha = chosen.scan === "fused" ? 1 : 0;
    pet.cal_max = Number(element("range").value);
    if (mask) mask.opacity = element("mask").checked ? 0.2 : 0; // of the inside; the outline is opaque
    show.updateGLVolume();
    element("suv").textContent = `SUV 0 to ${element("range").value}`;
    for (const button of document.querySelectorAll("button[data-group]"))
      button.ariaPressed = String(String(chosen[button.dataset.group]) === button.dataset.value);
  };
  const go = centre => {
    show.scene.crosshairPos = show.mm2frac(centre);
    show.createOnLocationChange();
    show.drawScene();
  };
  const choose = (group, value) => {
    chosen[group] = value;
    if (group === "window") [show.volumes[0].cal_min, show.volumes[0].cal_max] = data.windows.find(each => each.name === value).hu;
    if (group === "plane") show.setSliceType(planes[value]);
    if (group === "lesion") go(lesions[value]);
    draw();
  };
  const range = by => {
    element("range").value = Number(element("range").value) + by;
    draw();
  };
  const move = (x, y, z) => { show.moveCrosshairInVox(x, y, z); show.createOnLocationChange(); };
  const keys = {
    c: () => choose("scan", "CT"), p: () => choose("scan", "PET"), f: () => choose("scan", "fused"),
    s: () => choose("window", data.windows[0].name), b: () => choose("window", data.windows[1].name),
    m: () => element("mask").click(), "+": () => range(1), "=": () => range(1), "-": () => range(-1),
    n: () => lesions.length && choose("lesion", chosen.lesion === null ? 0 : (chosen.lesion + 1) % lesions.length),
    ArrowLeft: () => move(1, 0, 0), ArrowRight: () => move(-1, 0, 0), ArrowUp: () => move(0, 1, 0), ArrowDown: () => move(0, -1, 0),
    PageUp: () => move(0, 0, 1), PageDown: () => move(0, 0, -1),
  };
  for (const button of document.querySelectorAll("button[data-group]"))
    button.addEventListener("click", () => choose(button.dataset.group,
      button.dataset.group === "lesion" ? Number(button.dataset.value) : button.dataset.value));
  element("range").addEventListener("input", draw);
  element("mask").addEventListener("change", draw);
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const scrolls = event.key.startsWith("Arrow") || event.key.startsWith("Page");
    if (scrolls && event.target !== canvas) return; // elsewhere these keys scroll the page or move the slider
    const digit = Number(event.key) - 1;
    const act = lesions[digit] ? () => choose("lesion", digit) : keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    event.preventDefault();
    event.stopPropagation(); // niivue has keys of its own
    act();
  }, true);

  if (lesions.length) choose("lesion", 0);
  else { go(data.start); draw(); }
  message.hidden = true;
  element("pictures").hidden = true;
  document.body.dataset.ready = "yes";
})().catch(error => {
  const message = document.getElementById("message");
  message.hidden = document.getElementById("viewer").hidden = false;
  document.getElementById("viewer").hidden = true;
  message.textContent = `The viewer failed (${error.message}). Below are pictures of the largest lesions instead.`;
});
