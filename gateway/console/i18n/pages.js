// Imported by pages and dialogs of their own.
import { need } from "./texts.js";

await need("pages");
