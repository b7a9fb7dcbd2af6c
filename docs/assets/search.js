// An option such as --workers is found, too: to the index a word that begins with a dash is one that pages must not have.
document.addEventListener("input", ({ target }) => {
  if (!target.matches("[data-md-component=search-query]")) return
  const words = target.value.replace(/(^|\s)-+(?=\S)/g, "$1")
  if (words !== target.value) target.value = words
}, true)
