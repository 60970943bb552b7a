// Before anything is painted: the colours that were chosen here, or else those of the system.
// No module, so that it runs first; the switch itself is in main.js.
try {
  const chosen = localStorage.getItem("cwg-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch { /* storage may be switched off: then the system's colours it is */ }
