// Runs what the page carries packed.
const text = document.getElementById("packed").textContent;
const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
const code = await new Response(stream).text();
document.head.append(Object.assign(document.createElement("script"), {
  type: "module",
  textContent: code,
}));
