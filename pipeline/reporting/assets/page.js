const THEMES = ["auto", "light", "dark"];
const themeButton = document.getElementById("theme");

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  themeButton.textContent = `Theme: ${theme}`;
  themeButton.dataset.next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
}
themeButton.addEventListener("click", () => setTheme(themeButton.dataset.next));
themeButton.hidden = false;
document.getElementById("without-script").remove();
setTheme("auto");

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, at) => {
    const cell = row.cells[at];
    return cell.dataset.value === undefined ? cell.textContent : +cell.dataset.value;
  };
  heads.forEach((head, at) => {
    const button = html("button", { type: "button" }, ...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order === 1 ? "ascending" : "descending");
      const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => order * compare(key(a, at), key(b, at))));
    });
  });
}
document.querySelectorAll("table.sortable").forEach(sortable);

// open all details for printing, and close them afterwards
let folded = [];
window.addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach((each) => { each.open = true; });
});
window.addEventListener("afterprint", () => folded.forEach((each) => { each.open = false; }));
