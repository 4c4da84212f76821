// Imported by what shows what a model found.
import { need } from "./texts.js";

await need("results");
