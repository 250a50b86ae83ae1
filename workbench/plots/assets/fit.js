/* Keeps plotly figures as wide as their cell: JupyterLab draws them before they are attached, and
 * plotly looks at its width again only when the window is resized. Stands beside the figure. */
function render({ el }) {
  let width = 0;
  const fit = () => window.dispatchEvent(new Event("resize"));
  const observer = new ResizeObserver(() => {
    if (el.clientWidth !== width) {
      width = el.clientWidth;
      fit();
    }
  });
  observer.observe(el);
  document.addEventListener("plotlywidget-after-render", fit);
  return () => {
    observer.disconnect();
    document.removeEventListener("plotlywidget-after-render", fit);
  };
}

export default { render };
