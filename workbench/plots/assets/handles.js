/* Sends to the kernel where a handle of the figure beside it is dragged; stands behind explorer.js.
 * One place at a time: the next one, the newest, leaves when the figure was redrawn, or after a
 * while when there was nothing to redraw. */
const PATIENCE = 300; // milliseconds

function render({ model, el }) {
  let plot = null;
  let next = null;
  let timer = null;
  const send = () => {
    clearTimeout(timer);
    timer = null;
    if (next === null) { return; }
    model.set("moved", [...next, performance.now()]);
    next = null;
    model.save_changes();
    timer = setTimeout(send, PATIENCE);
  };
  const find = () => {
    const box = el.closest(".widget-vbox");
    const found = box && box.querySelector(".js-plotly-plot");
    if (!found || !found.on || found === plot) { return; }
    plot = found;
    plot.on("plotly_afterplot", send);
    globalThis.workbench.core.watchHandles(plot, (...place) => {
      next = place;
      if (timer === null) { send(); }
    });
  };
  const observer = new ResizeObserver(find);
  observer.observe(el);
  document.addEventListener("plotlywidget-after-render", find);
  return () => {
    clearTimeout(timer);
    observer.disconnect();
    document.removeEventListener("plotlywidget-after-render", find);
  };
}

export default { render };
