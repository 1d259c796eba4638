// Ink is the page's own text colour; a dot's run is in the list of all runs.
const draw = () => {
  const ink = getComputedStyle(document.body).color;
  const own = JSON.parse(JSON.stringify(spec).replaceAll('"#000000"', `"${ink}"`));
  return vegaEmbed("#vega", own, { actions: false, renderer: "svg" }).then(({ view }) => {
    view.addEventListener("click", (event, item) => {
      const row = [...document.querySelectorAll(".all-runs li")]
        .find((li) => li.textContent.startsWith(`${item?.datum?.run}:`));
      if (row) location.hash = row.id;
    });
    window.explorer = view;
  });
};
document.getElementById("explorer").hidden = false;
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
