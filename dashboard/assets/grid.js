// Cells and colours of the table of runs, and number labels of the sliders.
(() => {
  const functions = (window.dashAgGridFunctions = window.dashAgGridFunctions || {});
  const components = (window.dashAgGridComponentFunctions = window.dashAgGridComponentFunctions || {});

  functions.layerwatchGridTheme = (theme) =>
    theme.withParams({
      fontFamily: "inherit",
      fontSize: 13,
      headerFontWeight: 600,
      backgroundColor: "var(--card)",
      foregroundColor: "var(--text)",
      headerBackgroundColor: "var(--card)",
      headerTextColor: "var(--dim)",
      borderColor: "var(--border)",
      rowHoverColor: "var(--hover)",
      accentColor: "var(--accent)",
      wrapperBorder: false,
      columnBorder: false,
      headerColumnResizeHandleColor: "transparent",
    });

  components.RunLink = ({ data }) => React.createElement("a", { href: data.href, className: "run-link" }, data.run);
  components.Health = ({ data }) =>
    React.createElement(
      "span",
      { className: "health-cell" },
      React.createElement("span", { className: `badge ${data.health}` }, data.health),
      data.live ? React.createElement("span", { className: "dot", title: "live" }) : null,
    );

  const mantine = (window.dashMantineFunctions = window.dashMantineFunctions || {});
  mantine.twoDigits = (value) => Number(value).toFixed(2);
})();
