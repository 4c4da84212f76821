// Bundles the libraries of the console into gateway/console/vendor: two ES modules and a style sheet, with the licences
// and a list of SHA-256 sums. `--check` fails if what is committed differs.
import { createHash } from "node:crypto";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const folder = join(here, "../../gateway/console/vendor");
const packages = ["preact", "@preact/signals", "@preact/signals-core", "htm", "uplot"];

const entries = {
  "preact.js": `
    export { render } from "preact";
    export { useEffect, useRef, useState } from "preact/hooks";
    export { effect, signal } from "@preact/signals";
    export { html } from "htm/preact";
  `,
  "uplot.js": `export { default } from "uplot";`,
};

async function bundle(contents) {
  const result = await build({
    stdin: { contents, resolveDir: here },
    bundle: true,
    format: "esm",
    minify: true,
    target: "es2022",
    legalComments: "none",
    write: false,
  });
  return result.outputFiles[0].text;
}

const read = (path) => readFile(join(here, "node_modules", path), "utf8");

async function licences() {
  const parts = [];
  for (const name of packages) {
    const { version, license } = JSON.parse(await read(`${name}/package.json`));
    const text = await read(`${name}/LICENSE`).catch(() => read(`${name}/LICENSE.md`));
    parts.push(`${name} ${version} (${license})\n\n${text.trim()}\n`);
  }
  return parts.join(`\n${"-".repeat(80)}\n\n`);
}

// Types beside the bundles, for those who work on the console; they are not served.
const types = Object.fromEntries(
  Object.entries(entries).map(([name, contents]) => [name.replace(".js", ".d.ts"), `${contents.trim().replace(/^ +/gm, "")}\n`]),
);

const files = { ...types, "LICENSES.txt": await licences(), "uplot.css": await read("uplot/dist/uPlot.min.css") };
for (const [name, contents] of Object.entries(entries)) files[name] = await bundle(contents);
files["SHA256SUMS"] = Object.keys(files)
  .sort()
  .map((name) => `${createHash("sha256").update(files[name]).digest("hex")}  ${name}\n`)
  .join("");

if (process.argv.includes("--check")) {
  const differing = [];
  for (const [name, text] of Object.entries(files)) {
    const committed = await readFile(join(folder, name), "utf8").catch(() => "");
    if (committed !== text) differing.push(name);
  }
  if (differing.length) {
    console.error(`gateway/console/vendor differs from its packages: ${differing.join(", ")}; run npm run vendor`);
    process.exit(1);
  }
} else {
  await mkdir(folder, { recursive: true });
  for (const [name, text] of Object.entries(files)) await writeFile(join(folder, name), text);
}
