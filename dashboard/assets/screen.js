// Theme and width of the screen. Runs before Dash asks for the layout, so that the first figures are right.
(() => {
  const root = document.documentElement;
  const cookie = (name) => (document.cookie.match(new RegExp(`(?:^|; )${name}=([^;]*)`)) || [])[1];
  // The path that a proxy serves the dashboard at: "" or "/x".
  const config = JSON.parse(document.getElementById("_dash-config").textContent);
  const base = config.requests_pathname_prefix.replace(/\/$/, "");
  const remember = (name, value) => {
    document.cookie = `${name}=${value}; path=${base}/; max-age=31536000; SameSite=Strict`;
  };
  const preferred = () => (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const asked = () => {
    const theme = new URLSearchParams(location.search).get("theme");
    return theme === "dark" || theme === "light" ? theme : null;
  };
  const narrow = () => innerWidth < 700;

  function show(theme) {
    root.dataset.mantineColorScheme = theme;
    document.body.dataset.agThemeMode = theme;
    const meta = document.querySelector('meta[name="color-scheme"]');
    if (meta) meta.content = theme;
  }

  const screen = { theme: asked() || cookie("layerwatch_theme") || preferred(), narrow: narrow() };
  remember("layerwatch_theme", screen.theme);
  remember("layerwatch_narrow", screen.narrow ? "1" : "0");
  show(screen.theme);

  // The properties of a component, by its id; undefined where it is not on the page, or nothing is yet.
  function props(id) {
    try {
      return window.dash_component_api.getLayout(id)?.props;
    } catch {
      return undefined;
    }
  }

  window.layerwatch = Object.assign(window.layerwatch || {}, { screen, preferred, base, props, state: {} });

  function set(change) {
    Object.assign(screen, change);
    remember("layerwatch_theme", screen.theme);
    remember("layerwatch_narrow", screen.narrow ? "1" : "0");
    window.dash_clientside.set_props("screen", { data: { ...screen } });
  }
  addEventListener("click", (event) => {
    if (event.target.closest?.("#theme-button")) set({ theme: screen.theme === "dark" ? "light" : "dark" });
  });
  addEventListener("resize", () => {
    if (narrow() !== screen.narrow) set({ narrow: narrow() });
  });

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.layerwatch = {
    // The first page may have been made from what the browser said on its last visit.
    applyTheme(data) {
      if (data.theme !== screen.theme || data.narrow !== screen.narrow) setTimeout(set);
      show(data.theme);
      return data.theme;
    },
  };
})();
