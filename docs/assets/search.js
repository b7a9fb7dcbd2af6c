// Lets the search find an option such as --workers. The index takes a word that begins with a dash for a word that a page
// must not contain.
document.addEventListener("input", ({ target }) => {
  if (!target.matches("[data-md-component=search-query]")) return
  const words = target.value.replace(/(^|\s)-+(?=\S)/g, "$1")
  if (words !== target.value) target.value = words
}, true)
