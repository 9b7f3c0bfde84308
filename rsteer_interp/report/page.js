"use strict";
// Filters the replies that are already in the page; reads textContent, sets `hidden`, and writes no markup.
(() => {
  const form = document.getElementById("filter");
  const articles = [...document.querySelectorAll("article")];
  if (!form || !articles.length) return;
  const count = document.getElementById("count");
  const texts = articles.map((article) => article.textContent.toLowerCase());
  const show = () => {
    const words = form.elements.words.value.toLowerCase().trim();
    const set = form.elements.set.value;
    const method = form.elements.method.value;
    const changed = form.elements.changed.checked;
    let shown = 0;
    articles.forEach((article, i) => {
      const moved = article.dataset.changed.split(" ");
      const fits = (!set || article.dataset.set === set) && texts[i].includes(words) &&
        (!changed || (method ? moved.includes(method) : moved[0] !== ""));
      article.hidden = !fits;
      shown += fits;
      for (const reply of article.querySelectorAll("[data-method]")) {
        reply.hidden = method !== "" && reply.dataset.method !== method;
      }
    });
    count.textContent = `${shown} of ${articles.length} prompts`;
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  show();
})();
