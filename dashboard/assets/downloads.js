// Downloads of a plot: pictures are drawn by Plotly as they are on screen, data comes from the server.
(() => {
  const run = () => window.layerwatch.props("page")?.data?.run ?? "";
  const fileName = (plot) => `${run()}-${plot}`.replace(/[^A-Za-z0-9._-]+/g, "-").slice(-120).replace(/^[-.]+|[-.]+$/g, "");

  function save(blob, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  async function data(plot, format) {
    const { state, screen, base } = window.layerwatch;
    const answer = await fetch(`${base}/api/data`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ plot, format, run: run(), state, screen }),
    });
    if (!answer.ok) {
      const { error } = await answer.json().catch(() => ({}));
      throw new Error(error ?? `The server answered ${answer.status}.`);
    }
    save(await answer.blob(), `${fileName(plot)}.${format}`);
  }

  // The plots are transparent: the picture gets the colour of the card behind them.
  function picture(plot, format) {
    const drawn = document.querySelector(`[id="${plot}"] .js-plotly-plot`);
    if (!drawn?.data?.length) throw new Error("There is nothing to save in this plot.");
    const { backgroundColor } = getComputedStyle(drawn.closest(".card") ?? document.body);
    const { clientWidth: width, clientHeight: height } = drawn;
    const layout = { ...drawn.layout, paper_bgcolor: backgroundColor };
    return window.Plotly.downloadImage(
      { data: drawn.data, layout },
      { format, width, height, scale: format === "png" ? 2 : 1, filename: fileName(plot) },
    );
  }

  async function download(plot, format) {
    try {
      await (format === "csv" || format === "parquet" ? data : picture)(plot, format);
    } catch (error) {
      window.dash_clientside.set_props("error", { children: `Nothing was downloaded. ${error.message}`, className: "banner" });
    }
  }
  window.layerwatch = Object.assign(window.layerwatch || {}, { download });
})();
