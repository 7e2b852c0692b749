// The review sheet: remembers votes in this browser and writes them to a file. Nothing is sent anywhere.
"use strict";
const form = document.getElementById("sheet");
const sheet = form.dataset.sheet;
const total = form.querySelectorAll("fieldset").length;

function votes() {
  return Array.from(form.querySelectorAll("input:checked"), (radio) => ({
    question: Number(radio.name),
    choice: radio.value,
  }));
}

function changed() {
  const given = votes();
  document.getElementById("count").textContent = `${given.length} of ${total} answered`;
  try {
    localStorage.setItem(`review-${sheet}`, JSON.stringify(given));
  } catch (error) {
    // no storage for local files here: votes are lost on reload, as the form is
  }
}

function restore() {
  try {
    for (const vote of JSON.parse(localStorage.getItem(`review-${sheet}`) || "[]")) {
      const radio = form.querySelector(`input[name="${vote.question}"][value="${vote.choice}"]`);
      if (radio) radio.checked = true;
    }
  } catch (error) {
    // as above
  }
}

form.addEventListener("change", changed);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  const content = JSON.stringify({ sheet: sheet, votes: votes() }, null, 2) + "\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "application/json" }));
  link.download = `votes-${sheet}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
restore();
changed();
