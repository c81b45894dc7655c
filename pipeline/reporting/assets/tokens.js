// A token shows its row of the table below the answer; a card without the table shows nothing.
const probability = (logarithm) => {
  const value = parseFloat(logarithm.replace(MINUS, "-"));
  return Number.isFinite(value) ? `${show(100 * Math.exp(value))} %` : "–";
};

for (const card of document.querySelectorAll(".card")) {
  const table = card.querySelector(".trace-table");
  if (!table) continue;
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  const rows = [...table.tBodies[0].rows];
  explore([...card.querySelectorAll(".trace .tok")], (_, at) => {
    const [token, base, final, ...others] = [...rows[at].cells].map((cell) => cell.textContent);
    const lines = [["base probability", `${probability(base)} (${base})`], ["final probability", `${probability(final)} (${final})`]];
    others.forEach((value, index) => lines.push([heads[index + 3], value, `p${(index % DATA.principals.length) % 8}`]));
    return [token, lines];
  });
}
