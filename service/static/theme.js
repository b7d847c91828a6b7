// The theme before the first paint: a classic script, so that nothing flashes.
// In: what was chosen before (localStorage). Out: <html data-theme>.
document.documentElement.dataset.theme = (() => {
  try {
    return localStorage.getItem("invprop.theme") || "auto";
  } catch {
    return "auto"; // a browser that keeps nothing
  }
})();
