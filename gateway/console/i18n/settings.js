// Imported by settings and dialogs of their own.
import { need } from "./texts.js";

await need("settings");
