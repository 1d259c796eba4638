// The page is whole without this: copying commands, sorting tables, filtering claims.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

for (const code of all("td code, dd code")) {
  const button = document.createElement("button");
  button.textContent = "copy";
  button.onclick = () => navigator.clipboard.writeText(code.textContent)
    .then(() => { button.textContent = "copied"; });
  code.after(button);
}

const number = (cell) => {
  const found = cell.textContent.replace(/[,−]/g, (c) => (c === "," ? "" : "-"));
  return parseFloat(found.match(/[-+]?\d[\d.]*(e[-+]?\d+)?/i)?.[0]);
};
for (const head of all("table:not(.text) th")) {
  head.tabIndex = 0;
  head.onclick = () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    const body = head.closest("table").tBodies[0];
    const key = (row) => row.cells[head.cellIndex];
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [number(key(a)), number(key(b))];
      const order = isNaN(x) || isNaN(y)
        ? isNaN(x) - isNaN(y) || key(a).textContent.localeCompare(key(b).textContent) : x - y;
      return down ? -order : order;
    });
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  };
  head.onkeydown = (event) => { if (event.key === "Enter") head.onclick(); };
}

for (const cards of all(".cards")) {
  const verdicts = new Set(all("summary .verdict", cards).map((v) => v.textContent));
  if (verdicts.size < 2) continue;
  const choice = document.createElement("select");
  choice.setAttribute("aria-label", "verdict");
  choice.append(new Option("all verdicts", ""), ...[...verdicts].map((v) => new Option(v)));
  choice.onchange = () => {
    for (const card of all(".card", cards)) {
      card.hidden = choice.value && card.querySelector(".verdict").textContent !== choice.value;
    }
  };
  cards.prepend(choice);
}

// A link into something closed opens it, also where the browser does not; printing opens all.
const open = (node) => { for (; node; node = node.parentElement) if ("open" in node) node.open = true; };
const reveal = () => open(document.getElementById(location.hash.slice(1)));
addEventListener("hashchange", reveal);
reveal();
let closed = [];
addEventListener("beforeprint", () => {
  closed = all("details.card:not([open])");
  for (const card of closed) card.open = true;
});
addEventListener("afterprint", () => { for (const card of closed) card.open = false; });

const contents = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    for (const link of all("nav a")) link.classList.toggle("here", link.hash === `#${target.id}`);
  }
}, { rootMargin: "0px 0px -70% 0px" });
for (const title of all("h2")) contents.observe(title);
